"""Steering: how a model's predictions answer to more or less of one thing, be it attention or a direction.

Edges of attention are multiplied after the softmax and their rows renormalised; directions are added to the residual
stream (Turner et al. 2023, "Activation Addition"; Rimsky et al. 2023, "Steering Llama 2 via Contrastive Activation
Addition"). Doses, calibration and the inversion of a curve are candle-mi's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.addressing import Index, counted, listed
from ..models.edges import Edge, SteerAttention, SteeringSpec
from ..models.errors import nearest
from ..models.interventions import PATTERN, Add
from ..models.model import Model
from ..models.points import HookPoint
from ..models.taps import HookSpec, Sink
from .directions import vector_point
from .intervention_effect import compare_logits
from .prompts import Prompt, Prompts, many_prompts, one_prompt

DOSE_LEVELS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
"""Multiples at which a dose–response curve is measured unless others are given."""

LEAST_ATTENTION = 1e-10
"""Attention below which no ratio to it is taken."""

Vector: TypeAlias = Tensor | NDArray[np.floating] | xr.DataArray
Tokens: TypeAlias = int | str | Sequence[int | str]
"""Tokens of the vocabulary: their ids, or words, as `find_token_id(word, last=True)` finds them."""
Unit: TypeAlias = Literal["direction", "residual_norm"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringCalibration:
    """How strongly two sets of prompts attend along the same edges of a layer: `source_baseline`, the mean attention
    of the `n_source` prompts whose behaviour is wanted, and `target_baseline`, that of the `n_target` to be steered.
    """

    source_baseline: float
    target_baseline: float
    layer: int
    n_source: int = 1
    n_target: int = 1

    @property
    def ratio(self) -> float:
        """Source over target; 0 where the target attends to nothing."""
        return self.source_baseline / self.target_baseline if self.target_baseline > LEAST_ATTENTION else 0.0

    def scale_factor_for_target(self, attention: float) -> float:
        """By how much the target's baseline is smaller than an attention: attention / target_baseline, and 1 where
        there is nothing to scale. A row that is steered is divided by its sum: what this factor leads to is less than
        `attention` (see `renormalized_scale_for_target`)."""
        return attention / self.target_baseline if self.target_baseline > LEAST_ATTENTION else 1.0

    def scale_factor_to_source(self) -> float:
        """`scale_factor_for_target` of the source's baseline."""
        return self.scale_factor_for_target(self.source_baseline)

    def renormalized_scale_for_target(self, attention: float) -> float:
        """The scale at which an edge of weight a = target_baseline has the weight t = `attention` after its row is
        divided by its sum: t (1 − a) / (a (1 − t)). Exact for one edge of one head; a mean over heads or edges reaches
        t only nearly, for which `scale_for_target` reads a measured curve. SchemaError for what no scale can reach."""
        a = self.target_baseline
        if not (0 <= attention < 1 and LEAST_ATTENTION < a < 1):
            raise SchemaError(
                f"no scale leads from a weight of {a:g} to one of {attention:g}: both lie below 1, and the first above "
                f"0, for the weights of a row add up to 1"
            )
        return attention * (1 - a) / (a * (1 - attention))

    def dose_levels_absolute(self, doses: Sequence[float] = DOSE_LEVELS) -> xr.DataArray:
        """Dose times the target's baseline, float64 [dose]: attention before a row is divided by its sum."""
        found = np.asarray(doses, dtype=np.float64) * self.target_baseline
        attrs = {"long_name": "dose × baseline attention", "units": "attention"}
        return xr.DataArray(found, dims="dose", coords={"dose": list(doses)}, name="dose_absolute", attrs=attrs)


