"""Surprise in bits is what summing −log2 of the probabilities by hand gives, and a description costs its length."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import laplace

from forebay.stages.algzoo.regions import classify_regions, enumerate_regions
from forebay.stages.algzoo.spec import TASKS
from forebay.stages.algzoo.surprise import RESOLUTION, OracleEstimator, RegionEstimator, surprise_accounting
from forebay.stages.algzoo.tasks import all_functions, evaluate, sample_inputs, targets
from forebay.stores.errors import SchemaError

from .networks import SECOND_ARGMAX_OF_TWO, random_rnn, random_transformer, rnn_of


def network_of(task: str) -> object:
    return random_transformer()[0] if task == "longest_cycle" else random_rnn(task=task)[0]


@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_is_right_about_every_task(task: str) -> None:
    network = network_of(task)
    oracle = OracleEstimator(spec=network.spec)  # type: ignore[attr-defined]
    x = sample_inputs(network.spec, 300, seed=0)  # type: ignore[attr-defined]
    found = surprise_accounting(network, oracle, x)  # type: ignore[arg-type]
    assert found["estimate_accuracy"] == 1
    assert found["prediction"].values.tolist() == targets(network.spec, x).values.tolist()  # type: ignore[attr-defined]
    assert found["explanation_bits"] == 2 + 16
    assert found.attrs["task"] == task


@pytest.mark.parametrize("confidence", [0.99, 0.4])
def test_bits_of_classes_are_those_of_the_predictive_distribution(confidence: float) -> None:
    network, theirs = random_rnn(5, 4)
    x = sample_inputs(network.spec, 250, seed=3)
    with torch.no_grad():
        answer = theirs(torch.from_numpy(x.values))[0].numpy().argmax(1)
    right = targets(network.spec, x).values
    oracle = OracleEstimator(spec=network.spec, confidence=confidence)
    found = surprise_accounting(network, oracle, x)
    distribution = np.full((250, 4), (1 - confidence) / 3)
    distribution[np.arange(250), right] = confidence
    np.testing.assert_allclose(distribution.sum(1), 1)
    bits = -np.log2(distribution[np.arange(250), answer])
    np.testing.assert_allclose(found["surprise"].values, bits, rtol=1e-12)
    assert found["residual_bits"].item() == pytest.approx(bits.sum(), rel=1e-12)
    assert found["total_bits"].item() == pytest.approx(18 + bits.sum(), rel=1e-12)
    assert found["baseline_bits"].item() == 250 * 2
    assert found["parameter_bits"].item() == 16 * (5 + 25 + 20)
    assert found["n_params"].item() == 50
    assert found["model_accuracy"].item() == evaluate(network, x)["score"].item() == np.mean(answer == right)
    assert found["agreement"].item() + found["disagreement"].item() == 1
    assert found["chance_accuracy"].item() == 0.25
    assert np.isnan(found["mean_deviation"])


def test_the_confidence_that_fits_best_is_the_agreement() -> None:
    network, _ = random_rnn(5, 4)
    x = sample_inputs(network.spec, 1000, seed=3)
    found = surprise_accounting(network, OracleEstimator(spec=network.spec), x)
    best = found["agreement"].item()
    assert 0.1 < best < 0.9
    bits = {
        confidence: surprise_accounting(network, OracleEstimator(spec=network.spec, confidence=confidence), x)
        for confidence in (best - 0.05, best, best + 0.05)
    }
    residual = {confidence: found["residual_bits"].item() for confidence, found in bits.items()}
    assert min(residual, key=lambda confidence: residual[confidence]) == best
    entropy = -best * math.log2(best) - (1 - best) * math.log2((1 - best) / 3)
    assert residual[best] == pytest.approx(1000 * entropy, rel=1e-9)


@pytest.mark.parametrize("scale", [0.05, 0.8, 1e-4])
def test_bits_of_a_median_are_those_of_a_laplace_distribution_in_cells(scale: float) -> None:
    network, theirs = random_rnn(5, 4, task="median", seed=1)
    network.W_oh.mul_(0.05)
    theirs.linear.weight.data.mul_(0.05)
    x = sample_inputs(network.spec, 250, seed=3)
    with torch.no_grad():
        answer = theirs(torch.from_numpy(x.values))[0].numpy()[:, 0]
    right = np.median(x.values, axis=1)
    found = surprise_accounting(network, OracleEstimator(spec=network.spec, scale=scale), x)
    away = abs(answer - right) / scale
    half = RESOLUTION / 2 / scale
    mass = laplace.cdf(-away + half) - laplace.cdf(-away - half)
    told = mass > 1e-290
    assert told.sum() > 20
    np.testing.assert_allclose(found["surprise"].values[told], -np.log2(mass[told]), rtol=1e-8)
    assert np.isfinite(found["surprise"]).all()
    base = laplace.cdf(answer + RESOLUTION / 2) - laplace.cdf(answer - RESOLUTION / 2)
    assert found["baseline_bits"].item() == pytest.approx(-np.log2(base).sum(), rel=1e-9)
    assert found["mean_deviation"].item() == pytest.approx(abs(answer - right).mean(), rel=1e-9)
    assert found["agreement"].item() == np.mean(abs(answer - right) <= 0.1) == found["model_accuracy"].item()
    assert np.isnan(found["chance_accuracy"])


def test_all_functions_together_cost_what_their_classes_do() -> None:
    network, _ = random_transformer()
    found = surprise_accounting(network, OracleEstimator(spec=network.spec), all_functions(network.spec))
    wrong = (evaluate(network, all_functions(network.spec))["error"] == 1).sum().item()
    expected = -(256 - wrong) * math.log2(0.99) - wrong * math.log2(0.01 / 3)
    assert found["residual_bits"].item() == pytest.approx(expected, rel=1e-12)


# ── regions as an explanation ────────────────────────────────────────────────────────────────────────────────────────


def test_the_regions_of_a_network_made_by_hand_explain_it_wholly() -> None:
    network = rnn_of(SECOND_ARGMAX_OF_TWO)
    regions = enumerate_regions(network)
    estimator = RegionEstimator.from_regions(network, regions)
    found = surprise_accounting(network, estimator, n_input=400, seed=2)
    assert found["agreement"] == found["model_accuracy"] == found["estimate_accuracy"] == 1
    # four regions with two facets each: 4 · (2 · 2 + 1 + 2 · 2) numbers, the number of regions and the confidence
    assert found["explanation_bits"] == 16 * (4 * 9 + 2)
    assert found["residual_bits"].item() == pytest.approx(-400 * math.log2(0.99), rel=1e-12)
    assert found["parameter_bits"] == 160
    assert found.attrs["estimator"] == "the linear maps of 4 regions with 8 facets"


def test_all_regions_predict_what_the_network_answers_but_for_rounding() -> None:
    network, _ = random_rnn(4, 3, seed=3)
    estimator = RegionEstimator.from_regions(network, enumerate_regions(network))
    x = sample_inputs(network.spec, 3000, seed=4)
    found = surprise_accounting(network, estimator, x)
    assert found["agreement"] > 0.99
    assert found["estimate_accuracy"].item() == pytest.approx(found["model_accuracy"].item(), abs=0.01)
    scalar, _ = random_rnn(4, 3, task="median", seed=3)
    numbers = RegionEstimator.from_regions(scalar, enumerate_regions(scalar), scale=1e-3)
    assert surprise_accounting(scalar, numbers, x)["mean_deviation"] < 0.01


def test_of_inputs_outside_the_regions_that_are_kept_nothing_is_expected() -> None:
    network, _ = random_rnn(4, 3, seed=3)
    x = sample_inputs(network.spec, 3000, seed=4)
    regions = classify_regions(network, x)
    estimator = RegionEstimator.from_regions(network, regions, most=3)
    assert len(estimator.maps) == len(estimator.normals) == 3
    outside = regions["region_of_input"].values >= 3
    assert 0.05 < outside.mean() < 0.95
    found = surprise_accounting(network, estimator, x)
    assert (estimator.region_of(x.values) == np.where(outside, -1, regions["region_of_input"].values)).mean() > 0.995
    told = estimator.region_of(x.values) >= 0
    np.testing.assert_array_equal(found["prediction"].values == -1, ~told)
    np.testing.assert_allclose(found["surprise"].values[~told], math.log2(3))
    assert found["agreement"].item() == (found["prediction"] == found["answer"]).mean().item() <= told.mean()
    everything = surprise_accounting(network, RegionEstimator.from_regions(network, regions, most=12), x)
    assert everything["residual_bits"] < found["residual_bits"]
    assert everything["explanation_bits"] > found["explanation_bits"]


class Constant:
    """Anything with these four is an explanation."""

    description, n_bits = "always the last", 3.0

    def predict(self, inputs: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.full(len(inputs), inputs.shape[1] - 1)

    def surprise(self, inputs: NDArray[np.float64], answers: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.where(answers == inputs.shape[1] - 1, 1.0, 2.0)


def test_an_explanation_of_ones_own_is_accounted_for() -> None:
    network, _ = random_rnn(5, 4)
    found = surprise_accounting(network, Constant(), n_input=100, seed=0)
    last = (evaluate(network, sample_inputs(network.spec, 100, seed=0))["prediction"] == 3).sum().item()
    assert found["total_bits"].item() == 3 + 200 - last
    assert found["agreement"].item() == last / 100


def test_trust_out_of_range_is_refused() -> None:
    network, _ = random_rnn(2, 2)
    for confidence in (0.0, 1.0):
        with pytest.raises(SchemaError, match=r"confidence = .* above 0 and below 1"):
            OracleEstimator(spec=network.spec, confidence=confidence)
    with pytest.raises(SchemaError, match="scale = 0"):
        OracleEstimator(spec=network.spec, scale=0)
    regions = enumerate_regions(network)
    with pytest.raises(SchemaError, match="most = 0"):
        RegionEstimator.from_regions(network, regions, most=0)
    network.W_oh.mul_(1e6)
    with pytest.raises(SchemaError, match="float16 does not hold"):
        RegionEstimator.from_regions(network, enumerate_regions(network))
