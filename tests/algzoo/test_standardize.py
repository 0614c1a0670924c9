"""A standardised network computes the same, with input weights of ±1."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from forebay.stages.algzoo.regions import activation_patterns
from forebay.stages.algzoo.standardize import standardization_quality, standardize
from forebay.stages.algzoo.tasks import sample_inputs
from forebay.stages.models.errors import ModelError
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from .networks import SECOND_ARGMAX_OF_TWO, random_rnn, random_transformer, rnn_of


@pytest.mark.parametrize(("dtype", "exact"), [("float64", 1e-13), ("float32", 2e-6)])
def test_the_outputs_stay_and_the_input_weights_become_one(dtype: str, exact: float) -> None:
    network, _ = random_rnn(7, 5, dtype=dtype)
    assert standardization_quality(network) > 0.3
    made = standardize(network)
    assert standardization_quality(made) == 0
    assert made.weights["linear.weight"].dtype == network.W_oh.dtype
    x = sample_inputs(network.spec, 200, seed=0)
    before, after = network.forward(x).output, made.forward(x).output
    assert (before - after).abs().max() <= exact * before.abs().max()
    assert activation_patterns(network, x).identical(activation_patterns(made, x))


def test_hidden_states_are_divided_by_the_size_of_the_input_weight() -> None:
    network, _ = random_rnn(7, 5)
    x = sample_inputs(network.spec, 200, seed=0)
    hooks = HookSpec().capture("rnn.hook_hidden.*")
    before, after = (net.forward(x, hooks).to_dataset()["rnn.hook_hidden"] for net in (network, standardize(network)))
    assert abs(before / network.W_ih.abs().numpy() - after).max() <= 1e-12 * abs(after).max()


def test_a_standard_network_is_left_as_it_is() -> None:
    network = rnn_of(SECOND_ARGMAX_OF_TWO)
    assert all(weight.equal(network.weights[name]) for name, weight in standardize(network).weights.items())


def test_a_neuron_that_reads_no_input_is_refused_by_number() -> None:
    network, _ = random_rnn(4)
    deaf = dataclasses.replace(network, W_ih=network.W_ih * torch.tensor([1.0, 0.0, 1.0, 0.0]))
    with pytest.raises(ModelError, match=r"neurons \[1, 3\] are 0"):
        standardize(deaf)


def test_weights_too_far_apart_for_the_dtype_are_refused() -> None:
    network, _ = random_rnn(2, dtype="float32")
    far = dataclasses.replace(network, W_ih=torch.tensor([1e-30, 1e20]))
    with pytest.raises(ModelError, match=r"1e-30 to 1e\+20 are too far apart"):
        standardize(far)


def test_transformers_have_no_input_weights_to_standardise() -> None:
    with pytest.raises(SchemaError, match="standardize is for recurrent networks; that for longest_cycle"):
        standardize(random_transformer()[0])