def edge_attention(
    model: Model,
    prompts: Prompts,
    edges: Iterable[Edge],
    *,
    layer: int | None = None,
    heads: Index | None = None,
    batch_size: int = 32,
) -> xr.DataArray:
    """How much each prompt attends along some edges, float32 [sequence]: the mean over the edges and heads.

    `edges` are (query, key) pairs as `Knockout` takes them, counted in each prompt's own terms. `layer`: the middle one
    by default; `heads`: all. Edges to keys outside a layer's window are not counted. Memory: the attention patterns of
    `batch_size` prompts in one layer. HookError for edges, layers and heads that are not there, SchemaError where no
    edge is left, before anything is computed.
    """
    edges, layer = list(edges), middle_layer(model, layer)
    batches = in_batches(rows := many_prompts(model, prompts).rows(), batch_size)
    steered = SteeringSpec(edges=edges, layers=layer, heads=heads)
    marked = {n: _marked(steered, model, layer, n) for n in {len(row) for row in rows}}
    point = HookPoint(PATTERN, layer)
    found: list[float] = []
    for some in batches:
        pattern = model.forward(some, HookSpec().capture(point), logits=False)[point]
        for row, weights in zip(some, pattern, strict=True):
            found.append(float(weights[:, : len(row), : len(row)].float()[marked[len(row)]].mean()))
    attrs = {"long_name": "attention along the edges", "units": "mean weight"}
    coords = {"sequence": np.arange(len(rows)), "layer": layer}
    return xr.DataArray(
        np.array(found, dtype=np.float32), dims="sequence", coords=coords, name="attention", attrs=attrs
    )


def calibrate_steering(
    model: Model,
    source_prompts: Prompts,
    target_prompts: Prompts,
    edges: Iterable[Edge],
    *,
    layer: int | None = None,
    heads: Index | None = None,
    batch_size: int = 32,
) -> SteeringCalibration:
    """Measure the attention of two sets of prompts along the same edges; arguments are those of `edge_attention`."""
    edges, layer = list(edges), middle_layer(model, layer)
    source, target = (
        edge_attention(model, prompts, edges, layer=layer, heads=heads, batch_size=batch_size)
        for prompts in (source_prompts, target_prompts)
    )
    return SteeringCalibration(
        source_baseline=float(source.mean()),
        target_baseline=float(target.mean()),
        layer=layer,
        n_source=source.size,
        n_target=target.size,
    )


def dose_response(
    model: Model,
    prompt: Prompt,
    edges: Iterable[Edge],
    *,
    layer: int | None = None,
    heads: Index | None = None,
    doses: Sequence[float] = DOSE_LEVELS,
    tokens: Tokens | None = None,
    position: int = -1,
    batch_size: int = 32,
) -> xr.Dataset:
    """What the prediction at `position` becomes when edges of attention are multiplied by each of `doses`.

    `edges` are (query, key) pairs as `SteerAttention` takes them, in one `layer` (the middle one by default) and some
    `heads` (all). `tokens` are ids, or words, as `find_token_id(word, last=True)` finds them.

    Gives, all float32 along `dose`: `attention`, the mean weight of the edges over themselves and the heads, after
    steering; `kl_divergence` (nats) from the model that is not steered; with tokens also `probability` and
    `logit_change` [dose, vocab], steered − base, negative where the logit was lowered. Without a dimension:
    `baseline_attention`; `baseline_probability` [vocab]. A dose of 1 changes nothing but rounding.

    All doses of a batch are one forward. Memory: attention patterns of `batch_size` sequences in one layer, and logits
    at one position of each. Refuses before anything is computed: HookError for edges, layers, heads and doses that a
    model cannot have, SchemaError for tokens, positions and edges that are not there.
    """
    ids, edges, layer = one_prompt(model, prompt), list(edges), middle_layer(model, layer)
    batches = _dose_batches(doses, batch_size)
    for dose in doses:
        SteerAttention(edges, scale=dose).amount()
    asked = token_ids_of(model, tokens)
    (place,) = listed(counted(position, "position", len(ids)), len(ids))
    marked = _marked(SteeringSpec(edges=edges, layers=layer, heads=heads), model, layer, len(ids))
    point = HookPoint(PATTERN, layer)
    attention: list[Tensor] = []

    def keep(point: HookPoint, pattern: Tensor) -> None:
        attention.append(pattern.float()[:, marked].mean(1).cpu())

    capture = HookSpec().capture(point)
    base = logits_at(model, ids[None], capture, place, sink=keep)[0]
    steered: list[Tensor] = []
    for some in batches:
        hooks = capture
        for row, dose in enumerate(some):
            steer = SteerAttention(edges, scale=dose).at(sequence=row)
            hooks = hooks.intervene(point, steer if heads is None else steer.at(head=heads))
        steered.append(logits_at(model, ids.expand(len(some), -1), hooks, place, sink=keep))
    weights = torch.cat(attention).numpy()
    curve = prediction_change(model, base, torch.cat(steered), "dose", asked)
    curve = curve.assign(attention=("dose", weights[1:]), baseline_attention=weights[0])
    curve["attention"].attrs = {"long_name": "attention along the edges", "units": "mean weight"}
    curve["baseline_attention"].attrs = {"long_name": "attention, unsteered", "units": "mean weight"}
    attrs = {"long_name": "scale of the edges", "units": "1"}
    return curve.assign_coords(dose=("dose", np.asarray(doses, dtype=np.float64), attrs), layer=layer)


