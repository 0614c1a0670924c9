"""Directions: vectors that stand for a difference, from a store of activations, from pairs of prompts or from tokens.

The difference of two means (Marks and Tegmark 2023, "The Geometry of Truth"; Rimsky et al. 2023, "Steering Llama 2 via
Contrastive Activation Addition"), and the first component of paired differences (Zou et al. 2023, "Representation
Engineering").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.errors import nearest
from ..models.model import Model
from ..models.points import HookPoint
from ..models.taps import HookSpec
from .prompts import Prompts, many_prompts
from .statistics import mean_by
from .tokens import counted, same_tokens, vectors

Method: TypeAlias = Literal["mean_difference", "first_component"]
Of: TypeAlias = Literal["embedding", "unembedding"]
_Array: TypeAlias = NDArray[np.float64]
_SIDES = ("positive", "negative")

# ── from a store ─────────────────────────────────────────────────────────────────────────────────────────────────────


def mean_difference(
    activations: xr.Dataset,
    positive: xr.DataArray,
    negative: xr.DataArray | None = None,
    *,
    normalize: bool = False,
    skip_positions: int = 1,
) -> xr.Dataset:
    """The mean of some tokens minus the mean of others, lazily where `value` is lazy, in one pass.

    `activations`: `value[…, token, …, width]`; other dimensions, such as `layer`, are kept. `positive` and `negative`
    are boolean [token]; None: all others. Tokens that do not count (those before position `skip_positions` of their
    sequence, units that are not recorded, tokens with NaN or infinity among their values) are on neither side.

    Gives, all float64 but the counts: `direction[…, width]`, made of length 1 with `normalize` (0 stays 0);
    `mean_positive` and `mean_negative` [..., width]; `n_positive` and `n_negative` [...] (int64). NaN where a side has
    no tokens. How well it tells the sides apart: `separation`. Memory: a chunk a thread in float64, twice.

    SchemaError for what is no such node or mask, and for masks that overlap, where they are in memory; where
    they are lazy, a token of both counts for neither.
    """
    one, other = _masks(activations, positive, negative)
    side = (other * 2 + one - 1).rename("side")  # 2 for both and −1 for none: no group
    means = mean_by(activations, side, 2, skip_positions=skip_positions)
    width = str(activations["value"].dims[-1])
    direction = means["mean"].isel(side=0, drop=True) - means["mean"].isel(side=1, drop=True)
    if normalize:
        length = (direction**2).sum(width, skipna=False) ** 0.5
        direction = direction / length.where(length != 0, 1.0)
    found = xr.Dataset({"direction": direction.assign_attrs(long_name="positive − negative")})
    for number, name in enumerate(_SIDES):
        found[f"mean_{name}"] = means["mean"].isel(side=number, drop=True)
        found[f"n_{name}"] = means["n_token"].isel(side=number, drop=True)
    return found


def separation(
    activations: xr.Dataset,
    direction: xr.DataArray,
    positive: xr.DataArray,
    negative: xr.DataArray | None = None,
    *,
    skip_positions: int = 1,
) -> xr.Dataset:
    """How far apart two sides lie along a direction, and how far each spreads, lazily where `value` is lazy.

    `direction[…, width]`, such as that of `mean_difference` or a probe's weights, in memory: computed, so that the
    store is read once here and no chunk waits for a direction that all chunks make. Its length does not matter. Masks
    are those of `mean_difference`.

    Gives float64 [...]: `mean_positive`, `mean_negative`, `std_positive` and `std_negative` (ddof 1) of the tokens'
    components along the direction, in the units of the activations; `cohens_d`, the distance of the means over the
    pooled standard deviation √(((n₊ − 1) s₊² + (n₋ − 1) s₋²) / (n₊ + n₋ − 2)) (Cohen 1988, "Statistical Power Analysis
    for the Behavioral Sciences"); and `n_positive`, `n_negative` (int64). NaN where they are not defined. A d that is
    measured on the tokens that made the direction is too large: measure it on others.

    SchemaError as `mean_difference`, and for a direction of another width or of other layers.
    """
    sides = xr.concat(_masks(activations, positive, negative), xr.Variable("side", list(_SIDES)))
    sides = sides & counted(activations, skip_positions)
    value = vectors(activations, "a separation")
    width = str(value.dims[-1])
    if direction.chunks is not None:
        raise SchemaError("the direction is lazy, and every chunk would wait for it: give direction.compute()")
    if direction.sizes.get(width) != value.sizes[width]:
        raise SchemaError(
            f"a direction of {value.sizes[width]} {width} is expected, not one of {dict(direction.sizes)}"
        )
    unit = direction.astype(np.float64).reset_coords(drop=True)
    unit = unit / np.sqrt((unit**2).sum(width))
    try:
        xr.align(value, unit, join="exact", copy=False, exclude=["token"])
    except xr.AlignmentError as error:
        kept = ", ".join(str(dim) for dim in unit.dims if dim in unit.coords)
        raise SchemaError(f"direction and activations differ in {kept}: select the same of both") from error
    rows = value.reset_coords(drop=True)
    whole = (abs(rows) < np.inf).all(width)
    along = xr.dot(rows.where(whole, 0.0), unit, dim=width)
    used = sides & whole & along.notnull()
    found, spread = xr.Dataset(), {}
    for side in _SIDES:
        own = along.where(used.sel(side=side, drop=True))
        n = own.notnull().sum("token").astype(np.int64)
        spread[side] = own.var("token", ddof=1)
        found[f"mean_{side}"], found[f"std_{side}"] = own.mean("token"), np.sqrt(spread[side])
        found[f"n_{side}"] = n.assign_attrs(units="tokens")
    n_1, n_2 = found["n_positive"], found["n_negative"]
    pooled = ((n_1 - 1) * spread["positive"] + (n_2 - 1) * spread["negative"]) / (n_1 + n_2 - 2)
    d = (found["mean_positive"] - found["mean_negative"]) / np.sqrt(pooled)
    found["cohens_d"] = d.assign_attrs(long_name="Cohen's d along the direction", units="standard deviations")
    return found.drop_vars("token", errors="ignore")


def _masks(
    activations: xr.Dataset, positive: xr.DataArray, negative: xr.DataArray | None
) -> tuple[xr.DataArray, xr.DataArray]:
    """Which tokens were named for each side, boolean [token], checked."""
    n_token = vectors(activations, "a difference of means").sizes["token"]
    for name, mask in (("positive", positive), ("negative", negative)):
        if mask is not None and (mask.dims != ("token",) or mask.sizes["token"] != n_token or mask.dtype != bool):
            raise SchemaError(
                f"`{name}` must be boolean [token] of the {n_token:,} tokens given, not {mask.dtype} "
                f"[{', '.join(f'{dim}={size}' for dim, size in mask.sizes.items())}]"
            )
        if mask is not None:
            same_tokens(activations, mask, f"`{name}`")
    one = positive.reset_coords(drop=True)
    other = ~one if negative is None else negative.reset_coords(drop=True)
    if one.chunks is None and other.chunks is None and bool((one & other).any()):
        raise SchemaError(f"{int((one & other).sum()):,} tokens are on both sides: the masks overlap")
    return one, other


# ── from prompts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def contrastive_direction(
    model: Model,
    positive_prompts: Prompts,
    negative_prompts: Prompts,
    *,
    hook: str = "hook_resid_post",
    layers: Sequence[int] | None = None,
    position: int = -1,
    method: Method = "mean_difference",
    normalize: bool = False,
    batch_size: int = 32,
) -> xr.Dataset:
    """A direction in every layer, from what a model makes of two sets of prompts at one position of each.

    `hook` is a kind of point, `layers` those wanted (all by default), `position` counted in each prompt's own terms.
    `mean_difference`: mean of the positive minus mean of the negative. `first_component`: the prompts are pairs, in
    their order; the direction in which their differences are longest, Σ (d · u)² at its most, which is the first right
    singular vector. They are not centred, for that would take away what all pairs share; it points to where the mean
    difference points, and is as long as the mean difference along it.

    Gives `direction` [layer, width] (float32; of length 1 with `normalize`); `explained` [layer] (float32, with
    `first_component`), its share of the squared length of all differences; `n_positive` and `n_negative`. Memory:
    activations of `batch_size` prompts in one layer at a time, and one vector of each prompt in every layer.

    Refuses before anything is computed: SchemaError for points, layers, methods and pairs that are not there, and as
    `Model.forward` does.
    """
    if method not in _METHODS:
        raise SchemaError(f"a direction is a {' or a '.join(_METHODS)}, not {method!r}.{nearest(method, _METHODS)}")
    chosen = list(range(model.spec.n_layers) if layers is None else layers)
    points = [vector_point(model, hook, layer) for layer in chosen]
    rows = [many_prompts(model, prompts).rows() for prompts in (positive_prompts, negative_prompts)]
    if method == "first_component" and len(rows[0]) != len(rows[1]):
        raise SchemaError(f"pairs of prompts are compared, and there are {len(rows[0])} and {len(rows[1])}")
    for row in (*rows[0], *rows[1]):
        if not -len(row) <= position < len(row):
            raise SchemaError(f"position {position} is read, and a prompt has {len(row)} tokens")
    positive, negative = (_read(model, some, points, position, batch_size) for some in rows)
    direction, extra = _METHODS[method](positive, negative)
    if normalize:
        length = np.linalg.norm(direction, axis=-1, keepdims=True)
        direction = direction / np.where(length == 0, 1.0, length)
    attrs = {"long_name": f"{method.replace('_', ' ')}, positive − negative"}
    found = xr.Dataset(
        {
            "direction": (("layer", points[0].dims[-1]), direction.astype(np.float32), attrs),
            "n_positive": len(rows[0]),
            "n_negative": len(rows[1]),
        },
        coords={"layer": chosen},
    )
    for name, share in extra.items():
        attrs = {"long_name": "share of the squared length of all differences", "units": "fraction"}
        found[name] = ("layer", share.astype(np.float32), attrs)
    return found


def vector_point(model: Model, hook: str, layer: int) -> HookPoint:
    """The point of a kind in a layer, at which every token has one vector: [sequence, position, width]. SchemaError for
    another one."""
    if not 0 <= layer < model.spec.n_layers:
        raise SchemaError(f"there is no layer {layer}; the layers of this model are 0 to {model.spec.n_layers - 1}")
    points = [point for point in model.spec.points() if point.layer == layer and len(point.dims) == 3]
    kinds = {point.kind: point for point in points if point.dims[:2] == ("sequence", "position")}
    if hook not in kinds:
        raise SchemaError(
            f"{hook!r} is no kind of point in layer {layer} at which a token has one vector; such are "
            f"{', '.join(kinds)}.{nearest(hook, kinds)}"
        )
    return kinds[hook]


def _read(model: Model, rows: Sequence[Tensor], points: Sequence[HookPoint], position: int, size: int) -> _Array:
    """What stands at the points at one position of each sequence, float64 [layer, sequence, width]."""
    if size < 1:
        raise SchemaError(f"batch_size = {size}: at least 1 prompt is run at a time")
    held: dict[HookPoint, list[Tensor]] = {point: [] for point in points}
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        index = torch.arange(len(some), device=model.device)
        places = torch.tensor([position % len(row) for row in some], device=model.device)

        def take(point: HookPoint, value: Tensor, index: Tensor = index, places: Tensor = places) -> None:
            held[point].append(value[index, places].float().cpu())

        model.forward(some, HookSpec().capture(*points), logits=False, sink=take)
    return np.stack([torch.cat(held[point]).double().numpy() for point in points])


def _mean_difference(positive: _Array, negative: _Array) -> tuple[_Array, dict[str, _Array]]:
    return positive.mean(1) - negative.mean(1), {}


def _first_component(positive: _Array, negative: _Array) -> tuple[_Array, dict[str, _Array]]:
    difference = positive - negative
    _, size, axes = np.linalg.svd(difference, full_matrices=False)
    along = np.einsum("lw,lw->l", difference.mean(1), axes[:, 0])
    total = (size**2).sum(-1)
    share = np.divide(size[:, 0] ** 2, total, out=np.full_like(total, np.nan), where=total > 0)
    return axes[:, 0] * along[:, None], {"explained": share}


_METHODS: Mapping[str, Callable[[_Array, _Array], tuple[_Array, dict[str, _Array]]]] = {
    "mean_difference": _mean_difference,
    "first_component": _first_component,
}

# ── from tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────


def token_direction(
    model: Model, words: Sequence[str | int], *, of: Of = "unembedding", normalize: bool = True
) -> xr.DataArray:
    """The mean of the rows that some tokens have in the unembedding or the embedding, float32 [d_model], made of length
    1 unless `normalize` is off.

    A word stands for the last token of itself after a space, without special tokens; a number is a token id. Rows are
    the model's own, as they are: no norm's weight is folded in. Source: candle-mi's rhyme directions. SchemaError for
    no words and for tokens that are not there, ModelError for words where the model has no tokenizer.
    """
    if not len(words):
        raise SchemaError("there are no words to make a direction of")
    if of not in _MATRICES:
        raise SchemaError(f"rows are those of the {' or the '.join(_MATRICES)}, not {of!r}.{nearest(of, _MATRICES)}")
    ids = [one if isinstance(one, int) else _last_token(model, one) for one in words]
    if bad := [one for one in ids if not 0 <= one < model.spec.d_vocab]:
        raise SchemaError(f"there is no token {bad[0]}: the vocabulary has {model.spec.d_vocab:,}, numbered from 0")
    rows = _MATRICES[of](model)[ids].double().cpu()
    mean = rows.mean(0)
    found = (mean / mean.norm() if normalize else mean).float().numpy()
    attrs = {"long_name": f"mean row of the {of} of {len(ids)} tokens"}
    return xr.DataArray(found, dims="d_model", name="direction", attrs=attrs)


_MATRICES: Mapping[str, Callable[[Model], Tensor]] = {
    "unembedding": lambda model: model.weights.unembed,
    "embedding": lambda model: model.weights.embed,
}


def _last_token(model: Model, word: str) -> int:
    return int(model.tokenizer.to_tokens(f" {word.strip()}", prepend_bos=False)[0, -1])
