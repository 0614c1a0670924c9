"""What attention patterns say: who attends to what, how widely and how far, of one prompt or of a whole store.

All read `value[…, query, key]`: a node such as `open_run(path)["activations/attn.hook_pattern"]` or `as_run(forward)`
of it, a selection of one, or a DataArray, among them RWKV's `rwkv.hook_effective_attn` after
`normalize_effective_attention`. Every other dimension (`layer`, `sequence`, `head`) is kept, in its order, with its
coordinates, unless it says otherwise. Nothing is computed before it is asked for where the values are lazy; then a
chunk of patterns a thread is in memory.

How long a sequence is, is read off the values: beyond its end they are NaN, in stores and in labelled captures alike,
so that any selection of sequences can be given and no table has to come with it. What lies beyond is NaN in the
results and is never counted; so is a sequence of a unit that is not recorded. Queries and keys must be there whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ...stores.errors import SchemaError

Pattern: TypeAlias = "xr.DataArray | xr.Dataset | xr.DataTree"
"""A node with the variable `value`, or the values themselves: weights [..., query, key]."""

_WEIGHT = {"units": "attention weight"}


def weights_of(pattern: Pattern, what: str) -> xr.DataArray:
    """Check that what is given holds whole patterns, and give them with `query` and `key` last, each in one chunk.
    `what` names the analysis. SchemaError otherwise.
    """
    if not isinstance(pattern, xr.DataArray) and "value" not in pattern:
        held = ", ".join(map(str, pattern.data_vars)) or "nothing"
        raise SchemaError(
            f"{what} reads the variable `value` of attention patterns, such as "
            f'open_run(path)["activations/attn.hook_pattern"]; what was given holds {held}'
        )
    value = pattern if isinstance(pattern, xr.DataArray) else pattern["value"]
    if not {"query", "key"} <= set(value.dims):
        raise SchemaError(f"{what} reads patterns [..., query, key], not [{', '.join(map(str, value.dims))}]")
    if value.sizes["query"] != value.sizes["key"]:
        raise SchemaError(
            f"{what} counts positions, and so needs every query and key of a sequence: there are "
            f"{value.sizes['query']} queries and {value.sizes['key']} keys. Select from the result instead"
        )
    value = value.transpose(..., "query", "key")
    if value.chunks is None:
        return value
    # DataArray.chunk would make its labels lazy as well.
    return value.copy(data=value.data.rechunk({value.ndim - 2: -1, value.ndim - 1: -1}))


def lengths_of(block: NDArray[Any]) -> NDArray[np.int64]:
    """How many positions of patterns [..., query, key] are not beyond their sequence's end, int64 [...]."""
    return np.asarray((~np.isnan(block[..., :, 0])).sum(-1), dtype=np.int64)


def attention_from(pattern: Pattern, position: int = -1, *, mean_over_heads: bool = False) -> xr.DataArray:
    """Where the query at `position` attends to: float32 [..., key].

    `position` is counted in each sequence's own terms: −1 is its last token. A sequence that does not have it is NaN.
    `mean_over_heads` leaves `head` out. Definition: candle-mi's `attention_from_position`, which is the mean over
    heads.

    SchemaError for what is no pattern, for a position that no sequence can have, and where there is no `head` to take
    the mean over.
    """
    value = _located(pattern, position, "attention_from")
    found = _by_block(value, lambda block: _query_row(block, position), ["key"])
    return _over_heads(found, mean_over_heads).assign_attrs(_WEIGHT, long_name=f"attention from position {position}")


def attention_to(pattern: Pattern, position: int = 0, *, mean_over_heads: bool = False) -> xr.DataArray:
    """How much every query attends to the key at `position`: float32 [..., query], 0 at queries before it.

    Arguments and errors are those of `attention_from`. Definition: candle-mi's `attention_to_position`, which is the
    mean over heads.
    """
    value = _located(pattern, position, "attention_to")
    found = _by_block(value, lambda block: _query_row(block.swapaxes(-1, -2), position), ["query"])
    return _over_heads(found, mean_over_heads).assign_attrs(_WEIGHT, long_name=f"attention to position {position}")


