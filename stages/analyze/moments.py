"""Mean and covariance of activations in one pass over a store, in bounded memory: what PCA, probes and ablations need.

Blocks are centred on their own means, in float64, and merged in pairs (Chan, Golub and LeVeque 1983, "Algorithms for
computing the sample variance"), so that nothing cancels however far the mean lies from 0. `reduce_tokens` is such a
pass for any numbers that two blocks can merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .tokens import counted, vectors

ROWS_AT_ONCE = 4096
MERGED_AT_ONCE = 8

Packed = NDArray[np.float64]
"""Moments in one array [..., 1 + width, 1 + width]: the count in its corner, the mean in its first row, and the sum of
products of deviations from the mean, the scatter, below."""


def moments(
    activations: xr.Dataset, *, where: xr.DataArray | None = None, skip_positions: int = 1, ddof: int = 1
) -> xr.Dataset:
    """Mean and covariance over the tokens that count, lazily where `value` is lazy.

    `activations`: `value[…, token, …, width]`; every other dimension, such as `layer` or `head`, is kept, and its
    coordinates. `where` boolean [token] narrows the tokens further. A token with NaN or infinity among its values, as
    in units that are not recorded, does not count.

    Gives, all float64 but `n_token` int64: `n_token[…]`, `mean[…, width]`, and `covariance[…, width, width_2]`, the
    scatter divided by `n_token − ddof`; NaN where that is not above 0, as is the mean of no tokens. Exact to rounding
    in float64. Memory: a chunk a thread, and (1 + width)² numbers an entry of the other dimensions and chunk being
    merged.

    SchemaError for what is no such node or mask.
    """
    rows = token_rows(activations, "a mean")
    return labelled_moments(rows, counted(activations, skip_positions, where), ddof)


def labelled_moments(rows: xr.DataArray, counts: xr.DataArray, ddof: int = 1) -> xr.Dataset:
    """What `moments` gives, of rows [..., token, width] as `token_rows` gives them, of which `counts` boolean [token]
    says which count.
    """
    *kept, _, width = map(str, rows.dims)
    size = rows.sizes[width] + 1
    packed = reduce_tokens(packed_moments, merged_moments, rows, (counts,), shape=(size, size))
    both = {f"{width}_2": rows[width].values} if width in rows.coords else {}
    n, mean, scatter = packed[..., 0, 0], packed[..., 0, 1:], packed[..., 1:, 1:]
    xp = np if isinstance(packed, np.ndarray) else da
    divisor = xp.where(n > ddof, n - ddof, np.nan)[..., None, None]
    found = xr.Dataset(
        {
            "n_token": (kept, n.astype(np.int64), {"units": "tokens", "long_name": "tokens counted"}),
            "mean": ((*kept, width), mean, {"long_name": "mean"}),
            "covariance": ((*kept, width, f"{width}_2"), scatter / divisor, {"long_name": "covariance"}),
        }
    )
    return found.assign_coords(rows.coords).assign_coords({name: (name, values) for name, values in both.items()})


def token_rows(activations: xr.Dataset, what: str) -> xr.DataArray:
    """The vectors of a node as rows [..., token, width] with the coordinates of every dimension but `token`. `what`
    names the analysis in the SchemaError for a node without them.
    """
    value = vectors(activations, what)
    along = [name for name, coord in value.coords.items() if "token" in coord.dims]
    return value.drop_vars(along).transpose(..., "token", value.dims[-1])


def reduce_tokens(
    block: Callable[..., Packed],
    merge: Callable[[Packed, Packed], Packed],
    rows: xr.DataArray,
    per_token: Sequence[xr.DataArray] = (),
    per_entry: Sequence[Any] = (),
    *,
    shape: tuple[int, int],
) -> Any:
    """One pass over tokens: [..., *shape] float64, numpy's or, where the rows are lazy, dask's.

    `rows` [..., token, width]; `per_token` variables [token] and `per_entry` arrays [..., a, b], which belong to an
    entry of the leading dimensions, are handed on to `block(rows, *per_token, *per_entry)`, which gives [..., *shape]
    of some of the tokens; `merge` puts two of these together, whatever tokens they cover, in their order. Memory: a
    chunk a thread, and at most MERGED_AT_ONCE results a thread that merges.
    """
    if rows.chunks is None:
        return block(rows.values, *(one.values for one in per_token), *per_entry)
    lazy = rows.data.rechunk({rows.ndim - 1: -1})
    axis, lead, tokens = lazy.ndim - 2, lazy.chunks[:-2], lazy.chunks[-2]
    index, out = tuple(range(lazy.ndim)), tuple(range(lazy.ndim, lazy.ndim + 2))
    arguments: list[Any] = [lazy, index]
    for one in per_token:
        arguments += [da.asarray(one.data).rechunk((tokens,)), (axis,)]
    for place, entry in enumerate(per_entry):
        own = (out[-1] + 2 * place + 1, out[-1] + 2 * place + 2)
        arguments += [da.asarray(entry).rechunk((*lead, -1, -1)), (*index[:axis], *own)]
    blocks = da.blockwise(
        partial(_block, block),
        (*index[: axis + 1], *out),
        *arguments,
        new_axes=dict(zip(out, shape, strict=True)),
        adjust_chunks={axis: 1},
        dtype=np.float64,
        meta=np.empty((0,) * (lazy.ndim + 1)),
        concatenate=True,
    )
    while blocks.numblocks[axis] > 1:
        together = blocks.rechunk({axis: MERGED_AT_ONCE})
        chunks = (*lead, (1,) * together.numblocks[axis], (shape[0],), (shape[1],))
        blocks = together.map_blocks(_merge_block, axis=axis, merge=merge, chunks=chunks, dtype=np.float64)
    return blocks[(*(slice(None),) * axis, 0)]


def _block(block: Callable[..., Packed], rows: NDArray[Any], *others: Any) -> Packed:
    return block(rows, *others)[..., None, :, :]


def _merge_block(blocks: Packed, axis: int, merge: Callable[[Packed, Packed], Packed]) -> Packed:
    parts = [np.take(blocks, i, axis) for i in range(blocks.shape[axis])]
    return np.expand_dims(reduce(merge, parts), axis)


def packed_moments(rows: NDArray[Any], counts: NDArray[np.bool_] | None = None) -> Packed:
    """Moments, packed, of rows [..., token, width] in memory, of which those count that `counts` [token] says and that
    are finite.
    """
    lead, (n_token, width) = rows.shape[:-2], rows.shape[-2:]
    found = np.zeros((*lead, width + 1, width + 1))
    found[..., 0, 1:] = np.nan
    for place in np.ndindex(*lead):
        for first in range(0, n_token, ROWS_AT_ONCE):
            some = np.asarray(rows[place][first : first + ROWS_AT_ONCE], dtype=np.float64)
            kept = np.isfinite(some).all(-1)
            kept &= True if counts is None else counts[first : first + ROWS_AT_ONCE]
            if kept.any():
                found[place] = merged_moments(found[place], _of_rows(some[kept]))
    return found


def _of_rows(rows: NDArray[np.float64]) -> Packed:
    mean = rows.mean(0)
    deviation = rows - mean
    return np.block([[np.array([[len(rows)]]), mean[None]], [np.zeros((len(mean), 1)), deviation.T @ deviation]])


def merged_moments(a: Packed, b: Packed) -> Packed:
    """Moments, packed, of two disjoint sets of rows together."""
    n_a, n_b = a[..., 0, 0, None], b[..., 0, 0, None]
    n = n_a + n_b
    mean_a, mean_b = (np.where(m[..., 0, 0, None] > 0, m[..., 0, 1:], 0.0) for m in (a, b))
    between = mean_b - mean_a
    share = np.divide(n_b, n, out=np.zeros_like(n), where=n > 0)
    found = a + b
    found[..., 0, 1:] = np.where(n > 0, mean_a + between * share, np.nan)
    found[..., 1:, 0] = 0.0
    found[..., 1:, 1:] += (n_a * share)[..., None] * (between[..., :, None] * between[..., None, :])
    return found


def total_moments(parts: Sequence[Packed]) -> Packed:
    """Moments, packed, of disjoint sets of rows together."""
    return reduce(merged_moments, parts)
