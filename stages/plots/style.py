"""What all figures share: axes, labels from coordinates and attributes, and token texts that can be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ...stores.errors import SchemaError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TICKS = 40
"""Labels along an axis; of more, every second, third, … is drawn."""
MOST_CHARACTERS = 14
_SHOWN = {"\n": "\\n", "\t": "\\t", "\r": "\\r", " ": "·"}
_INCHES_A_CELL = 0.32


def new_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """The axes given, or those of a new figure of this size in inches, laid out so that nothing is cut off."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")[1]


def inches(cells: int, least: float = 3.0, most: float = 16.0) -> float:
    """The length of an axis of so many labelled cells."""
    return float(np.clip(1.5 + _INCHES_A_CELL * min(cells, MOST_TICKS), least, most))


def described(values: xr.DataArray) -> str:
    """The label of a variable: its `long_name` or name, and its units in brackets, where it has some."""
    name = str(values.attrs.get("long_name") or values.name or "")
    units = values.attrs.get("units")
    return drawable(f"{name} ({units})" if units not in (None, "", "1") and f"({units})" not in name else name)


def tick_labels(values: xr.DataArray | xr.Dataset, dim: str) -> list[str]:
    """A label for each place along a dimension: the text of its token, without its number, where there is one
    (`token_text`, or `key_token_text` along `key`), else the coordinate's value, else the number.
    """
    for name in (f"{dim}_token_text", f"{dim}_text", "token_text", "text"):
        if name in values.coords and values[name].dims == (dim,):
            return [token_label(str(text)) for text in values[name].values]
    numbers = values[dim].values if dim in values.coords else np.arange(values.sizes[dim])
    return [drawable(_number(one)) for one in numbers]


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


def token_label(text: str) -> str:
    """The text of a token as a label: a space as ·, control characters spelt out, cut where it is long."""
    shown = "".join(_SHOWN.get(ch, ch) for ch in text)
    return drawable(shown if len(shown) <= MOST_CHARACTERS else f"{shown[: MOST_CHARACTERS - 1]}…")


def drawable(text: str) -> str:
    """The text without what matplotlib takes for mathematics, and characters that its font lacks as \\u and their
    number.
    """
    known = _glyphs()
    seen = (ch if (ord(ch) in known and ch.isprintable()) or ch == "\n" else f"\\u{ord(ch):04x}" for ch in text)
    shown = "".join(seen)
    return shown.replace("$", r"\$")


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def set_ticks(ax: Axes, axis: str, labels: Sequence[str]) -> None:
    """Label the places 0, 1, 2, … of the axis "x" or "y", every one or as many as there is room for."""
    step = -(-len(labels) // MOST_TICKS) if labels else 1
    places = range(0, len(labels), max(step, 1))
    shown = [labels[place] for place in places]
    if axis == "x":
        turned = max(map(len, shown), default=0) * len(shown) > 60
        ax.set_xticks(list(places), shown, rotation=90 if turned else 0, fontsize=8)
    else:
        ax.set_yticks(list(places), shown, fontsize=8)


def plain(values: xr.DataArray, n_dims: Sequence[int], what: str) -> xr.DataArray:
    """Values in memory, without the last dimensions of length one beyond those that can be drawn. SchemaError where
    more are left, naming them.
    """
    ones = [dim for dim, size in values.sizes.items() if size == 1]
    while values.ndim > max(n_dims) and ones:
        values = values.isel({ones.pop(): 0})
    if values.ndim not in n_dims:
        sizes = ", ".join(f"{dim}={size}" for dim, size in values.sizes.items())
        raise SchemaError(
            f"{what} draws {' or '.join(map(str, n_dims))} dimensions, and [{sizes}] was given: choose with .sel(…), "
            "or take a mean"
        )
    return values.compute()