def attention_to_targets(
    pattern: Pattern, targets: int | Sequence[int], position: int = -1, *, mean_over_heads: bool = True
) -> xr.DataArray:
    """How much the query at `position` attends to the keys `targets` on average: float32 [...], without `head` unless
    `mean_over_heads` is off.

    All positions are counted in each sequence's own terms. Targets that a sequence does not have are left out of its
    mean, and one after the query counts as 0; NaN where a sequence has none of them, or not the query. Definition:
    candle-mi's `measure_attention_to_targets`, which is 0 there and takes the mean over sequences as well.

    SchemaError as `attention_from` raises, and for no targets.
    """
    value = _located(pattern, position, "attention_to_targets")
    asked = [int(target) for target in np.atleast_1d(np.asarray(targets, dtype=np.int64))]
    if not asked:
        raise SchemaError("attention_to_targets needs at least one key: targets is empty")
    for target in asked:
        _check_position(target, value.sizes["key"])

    def mean(block: NDArray[Any]) -> NDArray[np.float32]:
        row, length = _query_row(block, position).astype(np.float64), lengths_of(block)
        given = [_place(row, target if target >= 0 else length + target) for target in asked]
        weight = np.stack(given, -1)
        there = ~np.isnan(weight)
        return _divided(np.where(there, weight, 0.0).sum(-1), there.sum(-1))

    found = _over_heads(_by_block(value, mean, []), mean_over_heads)
    return found.assign_attrs(_WEIGHT, long_name=f"mean attention from position {position} to {asked}")


