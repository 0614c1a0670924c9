"""Interventions on single edges of attention, each from a query to a key: cutting them, and steering their weights.

An edge is a pair (query, key), either end a whole number (negative ones count from the end of each sequence), a slice,
a list of whole numbers, or None for all; ends that stand for several positions make every combination. Edges to keys
after their query carry no weight: a pair of numbers that names one is refused, combinations pass over them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .addressing import PER_TOKEN, Index, Places, Site, address, counted, listed, per_length
from .errors import HookError
from .interventions import PATTERN, SCORES, Intervention, NamedIntervention, finite, real
from .points import EFFECTIVE_ATTN, STATE, HookPoint
from .spec import ModelSpec
from .taps import HookSpec

Edge: TypeAlias = "tuple[Index | None, Index | None]"
"""From a query to a key."""


@dataclass(frozen=True, slots=True, eq=False)
class Knockout(NamedIntervention):
    """Cuts edges: their scores become −∞ and so their weights exactly 0, also in models that cap scores. A query all
    of whose edges are cut attends to nothing.

    Stands at `attn.hook_attn_scores`; `.at(head=…, sequence=…)` narrows it to some heads or sequences.
    """

    edges: Iterable[Edge]

    def bind(self, site: Site) -> Intervention:
        _check_point(site, SCORES)
        targets = _Targets.of(site, self.edges, self.where)

        def apply(scores: Tensor, point: HookPoint) -> Tensor:
            return scores.masked_fill_(targets.mask(scores.device), -torch.inf)

        return apply


@dataclass(frozen=True, slots=True, eq=False)
class SteerAttention(NamedIntervention):
    """Changes the weights of edges after the softmax and keeps the sum of every row that it touches at 1.

    Give one of `scale`, at least 0, by which the weights are multiplied before the row is divided by its sum (a row
    whose sum is 0 stays 0), and `weight`, from 0 on, to which they are set exactly, the other weights of the row
    sharing what is left in proportion; where those are all 0, the row is divided evenly among its targets. An edge
    that is named twice counts once.

    Stands at `attn.hook_pattern`; `.at(head=…, sequence=…)` narrows it. Source: candle-mi's attention steering, except
    that its `SetValue` takes the difference evenly from the other weights and may give some to hidden keys.
    """

    edges: Iterable[Edge]
    scale: float | Tensor | None = None
    weight: float | Tensor | None = None

    def bind(self, site: Site) -> Intervention:
        _check_point(site, PATTERN)
        targets = _Targets.of(site, self.edges, self.where, seen_only=True)
        rule, amount = _scaled if self.weight is None else _weighed, self.amount()
        if self.weight is not None:
            _check_total(float(amount.detach()), targets)

        def steer(pattern: Tensor, chosen: Tensor) -> Tensor:
            steered = rule(pattern.float(), chosen, amount.to(pattern.device)).to(pattern.dtype)
            return torch.where(chosen.any(-1, keepdim=True), steered, pattern)

        def apply(pattern: Tensor, point: HookPoint) -> Tensor:
            chosen = targets.mask(pattern.device)
            if len(targets.rows) == len(pattern):
                return steer(pattern, chosen)
            rows = torch.tensor(targets.rows, device=pattern.device)
            return pattern.index_copy(0, rows, steer(pattern[rows], chosen[rows]))

        return apply

    def amount(self) -> Tensor:
        """The scale or the weight, a tensor of one float32 number. Raises HookError for none or both of them, and for
        what is no such number."""
        if self.scale is not None and self.weight is None:
            return _amount(self.scale, "scale")
        if self.weight is not None and self.scale is None:
            return _amount(self.weight, "weight")
        raise HookError("give scale=… or weight=…, one of the two")


@dataclass(frozen=True, slots=True, kw_only=True)
class KnockoutSpec:
    """Edges to cut in some layers and heads: numbers (negative ones count from the end), lists, ranges, slices, or None
    for all of them. Nothing is checked before it meets a model. Source: candle-mi's KnockoutSpec, which leaves the
    layers to its caller."""

    edges: Iterable[Edge]
    layers: "Index | None" = None
    heads: "Index | None" = None

    def hooks(self, model_spec: ModelSpec) -> HookSpec:
        """Give the knockout at each of its layers; `HookSpec.extend` joins it to another. Raises HookError for layers
        or heads that the model does not have, for edges that are none, and for a model without attention."""
        return _in_layers(SCORES, Knockout(self.edges), self.edges, self.layers, self.heads, model_spec)

    def mask(self, model_spec: ModelSpec, n_positions: int) -> Tensor:
        """Give the edges that are cut in a sequence of `n_positions` tokens, boolean [layer, head, query, key].

        Raises HookError for layers, heads and positions that are not there, and for a model without attention.
        """
        return _mask(self.edges, self.layers, self.heads, model_spec, n_positions)


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringSpec:
    """Edges to steer in some layers and heads, by one of `scale` and `weight` (see `SteerAttention`): layers and heads
    are numbers (negative ones count from the end), lists, ranges, slices, or None for all of them. Nothing is checked
    before it meets a model. Source: candle-mi's SteeringSpec, which leaves the layers to its caller; its knockouts are
    `KnockoutSpec`."""

    edges: Iterable[Edge]
    layers: "Index | None" = None
    heads: "Index | None" = None
    scale: float | Tensor | None = None
    weight: float | Tensor | None = None

    def hooks(self, model_spec: ModelSpec) -> HookSpec:
        """Give the steering at each of its layers; `HookSpec.extend` joins it to another. Raises HookError for layers
        or heads that the model does not have, for edges that are none, for none or both of `scale` and `weight`, and
        for a model without attention; what depends on the sequences, such as their lengths, a forward refuses."""
        steering = SteerAttention(self.edges, scale=self.scale, weight=self.weight)
        steering.amount()
        return _in_layers(PATTERN, steering, self.edges, self.layers, self.heads, model_spec)

    def mask(self, model_spec: ModelSpec, n_positions: int) -> Tensor:
        """Give the edges that are steered in a sequence of `n_positions` tokens, boolean [layer, head, query, key];
        what lies outside the window of a layer is not.

        Raises HookError for layers, heads and positions that are not there, and for a model without attention.
        """
        mask = _mask(self.edges, self.layers, self.heads, model_spec, n_positions)
        positions = torch.arange(n_positions)
        far = positions[:, None] - positions >= (n_positions if model_spec.window is None else model_spec.window)
        slides = torch.tensor([model_spec.slides(layer) for layer in range(model_spec.n_layers)])
        return mask & ~(slides[:, None, None, None] & far)

    def is_prompt_only(self, prompt_length: int) -> bool:
        """Whether every query that is steered stays within the first `prompt_length` positions, however long the text
        grows: whether generation can go on without steering any token that is new. Ends that count from the end of the
        sequence move with it and do not; keys lie before their queries."""
        return all(_stays_within(query, prompt_length) for query, _ in _pairs(self.edges))


def _in_layers(
    kind: str,
    intervention: NamedIntervention,
    edges: Iterable[Edge],
    layers: "Index | None",
    heads: "Index | None",
    model_spec: ModelSpec,
) -> HookSpec:
    """Give an intervention on edges at a kind of point in some layers, in some heads there."""
    _check_attends(model_spec)
    _pairs(edges)
    _chosen(heads, "head", model_spec.n_heads)
    hooks = HookSpec()
    for layer in _chosen(layers, "layer", model_spec.n_layers):
        narrowed = intervention if heads is None else intervention.at(head=heads)
        hooks = hooks.intervene(HookPoint(kind, layer), narrowed)
    return hooks


def _mask(
    edges: Iterable[Edge], layers: "Index | None", heads: "Index | None", model_spec: ModelSpec, n_positions: int
) -> Tensor:
    """Mark edges, boolean [layer, head, query, key]."""
    _check_attends(model_spec)
    chosen = torch.tensor(_chosen(layers, "layer", model_spec.n_layers))
    mask = torch.zeros(model_spec.n_layers, model_spec.n_heads, n_positions, n_positions, dtype=torch.bool)
    marked = _filled(_resolved(edges, (n_positions,), (0,))[n_positions], n_positions)
    mask[chosen[:, None], torch.tensor(_chosen(heads, "head", model_spec.n_heads))] = marked
    return mask


def _stays_within(query: "Index | None", n_positions: int) -> bool:
    if query is None:
        return False
    if isinstance(query, slice):
        start, stop = query.start or 0, query.stop
        return stop is not None and start >= 0 and 0 <= stop <= n_positions and (query.step or 1) > 0
    numbers = [int(number) for number in torch.as_tensor(query).reshape(-1)]
    return all(0 <= number < n_positions for number in numbers)


@dataclass(frozen=True, slots=True)
class _Targets:
    """Edges of chosen heads in chosen sequences: `pairs` by the length of the sequence, ends counted from the start."""

    site: Site
    pairs: Mapping[int, list[tuple[Places, Places]]]
    rows: Sequence[int]
    heads: Sequence[int]
    seen_only: bool

    @classmethod
    def of(
        cls, site: Site, edges: Iterable[Edge], where: Mapping[str, Index], *, seen_only: bool = False
    ) -> "_Targets":
        """`seen_only` leaves out, and refuses as a pair of numbers, what lies outside the window of the layer."""
        for dim in where:
            if dim in PER_TOKEN and dim in site.sizes:
                raise HookError(f"its edges say which {dim} is meant: .at() takes sequence and head here")
        address(site, where)
        rows = _chosen(where.get("sequence"), "sequence", len(site.lengths))
        heads = _chosen(where.get("head"), "head", site.sizes["head"])
        pairs = _resolved(edges, site.lengths, rows, site.window if seen_only else None)
        return cls(site=site, pairs=pairs, rows=rows, heads=heads, seen_only=seen_only)

    def mask(self, device: torch.device) -> Tensor:
        """Boolean, broadcasts to [sequence, head, query, key]."""
        n = max(self.site.lengths)
        some = next(iter(self.pairs.values()))
        if len(self.rows) == len(self.site.lengths) and all(pairs == some for pairs in self.pairs.values()):
            cut = _filled(some, n)[None].to(device)
        else:
            filled = {length: _filled(pairs, n) for length, pairs in self.pairs.items()}
            cut = torch.zeros(len(self.site.lengths), n, n, dtype=torch.bool)
            for row in self.rows:
                cut[row] = filled[self.site.lengths[row]]
            cut = cut.to(device)
        if self.seen_only:
            cut &= ~self.site.hidden(device)
        if len(self.heads) == self.site.sizes["head"]:
            return cut[:, None]
        among = torch.zeros(self.site.sizes["head"], dtype=torch.bool, device=device)
        among[list(self.heads)] = True
        return cut[:, None] & among[:, None, None]


def _check_attends(spec: ModelSpec) -> None:
    if spec.rwkv is not None:
        raise HookError(
            f"this model ({spec.family}) has no attention whose edges could be cut: StateKnockout, at {STATE}, keeps a "
            f"token from being remembered; an edge of {EFFECTIVE_ATTN} can be set to 0"
        )


def _check_point(site: Site, kind: str) -> None:
    if site.point.kind.startswith("rwkv."):
        raise HookError(f"it acts on {kind} alone, and this model has no attention: at {STATE} there is StateKnockout")
    if site.point.kind != kind:
        where = HookPoint(kind, site.point.layer) if site.point.layer is not None else f"blocks.0.{kind}"
        raise HookError(f"it acts on {kind} alone: register it at {str(where)!r}")


def _chosen(index: "Index | None", dim: str, size: int) -> list[int]:
    return list(listed(slice(None) if index is None else counted(index, dim, size), size))


def _pairs(edges: Iterable[Edge]) -> list[Edge]:
    """Check that edges are pairs, and some."""
    if isinstance(edges, Iterator):
        raise HookError("its edges come from an iterator, which can be read once only: give a list of them")
    try:
        pairs = [(query, key) for query, key in edges]
    except (TypeError, ValueError) as error:
        raise HookError(f"its edges must be (query, key) pairs, such as [(-1, 0)], not {edges!r}") from error
    if not pairs:
        raise HookError("it names no edge: give (query, key) pairs, such as [(-1, 0)]")
    return pairs


def _resolved(
    edges: Iterable[Edge], lengths: Sequence[int], rows: Sequence[int], window: int | None = None
) -> dict[int, list[tuple[Places, Places]]]:
    """Count both ends of every edge from the start, for each length among the sequences `rows`."""
    resolved: dict[int, list[tuple[Places, Places]]] = {lengths[row]: [] for row in rows}
    for query, key in _pairs(edges):
        queries = per_length(slice(None) if query is None else query, "query", lengths, rows)
        keys = per_length(slice(None) if key is None else key, "key", lengths, rows)
        for length, pairs in resolved.items():
            _check_seen(queries[length], keys[length], length, window)
            pairs.append((queries[length], keys[length]))
    return resolved


def _check_seen(query: Places, key: Places, length: int, window: int | None) -> None:
    if isinstance(query, int) and isinstance(key, int):
        if key > query:
            raise HookError(
                f"the edge from query {query} to key {key} (in a sequence of {length} tokens) carries no weight: no "
                f"query sees a key after it. An edge is (query, key)"
            )
        if window is not None and query - key >= window:
            raise HookError(
                f"the edge from query {query} to key {key} carries no weight: queries of this layer see {window} "
                f"positions, themselves included"
            )
    elif max(listed(query, length)) < min(listed(key, length)):
        raise HookError(
            f"no edge leads from query {_span(query, length)} to key {_span(key, length)}: no query sees a key after it"
        )


def _span(places: Places, length: int) -> str:
    numbers = listed(places, length)
    return f"{numbers[0]}" if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def _filled(pairs: Sequence[tuple[Places, Places]], n_positions: int) -> Tensor:
    """Boolean [query, key] with the edges marked, those to the future left out."""
    marked = torch.zeros(n_positions, n_positions, dtype=torch.bool)
    for query, key in pairs:
        if isinstance(query, list) and isinstance(key, list):
            marked[torch.tensor(query)[:, None], torch.tensor(key)] = True
        else:
            marked[query, key] = True
    return marked.tril_()


def _amount(given: float | Tensor, name: str) -> Tensor:
    number = torch.as_tensor(finite(real(given, name), name))
    if number.dim():
        raise HookError(f"the {name} must be one number, not a tensor of shape {tuple(number.shape)}")
    if number < 0:
        raise HookError(f"the {name} must be at least 0, not {number:g}: weights of attention are not negative")
    return number.float()


def _check_total(weight: float, targets: _Targets) -> None:
    most = int(targets.mask(torch.device("cpu")).sum(-1).max())
    if weight * most > 1 + 1e-6:
        raise HookError(
            f"some query has {most} targets, and a weight of {weight:g} for each makes {weight * most:g}, but the "
            f"weights of a row add up to 1: give at most {1 / most:g}"
        )


def _scaled(pattern: Tensor, chosen: Tensor, amount: Tensor) -> Tensor:
    scaled = torch.where(chosen, pattern * amount, pattern)
    total = scaled.sum(-1, keepdim=True)
    return scaled / total.masked_fill(total == 0, 1.0)


def _weighed(pattern: Tensor, chosen: Tensor, amount: Tensor) -> Tensor:
    count = chosen.sum(-1, keepdim=True)
    others = pattern.masked_fill(chosen, 0.0)
    total = others.sum(-1, keepdim=True)
    alone = total == 0
    share = others * ((1 - amount * count).clamp_min(0) / total.masked_fill(alone, 1.0))
    even = 1.0 / count.clamp_min(1)
    return torch.where(chosen, torch.where(alone & (amount > 0), even, amount), share)
