"""Reading and changing the states of a recurrence: at which positions it stops, and what happens there.

The value at `rwkv.hook_state` is the state that a token hands on to the next one: what the token itself read of it
stays read. It is looked at and changed at chosen positions alone, one after another. What tokens write can be scaled
at all of them without a stop.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .addressing import Index, Site, address, listed, per_length
from .addressing import counted as counted_along
from .errors import HookError
from .interventions import Intervention, NamedIntervention, Value, finite, fitting
from .points import STATE, HookPoint
from .taps import Request, Sink, Tap


class _OnWrites(NamedIntervention):
    """One that scales what tokens write to the state; `where` says which tokens, heads and sequences."""

    __slots__ = ()

    @abstractmethod
    def factor(self) -> Value:
        """What the writes are multiplied by."""

    def bind(self, site: Site) -> Intervention:
        where = HookPoint(STATE, site.point.layer) if site.point.layer is not None else f"blocks.0.{STATE}"
        raise HookError(f"it acts on {STATE} alone: register it at {str(where)!r}")

    def scale_writes(self, factors_BTH: Tensor, site: Site) -> None:
        """Multiply the factors of the tokens and heads that are meant, in place. Raises HookError."""
        for dim in self.where:
            if dim in ("d_key", "d_value"):
                raise HookError(
                    f"a token writes to a head as a whole: .at() takes position, head and sequence, not {dim}"
                )
        part = address(
            replace(site, sizes={dim: site.sizes[dim] for dim in ("sequence", "position", "head")}), self.where
        )
        factor = finite(fitting(self.factor(), part, "scale"), "scale")
        part.write(factors_BTH, part.read(factors_BTH) * factor)


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


@dataclass(frozen=True, slots=True, eq=False)
class _Edit:
    """A change of the state at some stops: the function, and for each stop the sequences that are meant there."""

    function: Intervention
    rows: Mapping[int, tuple[int, ...]]


class StateTap(Tap):
    """What happens to the states of one layer in one forward. `stops` are the positions of the batch, ascending, after
    which the recurrence has to pause; `writes` [sequence, position, head] scales what is written, None: as it is."""

    __slots__ = ("_captured", "_edits", "_kept", "stops", "writes")

    def __init__(
        self,
        point: HookPoint,
        request: Request,
        record: Sink,
        last: bool,
        *,
        captured: Sequence[Mapping[int, tuple[int, ...]]],
        edits: Sequence[_Edit],
        writes: Tensor | None,
    ) -> None:
        super().__init__(point, request, record, last)
        self.functions = tuple(edit.function for edit in edits)
        self.writes = writes
        self._captured, self._edits = captured, edits
        self.stops = sorted({stop for rows in (*captured, *(edit.rows for edit in edits)) for stop in rows})
        self._kept: dict[int, Tensor] = {}

    def at(self, stop: int, state_BHKV: Tensor) -> Tensor:
        """Take in the state after position `stop`, give the one that is handed on."""
        if self._record_before:
            state_BHKV = self._keep(stop, state_BHKV)
        for edit in self._edits:
            rows = edit.rows.get(stop, ())
            if rows:
                changed_BHKV = edit.function(state_BHKV.clone(), self._point)
                state_BHKV = _in_rows(rows, changed_BHKV, state_BHKV)
        return self._keep(stop, state_BHKV) if self._record_after else state_BHKV

    def _keep(self, stop: int, state_BHKV: Tensor) -> Tensor:
        for index, rows in enumerate(self._captured):
            if meant := rows.get(stop, ()):
                state_B1HKV = state_BHKV[:, None]
                if torch.is_grad_enabled():  # a loss can be differentiated only by tensors that lead to it
                    if len(meant) < len(state_BHKV) or len(self._captured) > 1:
                        raise HookError(
                            f"{self._point}: where gradients are kept, states are captured at one position that is the "
                            f"same in all sequences"
                        )
                    state_B1HKV = state_B1HKV if state_B1HKV.requires_grad else state_B1HKV.clone().requires_grad_()
                    state_BHKV = state_B1HKV.squeeze(1)
                before = self._kept.get(index)
                self._kept[index] = state_B1HKV if before is None else _in_rows(meant, state_B1HKV, before)
        return state_BHKV

    def finish(self) -> None:
        """Give away what was captured [sequence, state_position, head, d_key, d_value], once the recurrence has run."""
        if self._captured:
            kept = [self._kept[index] for index in range(len(self._captured))]
            self._record(self._point, kept[0] if len(kept) == 1 else torch.cat(kept, 1))
            self._kept = {}
        self._end()

    def unrecorded(self) -> "StateTap":
        return StateTap(
            self._point, Request(), self._record, last=False, captured=(), edits=self._edits, writes=self.writes
        )


def _in_rows(rows: tuple[int, ...], new: Tensor, old: Tensor) -> Tensor:
    """Give `new` in some of the sequences, `old` in the others."""
    if len(rows) == len(old):
        return new
    chosen = torch.zeros(len(old), dtype=torch.bool, device=old.device)
    chosen[list(rows)] = True
    return torch.where(chosen.view(-1, *(1,) * (old.dim() - 1)), new, old)


def tap_states(
    site: Site, request: Request, changes: Sequence[object], positions: Sequence[int] | None, record: Sink, last: bool
) -> StateTap:
    """Make the tap of the states at a site, whose `sizes` have the positions of the batch as `position`.

    `changes` are interventions in their order, `positions` those after which states are captured, where they are.
    Raises HookError for an intervention that cannot act on states, or does not say at which position.
    """
    captured: list[Mapping[int, tuple[int, ...]]] = []
    if request.before or request.after:
        rows = range(len(site.lengths))
        captured = [_stops(position, site, rows, late=request.after) for position in positions or (-1,)]
    edits: list[_Edit] = []
    writes: Tensor | None = None
    for change in changes:
        try:
            if isinstance(change, _OnWrites):
                if writes is None:
                    writes = torch.ones(*(site.sizes[dim] for dim in ("sequence", "position", "head")))
                change.scale_writes(writes, site)
            elif isinstance(change, NamedIntervention):
                edits.append(_edit(change, site))
            else:
                raise HookError("a function is not told which position it is at: give Apply(function).at(position=…)")
        except HookError as error:
            raise HookError(f"{_called(change)} at {site.point}: {error}") from error
    return StateTap(site.point, request, record, last, captured=captured, edits=edits, writes=writes)


def _called(change: object) -> str:
    return type(change).__name__ if isinstance(change, NamedIntervention) else f"{change!r}"


def _edit(change: NamedIntervention, site: Site) -> _Edit:
    if "position" not in change.where:
        raise HookError("there is a state after every token: say after which, .at(position=…)")
    rest = {dim: index for dim, index in change.where.items() if dim != "position"}
    address(site, change.where)
    of_one = replace(site, sizes={dim: size for dim, size in site.sizes.items() if dim != "position"})
    sequences = (
        slice(None) if "sequence" not in rest else counted_along(rest["sequence"], "sequence", len(site.lengths))
    )
    rows = listed(sequences, len(site.lengths))
    return _Edit(replace(change, where=rest).bind(of_one), _stops(change.where["position"], site, rows))


def _stops(position: Index, site: Site, rows: Sequence[int], *, late: bool = False) -> dict[int, tuple[int, ...]]:
    """Give the positions of the batch that are meant, and for each the sequences in which it is. `late`: the state
    after a sequence's last token, which padding does not change, is looked at where the longest ends, to save stops.
    """
    longest = max(site.lengths)
    found = per_length(position, "position", site.lengths, rows)
    stops: dict[int, tuple[int, ...]] = {}
    for row in rows:
        length = site.lengths[row]
        for place in listed(found[length], length):
            place = longest - 1 if late and place == length - 1 else place
            stops[place] = (*stops.get(place, ()), row)
    return stops
