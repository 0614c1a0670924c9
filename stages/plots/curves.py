"""Curves: by layer, by dose, by component."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ...stores.errors import SchemaError
from .style import described, drawable, new_axes, plain, set_ticks, tick_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CURVES = 20


def line(
    values: xr.DataArray,
    *,
    x: str | None = None,
    low: xr.DataArray | None = None,
    high: xr.DataArray | None = None,
    chance: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one dimension as a curve, or two as a curve for each place of the other one, at most 20.

    `x` is the dimension along the axis: by default `layer`, `dose`, `position` or the last. `low` and `high`, of the
    same dimensions, are drawn as a band: a confidence interval. `chance` is a dashed line. Labels come from the
    coordinates and from `long_name` and `units`. Computes what is lazy. Gives the axes. SchemaError for other
    dimensions.
    """
    values = plain(values, (1, 2), "a curve")
    if (low is None) != (high is None):
        raise SchemaError("a band has two edges: give low= and high=, or neither")
    if low is not None and high is not None:
        low, high = _edge(low, values), _edge(high, values)
    along = _along(values, x)
    over = next((str(dim) for dim in values.dims if dim != along), None)
    if over is not None and values.sizes[over] > MOST_CURVES:
        raise SchemaError(
            f"{values.sizes[over]} curves along {over!r} cannot be told apart: choose at most {MOST_CURVES}"
        )
    ax = new_axes(ax, 6.4, 4.0)
    places = _places(ax, values, along)
    for i in range(1 if over is None else values.sizes[over]):
        name = None if over is None else tick_labels(values, over)[i]
        one = values if over is None else values.isel({over: i})
        (drawn,) = ax.plot(places, one.values, marker="o", markersize=3, label=name)
        if low is not None and high is not None:
            below, above = (band if over is None else band.isel({over: i}) for band in (low, high))
            ax.fill_between(places, below.values, above.values, alpha=0.2, color=drawn.get_color(), linewidth=0)
    if chance is not None:
        ax.axhline(chance, color="0.5", linestyle="--", linewidth=1)
        ax.annotate("chance", (0.99, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    if over is not None:
        ax.legend(title=over, fontsize=8, title_fontsize=8)
    ax.set_xlabel(drawable(str(values[along].attrs.get("long_name", along)) if along in values.coords else along))
    ax.set_ylabel(described(values))
    ax.grid(alpha=0.3)
    if title:
        ax.set_title(title)
    return ax


def _edge(band: xr.DataArray, values: xr.DataArray) -> xr.DataArray:
    """One edge of the band around values, with their dimensions in their order. SchemaError for others."""
    band = plain(band, (values.ndim,), "a band around this curve")
    if dict(band.sizes) != dict(values.sizes):
        raise SchemaError(f"a band around {dict(values.sizes)} must have these dimensions, not {dict(band.sizes)}")
    return band.transpose(*values.dims)


def _along(values: xr.DataArray, x: str | None) -> str:
    dims = [str(dim) for dim in values.dims]
    if x is not None and x not in dims:
        raise SchemaError(f"there is no dimension {x!r} to draw along; there are {dims}")
    return x or next((dim for dim in ("layer", "dose", "strength", "position", "component") if dim in dims), dims[-1])


def _places(ax: Axes, values: xr.DataArray, along: str) -> np.ndarray:
    """Where the points stand: at the coordinate where it is numbers, else at 0, 1, 2, … with labels."""
    has_text = any(name.endswith("text") and values[name].dims == (along,) for name in map(str, values.coords))
    numbers = values[along].values if along in values.coords else np.arange(values.sizes[along])
    if not has_text and np.issubdtype(numbers.dtype, np.number):
        return np.asarray(numbers)
    set_ticks(ax, "x", tick_labels(values, along))
    return np.arange(values.sizes[along])


def dose_response(curve: xr.Dataset, *, title: str | None = None, ax: np.ndarray | None = None) -> np.ndarray:
    """Draw every variable of a dose–response curve over its doses, a panel each: what lies along `dose` (or
    `strength`, `scale`), and along one further dimension at most.

    `ax`: as many axes as there are such variables; None: a new figure. Computes what is lazy. Gives the array of axes.
    SchemaError where nothing lies along a dose.
    """
    along = next((dim for dim in ("dose", "strength", "scale") if dim in curve.dims), None)
    drawn = [name for name, v in curve.data_vars.items() if along in v.dims and v.ndim <= 2 and v.dtype.kind in "fiu"]
    if along is None or not drawn:
        raise SchemaError(f"nothing here lies along a dose: {dict(curve.sizes)}")
    if ax is None:
        from matplotlib import pyplot

        size = (4.6 * len(drawn), 3.6)
        ax = pyplot.subplots(1, len(drawn), figsize=size, layout="constrained", squeeze=False)[1][0]
    for one, name in zip(ax, drawn, strict=True):
        line(curve[name], x=along, ax=one)
    if title:
        ax[0].figure.suptitle(title)
    return ax


def explained_variance(components: xr.Dataset, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw which share of the variance components explain, numbered from 1, each and together from the first that is
    given; of several layers only together, a curve each. A curve ends at the first NaN.

    `components` has `explained_variance_ratio` [component] or [layer, component], as `pca` gives it. Computes what is
    lazy. Gives the axes.
    """
    if "explained_variance_ratio" not in components:
        raise SchemaError(f"explained_variance_ratio is drawn, and there is {sorted(map(str, components.data_vars))}")
    ratio = plain(components["explained_variance_ratio"], (1, 2), "explained variance")
    number = ratio["component"].values + 1  # 0, 1, 2, … where there is no coordinate
    from_ = f" from component {number[0]}" if number[0] > 1 else ""
    name = f"explained variance, cumulated{from_}"
    together = ratio.cumsum("component", skipna=False).assign_attrs(long_name=name, units="fraction")
    ax = line(together.assign_coords(component=number), x="component", title=title, ax=ax)
    if ratio.ndim == 1:
        ax.bar(number, ratio.values, alpha=0.4)
        ax.set_ylabel("fraction of the variance: bars each, curve together")
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("component")
    return ax