def direction_dose_response(
    model: Model,
    prompt: Prompt,
    direction: Vector,
    *,
    layer: int | None = None,
    hook: str = "hook_resid_post",
    at: Index | None = -1,
    unit: Unit = "direction",
    doses: Sequence[float] = DOSE_LEVELS,
    tokens: Tokens | None = None,
    position: int = -1,
    batch_size: int = 32,
) -> xr.Dataset:
    """What the prediction at `position` becomes when each of `doses` of a direction is added at a hook point.

    `direction` [width of the point] is added at the kind of point `hook` of one `layer` (the middle one by default), at
    the positions `at` (None: all of them). `unit` says what one dose is: the `direction` as it is given, or the
    direction made as long as what stands at the position without it, `residual_norm`.

    Gives, along `dose`, what `dose_response` gives but attention, and `relative_norm` (float32), the length of what is
    added over the length of what stands there, mean over the positions. Memory: `batch_size` sequences' activations.
    SchemaError and HookError for what is not there, before anything is computed.
    """
    ids, layer = one_prompt(model, prompt), middle_layer(model, layer)
    batches = _dose_batches(doses, batch_size)
    asked = token_ids_of(model, tokens)
    (place,) = listed(counted(position, "position", len(ids)), len(ids))
    places = list(listed(counted(slice(None) if at is None else at, "position", len(ids)), len(ids)))
    point = vector_point(model, hook, layer)
    vector_D = _vector(direction, model.spec.sizes[point.dims[-1]])
    if unit not in _UNITS:
        raise SchemaError(f"a dose is measured in {' or '.join(_UNITS)}, not in {unit}.{nearest(unit, _UNITS)}")
    held: list[Tensor] = []
    capture = HookSpec().capture(point)
    base = logits_at(model, ids[None], capture, place, sink=lambda at, value: held.append(value[0, places].float()))[0]
    norms_P = held[0].norm(dim=-1).cpu()
    of_one_PD = vector_D.expand(len(places), -1)
    if unit == "residual_norm":
        of_one_PD = of_one_PD / vector_D.norm() * norms_P[:, None]
    steered: list[Tensor] = []
    for some in batches:
        added_BPD = torch.tensor(some, dtype=torch.float32)[:, None, None] * of_one_PD
        hooks = HookSpec().intervene(point, Add(added_BPD).at(position=places))
        steered.append(logits_at(model, ids.expand(len(some), -1), hooks, place))
    curve = prediction_change(model, base, torch.cat(steered), "dose", asked)
    relative = np.abs(np.asarray(doses)) * float((of_one_PD.norm(dim=-1) / norms_P).mean())
    attrs = {"long_name": "length of what is added over what stands there", "units": "1"}
    curve["relative_norm"] = ("dose", relative.astype(np.float32), attrs)
    attrs = {"long_name": "dose", "units": _UNITS[unit]}
    return curve.assign_coords(dose=("dose", np.asarray(doses, dtype=np.float64), attrs), layer=layer)


