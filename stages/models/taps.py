"""Reading and changing a forward pass at its hook points: what is asked for, and what runs when a point fires.

A `HookSpec` says what is wanted, a `Taps` is that checked against one model for one forward (`resolve`). The forward
looks a point up only in blocks that have taps, so that points nobody asked for cost no call.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import HookError
from .html import html_table
from .interventions import Intervention, NamedIntervention
from .points import HookPoint

Sink: TypeAlias = Callable[[HookPoint, Tensor], None]
"""Takes captures as they happen, in firing order. The forward never writes to a tensor that it has handed out; it may
read it again, so a sink must not write to it either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureRequest:
    """Points to capture, before or after what is done there; of recurrent states those after `positions`."""

    patterns: tuple[str | HookPoint, ...]
    before: bool
    positions: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeRequest:
    """What is to be done at the points of a pattern."""

    pattern: str | HookPoint
    function: Intervention | NamedIntervention


@dataclass(frozen=True, slots=True)
class HookSpec:
    """What to capture and what to change in a forward. Immutable: every method gives a new one.

    Patterns are those of `points.expand`. Nothing is checked before the spec meets a model (`resolve`), which a forward
    does before its first matrix multiply.
    """

    captures: tuple[CaptureRequest, ...] = ()
    changes: tuple[ChangeRequest, ...] = ()

    def capture(
        self, *patterns: str | HookPoint, before: bool = False, positions: Sequence[int] | None = None
    ) -> "HookSpec":
        """Add points to capture. Captured is the value that flows on, after any intervention there; with `before`, the
        value that arrived.

        `positions` says after which tokens recurrent states, `rwkv.hook_state`, are captured (negative numbers count
        from the end of each sequence); None: after the last one. One forward captures states at one list of positions;
        a sequence that is too short for one of them has NaN there, and a position that none has is refused.
        At a position before the last one the recurrence pauses, and what comes after it may be rounded otherwise.
        Raises HookError for what is no list of whole numbers.
        """
        chosen = None if positions is None else _whole_numbers(positions)
        added = CaptureRequest(patterns=patterns, before=before, positions=chosen)
        return replace(self, captures=(*self.captures, added))

    def intervene(self, pattern: str | HookPoint, function: Intervention | NamedIntervention) -> "HookSpec":
        """Add what is done at every point the pattern names. Several at one point act in the order in which they were
        added.

        Either a named intervention (`Replace`, `Add`, `Scale`, `Zero`, `Apply`, `Knockout`, `SteerAttention`,
        `StateKnockout`, `StateSteering`), or a function that is called with the value and the point and whose result
        flows on: it must have the shape, dtype and device of what was given; the forward raises HookError otherwise.
        Recurrent states take named interventions only, those that change the state itself `.at(position=…)`.
        """
        return replace(self, changes=(*self.changes, ChangeRequest(pattern=pattern, function=function)))

    def extend(self, other: "HookSpec") -> "HookSpec":
        """Add all that another asks for, its interventions after these."""
        return HookSpec(captures=self.captures + other.captures, changes=self.changes + other.changes)

    def _repr_html_(self) -> str:
        captures = [("capture", ", ".join(map(str, one.patterns)), _manner(one)) for one in self.captures]
        changes = [("intervene", one.pattern, _effect(one.function)) for one in self.changes]
        return html_table("HookSpec", {}, ("what", "at", "how"), [*captures, *changes])


EMPTY = HookSpec()


def _manner(capture: CaptureRequest) -> str:
    found = ["before interventions"] if capture.before else []
    return ", ".join([*found, *([] if capture.positions is None else [f"after tokens {list(capture.positions)}"])])


def _effect(function: Intervention | NamedIntervention) -> str:
    """An intervention by its name and the part that it addresses; not its values, which may be large."""
    if not isinstance(function, NamedIntervention):
        return str(getattr(function, "__qualname__", type(function).__name__))
    where = ", ".join(f"{dim}={index}" for dim, index in function.where.items())
    return type(function).__name__ + (f" at {where}" if where else "")


