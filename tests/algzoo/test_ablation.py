"""Ablating a neuron is what holding it by an intervention does; pairs and single steps likewise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import xarray as xr

from forebay.stages.algzoo.ablation import ablate_neuron_pairs, ablate_neurons
from forebay.stages.algzoo.rnn import AlgZooRNN
from forebay.stages.algzoo.tasks import evaluate, sample_inputs, targets
from forebay.stages.models.interventions import Replace, Zero
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from .networks import SECOND_ARGMAX_OF_TWO, random_rnn, random_transformer, rnn_of


def by_interventions(
    network: AlgZooRNN, x: xr.DataArray, neurons: list[int], times: list[int], mean: bool
) -> tuple[float, float]:
    """Score, and the fraction answered as before (median: the mean change), from a hooked forward."""
    plain = network.forward(x, HookSpec().capture("rnn.hook_hidden.*"))
    hooks = HookSpec()
    for t in times:
        state = plain[f"rnn.hook_hidden.{t}"]
        held = Replace(state[:, neurons].mean(0)) if mean else Zero()
        hooks = hooks.intervene(f"rnn.hook_hidden.{t}", held.at(neuron=neurons))
    output, before = network.forward(x, hooks).output.numpy(), plain.output.numpy()
    target = targets(network.spec, x).values
    if network.spec.scalar:
        wrong = output[:, 0] - target
        return -float(np.sqrt((wrong**2).mean())), float(abs(output - before).mean())
    answer = output.argmax(1)
    return float((answer == target).mean()), float((answer == before.argmax(1)).mean())


@pytest.mark.parametrize("value", ["zero", "mean"])
@pytest.mark.parametrize("task", ["2nd_argmax", "argmedian", "median"])
def test_a_neuron_held_at_every_step(task: str, value: str) -> None:
    network, _ = random_rnn(5, 3, task=task)
    x = sample_inputs(network.spec, 400, seed=1)
    found = ablate_neurons(network, x, value=value)
    other = found["output_change" if task == "median" else "agreement"]
    for neuron in range(5):
        score, stayed = by_interventions(network, x, [neuron], [0, 1, 2], value == "mean")
        assert found["score"].sel(neuron=neuron).item() == pytest.approx(score, rel=1e-12)
        assert other.sel(neuron=neuron).item() == pytest.approx(stayed, rel=1e-12)
    assert found["baseline"].item() == evaluate(network, x)["score"].item()
    np.testing.assert_allclose(found["score_change"], found["score"] - found["baseline"], atol=1e-15)
    assert np.ptp(found["score"].values) > 0.01


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_a_neuron_held_at_one_step_at_a_time(value: str) -> None:
    network, _ = random_rnn(5, 3)
    x = sample_inputs(network.spec, 400, seed=1)
    found = ablate_neurons(network, x, value=value, by_time=True)
    assert found["score"].dims == ("neuron", "time")
    for neuron, t in itertools.product(range(5), range(3)):
        score, stayed = by_interventions(network, x, [neuron], [t], value == "mean")
        assert found["score"].sel(neuron=neuron, time=t).item() == pytest.approx(score, rel=1e-12)
        assert found["agreement"].sel(neuron=neuron, time=t).item() == pytest.approx(stayed, rel=1e-12)


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_pairs_and_their_interaction(value: str) -> None:
    network, _ = random_rnn(4, 3)
    x = sample_inputs(network.spec, 400, seed=1)
    found = ablate_neuron_pairs(network, x, value=value)
    single = ablate_neurons(network, x, value=value)
    for a, b in itertools.product(range(4), range(4)):
        here = found.sel(neuron=a, other=b)
        score, stayed = by_interventions(network, x, sorted({a, b}), [0, 1, 2], value == "mean")
        assert here["score"].item() == pytest.approx(score, rel=1e-12)
        assert here["agreement"].item() == pytest.approx(stayed, rel=1e-12)
        if a == b:
            assert np.isnan(here["interaction"])
            continue
        together = score - found["baseline"].item()
        alone = single["score_change"].sel(neuron=[a, b]).values.sum()
        assert here["interaction"].item() == pytest.approx(together - alone, abs=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_how_many_are_run_together_changes_nothing(batch_size: int) -> None:
    network, _ = random_rnn(5, 3)
    x = sample_inputs(network.spec, 200, seed=1)
    xr.testing.assert_allclose(
        ablate_neurons(network, x, by_time=True, batch_size=batch_size), ablate_neurons(network, x, by_time=True)
    )


def test_neurons_that_stand_in_for_each_other_interact_negatively() -> None:
    """Two copies of each neuron at half the strength: without one copy the answers stay right."""
    weights = {name: weight.double() for name, weight in SECOND_ARGMAX_OF_TWO.items()}
    doubled = {
        "rnn.weight_ih_l0": weights["rnn.weight_ih_l0"].repeat(2, 1),
        "rnn.weight_hh_l0": weights["rnn.weight_hh_l0"].repeat(2, 2) / 2,
        "linear.weight": weights["linear.weight"].repeat(1, 2) / 2,
    }
    network = rnn_of(doubled)
    x = sample_inputs(network.spec, 1000, seed=0)
    found = ablate_neuron_pairs(network, x)
    assert found["baseline"] == 1
    assert found["score_change"].sel(neuron=0, other=2) < found["score_change"].sel(neuron=0, other=0)
    assert found["interaction"].sel(neuron=0, other=2) < 0
    np.testing.assert_array_equal(found["interaction"].values, found["interaction"].values.T)


def test_what_is_asked_wrongly_is_refused() -> None:
    network, _ = random_rnn()
    x = sample_inputs(network.spec, 5, seed=0)
    with pytest.raises(SchemaError, match=r"value = 'meen'.*Did you mean 'mean'"):
        ablate_neurons(network, x, value="meen")
    with pytest.raises(SchemaError, match="batch_size = 0"):
        ablate_neuron_pairs(network, x, batch_size=0)
    with pytest.raises(SchemaError, match="ablate_neurons is for recurrent networks"):
        ablate_neurons(random_transformer()[0], [0, 1, 2, 3])
