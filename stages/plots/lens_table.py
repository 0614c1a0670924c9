"""The table of a logit lens: what each layer would say at each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from ...stores.errors import SchemaError
from .style import inches, new_axes, set_ticks, token_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_CELLS = 1500

Decode = Callable[[Sequence[int]], Sequence[str]]
"""From token ids to the text of each, such as `model.tokenizer.to_str_tokens` or `run.to_str_tokens`."""


def lens_table(
    lens: xr.Dataset, *, decode: Decode | None = None, title: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw what `logit_lens` gives of a few tokens: rows are layers, the last at the top, columns the tokens read.

    `lens` has `top_token_id` and `top_probability` along `layer`, `token` (or `position`) and `rank`; at most 1,500
    cells, so choose a sequence: `lens.sel(sequence=3)`. A cell holds the strongest token, by `decode` its text, on the
    colour of its probability. Cells with the token that really follows are outlined, where `next_token_id` is known.
    Computes what is lazy. Gives the axes. SchemaError for what is no lens, and for too many cells.
    """
    if not {"top_token_id", "top_probability"} <= set(lens.data_vars) or "rank" not in lens.dims:
        raise SchemaError(
            f"a lens table is drawn of what logit_lens gives, with top_token_id and top_probability along rank, not of "
            f"{sorted(map(str, lens.data_vars))}"
        )
    strongest = lens.isel(rank=0)
    along = next((dim for dim in ("token", "position") if dim in strongest.dims), None)
    if along is None or set(strongest["top_token_id"].dims) - {"layer", along}:
        raise SchemaError(f"a lens table has layers and tokens, not {list(map(str, strongest['top_token_id'].dims))}")
    layers = strongest.sizes.get("layer", 1)
    if layers * strongest.sizes[along] > MOST_CELLS:
        raise SchemaError(
            f"{layers} layers × {strongest.sizes[along]:,} tokens are more than the {MOST_CELLS:,} cells that can be "
            "read: choose, for instance, one sequence with .sel(sequence=…)"
        )
    strongest = strongest.expand_dims("layer") if "layer" not in strongest.dims else strongest
    return _draw(strongest.transpose("layer", along, ...).compute(), along, decode, title, ax)


def _draw(lens: xr.Dataset, along: str, decode: Decode | None, title: str | None, ax: Axes | None) -> Axes:
    ids, probability = lens["top_token_id"].values, lens["top_probability"].values
    n_layer, n_token = ids.shape
    ax = new_axes(ax, 2.0 + 0.85 * n_token, inches(n_layer, 2.0, 14.0))
    image = ax.imshow(probability, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1)
    texts = _texts([*ids.ravel().tolist()], decode)
    for (row, column), label in zip(np.ndindex(n_layer, n_token), texts, strict=True):
        colour = "white" if probability[row, column] > 0.55 else "black"
        ax.text(column, row, label, ha="center", va="center", fontsize=7, color=colour)
    _outline(ax, lens, ids)
    read = lens["token_id"].values.tolist() if "token_id" in lens.coords else range(n_token)
    set_ticks(ax, "x", _texts(read, decode if "token_id" in lens.coords else None))
    set_ticks(ax, "y", [str(layer) for layer in (lens["layer"].values if "layer" in lens.coords else range(n_layer))])
    ax.set_xlabel("token read")
    ax.set_ylabel("layer")
    ax.figure.colorbar(image, ax=ax, label="probability of the strongest token")
    if title:
        ax.set_title(title)
    return ax


def _texts(ids: Sequence[int], decode: Decode | None) -> list[str]:
    if decode is None:
        return ["" if one < 0 else str(one) for one in ids]
    known = sorted({one for one in ids if one >= 0})
    texts = dict(zip(known, decode(known), strict=True))
    return [token_label(texts[one]) if one >= 0 else "" for one in ids]


def _outline(ax: Axes, lens: xr.Dataset, ids: np.ndarray) -> None:
    if "next_token_id" not in lens.coords:
        return
    from matplotlib.patches import Rectangle

    right = (ids == lens["next_token_id"].values) & (ids >= 0)
    for row, column in np.argwhere(right):
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="tab:orange", linewidth=1.5))
