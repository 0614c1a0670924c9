"""Which entries of a matrix are large: the k largest of each row, and those above a bound.

On a CPU numpy compares and partitions in a fraction of the time that torch takes (`scripts/bench --only encode` shows
what is left beside the matrix product); elsewhere torch does.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]

ROWS_A_THREAD = 256
"""Fewer are not worth a thread."""


def top_k(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of a matrix [row, k]: values descending and columns; of equal values the lower column
    wins, on every device. k larger than the row gives the whole row. Without NaN.
    """
    k = min(k, h.shape[-1])
    if h.device.type == "cpu" and h.dtype == torch.float32 and 8 * k <= h.shape[-1]:
        parts = _in_parts(lambda part: _top_k_of_candidates(part, k), h.detach().numpy())
        values, columns = (torch.from_numpy(np.concatenate(found)) for found in zip(*parts, strict=True))
        return (h.gather(-1, columns) if h.requires_grad else values), columns
    values, columns = torch.topk(h, min(k + 1, h.shape[-1]), dim=-1)
    if values.shape[-1] > k:
        # torch leaves open which of equal values it takes: where the last one taken has an equal that was not, look
        # again.
        tied = values[:, k - 1] == values[:, k]
        values, columns = values[:, :k].clone(), columns[:, :k].clone()
        if bool(tied.any()):
            again, order = torch.sort(h[tied], dim=-1, descending=True, stable=True)
            values[tied], columns[tied] = again[:, :k], order[:, :k]
    columns, order = torch.sort(columns, dim=-1)
    values, order = torch.sort(values.gather(-1, order), dim=-1, descending=True, stable=True)
    return values, columns.gather(-1, order)


def _top_k_of_candidates(h: Floats, k: int) -> tuple[Floats, Ints]:
    """Cut each row into 8 k groups or more: the k-th largest of their maxima is a lower bound of the row's k-th
    largest, and little more than k entries reach it.
    """
    n_row, width = h.shape
    members = width // (8 * k)
    groups = width // members
    largest = h[:, : groups * members].reshape(n_row, members, groups).max(axis=1)
    largest.partition(groups - k, axis=-1)
    row, column = np.divmod(np.flatnonzero(h >= largest[:, groups - k, None]), width)
    count = np.bincount(row, minlength=n_row)
    place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    columns = np.zeros((n_row, count.max(initial=k)), dtype=np.int64)
    values = np.full(columns.shape, -np.inf, dtype=np.float32)
    columns[row, place], values[row, place] = column, h[row, column]
    order = np.argsort(-values, axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(values, order, -1), np.take_along_axis(columns, order, -1)


def _in_parts(work: Callable[[Floats], tuple[NDArray[Any], ...]], h: Floats) -> list[tuple[NDArray[Any], ...]]:
    """What a function makes of the rows of a matrix, cut into as many parts as torch has threads, which work at once:
    numpy holds no lock meanwhile.
    """
    parts = np.array_split(h, max(1, min(torch.get_num_threads(), len(h) // ROWS_A_THREAD)))
    if len(parts) == 1:
        return [work(parts[0])]
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(work, parts))


def above(h: Tensor, bound: Tensor | float) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of a matrix that are larger than `bound`, a number or one a column; row by row,
    columns ascending. int64.
    """
    if h.device.type == "cpu" and h.dtype == torch.float32:
        limit = bound.detach().numpy() if isinstance(bound, Tensor) else bound

        def work(part: Floats) -> tuple[Ints, Ints, Ints]:
            return *np.divmod(np.flatnonzero(part > limit), part.shape[-1]), np.array([len(part)])

        parts = _in_parts(work, h.detach().numpy())
        first = np.cumsum([0, *(int(size[0]) for _, _, size in parts)])
        rows = np.concatenate([row + start for (row, _, _), start in zip(parts, first, strict=False)])
        return torch.from_numpy(rows), torch.from_numpy(np.concatenate([column for _, column, _ in parts]))
    row_, column_ = (h > bound).nonzero(as_tuple=True)
    return row_, column_
