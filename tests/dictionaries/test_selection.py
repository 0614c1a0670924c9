"""What is large in a matrix is what a stable sort and a loop say, in every dtype, however rows are cut among tiles and
threads; and encoding in blocks is encoding at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from forebay.stages.dictionaries import selection
from forebay.stages.dictionaries.activation import Activation
from forebay.stages.dictionaries.selection import above, top_k

from .feature_models import numbers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
WIDE = 331  # a prime: no groups of whatever size fill a row


@pytest.fixture(params=[1, 2**12, 2**20], ids=["rows one by one", "few rows", "all rows"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of so many bytes."""
    monkeypatch.setattr(selection, "TILE_BYTES", request.param)


@pytest.fixture(params=[1, 3], ids=["one thread", "three threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """That divide even a few rows among them."""
    monkeypatch.setattr(selection, "ROWS_A_THREAD", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def matrix(dtype: torch.dtype, width: int = WIDE) -> Tensor:
    """Rows of all kinds: numbers of their own, equal ones, nothing positive, little that is, infinities, zeros of both
    signs, all the same.
    """
    h = numbers(23, width, seed=0).float() * 3
    h[1:6] = h[1:6].round()
    h[6], h[7] = -h[6].abs() - 0.5, 1.0
    h[8], h[8, ::7] = -1.0, 2.0
    h[9, ::3], h[9, 1::3], h[9, 2::3] = 0.0, -0.0, -2.0
    h[10, 5], h[10, 200], h[10, 17] = torch.inf, torch.inf, -torch.inf
    h[11] = -torch.inf
    h[12], h[12, 40:43] = -3.0, torch.tensor([0.5, 0.0, 0.25])
    return h.to(dtype)


def by_sorting(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, columns = torch.sort(h.double(), dim=-1, descending=True, stable=True)
    return values[:, :k], columns[:, :k]


@pytest.mark.usefixtures("tiles", "threads")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_k_largest_are_those_of_a_stable_sort(dtype: torch.dtype, device: str) -> None:
    for width, k in [(WIDE, 1), (WIDE, 5), (WIDE, 41), (WIDE, 42), (512, 32), (512, 7)]:
        h = matrix(dtype, width)
        values, columns = top_k(h.to(device), k)
        due, of_columns = by_sorting(h, k)
        assert values.dtype == dtype
        assert torch.equal(values.cpu().double(), due)
        assert torch.equal(columns.cpu(), of_columns)


@pytest.mark.usefixtures("tiles", "threads")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_above_a_bound_is_what_a_loop_over_numbers_finds(dtype: torch.dtype, device: str) -> None:
    """Bounds are float32 whatever the matrix is: on numbers of its dtype, beside them, beyond the largest, none at all,
    negative.
    """
    h = matrix(dtype)
    tiny = 2.0**-20
    on_numbers = h[0].float().abs()
    bounds = {
        "on numbers": on_numbers,
        "just above": on_numbers * (1 + tiny),
        "just below": on_numbers * (1 - tiny),
        "far": torch.full((WIDE,), 3e38),
        "infinite": torch.full((WIDE,), torch.inf),
        "zero": torch.zeros(WIDE),
        "subnormal": torch.full((WIDE,), 1e-41),
        "negative": numbers(WIDE, seed=4).float(),
    }
    rows = h.double().tolist()
    for name, bound in bounds.items():
        limits = bound.double().tolist()
        due = [(i, j) for i, row in enumerate(rows) for j, x in enumerate(row) if x > limits[j]]
        row, column = above(h.to(device), bound.to(device))
        assert list(zip(row.tolist(), column.tolist(), strict=True)) == due, name
    row, column = above(h.to(device), 0.0)
    assert list(zip(row.tolist(), column.tolist(), strict=True)) == [
        (i, j) for i, row in enumerate(rows) for j, x in enumerate(row) if x > 0
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nan_is_above_nothing_and_does_not_hide_what_is(dtype: torch.dtype) -> None:
    h = matrix(dtype)[:3]
    h[0, 3], h[1, 9] = torch.nan, -torch.tensor(torch.nan)
    row, column = above(h, torch.full((WIDE,), 1.5))
    assert list(zip(row.tolist(), column.tolist(), strict=True)) == [tuple(at) for at in (h > 1.5).nonzero().tolist()]
    assert torch.equal(top_k(h[2:], 5)[1], by_sorting(h[2:], 5)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["topk", "abstopk", "groupmax"])
def test_ranks_of_wide_rows_are_what_the_dense_features_say(kind: str, dtype: torch.dtype) -> None:
    h = matrix(dtype, 320).nan_to_num(posinf=100.0, neginf=-100.0)
    activation = Activation(kind=kind, k=10)  # type: ignore[arg-type]
    values, features = activation.ranked(h)
    dense = activation(h, h[0])
    for row, of_row, names in zip(dense.tolist(), values.tolist(), features.tolist(), strict=True):
        fired = sorted((j for j, x in enumerate(row) if x != 0), key=lambda j: (-row[j], j))
        assert names == fired + [-1] * (10 - len(fired))
        assert of_row == [row[j] for j in fired] + [0.0] * (10 - len(fired))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_flow_through_the_k_largest(dtype: torch.dtype) -> None:
    h = matrix(dtype)[:3].requires_grad_()
    values, columns = top_k(h, 5)
    (slope,) = torch.autograd.grad(values.sum(), h)
    assert torch.equal(slope.nonzero()[:, 1].view(3, 5), columns.sort(dim=-1).values)
