"""Massive activations: a few values of the residual stream that are thousands of times larger than the others, at a few
channels and positions whatever the text, such as a sequence's first token.

Sun, Chen, Kolter and Liu (2024), "Massive Activations in Large Language Models", section 2.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError
from .moments import ROWS_AT_ONCE, reduce_tokens, token_rows
from .statistics import histogram_quantile, magnitude_histogram
from .tokens import counted, label, needs

LEAST_MAGNITUDE = 100.0
LEAST_RATIO = 1000.0

_BITS = 7
_LABELS = ("token", "sequence", "position", "token_id")
_COLUMNS = ("value", "channel", *_LABELS)


def massive_activations(
    activations: xr.Dataset,
    k: int = 10,
    *,
    distinct_channels: bool = False,
    least_magnitude: float = LEAST_MAGNITUDE,
    least_ratio: float = LEAST_RATIO,
    where: xr.DataArray | None = None,
    skip_positions: int = 0,
) -> xr.Dataset:
    """The `k` values of the largest magnitude at each layer, and which of them are massive; lazily in one pass where
    `value` is lazy.

    `activations`: `value[…, token, …, width]` with the coordinates `sequence`, `position` and `token_id`; every other
    dimension is kept. Tokens count as in `moments`, but here from the first position on, which holds most of them, and
    value by value: NaN does not count, infinity does. Along […, rank], rank 0 the largest, of equal magnitudes the
    earlier token, then the lower channel, first:

    - `value` (float32, signed), `channel`, `token` (its number among the tokens given), `sequence`, `position`,
      `token_id` (int64): NaN and −1 where there are fewer than `k`. With `distinct_channels`, each channel stands there
      once, by its own largest: otherwise one channel at the first position of every sequence fills the list.
    - `ratio` (float32): the magnitude over `median_magnitude[…]`, the median over all values of the layer that count:
      exact where they are bfloat16; of others, at most 0.8 % too small, being cut off to bfloat16. Where the median is
      0, infinity for values that are not 0, and NaN for those that are.
    - `massive` (boolean): larger than `least_magnitude` and more than `least_ratio` times the median, the paper's 100
      and 1000.

    Memory: a chunk a thread, 256 KiB an entry of the other dimensions and chunk being merged for the median, and with
    `distinct_channels` as many numbers as the width has beside the `k`. SchemaError for what is no such node or mask.
    """
    rows = token_rows(activations, "the search for massive activations")
    if k < 1:
        raise SchemaError(f"k = {k}: at least 1")
    needs(activations, _LABELS[1:], "the search for massive activations")
    counts = counted(activations, skip_positions, where)
    n = activations.sizes["token"]
    labels = [_numbers(activations, n), *(label(activations, name) for name in _LABELS[1:])]
    n_row = max(k, rows.shape[-1]) if distinct_channels else k
    found = reduce_tokens(
        partial(_largest_of_block, n_row=n_row, distinct=distinct_channels),
        partial(_merged, distinct=distinct_channels),
        rows,
        (counts, *labels),
        shape=(n_row, len(_COLUMNS)),
    )[..., :k, :]
    histogram = reduce_tokens(_histogram_of_block, np.add, rows, (counts,), shape=(1, 2 ** (8 + _BITS)))
    return _labelled(found, histogram, rows, least_magnitude, least_ratio)


def _numbers(activations: xr.Dataset, n: int) -> xr.DataArray:
    chunks = activations["value"].variable.chunksizes.get("token")
    if chunks is None:
        return xr.DataArray(np.arange(n), dims="token")
    import dask.array as da

    return xr.DataArray(da.arange(n, chunks=(chunks,)), dims="token")


def _labelled(found: Any, histogram: Any, rows: xr.DataArray, least_magnitude: float, least_ratio: float) -> xr.Dataset:
    kept = tuple(map(str, rows.dims[:-2]))
    columns = xr.DataArray(found, dims=(*kept, "rank", "column"))
    bins = xr.DataArray(histogram, dims=(*kept, "one", "bin"))
    median = histogram_quantile(bins, [0.5], _BITS, "bin").isel(one=0, quantile=0, drop=True)
    value = columns.isel(column=0)
    magnitude = abs(value)
    ratio = (magnitude / median.where(median > 0)).where((median != 0) | ~(magnitude > 0), np.inf)
    result = xr.Dataset(
        {
            "value": value.astype(np.float32).assign_attrs(long_name="activation"),
            "ratio": ratio.astype(np.float32).assign_attrs(units="1", long_name="magnitude over the median"),
            "massive": ((magnitude > least_magnitude) & (ratio > least_ratio)).assign_attrs(long_name="massive"),
            "median_magnitude": median.astype(np.float32).assign_attrs(long_name="median magnitude"),
        },
        attrs={"least_magnitude": least_magnitude, "least_ratio": least_ratio},
    )
    for place, name in enumerate(_COLUMNS[1:], start=1):
        result[name] = columns.isel(column=place).astype(np.int64).assign_attrs(long_name=name.replace("_", " "))
    coords = {name: coord for name, coord in rows.coords.items() if rows.dims[-1] not in coord.dims}
    return result.assign_coords(coords).assign_coords(rank=np.arange(columns.sizes["rank"]))


def _histogram_of_block(rows: NDArray[Any], counts: NDArray[np.bool_]) -> NDArray[np.float64]:
    found = np.zeros((*rows.shape[:-2], 1, 2 ** (8 + _BITS)))
    for place in np.ndindex(*rows.shape[:-2]):
        for first in range(0, len(counts), ROWS_AT_ONCE):
            some = rows[place][first : first + ROWS_AT_ONCE][counts[first : first + ROWS_AT_ONCE]]
            found[place][0] += magnitude_histogram(some[~np.isnan(some)], _BITS)
    return found


def _largest_of_block(
    rows: NDArray[Any], counts: NDArray[np.bool_], *labels: NDArray[Any], n_row: int, distinct: bool
) -> NDArray[np.float64]:
    """The largest values of a block [..., row, column], some rows at a time; beyond them NaN, and −1."""
    found = np.full((*rows.shape[:-2], n_row, len(_COLUMNS)), -1.0)
    found[..., 0] = np.nan
    for place in np.ndindex(*rows.shape[:-2]):
        for first in range(0, len(counts), ROWS_AT_ONCE):
            span = slice(first, first + ROWS_AT_ONCE)
            own = counts[span]
            part = _largest_of_rows(rows[place][span][own], [one[span][own] for one in labels], n_row, distinct)
            found[place] = _merged(found[place], part, distinct=distinct)
    return found


def _largest_of_rows(rows: NDArray[Any], labels: list[NDArray[Any]], n_row: int, distinct: bool) -> NDArray[np.float64]:
    """The largest values of rows [token, width], in order: [row, column]."""
    magnitude = np.abs(rows)
    magnitude = np.where(np.isnan(magnitude), -1, magnitude)
    if not rows.size:
        return _strongest(np.empty((0, len(_COLUMNS))), n_row)
    if distinct:
        token, channel = magnitude.argmax(0), np.arange(rows.shape[1])
    else:
        # Only the rows with the largest maxima can hold them; what is as large as the last one stays, to be settled by
        # place.
        tops = magnitude.max(1)
        among = np.flatnonzero(tops >= _nth_largest(tops, n_row))
        edge = _nth_largest(magnitude[among].reshape(-1), n_row)
        place, channel = np.nonzero(magnitude[among] >= edge)
        token = among[place]
    known = magnitude[token, channel] >= 0
    token, channel = token[known], channel[known]
    columns = [rows[token, channel], channel, *(one[token] for one in labels)]
    return _strongest(np.stack([np.asarray(one, dtype=np.float64) for one in columns], -1), n_row)


def _nth_largest(values: NDArray[Any], n: int) -> Any:
    place = max(0, len(values) - n)
    return np.partition(values, place)[place]


def _strongest(candidates: NDArray[np.float64], n_row: int) -> NDArray[np.float64]:
    """The first `n_row` by magnitude, token and channel of candidates [row, column], filled up."""
    order = np.lexsort((candidates[:, 1], candidates[:, 2], -np.abs(candidates[:, 0])))[:n_row]
    found = np.full((n_row, len(_COLUMNS)), -1.0)
    found[:, 0] = np.nan
    found[: len(order)] = candidates[order]
    return found


def _merged(a: NDArray[np.float64], b: NDArray[np.float64], *, distinct: bool) -> NDArray[np.float64]:
    found = np.empty_like(a)
    for place in np.ndindex(*a.shape[:-2]):
        both = np.concatenate([a[place], b[place]])
        both = _strongest(both[both[:, 1] >= 0], len(both))
        both = both[both[:, 1] >= 0]
        if distinct:
            both = both[np.sort(np.unique(both[:, 1], return_index=True)[1])]
        found[place] = _strongest(both, a.shape[-2])
    return found
