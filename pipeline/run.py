"""The loop: read → compute → write → record, each overlapped with the next, over the units that are not done.

A unit is read while the one before it is computed, and written while the one after it is computed; within a unit, a
batch's captures are gathered while the next batch computes. So memory holds two units' buffers, however many layers
there are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Event

import xarray as xr

from ..stages.encode import Encode
from ..stages.stage import Apply
from ..stores.errors import DiskFull
from ..stores.fingerprint import versions, whereabouts
from ..stores.grid import Unit
from ..stores.ledger import Record
from ..stores.store import Store
from ..stores.writer import UnitWriter
from .dictionaries import are_indexed, index_features, is_trained, train_in_run
from .exit_codes import COMPLETE, FAILED, INTERRUPTED
from .plan import Plan, Source, Step, default_folder, load_plan, make_plan, resolve_device
from .progress import Progress, Quiet
from .recipe import Recipe, read_recipe
from .stopping import Stopped, stop_on_signals


@dataclass
class StepOutcome:
    """What a run did for one step: tokens computed and bytes written by this run, wall `seconds` (loading left out).

    `left` counts the tokens that had no record when the run ended; `failed` maps a unit to the path of its record.
    """

    name: str
    n_token: int
    tokens: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    left: int = 0
    failed: dict[int, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a run did. `code` is the process's exit code."""

    folder: Path
    steps: tuple[StepOutcome, ...]
    interrupted: bool

    @property
    def code(self) -> int:
        if any(step.failed for step in self.steps):
            return FAILED
        return INTERRUPTED if self.interrupted else COMPLETE


