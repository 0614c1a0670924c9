"""Path patching: what one component does to another directly, with every other way between them held still.

Wang et al. (2022), "Interpretability in the Wild", appendix B; Goldowsky-Dill et al. (2023), "Localizing Model Behavior
with Path Patching", of which this is the case of direct paths: MLPs on the way are held still too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import xarray as xr
from torch import Tensor

from ...stores.errors import SchemaError
from ..models.errors import HookError, nearest
from ..models.interventions import NamedIntervention, Replace
from ..models.model import Model
from ..models.points import BLOCK, HookPoint, dims_of, expand
from ..models.taps import HookSpec
from .activation_patching import DIRECTIONS, Direction
from .metrics import Metric
from .patching import (
    Pairs,
    Sites,
    Variant,
    check_metric,
    labelled,
    metric_position,
    pairs_of,
    patch,
    run_baselines,
    sites_of,
    together,
    variant_logits,
)
from .prompts import Prompts

SENDERS = ("hook_embed", "attn.hook_z", "attn.hook_result", "rwkv.hook_z", "hook_attn_out", "hook_mlp_out")
"""Kinds of hook points that are senders: what writes to the residual stream."""
RECEIVERS = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_in", "mlp.hook_in", "hook_final_norm")
"""Kinds of hook points that are receivers: what is made of the residual stream first."""

_BRANCHES = ("hook_attn_out", "hook_mlp_out")
_FINAL = HookPoint("hook_final_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiver:
    """Where a path ends: `point`, such as "blocks.9.attn.hook_q", one `head` (of keys and values a kv_head) or, if it
    is None, all of them, and one `position` (negative ones count from the end) or all.
    """

    point: str
    head: int | None = None
    position: int | None = None


def path_patching(
    model: Model,
    clean: Prompts,
    corrupted: Prompts,
    metric: Metric,
    *,
    senders: Sequence[str] = ("attn.hook_z",),
    receivers: str | Receiver | Sequence[str | Receiver] = "hook_final_norm",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    by_position: bool = False,
    direction: Direction = "noising",
    batch_size: int = 32,
) -> xr.Dataset:
    """Patch the direct paths from many senders, one a run, to some receivers, and give the metric of every run.

    Prompts, `metric` and `direction` are those of `activation_patching`; noising, the default, gives a sender in the
    clean run what it has in the corrupted one. `senders` are kinds that write to the residual stream: `attn.hook_z`
    (one sender a head), `hook_attn_out`, `hook_mlp_out` and `hook_embed`. `receivers` are what reads it, in one or
    several layers, all patched in one run: queries, keys or values of a head (`attn.hook_q`, …, or `attn.hook_in` for
    all three and all heads), what enters an MLP (`mlp.hook_in`), or, alone, the final residual stream through its norm,
    `hook_final_norm`: the direct effect on the logits.

    `layers` of the senders; None means all that lie below the last receiver. `positions` are those at which senders
    are patched, all or these at once, or with `by_position` one by one.

    In a first run the sender has its other value, and what every attention and MLP between it and the receivers adds
    to the residual stream is what it was; what the receivers then get is put in their place in a second run, in which
    all that follows them is computed. For the final residual stream the first run is enough.

    Gives what `activation_patching` gives: one variable a kind of sender, float32, along `pair`, `layer`, `head` and
    `position` as far as they are told apart: the metric of the run with that path patched, NaN for senders that do not
    lie below any receiver; and `clean` and `corrupted` [pair]. Takes two forwards of each pair and two runs a sender,
    `batch_size` to a forward. Memory: what attention and MLPs add in one run, and a forward of `batch_size` sequences
    with what the receivers get, whose logits exist at one position only.

    Everything that does not fit is refused before anything is computed: SchemaError for a sender in `layers` that does
    not lie below any receiver, and as `activation_patching` does; HookError for kinds that are no senders or receivers
    and for heads and positions that are not there.
    """
    if direction not in DIRECTIONS:
        raise SchemaError(f"direction = {direction!r} is unknown.{nearest(direction, DIRECTIONS)}")
    if batch_size < 1:
        raise SchemaError(f"batch_size = {batch_size}: at least 1 run at a time")
    pairs = pairs_of(model, clean, corrupted)
    ends = _ends(model, [receivers] if isinstance(receivers, str | Receiver) else receivers, pairs)
    senders = [senders] if isinstance(senders, str) else list(senders)
    chosen = _layers(model, senders, ends, layers)
    sites = sites_of(model, pairs, senders, layers=chosen, positions=positions, by_position=by_position)
    check_metric(model, metric, pairs.lengths)
    values = {kind: sites.blank(kind, model, pairs) for kind in sites.kinds}
    baselines = run_baselines(model, pairs, metric)
    base, source = DIRECTIONS[direction]
    for number, rows in enumerate(pairs):
        runs = dict(zip(("clean", "corrupted"), rows, strict=True))
        task = _Task.of(model, sites, ends, runs[base], runs[source])
        found = task.metrics(metric, number, batch_size)
        for (kind, place), value in zip(task.places(), found.tolist(), strict=True):
            values[kind][(number, *place)] = value
    said = f"{metric.unit} of the {base} run with paths from {{kind}} of the {source} run"
    result = labelled(model, pairs, sites, metric, values, baselines, said)
    named = [str(end.point) if end.head is None else f"{end.point} head {end.head}" for end in ends]
    return result.assign_attrs(direction=direction, receivers=named)


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """A receiver that was checked against the model."""

    point: HookPoint
    head: int | None
    position: int | None

    def where(self) -> dict[str, int]:
        """The part of the point that it is."""
        dim = "kv_head" if "kv_head" in self.point.dims else "head"
        named = {dim: self.head, "position": self.position}
        return {dim: place for dim, place in named.items() if place is not None}


def _ends(model: Model, receivers: Sequence[str | Receiver], pairs: Pairs) -> list[_End]:
    ends = []
    for given in receivers:
        receiver = Receiver(point=given) if isinstance(given, str) else given
        points = expand([receiver.point], model.spec.points())
        for point in points:
            if point.kind not in RECEIVERS:
                raise HookError(f"{point} is no receiver: {', '.join(RECEIVERS)} are.{nearest(point.kind, RECEIVERS)}")
            _check_part(model, receiver, point, pairs)
            ends.append(_End(point=point, head=receiver.head, position=receiver.position))
    if not ends:
        raise SchemaError("receivers names none")
    if any(end.point == _FINAL and end.position is not None for end in ends):
        raise SchemaError(f"{_FINAL} is read at the position of the metric: give its receiver none")
    if len({(end.point, end.head, end.position) for end in ends}) < len(ends):
        raise SchemaError("a receiver is named twice")
    if len(ends) > 1 and any(end.point == _FINAL for end in ends):
        raise SchemaError(f"{_FINAL} comes after all other receivers, and would hide them: patch it alone")
    return ends


def _check_part(model: Model, receiver: Receiver, point: HookPoint, pairs: Pairs) -> None:
    dim = next((dim for dim in point.dims if dim in ("head", "kv_head")), None)
    if receiver.head is not None and dim is None:
        raise HookError(f"{point} has no heads, only [{', '.join(point.dims)}]; attn.hook_q has")
    if receiver.head is not None and not 0 <= receiver.head < model.spec.sizes[dim or "head"]:
        raise HookError(f"{point} has {dim}s 0 to {model.spec.sizes[dim or 'head'] - 1}, and no {receiver.head}")
    for number, length in enumerate(pairs.lengths):
        if receiver.position is not None and not -length <= receiver.position < length:
            raise SchemaError(f"there is no position {receiver.position} in pair {number}, of {length} tokens")


def _layers(model: Model, senders: Sequence[str], ends: Sequence[_End], layers: Sequence[int] | None) -> list[int]:
    """The layers of senders, all below a receiver where they were asked for, and any of them otherwise."""
    for kind in senders:
        if kind not in SENDERS:
            raise HookError(f"{kind!r} is no sender: {', '.join(SENDERS)} are.{nearest(kind, SENDERS)}")
    every = range(model.spec.n_layers)
    if layers is None:
        inside = [kind for kind in senders if kind in BLOCK]
        below = [layer for layer in every if any(_reaches(model, _sender(kind, layer), ends) for kind in inside)]
        if not below and set(senders) - {"hook_embed"}:
            raise SchemaError(f"no sender lies below {', '.join(str(end.point) for end in ends)}")
        return below or [0]
    for kind, layer in itertools.product(senders, layers):
        if layer in every and not _reaches(model, _sender(kind, layer), ends):
            raise SchemaError(f"{_sender(kind, layer)} does not lie below {', '.join(str(end.point) for end in ends)}")
    return list(layers)


def _sender(kind: str, layer: int | None) -> HookPoint:
    return HookPoint(kind, layer) if kind in BLOCK else HookPoint(kind)


def _reaches(model: Model, sender: HookPoint, ends: Sequence[_End]) -> bool:
    """Whether a sender lies below a receiver: in a parallel block attention and MLP do not see each other."""
    beside = sender.layer if model.spec.parallel else None
    return any(sender < end.point and (beside is None or end.point.layer != beside) for end in ends)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Task:
    """The runs of one pair: `own` holds what attention and MLPs add in the run that is patched, `other` what senders
    have in the other one.
    """

    model: Model
    sites: Sites
    ends: Sequence[_End]
    token_ids: Tensor
    own: Mapping[HookPoint, Tensor]
    other: Mapping[HookPoint, Tensor]

    @classmethod
    def of(cls, model: Model, sites: Sites, ends: Sequence[_End], base: Tensor, source: Tensor) -> _Task:
        added = [HookPoint(kind, layer) for layer in range(model.spec.n_layers) for kind in _BRANCHES]
        own = model.forward(base[None], HookSpec().capture(*added), logits=False).captures
        other = model.forward(source[None], HookSpec().capture(*sites.points()), logits=False).captures
        return cls(model=model, sites=sites, ends=ends, token_ids=base, own=own, other=other)

    def places(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The senders that lie below a receiver: kind, and place in the result's values."""
        for kind, numbers, site in self._sites():
            if _reaches(self.model, _sender(kind, site.get("layer")), self.ends):
                yield kind, numbers

    def _sites(self) -> Iterator[tuple[str, tuple[int, ...], dict[str, int]]]:
        for kind in self.sites.kinds:
            places = self.sites.places(kind, self.model, len(self.token_ids))
            for numbers in itertools.product(*(range(len(of_dim)) for of_dim in places.values())):
                yield kind, numbers, {dim: places[dim][n] for dim, n in zip(places, numbers, strict=True)}

    def metrics(self, metric: Metric, number: int, batch_size: int) -> Tensor:
        """The metric of every run, in the order of `places`."""
        at = metric_position(metric, len(self.token_ids))
        runs, found = self._first_runs(), []
        while batch := list(itertools.islice(runs, batch_size)):
            spec = together(batch, HookSpec()).capture(*(end.point for end in self.ends))
            out = self.model.forward(self.token_ids.expand(len(batch), -1), spec, logits=False)
            if self.ends[0].point == _FINAL:
                with torch.inference_mode():
                    logits = self.model.unembedding.project(out[_FINAL][:, at]).float()
            else:
                variants = (self._second_run(out.captures, n) for n in range(len(batch)))
                logits = next(variant_logits(self.model, self.token_ids, variants, at, batch_size=batch_size))
            numbers = torch.full((len(batch),), number, device=logits.device)
            found.append(metric.at_position(logits, numbers).cpu())
        return torch.cat(found)

    def _first_runs(self) -> Iterator[Variant]:
        """A sender has its other value, and nothing between it and the receivers answers."""
        last = max(end.point for end in self.ends)
        for kind, _, where in self._sites():
            point = _sender(kind, where.pop("layer", None))
            if not _reaches(self.model, point, self.ends):
                continue
            if not self.sites.by_position and "position" in dims_of(kind):
                places: Mapping[str, int | Sequence[int]] = {"position": self.sites.at(len(self.token_ids))}
            else:
                places = {}
            run: list[tuple[HookPoint, NamedIntervention]] = [patch(point, self.other[point], **where, **places)]
            for branch, value in self.own.items():
                # What the sender itself adds is not held.
                if point < branch < last and not (branch.layer == point.layer and branch.kind == "hook_attn_out"):
                    run.append((branch, Replace(value[0])))
            yield run

    def _second_run(self, captured: Mapping[HookPoint, Tensor], n: int) -> Variant:
        """The receivers have what they got in the n-th of some first runs."""
        length = len(self.token_ids)
        return [
            patch(
                end.point,
                captured[end.point][n : n + 1],
                **{dim: place % length if dim == "position" else place for dim, place in end.where().items()},
            )
            for end in self.ends
        ]
