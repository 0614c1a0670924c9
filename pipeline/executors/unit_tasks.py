"""The units of one step as tasks of a Dask cluster: handed out in a sliding window, taken back one by one."""

from __future__ import annotations

import queue
import statistics
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any

from ...stages.dictionaries.errors import DictionaryError
from ...stages.models.errors import HookError, ModelError
from ...stores.errors import ForebayError
from ...stores.grid import Unit
from ...stores.ledger import Record
from ...stores.places import Place, place
from ..plan import Plan, Step
from ..progress import Progress
from .executor import StepOutcome, settle
from .units import fail, is_recorded

if TYPE_CHECKING:
    from distributed import Client, Future

AHEAD = 2
"""Units handed out for each worker: one that it computes, one that it goes on with."""
GRACE = 20.0
"""Seconds in which units that run when the run is to stop may end."""
SLOW, LEAST_SLOW, FIRST_SLOW = 10, 60.0, 1800.0
"""A unit is slow that takes SLOW times the median, and LEAST_SLOW seconds; of the first ones, FIRST_SLOW seconds."""
LOOK = 2.0
"""Seconds between two looks at who is at what."""
POLL = 0.2
FETCH = 30.0
"""Seconds in which the result of a unit that is computed has to come."""
STALLED = 30.0
"""Seconds without a worker, while some have nothing to do, after which a unit is begun anew."""

EVERYONES = (ForebayError, ModelError, HookError, DictionaryError)
"""What ends a run and is not one unit's failure."""


@dataclass
class Flight:
    """A unit on its way: every task that was begun for it, with the worker that it runs on and since when; `alone` if
    nothing else is on its way, and `seen` when last it was on a worker or all of them had work.
    """

    unit: Unit
    submitted: float
    alone: bool = False
    seen: float = field(default_factory=time.monotonic)
    tasks: dict[str, Future[Record]] = field(default_factory=dict)
    running: dict[str, tuple[str, float]] = field(default_factory=dict)


