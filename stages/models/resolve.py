"""A `HookSpec` checked against one model and one batch: the taps of one forward."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .addressing import Site
from .batch import Batch
from .errors import HookError
from .interventions import Intervention, NamedIntervention
from .points import EFFECTIVE_ATTN, STATE, HookPoint, expand
from .spec import ModelSpec
from .state_taps import tap_states
from .taps import HookSpec, Request, Sink, Tap, Taps

_NO_TAPS: Mapping[str, Tap] = {}


def resolve(
    hooks: HookSpec, spec: ModelSpec, batch: Batch, record: Sink, *, logits: bool, gradients: bool = False
) -> Taps:
    """Check a `HookSpec` against a model and a batch, and make the taps of one forward, which give their captures to
    `record`; `gradients` says that a loss is to be differentiated by them.

    Raises HookError for a pattern that names no point of this model, for a point to be captured both before and after
    its interventions, for an intervention that cannot act at its point on these sequences, and where neither logits
    nor any hook is asked for.
    """
    wanted = _wanted(hooks, spec)
    if not wanted and not logits:
        raise HookError("nothing is asked of this forward: no logits, no capture and no intervention")
    positions = state_positions(hooks, spec)
    last = None if logits else max(wanted)
    blocks: dict[int, dict[str, Tap]] = {}
    top: dict[str, Tap] = {}
    passed: dict[object, Tensor] = {}
    for point, found in wanted.items():
        place = top if point.layer is None else blocks.setdefault(point.layer, {})
        if point.kind != STATE and not found.changes:  # most points of most forwards: nothing to be looked up
            place[point.kind] = Tap(point, found.request(), record, last=point == last)
            continue
        site = Site.of(point, spec, batch.lengths, passed)
        for change in found.changes:
            _check(change, point)
        if point.kind == STATE:
            place[STATE] = tap_states(
                site,
                found.request(),
                found.changes,
                positions,
                record=record,
                last=point == last,
                gradients=gradients,
            )
        else:
            functions = tuple(_bound(change, site) for change in found.changes)
            place[point.kind] = Tap(point, found.request(functions), record, last=point == last)
    _check_effective(blocks)
    return Taps(blocks=tuple(blocks.get(layer, _NO_TAPS) for layer in range(spec.n_layers)), top=top, last=last)


@dataclass(slots=True)
class _Wanted:
    """What is asked of one point, with what is done there as the caller gave it."""

    before: bool = False
    after: bool = False
    changes: list[Intervention | NamedIntervention] = field(default_factory=list)

    def request(self, functions: tuple[Intervention, ...] = ()) -> Request:
        return Request(before=self.before, after=self.after, functions=functions)


def _wanted(hooks: HookSpec, spec: ModelSpec) -> dict[HookPoint, _Wanted]:
    wanted: dict[HookPoint, _Wanted] = {}
    for capture in hooks.captures:
        for point in _expand(capture.patterns, spec):
            found = wanted.setdefault(point, _Wanted())
            found.before |= capture.before
            found.after |= not capture.before
            if found.before and found.after:
                raise HookError(
                    f"{point} is captured with before=True and without it; one forward keeps one of the two"
                )
    for change in hooks.changes:
        for point in _expand((change.pattern,), spec):
            wanted.setdefault(point, _Wanted()).changes.append(change.function)
    return wanted


def state_positions(hooks: HookSpec, spec: ModelSpec) -> tuple[int, ...]:
    """Give the positions after which a forward captures recurrent states.

    Raises HookError for positions asked of other points, for none, for one twice, and for two lists of them.
    """
    chosen: set[tuple[int, ...]] = set()
    for capture in hooks.captures:
        kinds = {point.kind for point in _expand(capture.patterns, spec)}
        if capture.positions is not None:
            if others := sorted(kinds - {STATE}):
                raise HookError(f"positions=… says where states are captured; {', '.join(others)} have every position")
            if not capture.positions or len(set(capture.positions)) < len(capture.positions):
                raise HookError(f"positions={list(capture.positions)} names none, or one of them twice")
        if STATE in kinds:
            chosen.add(capture.positions or (-1,))
    if len(chosen) > 1:
        lists = " and ".join(str(list(positions)) for positions in sorted(chosen))
        raise HookError(f"one forward captures states at one list of positions, not at {lists}")
    return next(iter(chosen), (-1,))


def _check(change: object, point: HookPoint) -> None:
    if isinstance(change, type):
        raise HookError(f"the intervention at {point} is the class {change.__name__}: make one, {change.__name__}(…)")
    if not isinstance(change, NamedIntervention) and not callable(change):
        raise HookError(
            f"the intervention at {point} is a {type(change).__name__}: a function of the value and the point is "
            f"expected, or one of Replace, Add, Scale, Zero, Apply, Knockout, SteerAttention, StateKnockout and "
            f"StateSteering"
        )


def _bound(change: Intervention | NamedIntervention, site: Site) -> Intervention:
    if not isinstance(change, NamedIntervention):
        return change
    try:
        return change.bind(site)
    except HookError as error:
        raise HookError(f"{type(change).__name__} at {site.point}: {error}") from error


def _check_effective(blocks: Mapping[int, Mapping[str, Tap]]) -> None:
    """A state that is put in was written by no token, so that no row of effective attention could tell it."""
    for layer, at in blocks.items():
        if EFFECTIVE_ATTN in at and STATE in at and at[STATE].functions:
            raise HookError(
                f"blocks.{layer}.{EFFECTIVE_ATTN} is not defined where the state of its layer is changed at a "
                f"position: capture it in a forward of its own"
            )


@functools.lru_cache(maxsize=256)
def _expand(patterns: tuple[str | HookPoint, ...], spec: ModelSpec) -> tuple[HookPoint, ...]:
    return expand(patterns, spec.points())
