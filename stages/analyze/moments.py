"""Mean and covariance of activations in one pass over a store, in bounded memory: what PCA, probes and ablations need.

Blocks are centred on their own means, in float64, and merged in pairs (Chan, Golub and LeVeque 1983, "Algorithms for
computing the sample variance"), so that nothing cancels however far the mean lies from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError
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
    coordinates. `where` boolean [token] narrows the tokens further. A token with NaN among its values, as in units that
    are not recorded, does not count.

    Gives, all float64 but `n_token` int64: `n_token[…]`, `mean[…, width]`, and `covariance[…, width, width_2]`, the
    scatter divided by `n_token − ddof`; NaN where that is not above 0, as is the mean of no tokens. Exact to rounding
    in float64. Memory: a chunk a thread, and (1 + width)² numbers an entry of the other dimensions and chunk being
    merged.

    SchemaError for what is no such node or mask.
    """
    value = vectors(activations, "a mean")
    width = str(value.dims[-1])
    counts = counted(activations, skip_positions)
    if where is not None:
        counts = counts & _mask(where, value.sizes["token"])
    kept = [dim for dim in value.dims if dim not in ("token", width)]
    rows = value.reset_coords(drop=True).transpose(*kept, "token", width)
    packed = _packed(rows, counts)
    both = {f"{width}_2": activations[width].data} if width in activations.coords else {}
    coords = {dim: activations[dim].reset_coords(drop=True) for dim in (*kept, width) if dim in activations.coords}
    n, mean, scatter = packed[..., 0, 0], packed[..., 0, 1:], packed[..., 1:, 1:]
    divisor = (
        np.where(n > ddof, n - ddof, np.nan) if isinstance(n, np.ndarray) else da.where(n > ddof, n - ddof, np.nan)
    )
    return xr.Dataset(
        {
            "n_token": (kept, n.astype(np.int64)),
            "mean": ((*kept, width), mean),
            "covariance": ((*kept, width, f"{width}_2"), scatter / divisor[..., None, None]),
        },
        coords={**coords, **{name: (name, data) for name, data in both.items()}},
    )


def _mask(where: xr.DataArray, n_token: int) -> xr.DataArray:
    if where.dims != ("token",) or where.sizes["token"] != n_token or where.dtype != bool:
        raise SchemaError(
            f"`where` must be boolean [token] of the {n_token:,} tokens given, not {where.dtype} "
            f"[{', '.join(f'{dim}={size}' for dim, size in where.sizes.items())}]"
        )
    return where.reset_coords(drop=True)


def _packed(rows: xr.DataArray, counts: xr.DataArray) -> Any:
    """Moments [..., 1 + width, 1 + width] of rows [..., token, width]: numpy's, or dask's where the rows are lazy."""
    size = rows.sizes[rows.dims[-1]] + 1
    if rows.chunks is None:
        return packed_moments(rows.values, counts.values)
    lazy = rows.data.rechunk({rows.ndim - 1: -1})
    lead, tokens = lazy.chunks[:-2], lazy.chunks[-2]
    mask = da.asarray(counts.data).rechunk((tokens,))
    index = tuple(range(lazy.ndim))
    blocks = da.blockwise(
        _packed_block,
        (*index, lazy.ndim),
        lazy,
        index,
        mask,
        (lazy.ndim - 2,),
        new_axes={lazy.ndim: size},
        adjust_chunks={lazy.ndim - 2: 1, lazy.ndim - 1: size},
        dtype=np.float64,
        meta=np.empty((0,) * (lazy.ndim + 1)),
        concatenate=True,
    )
    axis = len(lead)
    while blocks.numblocks[axis] > 1:
        together = blocks.rechunk({axis: MERGED_AT_ONCE})
        merged = (*lead, (1,) * together.numblocks[axis], (size,), (size,))
        blocks = together.map_blocks(_merge_block, axis=axis, chunks=merged, dtype=np.float64)
    return blocks[(*(slice(None),) * axis, 0)]


def _packed_block(rows: NDArray[Any], counts: NDArray[np.bool_]) -> Packed:
    return packed_moments(rows, counts)[..., None, :, :]


def _merge_block(blocks: Packed, axis: int) -> Packed:
    parts = [np.take(blocks, i, axis) for i in range(blocks.shape[axis])]
    return np.expand_dims(reduce(merged_moments, parts), axis)


def packed_moments(rows: NDArray[Any], counts: NDArray[np.bool_] | None = None) -> Packed:
    """Moments, packed, of rows [..., token, width] in memory, of which those count that `counts` [token] says and that
    hold no NaN.
    """
    lead, (n_token, width) = rows.shape[:-2], rows.shape[-2:]
    found = np.zeros((*lead, width + 1, width + 1))
    found[..., 0, 1:] = np.nan
    for place in np.ndindex(*lead):
        for first in range(0, n_token, ROWS_AT_ONCE):
            some = np.asarray(rows[place][first : first + ROWS_AT_ONCE], dtype=np.float64)
            kept = ~np.isnan(some).any(-1)
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