class UnitTasks:
    """The units of a step that have no record, as tasks `call(folder, step, index, device)`."""

    def __init__(
        self,
        client: Client,
        plan: Plan,
        step: Step,
        call: Callable[[str, str, int, str], Record],
        progress: Progress,
        stop: Event,
    ) -> None:
        self.client, self.plan, self.step, self.call = client, plan, step, call
        self.progress, self.stop = progress, stop
        self.store, self.folder = step.open(), str(plan.folder.resolve())
        self.outcome = StepOutcome(step.stage.store, step.schema.n_token)
        self.mark = uuid.uuid4().hex[:4]
        self.flights: dict[int, Flight] = {}
        self.suspects: deque[Unit] = deque()
        self.n_task = 0
        self.ended: queue.SimpleQueue[Future[Record]] = queue.SimpleQueue()
        self.took: list[float] = []
        self.looked = 0.0
        self.window = AHEAD

    def run(self) -> StepOutcome:
        """Until every unit is recorded or has failed, or `stop` is set. Raises what is everyone's, a full disk above
        all.
        """
        todo, began = deque(self.step.todo()), time.time()
        outcome = self.outcome
        self.progress.start(outcome.name, outcome.n_token, outcome.n_token - sum(map(len, todo)))
        started = time.perf_counter()
        try:
            while (todo or self.flights or self.suspects) and not self.stop.is_set():
                self._look()
                while todo and len(self.flights) < self.window:
                    self._submit(todo.popleft())
                if self.suspects and not self.flights:
                    self._submit(self.suspects.popleft(), alone=True)
                self._hear(POLL)
            if self.stop.is_set():
                self._end()
        finally:
            self.client.cancel([task for one in self.flights.values() for task in one.tasks.values()])
        outcome.seconds = time.perf_counter() - started
        settle(outcome, self.step)
        if outcome.tokens and not outcome.left:
            self.store.sweep(before=began)
        return outcome

    def _submit(self, unit: Unit, alone: bool = False, **where: Any) -> None:
        """Begins a task for a unit, under a key of its own that says on the dashboard what it is."""
        flight = self.flights.setdefault(unit.index, Flight(unit, time.monotonic(), alone))
        name, mark = self.step.stage.store, f"{self.mark}{self.n_task}"
        key = f"{name}-unit-{unit.index:06d}-{self.plan.folder.name}-{self.step.fingerprint[:8]}-{mark}"
        arguments = self.folder, name, unit.index, self.plan.device
        task = self.client.submit(self.call, *arguments, key=key, pure=False, **where)
        flight.tasks[key] = task
        self.n_task += 1
        task.add_done_callback(self.ended.put)

    def _hear(self, timeout: float) -> None:
        """Takes what has ended; waits so many seconds for the first."""
        try:
            self._take(self.ended.get(timeout=timeout))
            while True:
                self._take(self.ended.get_nowait())
        except queue.Empty:
            pass

    def _take(self, task: Future[Record]) -> None:
        """What became of a task. The first of a unit that ends with a record counts."""
        key = str(task.key)
        flight = next((one for one in self.flights.values() if key in one.tasks), None)
        if flight is None:
            return
        if task.status == "finished" and (record := self._record(flight, task)):
            self._came(flight, key, record)
            return
        del flight.tasks[key]
        if task.status == "error":
            error = task.exception()
            if isinstance(error, EVERYONES):
                raise error
            if not flight.tasks:
                self._died(flight, error)
        elif self.client.status != "running":
            self.progress.said("dask: the scheduler is gone. What is recorded is safe")
            self.stop.set()
        elif not flight.tasks and not self.stop.is_set():
            self._submit(flight.unit)  # it was cancelled by somebody else, or what came of it is lost

    def _died(self, flight: Flight, error: BaseException | None) -> None:
        """A unit whose workers died is tried alone at the end before it is given up: others were on them too."""
        from distributed import KilledWorker

        if isinstance(error, KilledWorker) and not flight.alone:
            self.progress.said(f"unit {flight.unit.index} was on workers that died: it is tried alone at the end")
            self._leave(flight)
            self.suspects.append(flight.unit)
        else:
            said = _told(flight.unit, error)
            self._failed(flight, said, fail(self.store.ledger, flight.unit, said))

    def _record(self, flight: Flight, task: Future[Record]) -> Record | None:
        """What a unit's task gave; where its worker died before it could hand that over, the unit's record. None if it
        has none.
        """
        try:
            return task.result(timeout=FETCH)
        except Exception:
            unit, ledger = flight.unit, self.store.ledger
            return ledger.record(unit.index) if is_recorded(ledger, unit) else None

    def _came(self, flight: Flight, key: str, record: Record) -> None:
        unit = flight.unit
        if "error" in record:
            self._failed(flight, RuntimeError(record["error"]), place(record["path"]))
            return
        self._leave(flight)
        self.took.append(time.monotonic() - flight.running.get(key, ("", flight.submitted))[1])
        self.outcome.tokens += len(unit)
        self.outcome.nbytes += record["bytes"]
        self.progress.advance(len(unit))
        self.progress.recorded(unit, record)

    def _failed(self, flight: Flight, error: BaseException, path: Place) -> None:
        self._leave(flight)
        self.outcome.failed[flight.unit.index] = path
        self.progress.failed(flight.unit, error, path)

    def _leave(self, flight: Flight) -> None:
        del self.flights[flight.unit.index]
        self.client.cancel(list(flight.tasks.values()))

    def _look(self) -> None:
        """Now and then: how many workers there are, and which units take too long."""
        if time.monotonic() - self.looked < LOOK or self.client.status != "running":
            return
        self.looked = now = time.monotonic()
        working = {str(worker): set(map(str, keys)) for worker, keys in self.client.processing().items()}
        self.window = AHEAD * max(1, len(working))
        slow = max(LEAST_SLOW, SLOW * statistics.median(self.took)) if self.took else FIRST_SLOW
        for flight in list(self.flights.values()):
            on = {key: worker for key in flight.tasks for worker, keys in working.items() if key in keys}
            flight.running = {key: (w, flight.running.get(key, (w, now))[1]) for key, w in on.items()}
            if on or all(working.values()):
                flight.seen = now
            elif now - flight.seen > STALLED:
                self._anew(flight)
                continue
            for key, (worker, since) in flight.running.items():
                if now - since > slow:
                    self._again(flight, key, worker, now - since > 2 * slow, list(working))

    def _anew(self, flight: Flight) -> None:
        """Begins a unit once more that no worker has, though some have nothing to do: it was lost with a worker."""
        self.client.cancel(list(flight.tasks.values()))
        flight.tasks, flight.seen = {}, time.monotonic()
        if is_recorded(self.store.ledger, flight.unit):
            self._came(flight, "", self.store.ledger.record(flight.unit.index))
        else:
            self.progress.said(f"unit {flight.unit.index} was lost with its worker, and is begun anew")
            self._submit(flight.unit)

    def _again(self, flight: Flight, key: str, worker: str, hopeless: bool, workers: list[str]) -> None:
        """Begins a slow unit on another worker too. Where there is none, or that did not help, the worker that hangs is
        started anew.
        """
        others = [one for one in workers if one != worker]
        if others and len(flight.tasks) == 1:
            self.progress.said(f"unit {flight.unit.index} takes long on {worker}: another worker begins it too")
            self._submit(flight.unit, workers=others, allow_other_workers=True)
        elif hopeless or not others:
            self.progress.said(f"unit {flight.unit.index} hangs on {worker}, which is started anew")
            flight.running[key] = worker, time.monotonic()
            try:
                self.client.restart_workers([worker], timeout=30, raise_for_error=False)
            except KeyError:  # the scheduler has none of that address any more
                self.progress.said(f"{worker} has gone by itself")
            except (OSError, TimeoutError, ValueError, RuntimeError) as error:
                self.progress.said(f"{worker} cannot be started anew ({error})")

    def _end(self) -> None:
        """Takes back what waits for a worker, and lets what runs end, for a while."""
        tasks = {key: task for one in self.flights.values() for key, task in one.tasks.items()}
        if self.client.status != "running" or not tasks:
            return
        first: dict[str, str] = {}  # on each worker the one that was handed out first: it is what the worker is at
        where = {str(key): str(worker) for worker, keys in self.client.processing().items() for key in keys}
        for key in tasks:
            if key in where:
                first.setdefault(where[key], key)
        running = set(first.values())
        self.client.cancel([task for key, task in tasks.items() if key not in running])
        ended([tasks[key] for key in running])
        self._hear(POLL)


def ended(tasks: Iterable[Future[Any]]) -> None:
    """Waits until tasks have ended, or the grace is over."""
    until = time.monotonic() + GRACE
    for task in tasks:
        while not task.done() and time.monotonic() < until:
            time.sleep(POLL)


def _told(unit: Unit, error: BaseException | None) -> BaseException:
    """An error that came from a worker without one, or of one that died, with words for it."""
    return error or RuntimeError(f"unit {unit.index} was lost without an error")
