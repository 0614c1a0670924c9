"""Bars: a number for each of a few things, such as the tokens whose probability changed most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ...stores.errors import SchemaError
from .style import described, inches, new_axes, plain, set_ticks, tick_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 60


def bars(values: xr.DataArray, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw one dimension as horizontal bars, the first at the top, red above 0 and blue below; at most 60.

    Labels come from the coordinates (`token_text`, `component`, …) and from `long_name` and `units`. Computes what is
    lazy. Gives the axes. SchemaError for other dimensions, and for more bars than can be read.
    """
    values = plain(values, (1,), "bars")
    (dim,) = map(str, values.dims)
    if values.sizes[dim] > MOST_BARS:
        raise SchemaError(
            f"{values.sizes[dim]:,} bars are more than can be read, {MOST_BARS}: choose with .isel({dim}=…)"
        )
    ax = new_axes(ax, 6.4, inches(values.sizes[dim], 2.0, 14.0))
    numbers = values.values.astype(float)
    colours = np.where(numbers >= 0, "tab:red", "tab:blue")
    ax.barh(np.arange(len(numbers)), numbers, color=colours.tolist())
    set_ticks(ax, "y", tick_labels(values, dim))
    ax.invert_yaxis()
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.set_ylabel(dim)
    ax.set_xlabel(described(values))
    ax.grid(axis="x", alpha=0.3)
    if title:
        ax.set_title(title)
    return ax
