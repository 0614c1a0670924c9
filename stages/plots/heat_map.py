"""Heat maps: a number for each layer and position, layer and head, or any two labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from .style import described, inches, new_axes, plain, set_ticks, tick_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ANNOTATED = 600


def heat_map(
    values: xr.DataArray,
    *,
    center: float | None = None,
    cmap: str | None = None,
    annotate: bool = False,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw two dimensions as rows and columns, with the labels that their coordinates have.

    Rows are the first dimension, or `layer` where that is the second, the first layer at the bottom; other rows go
    from top to bottom. Positions are labelled by the text of their tokens where there is `token_text`. `center` is the
    number that is white between blue (below) and red; None: from dark to light. `annotate` writes the numbers into the
    cells, at most 600. The colour bar has the variable's `long_name` and `units`. What is NaN is grey. Computes what is
    lazy. Gives the axes. SchemaError for more or fewer than two dimensions.
    """
    values = plain(values, (2,), "a heat map")
    rows, columns = (str(dim) for dim in values.dims)
    if columns == "layer":
        values, rows, columns = values.transpose(), columns, rows
    ax = new_axes(ax, inches(values.sizes[columns]) + 1.5, inches(values.sizes[rows], 2.0, 12.0))
    numbers = values.values.astype(float)
    limits = _limits(numbers, center)
    shades = cmap or ("viridis" if center is None else "RdBu_r")
    image = ax.imshow(
        numbers,
        aspect="auto",
        origin="lower" if rows == "layer" else "upper",
        cmap=shades,
        vmin=limits[0],
        vmax=limits[1],
        interpolation="nearest",
    )
    ax.set_facecolor("0.8")
    for axis, dim in (("x", columns), ("y", rows)):
        set_ticks(ax, axis, tick_labels(values, dim))
        (ax.set_xlabel if axis == "x" else ax.set_ylabel)(dim)
    ax.figure.colorbar(image, ax=ax, label=described(values))
    if annotate and numbers.size <= MOST_ANNOTATED:
        _annotate(ax, numbers, image)
    if title:
        ax.set_title(title)
    return ax


def _limits(numbers: np.ndarray, center: float | None) -> tuple[float | None, float | None]:
    finite = numbers[np.isfinite(numbers)]
    if center is None or not finite.size:
        return None, None
    reach = float(np.abs(finite - center).max()) or 1.0
    return center - reach, center + reach


def _annotate(ax: Axes, numbers: np.ndarray, image: object) -> None:
    for (row, column), number in np.ndenumerate(numbers):
        if np.isfinite(number):
            shade = image.cmap(image.norm(number))  # type: ignore[attr-defined]
            dark = np.dot(shade[:3], (0.299, 0.587, 0.114)) < 0.5
            colour = "white" if dark else "black"
            ax.text(column, row, f"{number:.2g}", ha="center", va="center", fontsize=7, color=colour)
