"""Reading and changing the states of a recurrence: at which positions it stops, and what happens there.

The value at `rwkv.hook_state` is the state that a token hands on to the next one: what the token itself read of it
stays read. It is looked at and changed at chosen positions alone, one after another. What tokens write can be scaled
at all of them without a stop.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .addressing import Index, Part, Site, address, counted, listed, per_length
from .errors import HookError
from .interventions import Intervention, NamedIntervention, Value, finite, fitting, real
from .points import STATE, HookPoint
from .taps import Request, Sink, Tap

Stops: TypeAlias = Mapping[int, tuple[int, ...]]
"""Positions of the batch after which the recurrence has to pause, each with the sequences that are meant there."""


class _OnWrites(NamedIntervention):
    """One that scales what tokens write to the state; `where` says which tokens, heads and sequences."""

    __slots__ = ()

    @abstractmethod
    def factor(self) -> Value:
        """What the writes are multiplied by."""

    def bind(self, site: Site) -> Intervention:
        where = HookPoint(STATE, site.point.layer) if site.point.layer is not None else f"blocks.0.{STATE}"
        raise HookError(f"it acts on {STATE} alone: register it at {str(where)!r}")

    def bind_to_writes(self, site: Site) -> Callable[[Tensor], None]:
        """Give the function that multiplies the factors [sequence, position, head] of what is written, in place.

        Raises HookError for tokens, heads or sequences that are not there, and for what is no finite factor of them.
        """
        for dim in self.where:
            if dim in ("d_key", "d_value"):
                raise HookError(
                    f"a token writes to a head as a whole: .at() takes position, head and sequence, not {dim}"
                )
        of_heads = {dim: site.sizes[dim] for dim in ("sequence", "position", "head")}
        part = address(replace(site, sizes=of_heads), self.where)
        factor = finite(fitting(self.factor(), part, "scale"), "scale")

        def apply(factors_BTH: Tensor) -> None:
            part.write(factors_BTH, part.read(factors_BTH) * torch.as_tensor(factor).to(factors_BTH))

        return apply


@dataclass(frozen=True, slots=True, eq=False)
class StateKnockout(_OnWrites):
    """Keeps tokens from writing to the state: k_t v_tᵀ is never added. Everything else happens as ever: the state
    decays, what RWKV-7 removes is removed, and the token still reads its own bonus.

    Stands at `rwkv.hook_state`; `.at(position=…, head=…, sequence=…)` says which tokens and heads (else all of them).
    Source: candle-mi's StateKnockoutSpec.
    """

    def factor(self) -> Value:
        return 0.0


@dataclass(frozen=True, slots=True, eq=False)
class StateSteering(_OnWrites):
    """Multiplies what tokens write to the state, k_t v_tᵀ, by `scale`: 0 is `StateKnockout`, 1 changes nothing.

    Stands at `rwkv.hook_state`; `.at(position=…, head=…, sequence=…)` says which tokens and heads (else all of them).
    Several that name the same token multiply. Source: candle-mi's StateSteeringSpec.
    """

    scale: Value

    def factor(self) -> Value:
        return self.scale


@dataclass(slots=True, kw_only=True, eq=False)
class StatePlan:
    """What is done with the states of one layer: for each position that is captured the stops, the interventions by
    the position after which they act, in their order, and what scales the factors of what is written."""

    captured: Sequence[Stops] = ()
    edits: dict[int, list[Intervention]] = field(default_factory=dict)
    writes: list[Callable[[Tensor], None]] = field(default_factory=list)


class StateTap(Tap):
    """What happens to the states of one layer in one forward. `stops` are the positions of the batch, ascending, after
    which the recurrence has to pause."""

    __slots__ = ("_due", "_kept", "_plan", "stops")

    def __init__(self, point: HookPoint, request: Request, record: Sink, last: bool, plan: StatePlan) -> None:
        super().__init__(point, request, record, last)
        self._plan = plan
        self._due: dict[int, list[tuple[int, tuple[int, ...]]]] = {}  # what is captured at each stop, in which rows
        for place, stops in enumerate(plan.captured):
            for stop, rows in stops.items():
                self._due.setdefault(stop, []).append((place, rows))
        self.stops = sorted({*plan.edits, *self._due})
        self._kept: dict[int, Tensor] = {}

    def written(self, k_BTHK: Tensor) -> Tensor:
        """Give the keys with which tokens write to the state: those given, scaled where interventions say so."""
        if not self._plan.writes:
            return k_BTHK
        factors_BTH = torch.ones(k_BTHK.shape[:3], device=k_BTHK.device)
        for scale in self._plan.writes:
            scale(factors_BTH)
        return k_BTHK.float() * factors_BTH[..., None]

    def at(self, stop: int, state_BHKV: Tensor) -> Tensor:
        """Take in the state after position `stop`, give the one that is handed on."""
        if self._record_before:
            state_BHKV = self._keep(stop, state_BHKV)
        for function in self._plan.edits.get(stop, ()):
            state_BHKV = function(state_BHKV.clone(), self._point)
        return self._keep(stop, state_BHKV) if self._record_after else state_BHKV

    def _keep(self, stop: int, state_BHKV: Tensor) -> Tensor:
        for place, rows in self._due.get(stop, ()):
            state_B1HKV = state_BHKV[:, None]
            if torch.is_grad_enabled():  # a loss can be differentiated only by tensors that lead to it
                state_B1HKV = state_B1HKV if state_B1HKV.requires_grad else state_B1HKV.clone().requires_grad_()
                state_BHKV = state_B1HKV.squeeze(1)
            if len(rows) < len(state_BHKV):  # a sequence that is too short for a position has no state there
                before = self._kept.get(place, torch.full_like(state_B1HKV, torch.nan))
                state_B1HKV = _in_rows(rows, state_B1HKV, before)
            self._kept[place] = state_B1HKV
        return state_BHKV

    def finish(self) -> None:
        """Give away what was captured [sequence, state_position, head, d_key, d_value], once the recurrence has run."""
        if self._plan.captured:
            kept = [self._kept[place] for place in range(len(self._plan.captured))]
            self._kept = {}
            self._record(self._point, kept[0] if len(kept) == 1 else torch.cat(kept, 1))
        self._end()

    def unrecorded(self) -> "StateTap":
        request = Request(functions=self.functions)
        return StateTap(self._point, request, self._record, last=False, plan=replace(self._plan, captured=()))


def _in_rows(rows: tuple[int, ...], new: Tensor, old: Tensor) -> Tensor:
    """Give `new` in some of the sequences, `old` in the others."""
    chosen = torch.zeros(len(old), dtype=torch.bool, device=old.device)
    chosen[list(rows)] = True
    return torch.where(chosen.view(-1, *(1,) * (old.dim() - 1)), new, old)


def tap_states(
    site: Site,
    request: Request,
    changes: Sequence[Intervention | NamedIntervention],
    positions: Sequence[int],
    *,
    record: Sink,
    last: bool,
    gradients: bool,
) -> StateTap:
    """Make the tap of the states at a site, whose `sizes` have the positions of the batch as `position`.

    `changes` are interventions in their order, `positions` those after which states are captured, where they are.
    Raises HookError for positions that are not there, for an intervention that cannot act on states or does not say at
    which position, and for captures of more than one position where gradients are to flow through them.
    """
    captured: list[Stops] = []
    if request.before or request.after:
        captured = [_captured(position, site) for position in positions]
    everywhere = all(len(rows) == len(site.lengths) for stops in captured for rows in stops.values())
    if gradients and (len(captured) > 1 or not everywhere):
        raise HookError(
            f"{site.point}: where gradients are kept, states are captured at one position, the same in all sequences"
        )
    plan = StatePlan(captured=captured)
    for change in changes:
        if not isinstance(change, NamedIntervention):
            raise HookError(
                f"the intervention at {site.point} is a function, which is not told after which token it acts: give "
                f"Apply(function).at(position=…)"
            )
        try:
            _include(change, site, plan)
        except HookError as error:
            raise HookError(f"{type(change).__name__} at {site.point}: {error}") from error
    functions = tuple(function for at_stop in plan.edits.values() for function in at_stop)
    return StateTap(site.point, replace(request, functions=functions), record, last, plan)


def _include(change: NamedIntervention, site: Site, plan: StatePlan) -> None:
    if isinstance(change, _OnWrites):
        plan.writes.append(change.bind_to_writes(site))
        return
    for stop, functions in _bound(change, site).items():
        plan.edits.setdefault(stop, []).extend(functions)


def _captured(position: int, site: Site) -> Stops:
    """Give the stops of a position that is captured, in the sequences that have it. Raises HookError where none has."""
    rows = [row for row, length in enumerate(site.lengths) if -length <= position < length]
    try:
        (stops,) = _stops(position, site, rows or range(len(site.lengths)))
    except HookError as error:
        raise HookError(f"{site.point}: {error}") from error
    return stops


def _stops(index: Index, site: Site, rows: Sequence[int]) -> list[dict[int, tuple[int, ...]]]:
    """Give the stops of each place that an index along positions names in these sequences.

    After a sequence's last token the recurrence pauses only where the longest ends: padding changes no state."""
    found = per_length(index, "position", site.lengths, rows)
    places: list[dict[int, tuple[int, ...]]] = []
    for row in rows:
        length = site.lengths[row]
        for n, place in enumerate(listed(found[length], length)):
            stop = max(site.lengths) - 1 if place == length - 1 else place
            if n == len(places):
                places.append({})
            places[n][stop] = (*places[n].get(stop, ()), row)
    return places


