"""The units of a step in this process: read, compute, write, record, each overlapped with the next.

A unit is read while the one before it is computed, and written while the one after it is computed; within a unit, a
batch's captures are gathered while the next batch computes. So memory holds two units' buffers, however many layers
there are.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import xarray as xr

from ...stages.stage import Apply
from ...stores.errors import DiskFull, StorageError
from ...stores.grid import Unit
from ...stores.ledger import Record
from ...stores.store import Store
from ...stores.writer import UnitWriter
from ..plan import Plan, Step
from ..progress import Progress
from ..stopping import Stopped
from .executor import Executor, StepOutcome, settle
from .units import fail, is_recorded, load, read

LOOK_AGAIN = 1.0
"""Seconds between two looks whether someone else has recorded the unit that is being computed."""


class ThisProcess(Executor):
    """All units, in order, here."""

    def run_step(self, plan: Plan, step: Step, progress: Progress, stop: Event) -> StepOutcome:
        return run_step(plan, step, progress, stop)


def run_step(plan: Plan, step: Step, progress: Progress, stop: Event) -> StepOutcome:
    """All units of a step that are not done, in order, overlapped.

    Ends early when `stop` is set; raises DiskFull and StorageError, which are every unit's.
    """
    return run_units(plan, step, step.todo(), progress, stop)


def run_units(plan: Plan, step: Step, units: Iterable[Unit], progress: Progress, stop: Event) -> StepOutcome:
    """Those of `units` that nobody has recorded when their turn comes. `units` is asked for one at a time."""
    store, outcome = step.open(), StepOutcome(step.stage.store, step.schema.n_token)
    progress.start(outcome.name, outcome.n_token, outcome.n_token - sum(map(len, step.todo())))
    began = time.time()
    todo = _unrecorded(store, units, progress)
    first = next(todo, None)
    if first is not None and not stop.is_set():
        apply = load(step, plan.device)
        started = time.perf_counter()
        _overlapped(plan, step, store, apply, first, todo, outcome, progress, stop)
        outcome.seconds = time.perf_counter() - started
        if outcome.limit:
            progress.said(outcome.limit)
    settle(outcome, step)
    if first is not None and not outcome.left:
        store.sweep(before=began)
    return outcome


def _unrecorded(store: Store, units: Iterable[Unit], progress: Progress) -> Iterator[Unit]:
    for unit in units:
        if is_recorded(store.ledger, unit):
            progress.advance(len(unit))
        else:
            yield unit


def _overlapped(
    plan: Plan,
    step: Step,
    store: Store,
    apply: Apply,
    first: Unit,
    todo: Iterator[Unit],
    outcome: StepOutcome,
    progress: Progress,
    stop: Event,
) -> None:
    source = plan.source(step)
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as finisher:
        unit: Unit | None = first
        ahead: Future[xr.Dataset] = reader.submit(read, step, source, first)
        behind: tuple[Unit, Future[Record | None]] | None = None
        while unit and not stop.is_set():
            block, following = ahead, next(todo, None)
            if following:
                ahead = reader.submit(read, step, source, following)
            begun = time.perf_counter()
            try:
                writer = _compute(apply, block, unit, store, progress, stop)
            except Stopped:
                break
            except StorageError:
                raise
            except Exception as error:
                _fail(outcome, store, unit, error, progress)
            else:
                timing = {"compute": time.perf_counter() - begun}
                if behind:
                    waiting = time.perf_counter()
                    _settle(outcome, store, *behind, progress)
                    outcome.waited += time.perf_counter() - waiting
                behind = (unit, finisher.submit(_finish, writer, timing)) if writer else None
            unit = following
        if behind:
            _settle(outcome, store, *behind, progress)


def _compute(
    apply: Apply, block: Future[xr.Dataset], unit: Unit, store: Store, progress: Progress, stop: Event
) -> UnitWriter | None:
    """The unit's pieces, gathered in a writer while the next one computes. None if someone has recorded it since;
    Stopped if the run is to stop.
    """
    looked, computed = float("-inf"), 0
    with ThreadPoolExecutor(1, "gather") as gatherer:
        gathered: Future[None] | None = None
        writer = UnitWriter(store, unit)
        pieces = apply(block.result(), unit)
        while True:
            if stop.is_set():
                raise Stopped
            if time.monotonic() - looked > LOOK_AGAIN:
                looked = time.monotonic()
                if is_recorded(store.ledger, unit):
                    progress.advance(len(unit) - computed)
                    return None
            piece = next(pieces, None)
            if gathered:
                gathered.result()
            if piece is None:
                return writer
            gathered = gatherer.submit(writer.put, piece)
            computed += (n_token := _n_token(piece))
            progress.advance(n_token)


def _finish(writer: UnitWriter, timing: dict[str, float]) -> Record | None:
    return None if is_recorded(writer.store.ledger, writer.unit) else writer.finish(timing)


def _settle(outcome: StepOutcome, store: Store, unit: Unit, record: Future[Record | None], progress: Progress) -> None:
    """Waits until a unit is recorded.

    A failure to write it is the unit's own; a full disk, or a store that does not answer, is everyone's: the run ends.
    """
    try:
        found = record.result()
    except (DiskFull, StorageError):
        raise
    except Exception as error:
        _fail(outcome, store, unit, error, progress)
    else:
        if found is not None:
            outcome.tokens += len(unit)
            outcome.nbytes += found["bytes"]
            outcome.computing += found["seconds"]["compute"]
            outcome.writing += found["seconds"]["write"]
            progress.recorded(unit, found)


def _fail(outcome: StepOutcome, store: Store, unit: Unit, error: Exception, progress: Progress) -> None:
    outcome.failed[unit.index] = fail(store.ledger, unit, error)
    progress.failed(unit, error, outcome.failed[unit.index])


def _n_token(piece: xr.DataTree) -> int:
    return max((node.sizes.get("token", 0) for node in piece.subtree), default=0)
