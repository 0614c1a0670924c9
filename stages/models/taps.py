"""Reading and changing a forward pass at its hook points: what is asked for, and what runs when a point fires.

A `HookSpec` says what is wanted, a `Taps` is that checked against one model for one forward. The forward looks a point
up only in blocks that have taps, so that points nobody asked for cost no call.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from .errors import HookError
from .points import HookPoint, expand
from .spec import ModelSpec

Intervention: TypeAlias = Callable[[Tensor, HookPoint], Tensor]
"""From the value at a point, and the point, to the value that flows on: same shape, dtype and device. It is given a
copy of its own, which it may change in place."""

Sink: TypeAlias = Callable[[HookPoint, Tensor], None]
"""Takes captures as they happen, in firing order. The forward never writes to a tensor that it has handed out; it may
read it again, so a sink must not write to it either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Capture:
    patterns: tuple[str | HookPoint, ...]
    before: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    pattern: str | HookPoint
    function: Intervention


@dataclass(frozen=True, slots=True)
class HookSpec:
    """What to capture and what to change in a forward. Immutable: every method gives a new one.

    Patterns are those of `points.expand`. Nothing is checked before the spec meets a model (`resolve`), which a forward
    does before its first matrix multiply.
    """

    captures: tuple[_Capture, ...] = ()
    changes: tuple[_Change, ...] = ()

    def capture(self, *patterns: str | HookPoint, before: bool = False) -> "HookSpec":
        """Add points to capture. Captured is the value that flows on, after any intervention there; with `before`, the
        value that arrived."""
        return replace(self, captures=(*self.captures, _Capture(patterns=patterns, before=before)))

    def intervene(self, pattern: str | HookPoint, function: Intervention) -> "HookSpec":
        """Add a function that is called at every point the pattern names, with the value there and the point, and whose
        result flows on. Several at one point are applied in the order in which they were added.

        The result must have the shape, dtype and device of what was given; the forward raises HookError otherwise.
        """
        return replace(self, changes=(*self.changes, _Change(pattern=pattern, function=function)))


EMPTY = HookSpec()


class Finished(Exception):
    """Raised by the tap after which nothing that a forward was asked for remains to be computed; caught in `Model`."""


class Tap:
    """What happens at one point of one forward. Called with the value that arrives, gives the value that flows on."""

    __slots__ = ("_last", "_point", "_record", "_record_after", "_record_before", "functions")

    def __init__(self, point: HookPoint, request: "_Request", record: Sink, last: bool) -> None:
        self._point = point
        self._record = record
        self._record_before, self._record_after = request.before, request.after
        self.functions = request.functions
        self._last = last

    def __call__(self, value: Tensor) -> Tensor:
        if self._record_before:
            self._record(self._point, value.contiguous())
        for function in self.functions:
            value = self._checked(function(value.clone(), self._point), value)
        if self._record_after:
            # A view of a wider tensor, such as q in the fused projection, would keep the whole of it alive.
            self._record(self._point, value.contiguous())
        if self._last:
            raise Finished
        return value

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Taps:
    """The taps of one forward: `blocks[layer]` maps kinds to the taps of a block (empty for most), `top` the global
    ones. `last` is the point after which nothing more is needed; None where the logits are.
    """

    blocks: tuple[Mapping[str, Tap], ...]
    top: Mapping[str, Tap]
    last: HookPoint | None


@dataclass(slots=True)
class _Request:
    before: bool = False
    after: bool = False
    functions: tuple[Intervention, ...] = ()


_NO_TAPS: Mapping[str, Tap] = {}


def resolve(hooks: HookSpec, spec: ModelSpec, record: Sink, *, logits: bool) -> Taps:
    """Check a `HookSpec` against a model and make the taps of one forward, which give their captures to `record`.

    Raises HookError for a pattern that names no point of this model, for a point to be captured both before and after
    its interventions, and where neither logits nor any hook is asked for.
    """
    requests = _requests(hooks, spec)
    if not requests and not logits:
        raise HookError("nothing is asked of this forward: no logits, no capture and no intervention")
    last = None if logits else max(requests)
    blocks: dict[int, dict[str, Tap]] = {}
    top: dict[str, Tap] = {}
    for point, request in requests.items():
        place = top if point.layer is None else blocks.setdefault(point.layer, {})
        place[point.kind] = Tap(point, request, record, last=point == last)
    return Taps(blocks=tuple(blocks.get(layer, _NO_TAPS) for layer in range(spec.n_layers)), top=top, last=last)


def _requests(hooks: HookSpec, spec: ModelSpec) -> dict[HookPoint, _Request]:
    requests: dict[HookPoint, _Request] = {}
    for capture in hooks.captures:
        for point in _expand(capture.patterns, spec):
            request = requests.setdefault(point, _Request())
            request.before |= capture.before
            request.after |= not capture.before
            if request.before and request.after:
                raise HookError(
                    f"{point} is captured with before=True and without it; one forward keeps one of the two"
                )
    for change in hooks.changes:
        for point in _expand((change.pattern,), spec):
            request = requests.setdefault(point, _Request())
            request.functions += (change.function,)
    return requests


@functools.lru_cache(maxsize=256)
def _expand(patterns: tuple[str | HookPoint, ...], spec: ModelSpec) -> tuple[HookPoint, ...]:
    return expand(patterns, spec.points())


def changes(at: Mapping[str, Tap], kind: str) -> bool:
    """Whether an intervention is registered at this kind of point."""
    return kind in at and bool(at[kind].functions)