def _whole_numbers(positions: object) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, positions))  # type: ignore[call-overload]
    except TypeError:
        raise HookError(f"positions={positions!r}: a list of whole numbers is expected, such as [0, -1]") from None


class Finished(Exception):
    """Raised by the tap after which nothing that a forward was asked for remains to be computed; caught in `Model`."""


@dataclass(slots=True)
class Request:
    """What is asked of one point: to record the value that arrives or flows on, and to change it."""

    before: bool = False
    after: bool = False
    functions: tuple[Intervention, ...] = ()


class Tap:
    """What happens at one point of one forward. Called with the value that arrives, gives the value that flows on."""

    __slots__ = ("_last", "_point", "_record", "_record_after", "_record_before", "functions")

    def __init__(self, point: HookPoint, request: "Request", record: Sink, last: bool) -> None:
        self._point = point
        self._record = record
        self._record_before, self._record_after = request.before, request.after
        self.functions = request.functions
        self._last = last

    def __call__(self, value: Tensor) -> Tensor:
        if self._record_before:
            value = self._hand_out(value)
        for function in self.functions:
            value = self._checked(function(copy_of(value), self._point), value)
        if self._record_after:
            value = self._hand_out(value)
        self._end()
        return value

    def _end(self) -> None:
        if self._last:
            raise Finished

    def _hand_out(self, value: Tensor) -> Tensor:
        """Record a value and give what flows on: the very tensor recorded where gradients are kept, for a loss can be
        differentiated only with respect to tensors that lead to it."""
        if not torch.is_grad_enabled():
            # A view of a wider tensor, such as q in the fused projection, would keep the whole of it alive.
            self._record(self._point, value.contiguous())
            return value
        if not value.requires_grad:
            value = value.clone().requires_grad_()
        self._record(self._point, value)
        return value

    def unrecorded(self) -> "Tap":
        """The same interventions with nothing captured."""
        return Tap(self._point, Request(functions=self.functions), self._record, last=False)

    def _checked(self, result: object, given: Tensor) -> Tensor:
        if not isinstance(result, Tensor):
            raise HookError(f"the intervention at {self._point} gave {type(result).__name__}; a tensor is expected")
        for what, got, expected in (
            ("shape", tuple(result.shape), tuple(given.shape)),
            ("dtype", result.dtype, given.dtype),
            ("device", result.device, given.device),
        ):
            if got != expected:
                dims = ", ".join(self._point.dims)
                raise HookError(
                    f"the intervention at {self._point} gave a tensor of {what} {got}; what arrived there, [{dims}], "
                    f"has {expected}"
                )
        return result


def copy_of(value: Tensor) -> Tensor:
    """Copy with the strides kept, for kernels may round otherwise by layout and an identity must change no bit."""
    if value.is_contiguous() or 0 in value.stride():
        return value.clone()
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taps:
    """The taps of one forward: `blocks[layer]` maps kinds to the taps of a block (empty for most), `top` the global
    ones. `last` is the point after which nothing more is needed; None where the logits are.
    """

    blocks: tuple[Mapping[str, Tap], ...]
    top: Mapping[str, Tap]
    last: HookPoint | None

    def unrecorded(self) -> "Taps":
        """The same interventions with nothing captured and no early end, for a pass that is run again."""
        quiet = tuple({kind: tap.unrecorded() for kind, tap in at.items()} for at in self.blocks)
        return replace(self, blocks=quiet)


At: TypeAlias = Mapping[str, Tap]
"""The taps of one block, or the global ones, by kind of point."""


def changes(at: At, kind: str) -> bool:
    """Whether an intervention is registered at this kind of point."""
    return kind in at and bool(at[kind].functions)


def flows(at: At, kind: str) -> bool:
    """Whether what comes out of this kind of point must be computed with: an intervention may have changed it, or
    gradients are to flow through what is captured there."""
    return kind in at and (bool(at[kind].functions) or torch.is_grad_enabled())