def run(
    recipe: str | Path | Recipe,
    folder: str | Path | None = None,
    *,
    device: str = "auto",
    progress: Progress | None = None,
) -> Outcome:
    """Runs a recipe into `folder` (by default runs/<recipe's name>), or goes on with it, and says what was done.

    Ctrl-C and SIGTERM stop between two batches: what is recorded stays, the unit in hand is computed again next time. A
    unit that fails is recorded with its traceback and the others go on. Everything that can be refused is refused
    before the first unit: RecipeError, CorpusError, SchemaError, ModelError, HookError, FingerprintMismatch, DiskFull.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    progress = progress or Quiet()
    with stop_on_signals() as stop, progress:
        where = default_folder(recipe, folder)

        def counted(documents: int, characters: int) -> None:
            progress.counted(documents, characters)
            if stop.is_set():
                raise Stopped

        try:
            plan = make_plan(recipe, where, resolve_device(device), counted)
        except Stopped:
            return Outcome(where, (), True)
        plan.check_space()
        plan.save()
        steps = run_steps(plan, (), progress, stop)
        whole = not stop.is_set() and not any(step.failed for step in steps)
        if whole and all(train_in_run(recipe, where, name, plan.device, progress, stop) for name in recipe.training):
            plan = make_plan(recipe, where, plan.device) if plan.waiting else plan
            plan.check_space()
            steps += run_steps(plan, steps, progress, stop)
        interrupted = stop.is_set() and not is_complete(plan)
    return Outcome(plan.folder, tuple(steps), interrupted)


def run_steps(plan: Plan, before: Sequence[StepOutcome], progress: Progress, stop: Event) -> list[StepOutcome]:
    """The steps of a plan in order, but for those that ran before, up to the first one that fails. Features are indexed
    when all of them are there.
    """
    ran, steps = {step.name for step in before}, list[StepOutcome]()
    for step in plan.steps:
        if step.stage.store in ran:
            continue
        steps.append(run_step(plan, step, progress, stop))
        if steps[-1].failed or stop.is_set():
            break
        if isinstance(step.stage, Encode) and not index_features(step.folder, progress, stop):
            break
    return steps


def is_complete(plan: Plan) -> bool:
    """Whether nothing of a plan is left to do: units, dictionaries, indexes."""
    features = [step.folder for step in plan.steps if isinstance(step.stage, Encode)]
    return (
        not plan.waiting
        and not any(step.todo() for step in plan.steps)
        and all(is_trained(plan.folder, name) for name in plan.recipe.training)
        and all(map(are_indexed, features))
    )


def run_unit(folder: str | Path, step: str, index: int, device: str = "auto") -> Record:
    """Computes one unit of a run that is there and gives its record: read, compute, write, record, one after the other.

    The only call that ever crosses a process boundary: three words in, one record out. A process loads each step once.
    """
    plan, this, apply = _loaded(Path(folder), step, resolve_device(device))
    store, unit = this.open(), this.schema.grid[index]
    block = _read(this, plan.source(this), unit)
    started = time.perf_counter()
    writer = UnitWriter(store, unit)
    for piece in apply(block, unit):
        writer.put(piece)
    return writer.finish({"compute": time.perf_counter() - started})


@lru_cache(maxsize=2)
def _loaded(folder: Path, step: str, device: str) -> tuple[Plan, Step, Apply]:
    plan = load_plan(folder, device)
    this = plan.step(step)
    return plan, this, this.stage.load(device, this.schema)


def run_step(plan: Plan, step: Step, progress: Progress, stop: Event) -> StepOutcome:
    """All units of a step that are not done, in order, overlapped.

    Ends early when `stop` is set; raises for a full disk only.
    """
    todo, store, source = step.todo(), step.open(), plan.source(step)
    outcome = StepOutcome(step.stage.store, step.schema.n_token)
    progress.start(outcome.name, outcome.n_token, outcome.n_token - sum(map(len, todo)))
    if not todo:
        return outcome
    began = time.time()
    apply = step.stage.load(plan.device, step.schema)
    started = time.perf_counter()
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as finisher:
        ahead = reader.submit(_read, step, source, todo[0])
        behind: tuple[Unit, Future[Record]] | None = None
        for unit, following in zip(todo, [*todo[1:], None], strict=True):
            block = ahead
            if following:
                ahead = reader.submit(_read, step, source, following)
            if store.ledger.path(unit.index).exists():
                # Another run of the recipe has recorded it since. Its objects must not be touched again.
                progress.advance(len(unit))
                continue
            begun = time.perf_counter()
            try:
                writer = _compute(apply, block.result(), unit, store, progress, stop)
            except Exception as error:
                _fail(outcome, store, unit, error, progress)
                continue
            if behind:
                _settle(outcome, store, *behind, progress)
            behind = None
            if writer is None:
                break
            behind = unit, finisher.submit(writer.finish, {"compute": time.perf_counter() - begun})
        if behind:
            _settle(outcome, store, *behind, progress)
    outcome.seconds = time.perf_counter() - started
    outcome.left = sum(map(len, step.todo()))
    if not outcome.left:
        store.sweep(before=began)
    return outcome


def _settle(outcome: StepOutcome, store: Store, unit: Unit, record: Future[Record], progress: Progress) -> None:
    """Waits until a unit is recorded.

    A failure to write it is the unit's own; a full disk is everyone's and ends the run.
    """
    try:
        found = record.result()
    except DiskFull:
        raise
    except Exception as error:
        _fail(outcome, store, unit, error, progress)
    else:
        outcome.tokens += len(unit)
        outcome.nbytes += found["bytes"]
        progress.recorded(unit, found)


def _fail(outcome: StepOutcome, store: Store, unit: Unit, error: Exception, progress: Progress) -> None:
    outcome.failed[unit.index] = store.ledger.fail(unit.index, error, {**whereabouts(), "versions": versions()})
    progress.failed(unit, error, outcome.failed[unit.index])


def _read(step: Step, source: Source, unit: Unit) -> xr.Dataset:
    return source.read(step.stage.span(unit, source.schema, step.schema))


def _compute(
    apply: Apply, block: xr.Dataset, unit: Unit, store: Store, progress: Progress, stop: Event
) -> UnitWriter | None:
    """The unit's pieces, gathered in a writer while the next one computes. None if the run is to stop."""
    writer = UnitWriter(store, unit)
    with ThreadPoolExecutor(1, "gather") as gatherer:
        gathered: Future[None] | None = None
        for piece in apply(block, unit):
            if gathered:
                gathered.result()
            if stop.is_set():
                return None
            gathered = gatherer.submit(writer.put, piece)
            progress.advance(_n_token(piece))
        if gathered:
            gathered.result()
    return writer


def _n_token(piece: xr.DataTree) -> int:
    return max((node.sizes.get("token", 0) for node in piece.subtree), default=0)