def _bound(change: NamedIntervention, site: Site) -> dict[int, list[Intervention]]:
    """Bind an intervention to every position that it names: to the state there of the sequences which have it there,
    with what its values hold for them."""
    if "position" not in change.where:
        raise HookError("there is a state after every token: say after which, .at(position=…)")
    whole = address(site, change.where)
    change.bind(site)  # which refuses what does not fit the part as a whole
    n_sequences = len(site.lengths)
    index = counted(change.where.get("sequence", slice(None)), "sequence", n_sequences)
    rows = listed(index, n_sequences)
    of_one = replace(site, sizes={dim: size for dim, size in site.sizes.items() if dim != "position"})
    rest = {dim: index for dim, index in change.where.items() if dim != "position"}
    bound: dict[int, list[Intervention]] = {}
    for place, stops in enumerate(_stops(change.where["position"], site, rows)):
        for stop, meant in stops.items():
            some = [n for n, row in enumerate(rows) if row in meant]
            part = _part_of(change, whole, place, some)
            where = rest if len(some) == len(rows) else {**rest, "sequence": [rows[n] for n in some]}
            bound.setdefault(stop, []).append(replace(part, where=where).bind(of_one))
    return bound


def _part_of(change: NamedIntervention, part: Part, place: int, rows: Sequence[int]) -> NamedIntervention:
    """Give an intervention with what its values, which broadcast to a part, hold for one of its positions and some of
    its sequences, both counted within the part."""
    dims = tuple(part.sizes)
    picked: dict[str, Any] = {}
    for name in (one.name for one in fields(change) if one.name != "where"):
        given = getattr(change, name)
        if callable(given) or not isinstance(value := real(given, name), Tensor):
            continue
        axis = {dim: n - len(dims) + value.dim() for n, dim in enumerate(dims)}
        if axis.get("sequence", -1) >= 0 and value.shape[0] > 1:
            value = value[list(rows)]
        if (along := axis.get("position", -1)) >= 0:
            value = value.select(along, place if value.shape[along] > 1 else 0)
        picked[name] = value
    return replace(change, **picked)
