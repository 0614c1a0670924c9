"""The right answers are those that a search by hand finds; inputs are drawn the same from the same seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from forebay.stages.algzoo.spec import AlgZooSpec
from forebay.stages.algzoo.tasks import all_functions, evaluate, sample_inputs, targets
from forebay.stores.errors import SchemaError

from .networks import SECOND_ARGMAX_OF_TWO, random_rnn, random_transformer, rnn_of


def second_argmax(x: Sequence[float]) -> float:
    largest = max(range(len(x)), key=lambda i: x[i])
    return max((i for i in range(len(x)) if i != largest), key=lambda i: x[i])


def argmedian(x: Sequence[float]) -> float:
    return next(i for i in range(len(x)) if sum(other < x[i] for other in x) == len(x) // 2)


def median(x: Sequence[float]) -> float:
    ordered = sorted(x)
    lower, upper = ordered[(len(x) - 1) // 2], ordered[len(x) // 2]
    return (lower + upper) / 2


def longest_cycle(f: Sequence[int]) -> float:
    """Its length, 1 to n, by marking on each walk when a place was first seen."""
    longest = 0
    for start in range(len(f)):
        seen: dict[int, int] = {}
        here = start
        while here not in seen:
            seen[here] = len(seen)
            here = int(f[here])
        longest = max(longest, len(seen) - seen[here])
    return longest


ANSWERS: dict[str, Callable[..., float]] = {"2nd_argmax": second_argmax, "argmedian": argmedian, "median": median}


@pytest.mark.parametrize("task", ANSWERS)
@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_answers_about_numbers_are_those_of_a_search(task: str, n: int) -> None:
    spec = AlgZooSpec.from_task(task, 2, n)
    x = sample_inputs(spec, 300, seed=n)
    found = targets(spec, x)
    assert found.values.tolist() == [ANSWERS[task](row.tolist()) for row in x.values]
    assert found.dtype == (np.float64 if task == "median" else np.int64)
    assert found.dims == ("input",)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_the_class_of_every_function_is_the_length_of_its_longest_cycle_minus_one(n: int) -> None:
    spec = AlgZooSpec.from_task("longest_cycle", 2, n)
    functions = all_functions(spec)
    assert functions.shape == (n**n, n)
    assert len(np.unique(functions.values, axis=0)) == n**n
    found = targets(spec, functions).values
    assert found.tolist() == [longest_cycle(f) - 1 for f in functions.values]
    assert set(found.tolist()) == set(range(n))


def test_tails_do_not_count() -> None:
    spec = AlgZooSpec.from_task("longest_cycle", 2, 5)
    assert targets(spec, [[1, 2, 3, 4, 4], [1, 2, 3, 4, 3], [1, 2, 3, 4, 0], [0, 0, 0, 0, 0]]).values.tolist() == [
        0, 1, 4, 0,
    ]  # fmt: skip


def test_numbers_are_standard_normal_and_functions_uniform() -> None:
    x = sample_inputs(AlgZooSpec.from_task("median", 2, 3), 40_000, seed=1)
    assert x.dims == ("input", "time")
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02
    assert abs(float((abs(x) < 1).mean()) - 0.6827) < 0.01
    f = sample_inputs(AlgZooSpec.from_task("longest_cycle", 2, 5), 40_000, seed=1)
    assert f.dims == ("input", "position")
    np.testing.assert_allclose(np.bincount(f.values.reshape(-1)) / f.size, 0.2, atol=0.01)


def test_a_seed_says_what_is_drawn() -> None:
    spec = AlgZooSpec.from_task("argmedian", 2, 3)
    first = sample_inputs(spec, 9, seed=4)
    assert first.identical(sample_inputs(spec, 9, seed=4))
    assert not first.identical(sample_inputs(spec, 9, seed=5))
    with pytest.raises(SchemaError, match="n_input = 0"):
        sample_inputs(spec, 0, seed=4)


def test_inputs_that_cannot_be_listed_or_read_are_refused() -> None:
    spec = AlgZooSpec.from_task("longest_cycle", 2, 4)
    with pytest.raises(SchemaError, match="cannot be listed"):
        all_functions(AlgZooSpec.from_task("longest_cycle", 2, 8))
    with pytest.raises(SchemaError, match="cannot be listed"):
        all_functions(AlgZooSpec.from_task("median", 2, 2))
    with pytest.raises(SchemaError, match="from 0 to 3"):
        targets(spec, [[0, 1, 2, 4]])
    with pytest.raises(SchemaError, match="NaN"):
        targets(AlgZooSpec.from_task("median", 2, 2), [[0, np.nan]])


def test_a_network_made_by_hand_is_always_right() -> None:
    network = rnn_of(SECOND_ARGMAX_OF_TWO, dtype="float32")
    found = evaluate(network, sample_inputs(network.spec, 5000, seed=0))
    assert found["score"] == 1
    assert found["score"].attrs["long_name"] == "accuracy"
    opposite = rnn_of(SECOND_ARGMAX_OF_TWO, task="argmedian")  # of two numbers, the larger has one smaller one
    assert evaluate(opposite, sample_inputs(opposite.spec, 5000, seed=0))["score"] == 0


@pytest.mark.parametrize("task", ["2nd_argmax", "argmedian", "longest_cycle"])
def test_accuracy_counts_the_inputs_that_are_answered_rightly(task: str) -> None:
    ours, theirs = random_transformer() if task == "longest_cycle" else random_rnn(task=task)
    x = sample_inputs(ours.spec, 500, seed=3)
    with torch.no_grad():
        output = theirs(torch.from_numpy(x.values))[0].numpy()
    answer = longest_cycle if task == "longest_cycle" else ANSWERS[task]
    right = [int(np.argmax(o)) == answer(row) - (task == "longest_cycle") for o, row in zip(output, x.values)]  # noqa: B905
    found = evaluate(ours, x)
    assert found["score"].item() == pytest.approx(np.mean(right), abs=1e-15)
    assert (found["error"] == 0).values.tolist() == right


def test_a_median_is_scored_by_its_root_mean_squared_error() -> None:
    ours, theirs = random_rnn(task="median")
    x = sample_inputs(ours.spec, 500, seed=3)
    with torch.no_grad():
        output = theirs(torch.from_numpy(x.values))[0].numpy()[:, 0]
    wrong = output - np.array([median(row) for row in x.values])
    found = evaluate(ours, x)
    assert found["score"].item() == pytest.approx(-np.sqrt(np.mean(wrong**2)), rel=1e-12)
    np.testing.assert_allclose(found["error"].values, wrong, rtol=1e-10, atol=1e-12)
