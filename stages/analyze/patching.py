"""What every kind of patching shares: pairs of prompts, the sites of patches, many patched runs in one forward, and the
shape of results.

A result is an `xr.Dataset` with one variable a kind of hook point, named after it as in `Forward.to_dataset`, along
`pair`, `layer`, `head` (or `kv_head`) and `position` as far as the kind has them: the metric of the run with that one
site patched. `clean` and `corrupted` [pair] hold the metric of both runs; `recovery` puts the first between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.addressing import Site
from ..models.batch import Batch
from ..models.errors import HookError, nearest
from ..models.interventions import Intervention, NamedIntervention, Replace
from ..models.model import Model
from ..models.points import BLOCK, STATE, HookPoint, dims_of, expand
from ..models.taps import HookSpec
from .metrics import Divergence, Metric, logits_at, place_of
from .prompts import Prompts, many_prompts

Variant: TypeAlias = Sequence[tuple[HookPoint, NamedIntervention]]
"""What is done in one run of a prompt, which is one sequence of a batch: parts are addressed without `sequence`, and
`Apply` is given them without that dimension. Nothing is done, if it is empty."""

ADDRESSES = ("layer", "head", "kv_head", "position")
"""Dimensions along which sites are patched one by one, in the order of a result."""
BASELINES = ("clean", "corrupted")
"""Variables of a result that hold the metric of runs in which nothing is patched."""

_LOGITS = HookPoint("hook_logits")
_NO_LOGITS = "logits are read at one position only and cannot be intervened on here"
_NOT_PATCHED = {
    _LOGITS.kind: "what a metric is read from is not patched",
    STATE: "of a recurrent state only chosen positions are captured; patch what is written to it, rwkv.hook_v",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Pairs of prompts with equally many tokens each: `clean` and `corrupted` [pair, position], on the CPU, padded on
    the right to the longest. Made by `pairs_of`.
    """

    clean: Batch
    corrupted: Batch

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens both prompts of each pair have."""
        return self.clean.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The token ids [position] of the clean and of the corrupted prompt of each pair, without padding."""
        return zip(self.clean.rows(), self.corrupted.rows(), strict=True)


def pairs_of(model: Model, clean: Prompts, corrupted: Prompts) -> Pairs:
    """Pair prompts, given as texts or token ids: the first clean one with the first corrupted one, and so on.

    SchemaError where there are not equally many of both, and where the two of a pair have not equally many tokens: what
    is patched at a position must mean the same in both. Raises as `Model.forward` does.
    """
    pairs = Pairs(clean=many_prompts(model, clean), corrupted=many_prompts(model, corrupted))
    if len(pairs.clean.lengths) != len(pairs.corrupted.lengths):
        raise SchemaError(
            f"there are {len(pairs.clean.lengths)} clean prompts and {len(pairs.corrupted.lengths)} corrupted ones: "
            f"give one for each"
        )
    for number, (one, other) in enumerate(zip(pairs.clean.rows(), pairs.corrupted.rows(), strict=True)):
        if len(one) != len(other):
            raise SchemaError(
                f"the prompts of pair {number} must have equally many tokens: the clean one has {len(one)}, "
                f"{_shown(model, one)}, the corrupted one {len(other)}, {_shown(model, other)}. Choose words of as "
                f"many tokens; block_patching maps positions of prompts of different lengths"
            )
    return pairs