def top_edges(
    pattern: Pattern,
    k: int = 10,
    *,
    by_query: bool = False,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
) -> xr.Dataset:
    """The `k` strongest edges of every pattern, or with `by_query` the `k` keys that each query attends to most.

    Along `rank`, the strongest first and of equal ones the earlier query, then the earlier key: `query`, `key` (int32,
    −1 where a sequence has fewer with a weight) and `weight` (float32, NaN there). With `by_query` there is a dimension
    `query` in place of the variable. `exclude_bos` passes over edges to position 0, which many heads attend to when
    they attend to nothing in particular, and `exclude_current_token` over those of queries to themselves.

    SchemaError for what is no pattern, and for a `k` that is not between 1 and the number of edges.
    """
    value = weights_of(pattern, "top_edges")
    n = value.sizes["query"]
    most = n if by_query else n * (n + 1) // 2
    if not 1 <= k <= most:
        raise SchemaError(f"k = {k}: from 1 to {most} edges of a {'query' if by_query else 'pattern'} can be told")
    allowed = np.tri(n, dtype=bool)
    if exclude_bos:
        allowed[:, 0] = False
    if exclude_current_token:
        np.fill_diagonal(allowed, False)
    kept = ["query"] if by_query else []
    edge, weight = xr.apply_ufunc(
        lambda block: _strongest(block, allowed, k, by_query),
        value,
        input_core_dims=[["query", "key"]],
        output_core_dims=[[*kept, "rank"], [*kept, "rank"]],
        keep_attrs=False,
        dask="parallelized",
        output_dtypes=[np.int64, np.float32],
        dask_gufunc_kwargs={"output_sizes": {"rank": k}},
    )
    key = edge.where(edge < 0, edge % n).astype(np.int32)
    found = {"key": key.assign_attrs(long_name="key position")}
    if not by_query:
        found = {
            "query": edge.where(edge < 0, edge // n).astype(np.int32).assign_attrs(long_name="query position")
        } | found
    found["weight"] = weight.assign_attrs(_WEIGHT, long_name="attention")
    return xr.Dataset(found).assign_coords(rank=np.arange(k))


def attention_entropy(pattern: Pattern, *, window: int | None = None) -> xr.Dataset:
    """How widely each query attends: the entropy of its weights, float32 [..., query].

    `entropy`, −Σ w ln w in nats, from 0 (one key) to the logarithm of the number of keys that the query sees (all
    alike), and `normalized_entropy`, divided by that logarithm; NaN at position 0, which sees only itself. A query at
    position p sees p + 1 keys, or `window` of them where the layer's attention slides. Both are NaN for a row of
    nothing, such as one whose every edge was knocked out, and for one with a weight below 0.

    SchemaError for what is no pattern, and for a window below 1.
    """
    value = weights_of(pattern, "attention_entropy")
    if window is not None and window < 1:
        raise SchemaError(f"window = {window}: a query sees at least 1 key, itself")
    seen = np.arange(1, value.sizes["query"] + 1)
    most = np.log(seen if window is None else np.minimum(seen, window))

    def entropy(block: NDArray[Any]) -> NDArray[np.float32]:
        weight = np.where(np.isnan(block), 0.0, block).astype(np.float64)
        terms = weight * np.log(np.where(weight > 0, weight, 1.0))
        nothing = (weight < 0).any(-1) | (weight.sum(-1) == 0)
        return np.where(nothing, np.nan, np.maximum(-terms.sum(-1), 0.0)).astype(np.float32)

    found = _by_block(value, entropy, ["query"])
    share = found / xr.DataArray(np.where(most > 0, most, np.nan).astype(np.float32), dims="query")
    return xr.Dataset(
        {
            "entropy": found.assign_attrs(units="nats", long_name="attention entropy"),
            "normalized_entropy": share.assign_attrs(units="1", long_name="attention entropy / ln(visible keys)"),
        }
    )


def attention_distance(pattern: Pattern, *, exclude_bos: bool = False) -> xr.DataArray:
    """How far back each query attends on average: Σ w (query − key) / Σ w over its keys, float32 [..., query].

    `exclude_bos` leaves position 0 out of both sums, and with it what heads attend to when they attend to nothing in
    particular. NaN where no weight is left. The mean over queries is the attention distance of Vig and Belinkov (2019,
    "Analyzing the Structure of Attention in a Transformer Language Model") wherever rows add up to 1.

    SchemaError for what is no pattern.
    """
    value = weights_of(pattern, "attention_distance")
    place = np.arange(value.sizes["query"])
    back = (place[:, None] - place).astype(np.float64)
    first = int(exclude_bos)

    def distance(block: NDArray[Any]) -> NDArray[np.float32]:
        weight = np.where(np.isnan(block), 0.0, block)[..., first:].astype(np.float64)
        return _divided((weight * back[:, first:]).sum(-1), weight.sum(-1))

    found = _by_block(value, distance, ["query"])
    return found.assign_attrs(units="positions", long_name="mean attention distance")


def _located(pattern: Pattern, position: int, what: str) -> xr.DataArray:
    value = weights_of(pattern, what)
    _check_position(position, value.sizes["query"])
    return value


def _check_position(position: int, n: int) -> None:
    if not -n <= position < n:
        raise SchemaError(f"position {position}: the sequences have at most {n}, so {-n} to {n - 1}")


def _by_block(value: xr.DataArray, function: Callable[[NDArray[Any]], NDArray[Any]], left: list[str]) -> xr.DataArray:
    found: xr.DataArray = xr.apply_ufunc(
        function,
        value,
        input_core_dims=[["query", "key"]],
        output_core_dims=[left],
        keep_attrs=False,
        dask="parallelized",
        output_dtypes=[np.float32],
    )
    return found


def _over_heads(found: xr.DataArray, mean: bool) -> xr.DataArray:
    if not mean:
        return found
    if "head" not in found.dims:
        raise SchemaError(
            f"there is no dimension `head` in [{', '.join(map(str, found.dims))}] to take the mean over: give "
            "mean_over_heads=False"
        )
    return found.mean("head", skipna=False)


def _query_row(block: NDArray[Any], position: int) -> NDArray[np.float32]:
    """The row [..., key] of patterns [..., query, key] at a position, NaN where the sequence does not have it."""
    length = lengths_of(block)
    place = np.full_like(length, position) if position >= 0 else length + position
    there = (place >= 0) & (place < length)
    row = np.take_along_axis(block, np.where(there, place, 0)[..., None, None], -2)[..., 0, :]
    return np.where(there[..., None], row, np.nan).astype(np.float32)


def _place(row: NDArray[Any], place: NDArray[np.int64] | int) -> NDArray[Any]:
    """The entries [...] of rows [..., key] at places [...], NaN where there is no such place."""
    places = np.broadcast_to(np.asarray(place), row.shape[:-1])
    found = np.take_along_axis(row, np.maximum(places, 0)[..., None], -1)[..., 0]
    return np.where(places >= 0, found, np.nan)


def _divided(total: NDArray[Any], by: NDArray[Any]) -> NDArray[np.float32]:
    found: NDArray[np.float64] = np.divide(total, by, out=np.full(total.shape, np.nan), where=by != 0)
    return found.astype(np.float32)


def _strongest(
    block: NDArray[Any], allowed: NDArray[np.bool_], k: int, by_query: bool
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The strongest edges, numbered row by row (with `by_query` within their row), −1 where there are fewer, and their
    weights."""
    weight = np.where(allowed & (block > 0), block, -np.inf)
    n = weight.shape[-1]
    lead, size = (weight.shape[:-1], n) if by_query else (weight.shape[:-2], n * n)
    flat = weight.reshape(math.prod(lead), size)
    least = np.partition(flat, -k, -1)[:, -k, None]
    larger, equal = flat > least, flat == least
    room = k - larger.sum(-1, keepdims=True)
    chosen = np.nonzero(larger | (equal & (equal.cumsum(-1) <= room)))[1].reshape(len(flat), k)
    held = np.take_along_axis(flat, chosen, -1)
    order = np.argsort(-held, axis=-1, kind="stable")
    edges, found = (np.take_along_axis(x, order, -1).reshape(*lead, k) for x in (chosen, held))
    nothing = np.isneginf(found)
    return np.where(nothing, -1, edges), np.where(nothing, np.nan, found).astype(np.float32)
