"""The units of a step on the workers of a Dask cluster.

Only `run_unit(folder, step, index, device)` travels, and a small record comes back. At most twice as many units as
there are workers are handed out at a time. Dask hands a unit whose worker died to another one; what dies everywhere is
recorded as failed, and what takes ten times as long as others is begun on another worker too.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ...stores.errors import RecipeError
from ...stores.fingerprint import versions
from ...stores.ledger import Record
from ...stores.places import place
from ..dictionaries import index_group, is_trained, train_in_run, unindexed
from ..plan import Plan, Step, load_plan, resolve_device
from ..progress import Progress, Quiet
from ..stopping import Stopped
from . import clusters
from .executor import Executor, StepOutcome
from .unit_tasks import UnitTasks, ended
from .units import run_unit

if TYPE_CHECKING:
    from distributed import Client, Future

POLL = 0.2
"""Seconds between two looks whether the run is to stop."""


class DaskWorkers(Executor):
    """The workers of a cluster: `where` is what `--dask` takes (see `clusters.connect`), or a client of one's own."""

    def __init__(self, where: str | Client) -> None:
        self.where = where
        self._begun = ExitStack()
        self._threads: int | None = None

    def __enter__(self) -> Self:
        self._begun.enter_context(clusters.quiet())
        if isinstance(self.where, str):
            self.client = clusters.connect(self.where)
            self._begun.callback(clusters.close, self.client)
        else:
            self.client = self.where
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._begun.close()

    def device(self, asked: str, progress: Progress, stop: Event) -> str:
        """The device of the workers, as the first one that is there says. RecipeError if it has another forebay."""
        progress.said(f"dask: waiting for workers; dashboard at {self.client.dashboard_link}")
        said = self._one(_about_worker, asked, name="worker", stop=stop)
        if said is None:
            raise Stopped
        ours, theirs = versions()["forebay"], said["versions"]["forebay"]
        if ours != theirs:
            raise RecipeError(f"the workers have forebay {theirs}, this is {ours}: install one version everywhere")
        self._threads = said["threads"]
        return str(said["device"])

    def threads(self) -> int | None:
        return self._threads

    def run_step(self, plan: Plan, step: Step, progress: Progress, stop: Event) -> StepOutcome:
        return UnitTasks(self.client, plan, step, unit_task, progress, stop).run()

    def train(self, plan: Plan, name: str, progress: Progress, stop: Event) -> bool:
        """On one worker, in one task."""
        if is_trained(plan.folder, name):
            return super().train(plan, name, progress, stop)  # which checks that it is of these settings
        said = self._one(
            train_task, str(plan.folder.resolve()), name, plan.device, name=f"train-{name}", stop=stop, heard=progress
        )
        return bool(said)

    def index(self, plan: Plan, step: Step, progress: Progress, stop: Event) -> bool:
        """Each group's on a worker, in a task of its own."""
        folder, name = str(step.folder.resolve()), step.stage.store
        with _Heard(self.client, progress, stop) as heard:
            tasks = [
                self._submit(index_task, folder, group, heard.topic, name=f"index-{name}-{group}")
                for group in unindexed(step.folder)
            ]
            built = [heard.result(task) for task in tasks]
        return all(built)

    def _submit(self, call: Callable[..., Any], *arguments: Any, name: str) -> Future[Any]:
        key = f"{name.replace('/', '-')}-{uuid.uuid4().hex[:8]}"
        return self.client.submit(call, *arguments, key=key, pure=False)

    def _one(
        self, call: Callable[..., Any], *arguments: Any, name: str, stop: Event, heard: Progress | None = None
    ) -> Any:
        """What one task gives; None if `stop` is set before its end."""
        with _Heard(self.client, heard or Quiet(), stop) as listening:
            topic = (listening.topic,) if heard else ()
            return listening.result(self._submit(call, *arguments, *topic, name=name))


class _Heard:
    """Long tasks that tell how far they are, and hear that they are to stop, under a topic of their own."""

    def __init__(self, client: Client, progress: Progress, stop: Event) -> None:
        self.client, self.progress, self.stop = client, progress, stop
        self.topic = f"forebay-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> Self:
        self.client.subscribe_topic(self.topic, lambda event: self.progress.working(*event[1]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.unsubscribe_topic(self.topic)

    def result(self, task: Future[Any]) -> Any:
        """What a task gives, its exception raised; None if it was asked to stop and has not ended in time."""
        from distributed import Event as ClusterEvent

        while not task.done():
            if self.stop.wait(POLL):
                ClusterEvent(self.topic, client=self.client).set()
                ended([task])
                break
        if task.status in ("finished", "error"):
            return task.result()
        task.cancel()
        return None


def unit_task(folder: str, step: str, index: int, device: str) -> Record:
    """`run_unit`, of whose record only what the run says of it comes back."""
    record = run_unit(folder, step, index, device)
    return {key: record[key] for key in ("unit", "bytes", "seconds", "error", "path") if key in record}


def train_task(folder: str, name: str, device: str, topic: str) -> bool:
    """Trains the dictionary of [train.NAME] of a run that is there."""
    run = place(folder)
    return train_in_run(load_plan(run, device).recipe, run, name, device, _Telling(topic), _Asked(topic))


def index_task(folder: str, group: str, topic: str) -> bool:
    """Builds the index of one group of a step's features."""
    return index_group(place(folder), group, _Telling(topic), _Asked(topic))


def _about_worker(asked: str) -> dict[str, Any]:
    import torch

    return {"device": resolve_device(asked), "threads": torch.get_num_threads(), "versions": versions()}


class _Telling(Quiet):
    """Sends a worker's progress to the run, which listens under a topic."""

    def __init__(self, topic: str) -> None:
        self.topic, self.told = topic, 0.0

    def working(self, what: str, done: int, total: int, said: str) -> None:
        from distributed import get_worker

        if done >= total or time.monotonic() - self.told > 1:
            self.told = time.monotonic()
            get_worker().log_event(self.topic, (what, done, total, said))


class _Asked(Event):
    """Whether the run asks its workers to stop: looked up in the cluster, at most twice a second."""

    def __init__(self, topic: str) -> None:
        super().__init__()
        self.topic, self.looked = topic, 0.0

    def is_set(self) -> bool:
        from distributed import Event as ClusterEvent

        if not super().is_set() and time.monotonic() - self.looked > 0.5:
            self.looked = time.monotonic()
            if ClusterEvent(self.topic).is_set():
                self.set()
        return super().is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(timeout) or self.is_set()
