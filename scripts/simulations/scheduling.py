"""Units among workers, in simulated time: ranks that share nothing but the ledger, or a central queue.

A discrete-event simulation: the only events are the end of a unit, a preemption, and a worker that asks for its next
unit. Nothing is computed and nothing is stored, so that 10⁶ units take seconds. Equal seeds give equal results.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

END, PREEMPTED, ASK = range(3)
"""Kinds of event. What ends at a moment is recorded before anyone asks at the same moment."""
AT_ONCE = 4096
"""Units that a rank looks past in one go on its way to one that is not done."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Workers and what befalls them. Times are in seconds.

    A unit takes `unit_seconds` at speed 1. Speeds are log-normal with the standard deviation `spread` of their
    logarithm and a mean of 1. An attempt at a unit is, with probability `stragglers`, `slower` times as long. Each
    worker is preempted `preemptions` times an hour (a Poisson process), loses the unit in hand, and comes back
    `restart` seconds later.
    """

    workers: int
    unit_seconds: float = 60.0
    spread: float = 0.0
    stragglers: float = 0.0
    slower: float = 10.0
    preemptions: float = 0.0
    restart: float = 180.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of it: seconds until every unit is recorded, and `ideal`, what the same work takes if it is divided
    without loss; attempts that ended on a unit another had recorded; worker-seconds lost to preemptions, and worker-
    seconds of all units at speed 1; preemptions; and records that were looked for, one request each.
    """

    units: int
    makespan: float
    ideal: float
    duplicates: int
    lost: float
    work: float
    preemptions: int
    looks: int

    @property
    def over_ideal(self) -> float:
        return self.makespan / self.ideal


class Source(ABC):
    """Which unit a worker computes next. `done[unit]` is the ledger."""

    looks = 0

    def __init__(self, n_unit: int, workers: int) -> None:
        self.done = np.zeros(n_unit, dtype=bool)

    @abstractmethod
    def next(self, worker: int) -> int | None:
        """The worker's next unit; None if there is none for it now."""

    @abstractmethod
    def lost(self, worker: int, unit: int) -> None:
        """A worker was preempted at a unit, and starts afresh when it is back."""


class Queue(Source):
    """One scheduler hands out the units in order, none twice, and those that were lost again."""

    def __init__(self, n_unit: int, workers: int) -> None:
        super().__init__(n_unit, workers)
        self.fresh, self.again = 0, list[int]()

    def next(self, worker: int) -> int | None:
        if self.again:
            return self.again.pop()
        if self.fresh == len(self.done):
            return None
        self.fresh += 1
        return self.fresh - 1

    def lost(self, worker: int, unit: int) -> None:
        self.again.append(unit)


class Ranks(Source):
    """No scheduler: each rank its own units first, every n-th, then the leftovers of the others by a fresh listing,
    from the last one on, each rank from another place. What has a record by then is passed over; what another is still
    at is computed twice.
    """

    def __init__(self, n_unit: int, workers: int) -> None:
        super().__init__(n_unit, workers)
        self.world = workers
        self.ahead: dict[int, Iterator[int]] = {}

    def next(self, worker: int) -> int | None:
        if worker not in self.ahead:
            self.ahead[worker] = self._order(worker)
        return next(self.ahead[worker], None)

    def lost(self, worker: int, unit: int) -> None:
        self.ahead.pop(worker, None)

    def _order(self, rank: int) -> Iterator[int]:
        own = np.arange(rank, len(self.done), self.world, dtype=np.int32)
        yield from self._undone(own[~self.done[own]])
        yield from self._undone(leftovers(self.done, rank, self.world))

    def _undone(self, units: NDArray[np.int32]) -> Iterator[int]:
        at = 0
        while at < len(units):
            still = np.flatnonzero(~self.done[units[at : at + AT_ONCE]])
            if not len(still):
                self.looks += len(units[at : at + AT_ONCE])
                at += AT_ONCE
                continue
            self.looks += int(still[0]) + 1
            at += int(still[0]) + 1
            yield int(units[at - 1])


