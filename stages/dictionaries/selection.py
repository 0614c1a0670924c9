"""Which entries of a matrix are large: the k largest of each row, and those above a bound.

On a CPU numpy compares and partitions in a fraction of the time that torch takes, over as many rows at a time as the
cache holds; 16-bit floats it compares by their bits, which for positive numbers are ordered as the numbers are
(`scripts/bench --only encode` shows what is left beside the matrix product). Elsewhere torch does. What is chosen
depends on neither.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rows: TypeAlias = NDArray[np.float32 | np.int16]
"""Rows of a matrix as numpy compares them: float32, or the bits of 16-bit floats."""
Ints: TypeAlias = NDArray[np.int64]

ROWS_A_THREAD = 256
"""Fewer are not worth a thread."""
TILE_BYTES = 2**22
"""Of rows that are gone over more than once before the next ones are: they stay in the cache that cores share. With
fewer, in their own cache, one thread is as fast and two are slower than one: they wait for Python between calls.
"""
BITS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""16-bit floats that are compared by their bits, and those of infinity, beyond which there is only NaN."""


def top_k(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of a matrix [row, k]: values descending and columns; of equal values the lower column
    wins, on every device. k larger than the row gives the whole row. Without NaN.
    """
    k = min(k, h.shape[-1])
    if h.device.type == "cpu" and 8 * k <= h.shape[-1] and (h.dtype == torch.float32 or h.dtype in BITS):
        return _top_k_of_candidates(h, k)
    values, columns = torch.topk(h, min(k + 1, h.shape[-1]), dim=-1)
    if values.shape[-1] > k:
        # torch leaves open which of equal values it takes: where the last one taken has an equal that was not, look
        # again.
        tied = values[:, k - 1] == values[:, k]
        values, columns = values[:, :k].clone(), columns[:, :k].clone()
        if bool(tied.any()):
            values[tied], columns[tied] = _sorted(h[tied], k)
    columns, order = torch.sort(columns, dim=-1)
    values, order = torch.sort(values.gather(-1, order), dim=-1, descending=True, stable=True)
    return values, columns.gather(-1, order)


def _sorted(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, columns = torch.sort(h, dim=-1, descending=True, stable=True)
    return values[:, :k], columns[:, :k]


def _top_k_of_candidates(h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    parts = _in_parts(lambda part: _largest(part, k, BITS.get(h.dtype)), _rows(h))
    found, columns, unsettled = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
    values = h.gather(-1, columns) if h.requires_grad else found.view(h.dtype)
    if bool(unsettled.any()):
        values[unsettled], columns[unsettled] = _sorted(h[unsettled], k)
    return values, columns


def _largest(h: Rows, k: int, infinity: int | None) -> tuple[Rows, Ints, NDArray[np.bool_]]:
    """Values and columns of the k largest of each row; and the rows of which they were not sought: bits are ordered as
    the numbers are where these are positive, and rows with too little that is, or with NaN, are left out.
    """
    unsettled = np.zeros(len(h), dtype=np.bool_)
    places, values = [np.zeros(0, np.int64)], [np.zeros(0, h.dtype)]
    for first, tile in _tiles(h):
        reached, unsettled[first : first + len(tile)] = _reaching(tile, k, infinity)
        values.append(tile.reshape(-1)[reached])
        places.append(reached + first * h.shape[-1])
    row, column = np.divmod(np.concatenate(places), h.shape[-1])
    count = np.bincount(row, minlength=len(h))
    keys = np.full((len(h), count.max(initial=k)), _NOTHING)
    keys[row, np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)] = _keys(np.concatenate(values), column)
    keys.sort(axis=-1)
    columns = keys[:, :k] & _COLUMN
    columns[columns == _COLUMN] = 0
    return _values(keys[:, :k], h.dtype), columns, unsettled


def _reaching(tile: Rows, k: int, infinity: int | None) -> tuple[Ints, NDArray[np.bool_]]:
    """Places, in all rows end to end, of little more than the k largest entries of each row; and rows left out.

    Each row is cut into 8 k groups or more: the k-th largest of their maxima is a lower bound of the row's k-th
    largest. The maxima are those of a quarter of the members each, so that numpy goes over long runs.
    """
    n_row, width = tile.shape
    members = width // (8 * k)
    quarters = min(4, members)
    members -= members % quarters
    groups = width // members
    within = tile[:, : groups * members].reshape(n_row, members // quarters, quarters * groups).max(axis=1)
    largest = within.reshape(n_row, quarters, groups).max(axis=1)
    largest.partition(groups - k, axis=-1)
    bound = largest[:, groups - k, None]
    reached, out = tile >= bound, np.zeros(n_row, dtype=np.bool_)
    if infinity is not None:
        out = (bound[:, 0] <= 0) | (largest[:, groups - k :].max(axis=-1) > infinity)
        reached[out] = False
    return np.flatnonzero(reached), out


_COLUMN = 2**31 - 1
"""The part of a key that says the column."""
_NOTHING = 0x7F800000 << 32 | _COLUMN
"""The key of −∞ behind all columns."""


def _keys(values: Rows, columns: Ints) -> Ints:
    """Numbers that ascend as values descend and, of equal values, as columns ascend."""
    bits = (values + np.float32(0)).view(np.int32) if values.dtype == np.float32 else values.astype(np.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (~ordered).astype(np.int64) << 32 | columns


def _values(keys: Ints, dtype: np.dtype[Any]) -> Rows:
    """The values of keys; zeros have lost their sign."""
    ordered = ~(keys >> 32).astype(np.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    found: Rows = bits.view(np.float32) if dtype == np.float32 else bits.astype(np.int16)
    return found


def above(h: Tensor, bound: Tensor | float) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of a matrix that are larger than `bound`, a number or one a column, which stay
    float32 whatever the matrix is; row by row, columns ascending. int64.
    """
    return entries_above(h, bound)[:2]


def entries_above(h: Tensor, bound: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """As `above`, with the values of the entries."""
    limits = bound.detach() if isinstance(bound, Tensor) else torch.tensor(bound, dtype=h.dtype, device=h.device)
    of_bits = h.dtype in BITS
    if h.device.type != "cpu" or not (of_bits or h.dtype == torch.float32) or (of_bits and bool((limits < 0).any())):
        row, column = (h > bound).nonzero(as_tuple=True)
        return row, column, h[row, column]
    limit = _bits_below(limits, h.dtype) if of_bits else limits.numpy()
    parts = _in_parts(lambda part: _above(part, limit, BITS.get(h.dtype)), _rows(h))
    starts = np.cumsum([0, *(int(size[0]) for *_, size in parts)])
    row = torch.from_numpy(np.concatenate([row + start for (row, *_), start in zip(parts, starts, strict=False)]))
    column, found = (torch.from_numpy(np.concatenate([part[i] for part in parts])) for i in (1, 2))
    return row, column, h[row, column] if h.requires_grad else found.view(h.dtype)


def _above(h: Rows, limit: NDArray[Any], infinity: int | None) -> tuple[Ints, Ints, Rows, Ints]:
    """Rows, columns and values of what is larger than a limit, without NaN, and the number of rows looked at."""
    places, values = [np.zeros(0, np.int64)], [np.zeros(0, h.dtype)]
    for first, tile in _tiles(h):
        larger = np.flatnonzero(tile > limit)
        found = tile.reshape(-1)[larger]
        if infinity is not None and found.max(initial=0) > infinity:
            larger, found = larger[found <= infinity], found[found <= infinity]
        places.append(larger + first * h.shape[-1])
        values.append(found)
    row, column = np.divmod(np.concatenate(places), h.shape[-1])
    return row, column, np.concatenate(values), np.array([len(h)])


def _bits_below(limits: Tensor, dtype: torch.dtype) -> NDArray[np.int16]:
    """Of limits that are not negative the bits of the largest number of a 16-bit dtype that is not above each: the
    same numbers of that dtype are larger than either.
    """
    rounded = limits.abs().to(dtype)
    found: NDArray[np.int16] = (rounded.view(torch.int16) - (rounded > limits).to(torch.int16)).numpy()
    return found


def _rows(h: Tensor) -> Rows:
    found: Rows = (h.detach().contiguous().view(torch.int16) if h.dtype in BITS else h.detach()).numpy()
    return found


def _tiles(h: Rows) -> Iterator[tuple[int, Rows]]:
    """First row and rows, as many at a time as stay in the cache."""
    n = max(1, TILE_BYTES // max(1, h.shape[-1] * h.itemsize))
    for first in range(0, len(h), n):
        yield first, h[first : first + n]


def _in_parts(work: Callable[[Rows], tuple[NDArray[Any], ...]], h: Rows) -> list[tuple[NDArray[Any], ...]]:
    """What a function makes of the rows of a matrix, cut into as many parts as torch has threads, which work at once:
    numpy holds no lock meanwhile.
    """
    parts = np.array_split(h, max(1, min(torch.get_num_threads(), len(h) // ROWS_A_THREAD)))
    if len(parts) == 1:
        return [work(parts[0])]
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(work, parts))
