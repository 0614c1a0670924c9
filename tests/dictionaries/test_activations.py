"""Activation functions give what loops over single numbers give, also where values are equal, and stay sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forebay.stages.dictionaries.activation import COUNTED, Activation, Kind, Sparse, top_k
from forebay.stages.dictionaries.errors import DictionaryError

from .feature_models import activation_of, numbers

N_ROW, N_FEATURE = 7, 15
WIDE = 120  # so many that a CPU looks for the k largest in another way
KINDS = get_args(Kind)


def with_ties(n_feature: int = N_FEATURE) -> Tensor:
    """Whole numbers from −2 to 2 and zeros of both signs, and rows with nothing positive, and of equal numbers."""
    h = numbers(N_ROW, n_feature, seed=1, scale=1.5).round().clamp(-2, 2)
    h[0] = -h[0].abs() - 1
    h[1] = 2.0
    h[2] = -2.0
    h[3, ::2], h[3, 1::2] = 0.0, -0.0
    h[4, 3:] = -1.0
    h[4, :3] = torch.tensor([1.0, -0.0, 1.0])
    return h


INPUTS: dict[str, Callable[[], Tensor]] = {
    "numbers none of which are equal": lambda: numbers(N_ROW, N_FEATURE, seed=0),
    "equal numbers": with_ties,
    "one row": lambda: numbers(1, N_FEATURE, seed=2),
    "no rows": lambda: numbers(0, N_FEATURE, seed=3),
    "many numbers none of which are equal": lambda: numbers(N_ROW, WIDE, seed=6).float(),
    "many equal numbers": lambda: with_ties(WIDE).float(),
    "no rows of many": lambda: numbers(0, WIDE, seed=3).float(),
}


def chosen_by_hand(kind: str, row: Sequence[float], k: int) -> set[int]:
    """The features that a counted kind lets through, if they are positive where they must be."""
    size = len(row) // k
    if kind == "groupmax":
        groups = [range(first, first + size) for first in range(0, len(row), size)]
        return {max(group, key=lambda j: (row[j], -j)) for group in groups}
    largest: Callable[[int], float] = (lambda j: abs(row[j])) if kind == "abstopk" else (lambda j: row[j])
    return set(sorted(range(len(row)), key=lambda j: (-largest(j), j))[:k])


def by_hand(activation: Activation, h: Tensor, b_enc: Tensor) -> Tensor:
    """Every number of its own, as Python computes it."""
    listed = [None if p is None else p.tolist() for p in (activation.threshold, activation.r_mag, activation.b_mag)]
    threshold, r_mag, b_mag = listed
    found = []
    for row in h.tolist():
        chosen = (
            chosen_by_hand(activation.kind, row, activation.k) if activation.kind in COUNTED else set(range(len(row)))
        )
        out = []
        for j, x in enumerate(row):
            fires = j in chosen and (x > 0 or activation.kind == "abstopk")
            if threshold is not None:
                fires = fires and x > threshold[j]
            if r_mag is not None:
                x = max((x - b_enc[j].item()) * math.exp(r_mag[j]) + b_mag[j], 0.0)
            out.append(x if fires else 0.0)
        found.append(out)
    return torch.tensor(found, dtype=h.dtype).view(h.shape)


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("k", [1, 3, 5, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_what_a_loop_over_numbers_gives(kind: str, k: int, given: str) -> None:
    h = INPUTS[given]()
    n_feature = h.shape[1]
    b_enc = numbers(n_feature, seed=4).to(h.dtype)
    activation = activation_of(kind, n_feature, seed=5, k=k)
    found, expected = activation(h, b_enc), by_hand(activation, h, b_enc)
    assert found.dtype == h.dtype
    # exp of float32 parameters is rounded to float32; everything else is the number itself or 0
    torch.testing.assert_close(found, expected, rtol=1e-6 if kind == "gated" else 0, atol=1e-6 * (kind == "gated"))
    assert torch.equal(activation.sparse(h, b_enc).to_dense(), found)


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("k", [1, 3, 5, 15])
@pytest.mark.parametrize("kind", sorted(COUNTED))
def test_ranks_are_the_same_features_the_strongest_first_and_of_equal_ones_the_lower(
    kind: str, k: int, given: str
) -> None:
    h = INPUTS[given]()
    activation = activation_of(kind, h.shape[1], seed=0, k=k)
    values, features = activation.ranked(h)
    assert values.shape == features.shape == (len(h), k)
    for row, of_row, names in zip(
        by_hand(activation, h, h[:0]).tolist(), values.tolist(), features.tolist(), strict=True
    ):
        fired = sorted((j for j, x in enumerate(row) if x != 0), key=lambda j: (-row[j], j))
        absent = k - len(fired)
        assert names == fired + [-1] * absent
        assert of_row == [row[j] for j in fired] + [0.0] * absent


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_the_k_largest_of_equal_numbers_are_the_first(data: Any) -> None:
    """Against a sort by value and place, wherever in the row the k-th place cuts a run of equal numbers."""
    n = data.draw(st.integers(1, 60))
    row = data.draw(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0]), min_size=n, max_size=n))
    k = data.draw(st.one_of(st.integers(1, n + 2), st.integers(1, max(1, n // 8))))
    for dtype in (torch.float32, torch.bfloat16):
        values, features = top_k(torch.tensor([row], dtype=dtype), k)
        expected = sorted(range(n), key=lambda j: (-row[j], j))[:k]
        assert features[0].tolist() == expected
        assert values[0].tolist() == [row[j] for j in expected]


def test_a_threshold_stays_float32_in_a_bfloat16_dictionary() -> None:
    """0.999 rounds to 1 in bfloat16, and a preactivation of 1 is above the one and not above the other."""
    h = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    for kind in ("jumprelu", "batchtopk"):
        activation = Activation(kind=kind, threshold=torch.tensor([0.999, 1.0], dtype=torch.float64))
        assert activation.threshold is not None
        assert activation.threshold.dtype == torch.float32
        assert activation(h, h[0]).tolist() == [[1.0, 0.0]]
        assert activation(h, h[0]).dtype == torch.bfloat16
    assert not bool((h > torch.tensor([0.999]).bfloat16()).any())


def test_a_threshold_below_zero_lets_nothing_negative_through() -> None:
    activation = Activation(kind="jumprelu", threshold=torch.tensor([-1.0, -1.0, 0.5]))
    assert activation(torch.tensor([[-0.5, 0.25, 0.5]]), torch.zeros(3)).tolist() == [[0.0, 0.25, 0.0]]


def test_parameters_of_a_gate_stay_float32_and_features_take_the_dtype_of_what_is_encoded() -> None:
    activation = activation_of("gated", N_FEATURE, seed=0)
    assert activation.r_mag is not None
    assert activation.b_mag is not None
    assert activation.r_mag.dtype == activation.b_mag.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert activation(numbers(3, N_FEATURE, seed=1).to(dtype), torch.zeros(N_FEATURE, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_an_activation_on_another_device_has_all_its_parameters(kind: str) -> None:
    activation = activation_of(kind, N_FEATURE, seed=0, k=5)
    moved = activation.to("meta")
    assert (moved.kind, moved.k) == (activation.kind, activation.k)
    for name in ("threshold", "r_mag", "b_mag"):
        before, after = getattr(activation, name), getattr(moved, name)
        assert (before is None) == (after is None)
        assert after is None or (after.device.type, after.dtype) == ("meta", torch.float32)


@pytest.mark.parametrize("kind", sorted(COUNTED))
def test_gradients_reach_the_features_that_are_let_through_and_no_others(kind: str) -> None:
    for name in ("numbers none of which are equal", "equal numbers", "many equal numbers"):
        h = INPUTS[name]().requires_grad_()
        found = activation_of(kind, h.shape[1], seed=0, k=3)(h, h[0])
        weights = numbers(*h.shape, seed=2).to(h.dtype)
        (slope,) = torch.autograd.grad((found * weights).sum(), h)
        counted = h != 0  # what is let through with a value of 0 cannot be told from what is not
        assert torch.equal(slope[counted], torch.where(found != 0, weights, 0)[counted])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"kind": "top-k", "k": 3}, "activation 'top-k' is not known; known are relu, topk, abstopk"),
        ({"kind": "topk"}, "'topk' with other parameters than its own: it has nothing, and needs k"),
        ({"kind": "relu", "k": 3}, "it has k, and needs nothing"),
        ({"kind": "jumprelu"}, "it has nothing, and needs threshold"),
        ({"kind": "jumprelu", "threshold": torch.ones(2), "k": 3}, "it has k, threshold, and needs threshold"),
        ({"kind": "batchtopk", "k": 3}, "it has k, and needs threshold"),
        ({"kind": "gated", "r_mag": torch.ones(2)}, "it has r_mag, and needs b_mag, r_mag"),
        ({"kind": "topk", "k": 0}, "'topk' with k = 0: k must be at least 1"),
        ({"kind": "batchtopk", "threshold": torch.ones(2), "k": -1}, "k must be at least 1"),
    ],
)
def test_parameters_that_are_missing_or_too_many_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(DictionaryError, match=message):
        Activation(**parameters)


# ── features that fire ───────────────────────────────────────────────────────────────────────────────────────────────


def test_features_come_back_from_their_sparse_form_feature_zero_among_them() -> None:
    dense = torch.zeros(5, 9)
    dense[0, 0], dense[0, 8], dense[2, 0], dense[4, 3] = 1.5, 2.5, -3.5, 1e-30
    dense[3, 4] = -0.0
    sparse = Sparse.from_dense(dense)
    assert sparse.count.tolist() == [2, 0, 1, 0, 1]
    assert sparse.feature.tolist() == [0, 8, 0, 3]
    assert sparse.row.tolist() == [0, 0, 2, 4]
    assert sparse.n_feature == 9
    assert torch.equal(sparse.to_dense(), dense)


@pytest.mark.parametrize("shape", [(0, 6), (4, 6)], ids=["no rows", "nothing fires"])
def test_nothing_has_a_sparse_form_too(shape: tuple[int, int]) -> None:
    sparse = Sparse.from_dense(torch.zeros(shape))
    assert len(sparse.count) == shape[0]
    assert len(sparse.feature) == len(sparse.value) == len(sparse.row) == 0
    assert torch.equal(sparse.to_dense(), torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_features_of_every_kind_come_back_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    dense = activation_of(kind, N_FEATURE, seed=6, k=5)(with_ties().to(dtype), torch.zeros(N_FEATURE, dtype=dtype))
    sparse = Sparse.from_dense(dense)
    assert sparse.value.dtype == dtype
    assert bool((sparse.value != 0).all())
    assert torch.equal(sparse.to_dense(), dense)
    inside = sparse.row[1:] == sparse.row[:-1]
    assert bool((sparse.feature[1:] > sparse.feature[:-1])[inside].all())
