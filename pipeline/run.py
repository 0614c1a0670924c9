"""What a run does: plan, then step after step, each by an executor, which knows units; then nothing is left to do.

A step begins when all units of the step that it reads are recorded. Dictionaries are trained when the activations are
there, features are indexed when all of them are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from ..stages.encode import Encode
from ..stores.html import html_table
from ..stores.places import Place
from .audit import require_whole
from .dictionaries import are_indexed, is_trained
from .executors.executor import Executor, StepOutcome
from .executors.this_process import ThisProcess
from .executors.units import run_unit, settle_threads
from .exit_codes import COMPLETE, FAILED, INTERRUPTED
from .plan import Plan, default_folder, make_plan
from .progress import Progress, Quiet
from .recipe import Recipe, read_recipe
from .stopping import Stopped, stop_on_signals

__all__ = ["Outcome", "StepOutcome", "is_complete", "run", "run_unit"]


@dataclass(frozen=True)
class Outcome:
    """What a run did. `code` is the process's exit code."""

    folder: Place
    steps: tuple[StepOutcome, ...]
    interrupted: bool

    @property
    def code(self) -> int:
        if any(step.failed for step in self.steps):
            return FAILED
        return INTERRUPTED if self.interrupted else COMPLETE

    def _repr_html_(self) -> str:
        said = {COMPLETE: "complete", INTERRUPTED: "stopped early: run again", FAILED: "units failed"}[self.code]
        rows = [
            (step.name, f"{step.tokens:,}", f"{step.left:,}", f"{step.nbytes:,}", f"{step.seconds:.1f}", failed)
            for step in self.steps
            for failed in [", ".join(map(str, step.failed)) or "none"]
        ]
        header = ("step", "tokens computed", "left", "bytes written", "seconds", "failed units")
        return html_table("Outcome", {"folder": self.folder, "outcome": said}, header, rows)


def run(
    recipe: str | Path | Recipe,
    folder: str | Place | None = None,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Outcome:
    """Runs a recipe into `folder` (by default runs/<recipe's name>), or goes on with it, and says what was done.

    `executor` computes the units: this process by default, `Ranks(i, n)`, or `DaskWorkers("local:4")`; all of them to
    the same bytes, and each goes on with what another began.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 stop between two batches: what is recorded stays, the unit in hand is
    computed again next time. A unit that fails is recorded with its traceback and the others go on. Everything that can
    be refused is refused before the first unit: RecipeError, CorpusError, SchemaError, ModelError, HookError,
    FingerprintMismatch, DiskFull. When all is recorded, rows in must be rows out: CorruptStore names the records that
    do not add up, see `audit`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    progress, executor = progress or Quiet(), executor or ThisProcess()
    where = default_folder(recipe, folder)
    with stop_on_signals() as stop, progress, executor:
        try:
            plan = planned(recipe, where, device, executor, progress, stop)
        except Stopped:
            return Outcome(where, (), True)
        steps = run_steps(plan, (), executor, progress, stop)
        whole = not stop.is_set() and not any(step.failed for step in steps)
        if whole and all(executor.train(plan, name, progress, stop) for name in recipe.training):
            plan = make_plan(recipe, where, plan.device) if plan.waiting else plan
            plan.check_space()
            steps += run_steps(plan, steps, executor, progress, stop)
        interrupted = stop.is_set() and not is_complete(plan)
    outcome = Outcome(plan.folder, tuple(steps), interrupted)
    if outcome.code == COMPLETE and not any(step.todo() for step in plan.steps):
        require_whole(plan.folder)
    return outcome


def planned(recipe: Recipe, folder: Place, device: str, executor: Executor, progress: Progress, stop: Event) -> Plan:
    """The plan, with all its refusals, saved in the run's folder. Stopped if `stop` is set meanwhile."""

    def counted(documents: int, characters: int) -> None:
        progress.counted(documents, characters)
        if stop.is_set():
            raise Stopped

    on = executor.device(device, progress, stop)
    settle_threads(recipe.stages, folder, executor.threads())
    plan = make_plan(recipe, folder, on, counted)
    plan.check_space()
    plan.save()
    return plan


def run_steps(
    plan: Plan, before: Sequence[StepOutcome], executor: Executor, progress: Progress, stop: Event
) -> list[StepOutcome]:
    """The steps of a plan in order, but for those that ran before, up to the first one that fails. Features are indexed
    when all of them are there.
    """
    ran, steps = {step.name for step in before}, list[StepOutcome]()
    for step in plan.steps:
        if step.stage.store in ran:
            continue
        steps.append(executor.run_step(plan, step, progress, stop))
        if steps[-1].failed or stop.is_set():
            break
        if isinstance(step.stage, Encode) and not executor.index(plan, step, progress, stop):
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