_UNITS = {"direction": "lengths of the direction", "residual_norm": "lengths of the residual stream"}


def scale_for_target(curve: xr.Dataset | xr.DataArray, target: float, *, variable: str = "attention") -> xr.DataArray:
    """The dose at which a dose–response curve reaches a value, float64, without the dimension `dose`.

    Of the first two adjacent doses, in the order in which they stand, between whose values `target` lies, the point on
    the straight line between them; NaN where no two enclose it. Pairs whose values differ by less than 1e-10 are passed
    over. `curve` is what `dose_response` gives, or one variable of it. Lazy where it is lazy. SchemaError for a curve
    without that variable or without `dose`.
    """
    if isinstance(curve, xr.Dataset) and variable not in curve:
        held = [str(name) for name in curve.data_vars]
        raise SchemaError(f"the curve has no variable {variable!r}, only {', '.join(held)}.{nearest(variable, held)}")
    values = curve[variable] if isinstance(curve, xr.Dataset) else curve
    if "dose" not in values.dims or "dose" not in values.coords:
        raise SchemaError(f"a curve lies along doses; {values.name or 'what was given'} has {list(values.dims)}")
    whole = values.astype(np.float64).chunk({"dose": -1}) if values.chunks else values.astype(np.float64)
    doses = values["dose"].astype(np.float64).reset_coords(drop=True)
    found: xr.DataArray = xr.apply_ufunc(
        _crossing,
        whole,
        doses,
        kwargs={"target": float(target)},
        input_core_dims=[["dose"], ["dose"]],
        dask="parallelized",
        output_dtypes=[np.float64],
    )
    return found.rename("scale").assign_attrs(long_name=f"dose at which {values.name} is {target:g}", units="1")


def _crossing(values: NDArray[np.float64], doses: NDArray[np.float64], target: float) -> NDArray[np.float64]:
    """Where values [..., dose] first cross the target, [...]."""
    before, after = values[..., :-1], values[..., 1:]
    step = after - before
    enclosed = (np.minimum(before, after) <= target) & (target <= np.maximum(before, after)) & (np.abs(step) >= 1e-10)
    share = np.divide(target - before, step, out=np.zeros_like(step), where=enclosed)
    crossings = doses[:-1] + share * np.diff(doses)
    if not enclosed.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    first = enclosed.argmax(-1)[..., None]
    found = np.take_along_axis(np.where(enclosed, crossings, np.nan), first, -1)
    return np.asarray(found[..., 0])


# ── what is shared by all that steers ────────────────────────────────────────────────────────────────────────────────


def logits_at(model: Model, token_ids: Tensor, hooks: HookSpec, position: int, sink: Sink | None = None) -> Tensor:
    """The logits [sequence, vocab], float32 on the CPU, at one position of sequences of one length, under `hooks`,
    whose captures `sink` takes. The unembedding is not computed at any other position."""
    found: list[Tensor] = []

    def take(point: HookPoint, value: Tensor) -> None:
        if point.kind == "hook_final_norm":
            found.append(model.unembedding.project(value[:, position]).float().cpu())
        elif sink is not None:
            sink(point, value)

    model.forward(token_ids, hooks.capture("hook_final_norm"), logits=False, sink=take)
    return found[0]


