"""Attention patterns: which key each query attends to, a panel a head."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import numpy as np
import xarray as xr

from ...stores.errors import SchemaError
from .style import inches, plain, set_ticks, tick_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 64


class _Scale(TypedDict):
    cmap: str
    vmin: float
    vmax: float


def attention_pattern(pattern: xr.DataArray, *, columns: int = 4, ax: Axes | None = None) -> Axes | np.ndarray:
    """Draw weights [query, key], or one panel for each of [head, query, key], at most 64.

    The first query is at the top, the first key at the left; labels are the texts of tokens where there are
    `query_token_text` and `key_token_text`, or `token_text` along them. White is 0; all panels share the scale, whose
    upper end is 1, or the largest weight where that is more. Where some weight is below 0, as in a difference of
    patterns, red is above 0, blue below, and the scale reaches as far to either side. Computes what is lazy. Gives the
    axes, an array of them for several heads. SchemaError for other dimensions.
    """
    pattern = plain(pattern, (2, 3), "an attention pattern")
    if tuple(pattern.dims[-2:]) != ("query", "key"):
        raise SchemaError(
            f"an attention pattern is [query, key] or [head, query, key], not {list(map(str, pattern.dims))}"
        )
    least, most = float(pattern.min()), max(1.0, float(pattern.max()))
    scale = _Scale(cmap="Purples", vmin=0.0, vmax=most)
    if least < 0:
        most = max(-least, most)
        scale = _Scale(cmap="RdBu_r", vmin=-most, vmax=most)
    if pattern.ndim == 2:
        return _panel(pattern, scale, ax, "", labelled=True)
    n = pattern.sizes[pattern.dims[0]]
    if n > MOST_PANELS:
        raise SchemaError(f"{n} panels are more than can be read, {MOST_PANELS}: choose heads with .sel(head=…)")
    return _grid(pattern, scale, columns)


def _grid(pattern: xr.DataArray, scale: _Scale, columns: int) -> np.ndarray:
    from matplotlib import pyplot

    over = str(pattern.dims[0])
    n = pattern.sizes[over]
    columns = min(columns, n)
    rows = -(-n // columns)
    size = inches(pattern.sizes["key"], 2.0, 5.0)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(size * columns, size * rows), layout="constrained", squeeze=False
    )
    names = pattern[over].values if over in pattern.coords else range(n)
    for i, (one, name) in enumerate(zip(axes.flat, names, strict=False)):
        _panel(pattern.isel({over: i}), scale, one, f"{over} {name}", labelled=True)
    for unused in axes.flat[n:]:
        unused.set_visible(False)
    figure.colorbar(axes.flat[0].images[0], ax=axes, label="weight", shrink=0.6)
    return np.asarray(axes)


def _panel(pattern: xr.DataArray, scale: _Scale, ax: Axes | None, title: str, *, labelled: bool) -> Axes:
    from .style import new_axes

    size = inches(pattern.sizes["key"], 3.0, 9.0)
    alone = ax is None
    ax = new_axes(ax, size + 1.0, size)
    image = ax.imshow(pattern.values, aspect="equal", **scale)
    ax.set_facecolor("0.85")
    for axis, dim in (("x", "key"), ("y", "query")):
        set_ticks(ax, axis, tick_labels(pattern, dim))
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.set_title(title)
    if alone:
        ax.figure.colorbar(image, ax=ax, label="weight")
    return ax
