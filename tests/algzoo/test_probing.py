"""Neurons made to follow a role are found to follow it; correlations and readouts are numpy's and scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from forebay.stages.algzoo.probing import linear_readout, probe_neurons
from forebay.stages.algzoo.rnn import AlgZooRNN
from forebay.stages.algzoo.tasks import sample_inputs
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from .networks import SECOND_ARGMAX_OF_TWO, random_rnn, random_transformer, rnn_of


def states_of(network: AlgZooRNN, x: object) -> np.ndarray:
    return network.forward(x, HookSpec().capture("rnn.hook_hidden.*")).to_dataset()["rnn.hook_hidden"].values


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def roles_by_hand(x: np.ndarray) -> dict[str, np.ndarray]:
    """The roles at the last step of three."""
    a, b, c = x.T
    largest = np.maximum.reduce([a, b, c])
    roles = {
        "RunningMax": relu(largest),
        "RunningMin": relu(np.minimum.reduce([a, b, c])),
        "MaxIncrement": relu(relu(largest) - relu(np.maximum(a, b))),
        "LeaveOneOutMax": relu(relu(largest) - c),
        "RecentInput": relu(c),
    }
    pairs = {(i, j): relu(x[:, i] - x[:, j]) for i in range(3) for j in range(3) if i != j}
    return roles | {f"Comparator({i}, {j})": value for (i, j), value in pairs.items()}


def test_correlations_are_those_of_numpy() -> None:
    network, _ = random_rnn(4, 3, seed=2)
    x = np.random.default_rng(7).uniform(-3, 3, (500, 3))
    found = probe_neurons(network, x)
    hidden, roles = states_of(network, x), roles_by_hand(x)
    assert found.role.values.tolist() == list(roles)
    for role, values in roles.items():
        for neuron in range(4):
            expected = np.corrcoef(values, hidden[:, 2, neuron])[0, 1]
            assert found["correlation"].sel(role=role, neuron=neuron, time=2).item() == pytest.approx(
                expected, abs=1e-12
            )
    last = found.isel(time=-1)
    for neuron in range(4):
        own = last["correlation"].sel(neuron=neuron)
        best = own[abs(own).argmax("role")]
        assert last["best_correlation"].sel(neuron=neuron).item() == best.item()
        told = last["best_role"].sel(neuron=neuron).item()
        assert told == (best.role.item() if abs(best) >= 0.8 else "unknown")


def test_earlier_steps_are_those_of_shorter_sequences() -> None:
    network, _ = random_rnn(4, 5, seed=2)
    short = rnn_of(dict(network.weights) | {"linear.weight": network.W_oh[:3]})
    x = np.random.default_rng(7).uniform(-3, 3, (500, 5))
    earlier = probe_neurons(network, x)["correlation"].isel(time=2)
    own = probe_neurons(short, x[:, :3])["correlation"].isel(time=2)
    np.testing.assert_allclose(earlier.sel(role=own.role).values, own.values, atol=1e-12)
    later = [role for role in earlier.role.values if role not in own.role.values]
    assert len(later) == 14
    assert np.isnan(earlier.sel(role=later)).all()


def running_max() -> dict[str, torch.Tensor]:
    """Neuron 0 holds what the new input exceeds the maximum by, so far as it is positive; 1 and 2 are r(±x_t)."""
    return {
        "rnn.weight_ih_l0": torch.tensor([[1.0], [1.0], [-1.0]]),
        "rnn.weight_hh_l0": torch.tensor([[-1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        "linear.weight": torch.eye(3)[:2],
    }


def test_neurons_that_were_made_for_a_role_are_told_by_it() -> None:
    hand = probe_neurons(rnn_of(SECOND_ARGMAX_OF_TWO)).isel(time=-1)
    assert hand["best_role"].values.tolist() == ["Comparator(1, 0)", "Comparator(0, 1)"]
    np.testing.assert_allclose(hand["best_correlation"], 1)
    made = probe_neurons(rnn_of(running_max()), seed=3).isel(time=-1)  # r(x_1 − r(x_0)), r(x_1), r(−x_1)
    assert made["best_role"].values[:2].tolist() == ["MaxIncrement", "RecentInput"]
    np.testing.assert_allclose(made["best_correlation"][:2], 1)


def test_a_neuron_below_the_threshold_is_unknown_and_its_best_correlation_is_still_told() -> None:
    network = rnn_of(running_max())
    strict = probe_neurons(network, threshold=1.0, seed=3).isel(time=-1, neuron=2)
    assert strict["best_role"].item() == "unknown"
    assert 0.3 < abs(strict["best_correlation"].item()) < 1
    assert (probe_neurons(network, threshold=0.0)["best_role"] != "unknown").all()


def test_a_dead_neuron_follows_nothing() -> None:
    network = rnn_of({**running_max(), "rnn.weight_ih_l0": torch.tensor([[1.0], [0.0], [-1.0]])})
    found = probe_neurons(network).sel(neuron=1)
    assert np.isnan(found["correlation"]).all()
    assert np.isnan(found["best_correlation"]).all()
    assert (found["best_role"] == "unknown").all()


def test_a_seed_says_which_inputs_are_tried_and_they_are_uniform_from_minus_three_to_three() -> None:
    network, _ = random_rnn()
    assert probe_neurons(network, seed=1).identical(probe_neurons(network, seed=1))
    assert not probe_neurons(network, seed=1).identical(probe_neurons(network, seed=2))
    x = np.random.default_rng(5).uniform(-3, 3, (77, 4))
    assert probe_neurons(network, x).identical(probe_neurons(network, n_input=77, seed=5))


def test_what_is_read_linearly_is_what_scikit_learn_reads() -> None:
    network, _ = random_rnn(4, 3, seed=2)
    x = sample_inputs(network.spec, 601, seed=1).values
    found = linear_readout(network, x)
    assert found.quantity.values.tolist() == ["x_0", "x_1", "x_2", "max", "min", "mean", "second_max"]
    hidden = states_of(network, x)
    for t in range(3):
        so_far = np.sort(x[:, : t + 1], axis=1)
        quantities = {"x_0": x[:, 0], "max": so_far[:, -1], "min": so_far[:, 0], "mean": x[:, : t + 1].mean(1)}
        quantities |= {"second_max": so_far[:, -2]} if t else {}
        for name, values in quantities.items():
            fitted = LinearRegression().fit(hidden[:300, t], values[:300])
            expected = r2_score(values[300:], fitted.predict(hidden[300:, t]))
            assert found["r2"].sel(quantity=name, time=t).item() == pytest.approx(expected, rel=1e-9)
    assert np.isnan(found["r2"].sel(quantity="x_2", time=[0, 1])).all()
    assert np.isnan(found["r2"].sel(quantity="second_max", time=0))


def test_quantities_of_ones_own_are_read_at_every_step() -> None:
    network = rnn_of(SECOND_ARGMAX_OF_TWO)
    x = sample_inputs(network.spec, 200, seed=1).values
    own = {"difference": x[:, 1] - x[:, 0], "first": x[:, 0], "constant": np.full(200, 0.1)}
    found = linear_readout(network, x, quantities=own)["r2"]
    assert found.sel(quantity="difference", time=1).item() == pytest.approx(1)
    assert found.sel(quantity="first", time=0).item() == pytest.approx(1)
    assert found.sel(quantity="first", time=1) < 0.7
    assert np.isnan(found.sel(quantity="constant")).all()


def test_what_is_asked_wrongly_is_refused() -> None:
    network, _ = random_rnn()
    x = sample_inputs(network.spec, 20, seed=1)
    with pytest.raises(SchemaError, match=r"threshold = 1.5"):
        probe_neurons(network, threshold=1.5)
    with pytest.raises(SchemaError, match="at least two inputs, not 1"):
        probe_neurons(network, x[:1])
    with pytest.raises(SchemaError, match="at least two inputs, not 0"):
        probe_neurons(network, n_input=0)
    with pytest.raises(SchemaError, match="20 inputs are too few to fit 6 numbers"):
        linear_readout(network, x)
    with pytest.raises(SchemaError, match=r"'own' is \[3\]: 50 finite numbers"):
        linear_readout(network, sample_inputs(network.spec, 50, seed=1), quantities={"own": np.ones(3)})
    with pytest.raises(SchemaError, match="probe_neurons is for recurrent networks"):
        probe_neurons(random_transformer()[0])