def leftovers(done: NDArray[np.bool_], rank: int, world: int) -> NDArray[np.int32]:
    """What a rank takes on when its own units are done: those of the others without a record, from the last one on,
    beginning at another place for every rank.
    """
    left = np.flatnonzero(~done).astype(np.int32)
    left = left[left % world != rank][::-1]
    start = rank * len(left) // world
    return np.concatenate([left[start:], left[:start]])


SOURCES: dict[str, Callable[[int, int], Source]] = {"ranks": Ranks, "queue": Queue}


@dataclass
class Simulation:
    """One run of `n_unit` units. `run` gives what came of it."""

    n_unit: int
    cluster: Cluster
    source: Source
    chance: np.random.Generator = field(init=False)
    events: list[tuple[float, int, int, int, float]] = field(init=False, default_factory=list)
    idle: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.chance = np.random.default_rng(self.cluster.seed)
        self.speeds = self._speeds()
        self.preempted = [self._interval() for _ in range(self.cluster.workers)]

    def _speeds(self) -> list[float]:
        spread = self.cluster.spread
        drawn = np.exp(spread * self.chance.standard_normal(self.cluster.workers) - spread**2 / 2)
        return list(map(float, drawn))

    def _interval(self) -> float:
        rate = self.cluster.preemptions / 3600
        return float(self.chance.exponential(1 / rate)) if rate else math.inf

    def run(self) -> Result:
        """Events in the order of time until every unit is recorded, and those attempts that are then under way."""
        left, makespan, lost, duplicates, preemptions = self.n_unit, 0.0, 0.0, 0, 0
        for worker in range(self.cluster.workers):
            heapq.heappush(self.events, (0.0, ASK, worker, -1, 0.0))
        while self.events:
            now, kind, worker, unit, began = heapq.heappop(self.events)
            if kind == END:
                duplicates += bool(self.source.done[unit])
                if not self.source.done[unit]:
                    self.source.done[unit] = True
                    left, makespan = left - 1, now
                if left and (not self.events or self.events[0][0] > now):
                    self._assign(now, worker)
                else:  # others end at this moment, too: their records stand before anyone asks
                    heapq.heappush(self.events, (now, ASK, worker, -1, 0.0))
            elif kind == PREEMPTED:
                if left:
                    preemptions, lost = preemptions + 1, lost + now - began
                    self.source.lost(worker, unit)
                    self._wake(now)
                back = now + self.cluster.restart
                self.preempted[worker] = back + self._interval()
                heapq.heappush(self.events, (back, ASK, worker, -1, 0.0))
            elif left:
                self._assign(now, worker)
        speed = sum(self.speeds)
        return Result(
            units=self.n_unit,
            makespan=makespan,
            ideal=self.n_unit * self.cluster.unit_seconds / speed,
            duplicates=duplicates,
            lost=lost,
            work=self.n_unit * self.cluster.unit_seconds,
            preemptions=preemptions,
            looks=self.source.looks,
        )

    def _assign(self, now: float, worker: int) -> None:
        while self.preempted[worker] <= now:  # while it had nothing to do, and lost nothing
            self.preempted[worker] += self.cluster.restart + self._interval()
        unit = self.source.next(worker)
        if unit is None:
            self.idle.add(worker)
            return
        takes = self.cluster.unit_seconds / self.speeds[worker]
        if self.cluster.stragglers and self.chance.random() < self.cluster.stragglers:
            takes *= self.cluster.slower
        kind, at = (PREEMPTED, self.preempted[worker]) if self.preempted[worker] < now + takes else (END, now + takes)
        heapq.heappush(self.events, (at, kind, worker, unit, now))

    def _wake(self, now: float) -> None:
        """A unit was lost: whoever has nothing to do asks again. (A rank has ended by then, and does not.)"""
        if isinstance(self.source, Queue):
            for worker in self.idle:
                heapq.heappush(self.events, (now, ASK, worker, -1, 0.0))
            self.idle.clear()


def simulate(n_unit: int, cluster: Cluster, how: str = "ranks") -> Result:
    """Runs the units of one step on a cluster: `how` is "ranks" or "queue"."""
    return Simulation(n_unit, cluster, SOURCES[how](n_unit, cluster.workers)).run()