def prediction_change(
    model: Model, base: Tensor, changed: Tensor, dim: str, tokens: Sequence[int], top: int = 1
) -> xr.Dataset:
    """Compare logits `changed` [dim, vocab] with those of one prediction, `base` [vocab]: `kl_divergence` [dim] and, of
    some tokens, `probability` and `logit_change`, changed − base, [dim, vocab] and `baseline_probability` [vocab]."""
    n = len(changed)
    compared = compare_logits(base.expand(n, 1, -1), changed[:, None], (1,) * n, top=top)
    found = xr.Dataset({"kl_divergence": (dim, compared["kl_divergence"].values[:, 0])})
    found["kl_divergence"].attrs = {"long_name": "KL(base ‖ changed)", "units": "nats"}
    if not tokens:
        return found
    ids = list(tokens)
    probability, before = changed.double().softmax(-1)[:, ids], base.double().softmax(-1)[ids]
    moved = (changed.double()[:, ids] - base.double()[ids]).float()
    of_tokens = {
        "probability": ((dim, "vocab"), probability.float(), "of the token, changed", "probability"),
        "logit_change": ((dim, "vocab"), moved, "changed − base", "logit"),
        "baseline_probability": ("vocab", before.float(), "of the token, unchanged", "probability"),
    }
    for name, (dims, value, long_name, units) in of_tokens.items():
        found[name] = (dims, value.numpy(), {"long_name": long_name, "units": units})
    found = found.assign_coords(vocab=ids)
    if model.has_tokenizer:
        texts = np.array([model.tokenizer.to_str_tokens([one])[0] for one in ids], dtype=object)
        found = found.assign_coords(vocab_text=("vocab", texts))
    return found


def token_ids_of(model: Model, tokens: Tokens | None) -> list[int]:
    """The ids of tokens: words by `find_token_id(word, last=True)`. SchemaError for one that is not in the vocabulary
    or is named twice, ModelError for words where the model has no tokenizer."""
    asked = [] if tokens is None else [tokens] if isinstance(tokens, int | str) else list(tokens)
    ids = [model.tokenizer.find_token_id(one.strip(), last=True) if isinstance(one, str) else int(one) for one in asked]
    for one in ids:
        if not 0 <= one < model.spec.d_vocab:
            raise SchemaError(f"there is no token {one}: the vocabulary has {model.spec.d_vocab:,}, numbered from 0")
    if len(set(ids)) < len(ids):
        raise SchemaError(f"the tokens {ids} are not all different: name each once")
    return ids


def middle_layer(model: Model, layer: int | None) -> int:
    """A layer counted from 0; None is the one in the middle, n_layers // 2. HookError for one that is not there."""
    n_layers = model.spec.n_layers
    return n_layers // 2 if layer is None else listed(counted(layer, "layer", n_layers), n_layers)[0]


def in_batches(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    """Some at a time. SchemaError for a size below 1."""
    if size < 1:
        raise SchemaError(f"batch_size = {size}: at least 1 variant is run at a time")
    return [items[first : first + size] for first in range(0, len(items), size)]


def _dose_batches(doses: Sequence[float], batch_size: int) -> list[Sequence[float]]:
    if not len(doses) or not np.isfinite(np.asarray(doses, dtype=np.float64)).all():
        raise SchemaError(f"doses = {list(doses)}: at least one, all of them finite")
    return in_batches([float(dose) for dose in doses], batch_size)


def _marked(steered: SteeringSpec, model: Model, layer: int, n_positions: int) -> Tensor:
    """The edges [head, query, key] of a layer. SchemaError where none can carry weight."""
    marked = steered.mask(model.spec, n_positions)[layer].clone()  # a view would keep those of all layers
    if not marked.any():
        raise SchemaError(f"none of the edges carries weight in layer {layer}, in a sequence of {n_positions} tokens")
    return marked.to(model.device)


def _vector(direction: Vector, width: int) -> Tensor:
    vector = torch.as_tensor(np.asarray(direction) if isinstance(direction, xr.DataArray) else direction)
    vector = vector.detach().float().cpu()
    if tuple(vector.shape) != (width,) or not bool(vector.isfinite().all()) or not bool(vector.any()):
        raise SchemaError(
            f"a direction is a vector of {width} finite numbers that are not all 0, not one of shape "
            f"{tuple(vector.shape)}; of several layers choose one, .sel(layer=…)"
        )
    return vector
