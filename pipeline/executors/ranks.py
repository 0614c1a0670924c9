"""One of several processes that share nothing but the run's folder.

Each takes every n-th unit first. Then it looks what of the other ranks' has no record and walks it from the other end,
so that it meets its owner in the middle; a unit that two compute is replaced, object by object, by equal bytes. So the
units of a rank that is dead, hung or not started yet are computed by the others, and none waits for another.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from threading import Event
from typing import NamedTuple

from ...stores.errors import RecipeError
from ...stores.grid import Unit
from ..dictionaries import index_features, train_in_run
from ..plan import Plan, Step, resolve_device
from ..progress import Progress
from .executor import Executor, StepOutcome
from .this_process import run_units

MOST_ATTEMPTS = 2
"""Failures of a unit in this run, of whichever ranks, after which no other rank tries it again."""


class Launcher(NamedTuple):
    """The variables by which a launcher tells a process which one of how many it is, on its node too."""

    rank: str
    world: str
    local: str


LAUNCHERS = (
    Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    Launcher("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    Launcher("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    Launcher("JOB_COMPLETION_INDEX", "", ""),  # an indexed job of Kubernetes
    Launcher("PBS_ARRAY_INDEX", "", ""),
    Launcher("LSB_JOBINDEX", "", ""),
)


@dataclass(frozen=True)
class Ranks(Executor):
    """Rank `rank` of `world`, numbered from 0. `world` may be another at every restart. `local` is the rank on its
    node, by which one of several GPUs is chosen.
    """

    rank: int
    world: int
    local: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise RecipeError(
                f"rank {self.rank} of {self.world}: ranks are numbered from 0 to {self.world - 1}"
                if self.world > 0
                else f"a world of {self.world} ranks computes nothing: give at least 1"
            )

    def device(self, asked: str, progress: Progress, stop: Event) -> str:
        """For `auto`, where a node has several GPUs, the one of the rank on its node."""
        found = resolve_device(asked)
        if asked != "auto" or found != "cuda":
            return found
        import torch

        return f"cuda:{self.local % torch.cuda.device_count()}"

    def run_step(self, plan: Plan, step: Step, progress: Progress, stop: Event) -> StepOutcome:
        before = step.ledger.failed()
        outcome = run_units(plan, step, self._units(step, before), progress, stop)
        if not stop.is_set():
            # What other ranks failed at is this rank's to say, too: the run is not complete.
            for index, attempts in step.ledger.failed().items():
                if attempts > before.get(index, 0):
                    path = step.ledger.failed_folder / f"{index:06d}.{attempts}.json"
                    outcome.failed.setdefault(index, path)
        return outcome

    def _units(self, step: Step, before: Mapping[int, int]) -> Iterator[Unit]:
        """This rank's own units; then, by a fresh look, those of the others that have no record."""
        yield from (unit for unit in step.todo() if unit.index % self.world == self.rank)
        left = [unit for unit in step.todo() if unit.index % self.world != self.rank][::-1]
        start = self.rank * len(left) // self.world
        for unit in left[start:] + left[:start]:
            attempts = before.get(unit.index, 0) + MOST_ATTEMPTS
            if not (step.ledger.failed_folder / f"{unit.index:06d}.{attempts}.json").exists():
                yield unit

    def train(self, plan: Plan, name: str, progress: Progress, stop: Event) -> bool:
        """Whoever comes first trains. The others wait for it only where a later step needs the dictionary."""
        needed = any(stage.name == name for stage in plan.waiting)
        return train_in_run(plan.recipe, plan.folder, name, plan.device, progress, stop, wait=needed)

    def index(self, plan: Plan, step: Step, progress: Progress, stop: Event) -> bool:
        """Whoever comes first builds an index; the others leave it to the one that is at it."""
        return index_features(step.folder, progress, stop, wait=False)


def rank_of(rank: str | int, world: int | None, environment: Mapping[str, str] = os.environ) -> Ranks:
    """The executor of `--rank RANK --world WORLD`; with `auto`, as the launcher of this process says in variables.

    RecipeError where `auto` finds nothing, and for what is no number.
    """
    if rank != "auto":
        if world is None:
            raise RecipeError(f"--rank {rank} needs --world, the number of ranks; or give --rank auto")
        number = _number("--rank", str(rank))
        return Ranks(number, world, _number("LOCAL_RANK", environment.get("LOCAL_RANK", str(number))))
    found = _array(environment) if "SLURM_ARRAY_TASK_ID" in environment else _launched(environment)
    if found is None:
        names = ", ".join(f"{one.rank} and {one.world}" if one.world else one.rank for one in LAUNCHERS)
        raise RecipeError(
            f"--rank auto finds no launcher's variables (SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT, {names}). "
            "Give --rank I --world N"
        )
    number, said, local = found
    if world is None and said is None:
        raise RecipeError(f"this is rank {number}, but no variable says of how many: give --world")
    of = world if world is not None else int(said or 1)
    return Ranks(number % of if of > 0 else number, of, local)


def _launched(environment: Mapping[str, str]) -> tuple[int, int | None, int] | None:
    """Rank, world and local rank by the first launcher whose variables are there."""
    for one in LAUNCHERS:
        if one.rank in environment and (not one.world or one.world in environment):
            number = _number(one.rank, environment[one.rank])
            world = _number(one.world, environment[one.world]) if one.world else None
            local = _number(one.local, environment.get(one.local, str(number))) if one.local else 0
            # PBS and LSF number from 1 as a rule: modulo their number all ranks are there either way.
            return number, world, local
    return None


def _array(environment: Mapping[str, str]) -> tuple[int, int | None, int]:
    """Of a Slurm array whose tasks may have several processes each, started by srun.

    Arrays that do not start at 0, or have steps, are counted as they stand. Of a list with holes two tasks may get one
    number: they then compute the same units first, and the leftovers of the others after.
    """
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
    task, least, step, count = (
        _number(name, environment.get(name, otherwise)) for name, otherwise in zip(names, "0011", strict=True)
    )
    inside = "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment
    n_process = _number("SLURM_NTASKS", environment.get("SLURM_NTASKS", "1")) if inside else 1
    process = _number("SLURM_PROCID", environment.get("SLURM_PROCID", "0")) if inside else 0
    local = _number("SLURM_LOCALID", environment.get("SLURM_LOCALID", "0")) if inside else 0
    place = (task - least) // max(1, step)
    place = place if place < count else task % count
    return place * n_process + process, count * n_process, local


def _number(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise RecipeError(f"{name} = {text!r} is no number from 0 on")
    return int(text)