def _shown(model: Model, token_ids: Tensor) -> str:
    return str(model.tokenizer.to_str_tokens(token_ids) if model.has_tokenizer else token_ids.tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites:
    """Which sites are patched: `kinds` of hook point, the `layers` of those that lie in blocks, `positions` as they
    were asked for (negative ones count from the end of each prompt; None: all of them), and whether positions are
    patched one by one or, without `by_position`, all at once. Made by `sites_of`.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...] | None
    by_position: bool

    def dims(self, kind: str) -> tuple[str, ...]:
        """The dimensions along which the sites of a kind are told apart: `layer` if it lies in blocks, `head` or
        `kv_head` if it has heads, `position` if it has positions and they are patched one by one. A kind that is laid
        out by query and key, such as a pattern, is patched whole.
        """
        own = {"layer"} if kind in BLOCK else set()
        own |= set(dims_of(kind)) if self.by_position else set(dims_of(kind)) - {"position"}
        return tuple(dim for dim in ADDRESSES if dim in own)

    def places(self, kind: str, model: Model, n_positions: int) -> dict[str, tuple[int, ...]]:
        """The places of a kind by dimension, in a prompt of this many tokens; positions are counted from 0."""
        along = {"layer": self.layers, "position": self.at(n_positions)}
        along |= {dim: tuple(range(model.spec.sizes[dim])) for dim in ("head", "kv_head")}
        return {dim: along[dim] for dim in self.dims(kind)}

    def at(self, n_positions: int) -> tuple[int, ...]:
        """The positions, counted from 0, in a prompt of this many tokens."""
        asked = range(n_positions) if self.positions is None else self.positions
        return tuple(position % n_positions for position in asked)

    def points(self) -> tuple[HookPoint, ...]:
        """The hook points that they lie at."""
        inside = [HookPoint(kind, layer) for kind in self.kinds if kind in BLOCK for layer in self.layers]
        return (*inside, *(HookPoint(kind) for kind in self.kinds if kind not in BLOCK))

    def blank(self, kind: str, model: Model, pairs: Pairs) -> NDArray[np.float32]:
        """NaN [pair, …] for every site of a kind. A shorter pair fills the first of its positions."""
        places = self.places(kind, model, max(pairs.lengths))
        return np.full((len(pairs), *map(len, places.values())), np.nan, dtype=np.float32)


def sites_of(
    model: Model,
    pairs: Pairs,
    hooks: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    by_position: bool = True,
) -> Sites:
    """Check which sites are to be patched; `layers` and `positions` None mean all.

    HookError for a kind of hook point, or a layer, that the model does not have or that cannot be patched; SchemaError
    for a position that a pair lacks, and for what is named twice or not at all.
    """
    hooks = [hooks] if isinstance(hooks, str) else list(hooks)
    known = {point.kind for point in model.spec.points()}
    for kind in hooks:
        if kind not in known:
            bare = kind.split(".", 2)[-1] if kind.startswith("blocks.") else kind
            hint = f" Give the kind alone, {bare!r}, and layers=[…]." if bare in known else nearest(bare, known)
            raise HookError(f"this model has no kind of hook point {kind!r}.{hint}")
        if kind in _NOT_PATCHED:
            raise HookError(f"{kind} cannot be patched: {_NOT_PATCHED[kind]}")
        if positions is not None and "position" not in dims_of(kind):
            raise SchemaError(
                f"{kind} is laid out by {', '.join(dims_of(kind))} and patched whole: leave out positions"
            )
    n_layers = model.spec.n_layers
    chosen = tuple(range(n_layers)) if layers is None else tuple(map(int, layers))
    for layer in chosen:
        if not 0 <= layer < n_layers:
            raise HookError(f"layer {layer} is to be patched; the layers of this model are 0 to {n_layers - 1}")
    for what, names in (("hooks", hooks), ("layers", chosen)):
        if not names or len(set(names)) < len(names):
            raise SchemaError(f"{what} = {list(names)} names none, or one of them twice")
    places = None if positions is None else tuple(map(int, positions))
    if places is not None:
        _check_positions(places, pairs.lengths)
    return Sites(kinds=tuple(hooks), layers=chosen, positions=places, by_position=by_position)


def _check_positions(positions: tuple[int, ...], lengths: Sequence[int]) -> None:
    for number, length in enumerate(lengths):
        for position in positions:
            if not -length <= position < length:
                raise SchemaError(f"there is no position {position} in pair {number}, of {length} tokens")
        if not positions or len({position % length for position in positions}) < len(positions):
            raise SchemaError(f"positions = {list(positions)} names none, or one of pair {number} twice")


def patch(point: HookPoint, source: Tensor, **where: int | Sequence[int]) -> tuple[HookPoint, NamedIntervention]:
    """The intervention that puts a part of `source`, a capture of one sequence at this point, where the same part is of
    the prompt that is run. `where` names the part: `position=3`, `head=0`; what it does not name is meant whole.
    """
    value = source[0]
    for axis, dim in reversed(list(enumerate(point.dims[1:]))):
        if dim in where:
            value = value.select(axis, place) if isinstance(place := where[dim], int) else value[_index(axis, place)]
    return point, Replace(value).at(**where)


def _index(axis: int, places: Sequence[int]) -> tuple[Any, ...]:
    return (*(slice(None) for _ in range(axis)), list(places))


def run_variants(
    model: Model,
    token_ids: Tensor,
    variants: Iterable[Variant],
    metric: Metric,
    *,
    prompt: int = 0,
    hooks: HookSpec | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Run one prompt, token ids [position], in many variants, and give the metric of each: float32 [variant], CPU.

    `prompt` is its number among the metric's prompts; `hooks` act in every variant, before its own interventions.
    Variants are taken as they come, `batch_size` to a forward, and their values go to the model's device there.
    Memory: a forward of `batch_size` sequences without its logits, of which only those at the metric's position exist.

    SchemaError for a metric's position that the prompt lacks, and for a `batch_size` below 1; HookError for what
    cannot act on one sequence of a batch.
    """
    position = metric_position(metric, len(token_ids))
    found = [
        metric.at_position(logits, torch.full((len(logits),), prompt, device=logits.device)).cpu()
        for logits in variant_logits(model, token_ids, variants, position, hooks=hooks, batch_size=batch_size)
    ]
    return torch.cat(found) if found else torch.empty(0)


def variant_logits(
    model: Model,
    token_ids: Tensor,
    variants: Iterable[Variant],
    position: int,
    *,
    hooks: HookSpec | None = None,
    batch_size: int = 32,
) -> Iterator[Tensor]:
    """As `run_variants`, giving the logits at one position, float32 [variant, vocab], one forward after the other."""
    if batch_size < 1:
        raise SchemaError(f"batch_size = {batch_size}: at least 1 variant is run at a time")
    if hooks is not None and _LOGITS in expand([change.pattern for change in hooks.changes], model.spec.points()):
        raise HookError(_NO_LOGITS)
    left = iter(variants)
    while batch := list(itertools.islice(left, batch_size)):
        yield logits_at(model, token_ids.expand(len(batch), -1), together(batch, hooks or HookSpec()), position)


def together(variants: Sequence[Variant], hooks: HookSpec) -> HookSpec:
    """The hooks with which one forward runs variants, the sequences of its batch, after what `hooks` do in all."""
    by_point: dict[HookPoint, list[NamedIntervention]] = {}
    for sequence, variant in enumerate(variants):
        for point, intervention in variant:
            if not isinstance(intervention, NamedIntervention):
                raise HookError(
                    f"what is done at {point} is a plain {type(intervention).__name__}, which would act on every "
                    f"variant of the batch: wrap a function in Apply"
                )
            by_point.setdefault(point, []).append(intervention.at(sequence=sequence))
    if _LOGITS in by_point:
        raise HookError(_NO_LOGITS)
    for point, interventions in by_point.items():
        # States are changed position by position, by interventions that are looked at one by one.
        acting = interventions if point.kind == STATE else [_OneAfterAnother(interventions)]
        for intervention in acting:
            hooks = hooks.intervene(point, intervention)
    return hooks


@dataclass(frozen=True, slots=True, eq=False)
class _OneAfterAnother(NamedIntervention):
    """Several on different sequences, of which each would otherwise be given a copy of the whole batch."""

    parts: Sequence[NamedIntervention]

    def bind(self, site: Site) -> Intervention:
        bound = [part.bind(site) for part in self.parts]

        def apply(value: Tensor, point: HookPoint) -> Tensor:
            for function in bound:
                value = function(value, point)
            return value

        return apply


def metric_position(metric: Metric, length: int) -> int:
    """Where in a prompt of this many tokens a metric is measured, counted from 0. SchemaError where that is outside."""
    return place_of(metric.position, length)


def window_of(layer: int, window: int, n_layers: int) -> range:
    """The layers of a window around one, from window // 2 before it on, clipped to the model."""
    first = layer - window // 2
    return range(max(0, first), min(n_layers, first + window))


def check_metric(model: Model, metric: Metric, lengths: Sequence[int]) -> None:
    """Try a metric for prompts of these lengths. SchemaError for a position or a token that is not there."""
    for length in lengths:
        metric_position(metric, length)
    metric.at_position(torch.zeros(1, model.spec.d_vocab), torch.tensor([len(lengths) - 1]))


def run_baselines(model: Model, pairs: Pairs, metric: Metric) -> dict[str, NDArray[np.float32]]:
    """The metric of the runs in which nothing is patched, by `BASELINES`, [pair]. Raises as `run_variants` does."""
    found = [
        [float(run_variants(model, row, [()], metric, prompt=number)) for row in pair]
        for number, pair in enumerate(pairs)
    ]
    return dict(zip(BASELINES, np.array(found, dtype=np.float32).T, strict=True))


def divergence_from(model: Model, prompts: Prompts, *, position: int = -1) -> Divergence:
    """The divergence from what the model says at a position of these prompts, as a metric: KL(prompt ‖ patched run).

    With it `recovery` is candle-mi's, 1 − KL_patched / KL_corrupted. Raises as `run_variants` does.
    """
    rows = many_prompts(model, prompts).rows()
    found = [next(variant_logits(model, row, [()], place_of(position, len(row)))) for row in rows]
    return Divergence(reference=torch.cat(found), position=position)


def pair_coords(model: Model, pairs: Pairs, sites: Sites) -> dict[str, Any]:
    """The coordinates of a result: `pair` and `layer`; `position` as asked for, and on [pair, position] `token_id` and
    `token_text` of the clean prompts, `corrupted_token_id` and `corrupted_token_text`: −1 and "" beyond a pair's end.
    """
    coords: dict[str, Any] = {"pair": range(len(pairs)), "layer": list(sites.layers)}
    if not sites.by_position:
        return coords
    n_positions = len(sites.at(max(pairs.lengths)))
    coords["position"] = list(range(n_positions) if sites.positions is None else sites.positions)
    for prefix, batch in (("", pairs.clean), ("corrupted_", pairs.corrupted)):
        ids = np.full((len(pairs), n_positions), -1, dtype=np.int64)
        texts = np.full((len(pairs), n_positions), "", dtype=object)
        for number, row in enumerate(batch.rows()):
            tokens = row[list(sites.at(len(row)))]
            ids[number, : len(tokens)] = tokens.numpy()
            if model.has_tokenizer:
                texts[number, : len(tokens)] = model.tokenizer.to_str_tokens(tokens)
        coords[f"{prefix}token_id"] = (("pair", "position"), ids)
        if model.has_tokenizer:
            coords[f"{prefix}token_text"] = (("pair", "position"), texts)
    return coords


def labelled(
    model: Model,
    pairs: Pairs,
    sites: Sites,
    metric: Metric,
    values: Mapping[str, NDArray[Any]],
    baselines: Mapping[str, NDArray[Any]],
    said: str,
) -> xr.Dataset:
    """A result out of its values by kind, laid out as `Sites.blank` does, and its baselines [pair]. `said` is what a
    value is, with {kind} in it, such as "logit difference with {kind} patched".
    """
    units = {"units": metric.unit}
    variables: dict[str, Any] = {
        kind: (("pair", *sites.dims(kind)), value, {**units, "long_name": said.format(kind=kind)})
        for kind, value in values.items()
    }
    for name, value in baselines.items():
        variables[name] = ("pair", value, {**units, "long_name": f"{metric.unit} of the {name} run"})
    used = {dim for kind in values for dim in sites.dims(kind)}
    coords = {k: v for k, v in pair_coords(model, pairs, sites).items() if k != "layer" or "layer" in used}
    coords |= {dim: range(model.spec.sizes[dim]) for dim in ("head", "kv_head") if dim in used}
    attrs = {"metric": type(metric).__name__, "units": metric.unit, "metric_position": metric.position}
    return xr.Dataset(variables, coords=coords, attrs=attrs)


def recovery(result: xr.Dataset) -> xr.Dataset:
    """How much of what divides both runs a patch brings back, (patched − corrupted) / (clean − corrupted), of every
    variable of a result but its baselines: 0 as corrupted, 1 as clean, NaN where the two are equal. Lazy where it is.

    Of a `Divergence` from the clean run, which is 0 there, it is candle-mi's 1 − KL_patched / KL_corrupted. SchemaError
    for a dataset without the variables `clean` and `corrupted`.
    """
    if missing := [name for name in BASELINES if name not in result]:
        raise SchemaError(f"recovery lies between two runs, and {missing} is not in what was given")
    whole = result["clean"] - result["corrupted"]
    found = result.drop_vars(list(BASELINES))
    found = (found - result["corrupted"]) / whole.where(whole != 0)
    for kind in found.data_vars:
        found[kind].attrs = {"units": "fraction", "long_name": f"recovery with {kind} patched"}
    found.attrs = result.attrs | {"units": "fraction"}
    return found
