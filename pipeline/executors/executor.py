"""What every executor does for a run: the units of a step, dictionaries to train, indexes to build."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from threading import Event
from types import TracebackType
from typing import Self

from ...stores.places import Place
from ..dictionaries import index_features, train_in_run
from ..plan import Plan, Step, resolve_device
from ..progress import Progress

WAITED = 0.1
"""The share of a step's time in which it waits for the disk from which on it is told so."""


@dataclass
class StepOutcome:
    """What a run did for one step: tokens computed and bytes written by this run, wall `seconds` (loading left out).

    Of these, where one process computes and writes at the same time, `computing` and `writing` are the seconds in which
    it did either, and `waited` those in which it could not compute because the last unit was still being written.
    `left` counts the tokens that had no record when the run ended; `failed` maps a unit to the path of its record.
    """

    name: str
    n_token: int
    tokens: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    computing: float = 0.0
    writing: float = 0.0
    waited: float = 0.0
    left: int = 0
    failed: dict[int, Place] = field(default_factory=dict)

    @property
    def limit(self) -> str | None:
        """Says, with both rates, that the disk is what a step waits for; None where it is not."""
        if self.waited < max(1.0, WAITED * self.seconds):
            return None
        computed, written = (self.nbytes / seconds / 1e6 for seconds in (self.computing, self.writing))
        return (
            f"{self.name}: the disk is the limit: units are computed at {computed:,.0f} MB/s and written at "
            f"{written:,.0f} MB/s; {self.waited / self.seconds:.0%} of the time nothing was computed"
        )


class Executor(ABC):
    """Who computes the units of a run. A context for the length of the run: workers start with it and end with it.

    Every executor takes the same units of the same plan to the same bytes; they differ in who computes which unit when.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def device(self, asked: str, progress: Progress, stop: Event) -> str:
        """The device that units are computed on, where `auto` may have been asked for. ModelError if it is not there;
        Stopped if `stop` is set while workers are waited for.
        """
        return resolve_device(asked)

    def threads(self) -> int | None:
        """Threads a unit is computed with on a CPU, where the recipe says nothing. None: torch's own number."""
        return None

    @abstractmethod
    def run_step(self, plan: Plan, step: Step, progress: Progress, stop: Event) -> StepOutcome:
        """Computes the units of a step that have no record. Ends early when `stop` is set; raises
        DiskFull and StorageError, which are every unit's, and nothing that is one unit's own.
        """

    def train(self, plan: Plan, name: str, progress: Progress, stop: Event) -> bool:
        """Trains the dictionary of [train.NAME]. Whether it is done, or another process is at it and nothing here
        waits for it.
        """
        return train_in_run(plan.recipe, plan.folder, name, plan.device, progress, stop)

    def index(self, plan: Plan, step: Step, progress: Progress, stop: Event) -> bool:
        """Builds the indexes of a step's features. Whether all are there, or another process is at it."""
        return index_features(step.folder, progress, stop)


def settle(outcome: StepOutcome, step: Step) -> StepOutcome:
    """Says what is left of a step, and forgets failures of units that were recorded since, whoever did."""
    todo = step.todo()
    left = {unit.index for unit in todo}
    outcome.left = sum(map(len, todo))
    outcome.failed = {index: path for index, path in sorted(outcome.failed.items()) if index in left}
    return outcome
