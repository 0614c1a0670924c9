"""Linear regions: their maps are exact, counting them is counting patterns, and enumerating them misses none."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray

from forebay.stages.algzoo.regions import (
    activation_patterns,
    classify_regions,
    enumerate_regions,
    exact_accuracy,
    region_facets,
    region_linear_map,
)
from forebay.stages.algzoo.rnn import AlgZooRNN
from forebay.stages.algzoo.tasks import evaluate, sample_inputs
from forebay.stores.errors import SchemaError

from .networks import SECOND_ARGMAX_OF_TWO, random_rnn, random_transformer, rnn_of


def keys(patterns: xr.DataArray) -> list[bytes]:
    return [pattern.tobytes() for pattern in patterns.values]


def pre_by_hand(network: AlgZooRNN, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """[time, neuron], one number at a time."""
    W_ih, W_hh = network.W_ih.tolist(), network.W_hh.tolist()
    hidden, made = [0.0] * len(W_ih), []
    for value in x:
        made.append([W_ih[j] * value + sum(W_hh[j][k] * hidden[k] for k in range(len(W_ih))) for j in range(len(W_ih))])
        hidden = [max(pre, 0.0) for pre in made[-1]]
    return np.array(made)


# ── patterns and maps ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pattern_says_which_pre_activations_are_at_least_zero() -> None:
    network, _ = random_rnn()
    x = sample_inputs(network.spec, 30, seed=1)
    found = activation_patterns(network, x)
    assert found.dims == ("input", "time", "neuron")
    assert found.dtype == bool
    np.testing.assert_array_equal(found.values, [pre_by_hand(network, row) >= 0 for row in x.values])
    assert 0.2 < found.mean() < 0.8
    assert activation_patterns(network, np.zeros(4)).values.all()


@pytest.mark.parametrize("task", ["2nd_argmax", "median"])
def test_the_map_of_its_region_gives_the_output_of_an_input(task: str) -> None:
    network, theirs = random_rnn(5, 4, task=task)
    x = sample_inputs(network.spec, 300, seed=2)
    maps = region_linear_map(network, activation_patterns(network, x))
    assert maps.dims == ("input", "output", "time")
    with torch.no_grad():
        output = theirs(torch.from_numpy(x.values))[0].numpy()
    assert abs((maps.values @ x.values[..., None])[..., 0] - output).max() <= 1e-13 * abs(output).max()


def test_the_map_is_the_derivative_of_the_output() -> None:
    network, theirs = random_rnn(5, 4)
    x = sample_inputs(network.spec, 20, seed=3).values
    maps = region_linear_map(network, activation_patterns(network, x)).values
    step, patterns = 1e-6, activation_patterns(network, x)
    for t in range(4):
        there, back = x.copy(), x.copy()
        there[:, t] += step
        back[:, t] -= step
        same = (activation_patterns(network, there) == patterns) & (activation_patterns(network, back) == patterns)
        inside = same.all(("time", "neuron")).values
        assert inside.sum() > 15
        with torch.no_grad():
            outputs = [theirs(torch.from_numpy(moved))[0].numpy() for moved in (there, back)]
        np.testing.assert_allclose(((outputs[0] - outputs[1]) / (2 * step))[inside], maps[inside, :, t], atol=1e-8)


def test_patterns_keep_their_dimensions_and_labels() -> None:
    network, _ = random_rnn()
    patterns = activation_patterns(network, sample_inputs(network.spec, 6, seed=0))
    some = patterns.isel(input=[4, 1]).assign_coords(input=[40, 10])
    maps = region_linear_map(network, some)
    assert maps.sel(input=10).values.tolist() == region_linear_map(network, patterns.values[1]).values.tolist()
    assert region_linear_map(network, patterns.values.reshape(2, 3, 4, 5)).shape == (2, 3, 4, 4)
    with pytest.raises(SchemaError, match=r"boolean \[time=4, neuron=5\], not bool \[4, 4\]"):
        region_linear_map(network, np.ones((4, 4), dtype=bool))
    with pytest.raises(SchemaError, match="not float64"):
        region_linear_map(network, np.ones((4, 5)))


def test_a_product_that_overflows_is_refused() -> None:
    huge = {name: weight.double() * 1e300 for name, weight in SECOND_ARGMAX_OF_TWO.items()}
    with pytest.raises(SchemaError, match="overflows"):
        region_linear_map(rnn_of(huge), np.ones((2, 2), dtype=bool))


# ── counting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_regions_are_counted_as_patterns_are() -> None:
    network, _ = random_rnn()
    x = sample_inputs(network.spec, 700, seed=1)
    patterns = activation_patterns(network, x)
    found = classify_regions(network, x)
    expected = Counter(keys(patterns)).most_common()  # of equally frequent ones the first seen first, as promised
    assert keys(found["pattern"]) == [key for key, _ in expected]
    assert found["count"].values.tolist() == [count for _, count in expected]
    assert found["fraction"].values.tolist() == [count / 700 for _, count in expected]
    held = keys(patterns)
    for region, (key, _) in enumerate(expected):
        assert found["representative"].values[region].tolist() == x.values[held.index(key)].tolist()
        members = np.flatnonzero(found["region_of_input"].values == region)
        assert members.tolist() == [i for i in range(700) if held[i] == key]
    np.testing.assert_array_equal(found["linear_map"].values, region_linear_map(network, found["pattern"]).values)
    assert found["linear_map"].dims == ("region", "output", "time")


def test_a_network_of_two_neurons_and_steps_has_no_more_than_sixteen_regions() -> None:
    for seed in range(5):
        network, _ = random_rnn(2, 2, seed=seed)
        found = enumerate_regions(network)
        assert 4 <= found.sizes["region"] <= 16
        assert found["probability"].sum().item() == pytest.approx(1, abs=1e-12)


# ── enumerating ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("hidden", "n", "seed"), [(2, 2, 0), (3, 2, 1), (2, 4, 2), (4, 3, 3)])
def test_every_region_that_inputs_fall_into_is_enumerated_and_every_enumerated_one_is_there(
    hidden: int, n: int, seed: int
) -> None:
    network, _ = random_rnn(hidden, n, seed=seed)
    found = enumerate_regions(network)
    enumerated = keys(found["pattern"])
    assert len(set(enumerated)) == len(enumerated)
    sampled = classify_regions(network, sample_inputs(network.spec, 20_000, seed=0))
    assert set(keys(sampled["pattern"])) <= set(enumerated)
    inside = found["representative"].values
    assert keys(activation_patterns(network, inside)) == enumerated
    assert (found["radius"] > 1e-6).all()
    directions = np.random.default_rng(0).standard_normal((25, n))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    for direction in directions:  # the whole ball lies inside
        moved = inside + 0.999 * found["radius"].values[:, None] * direction
        assert keys(activation_patterns(network, moved)) == enumerated
        assert abs(moved).max() <= 1 + 1e-8


def test_enumeration_agrees_with_an_exhaustive_search_of_all_patterns_by_linear_programs() -> None:
    from scipy.optimize import linprog

    network, _ = random_rnn(2, 3, seed=6)
    reachable = set()
    for bits in itertools.product([False, True], repeat=6):
        gates = np.array(bits).reshape(3, 2)
        rows, hidden = [], np.zeros((2, 3))
        for t in range(3):
            pre = network.W_hh.numpy() @ hidden + np.outer(network.W_ih.numpy(), np.eye(3)[t])
            rows += list(np.where(gates[t][:, None], 1, -1) * pre)
            hidden = pre * gates[t][:, None]
        if linprog(np.zeros(3), A_ub=-np.array(rows), b_ub=np.full(6, -1.0), bounds=(None, None)).success:
            reachable.add(gates.tobytes())
    assert set(keys(enumerate_regions(network)["pattern"])) == reachable


def test_the_network_made_by_hand_has_the_regions_that_one_reads_off_it() -> None:
    network = rnn_of(SECOND_ARGMAX_OF_TWO)
    found = enumerate_regions(network)
    by_pattern = {
        tuple(map(tuple, pattern.astype(int).tolist())): (probability, linear.tolist())
        for pattern, probability, linear in zip(
            found["pattern"].values, found["probability"].values, found["linear_map"].values, strict=True
        )
    }
    rising, falling = (0, 1), (1, 0)  # which of the two neurons is active: r(x_t − …) or its opposite
    difference = [[-1, 1], [1, -1]]
    assert by_pattern.keys() == {(falling, falling), (falling, rising), (rising, falling), (rising, rising)}
    # x_0 ≥ 0 > x_1 − x_0 is three eighths of the plane, x_1 > x_0 ≥ 0 one.
    assert by_pattern[falling, rising] == (pytest.approx(3 / 8), difference)
    assert by_pattern[falling, falling] == (pytest.approx(1 / 8), difference)
    assert exact_accuracy(network) == pytest.approx(1)
    assert exact_accuracy(rnn_of(SECOND_ARGMAX_OF_TWO, task="argmedian")) == pytest.approx(0)


@pytest.mark.parametrize("seed", range(4))
def test_exact_probabilities_and_accuracy_are_what_sampling_comes_near(seed: int) -> None:
    network, _ = random_rnn(3, 2, seed=seed)
    x = sample_inputs(network.spec, 200_000, seed=0)
    found = enumerate_regions(network)
    sampled = classify_regions(network, x)
    fraction = dict(zip(keys(sampled["pattern"]), sampled["fraction"].values, strict=True))
    for key, probability in zip(keys(found["pattern"]), found["probability"].values, strict=True):
        assert fraction.get(key, 0.0) == pytest.approx(probability, abs=5e-3)
    assert exact_accuracy(network, found) == pytest.approx(evaluate(network, x)["score"].item(), abs=5e-3)
    assert 0 <= exact_accuracy(network) <= 1


def test_a_neuron_that_nothing_reaches_counts_as_active_everywhere() -> None:
    network, _ = random_rnn(3, 2)
    network.W_ih[1] = 0
    network.W_hh[1] = 0
    found = enumerate_regions(network)
    assert found["pattern"].sel(neuron=1).all()
    assert keys(activation_patterns(network, found["representative"].values)) == keys(found["pattern"])


def test_more_regions_than_allowed_are_refused() -> None:
    network, _ = random_rnn(4, 3)
    with pytest.raises(SchemaError, match="more than 5 regions within the first 2 of 3 time steps"):
        enumerate_regions(network, most=5)


def test_where_no_region_is_thick_enough_that_is_said() -> None:
    with pytest.raises(SchemaError, match="thinnest = 2: lower it"):
        enumerate_regions(rnn_of(SECOND_ARGMAX_OF_TWO), thinnest=2.0)


# ── facets ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_facets_alone_tell_a_region_and_without_any_one_of_them_it_would_be_larger() -> None:
    network, _ = random_rnn(4, 3, seed=3)
    x = sample_inputs(network.spec, 4000, seed=0).values
    regions = classify_regions(network, x)
    for region in range(6):
        found = region_facets(network, regions["pattern"].values[region])
        normals = found["normal"].values[found["facet"].values]
        assert 1 <= len(normals) < 12
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)
        member = regions["region_of_input"].values == region
        np.testing.assert_array_equal((x @ normals.T >= 0).all(1), member)
        assert np.isnan(found["normal"].values[~found["facet"].values]).all()
        wider = np.random.default_rng(1).standard_normal((200_000, 3))
        for i in range(len(normals)):
            others = (wider @ np.delete(normals, i, axis=0).T >= 0).all(1)
            assert (wider[others] @ normals[i] < 0).any()


def test_a_pattern_that_no_input_has_bounds_nothing() -> None:
    network, _ = random_rnn(4, 3, seed=3)
    possible = set(keys(enumerate_regions(network)["pattern"]))
    patterns = (np.array(bits).reshape(3, 4) for bits in itertools.product([False, True], repeat=12))
    impossible = next(pattern for pattern in patterns if pattern.tobytes() not in possible)
    with pytest.raises(SchemaError, match="no input has this activation pattern"):
        region_facets(network, impossible)
    with pytest.raises(SchemaError, match="facets of one region are asked for, and there are 2"):
        region_facets(network, np.ones((2, 3, 4), dtype=bool))


@pytest.mark.parametrize("task", ["median", "2nd_argmax"])
def test_exact_accuracy_is_for_classes_of_two_numbers(task: str) -> None:
    network, _ = random_rnn(2, 3 if task == "2nd_argmax" else 2, task=task)
    with pytest.raises(SchemaError, match="exact_accuracy is for classes of sequences of 2"):
        exact_accuracy(network)


def test_transformers_are_not_piecewise_linear() -> None:
    network, _ = random_transformer()
    for analysis in (classify_regions, activation_patterns):
        with pytest.raises(SchemaError, match="is for recurrent networks"):
            analysis(network, [0, 1, 2, 3])
