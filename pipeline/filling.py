"""Stores that are filled from what is there already: unit after unit, resumable as any run is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Protocol

from ..stores.errors import DiskFull
from ..stores.feature_rows import KIND
from ..stores.grid import Unit
from ..stores.ledger import Ledger, Record
from ..stores.places import Place, free_space
from ..stores.schema import Schema
from ..stores.store import Store
from .dictionaries import index_features
from .executors.executor import StepOutcome
from .progress import Progress
from .run import Outcome
from .stopping import stop_on_signals


class Filling(Protocol):
    """A store that will be made in `folder`, and how each of its units is written."""

    @property
    def folder(self) -> Place: ...
    @property
    def name(self) -> str: ...
    @property
    def schema(self) -> Schema: ...
    def open(self) -> Store: ...
    def write(self, store: Store, unit: Unit) -> Record: ...


def fill(fillings: Sequence[Filling], folder: Place, progress: Progress) -> Outcome:
    """Makes the stores of the run in `folder` and writes the units that are not there; features get their index. Ctrl-C
    and SIGTERM stop between two units.
    """
    with stop_on_signals() as stop, progress:
        # All are there before the first is filled: a run that was stopped is seen to be incomplete.
        stores = [one.open() for one in fillings]
        outcomes: list[StepOutcome] = []
        whole = True
        for one, store in zip(fillings, stores, strict=True):
            outcomes.append(_fill(one, store, progress, stop))
            whole = not outcomes[-1].left
            if whole and store.schema.kind == KIND:
                whole = index_features(one.folder, progress, stop)
            if not whole:
                break
    return Outcome(folder, tuple(outcomes), interrupted=not whole)


def _fill(filling: Filling, store: Store, progress: Progress, stop: Event) -> StepOutcome:
    """The units of a store that are not there, until `stop` is set."""
    outcome, todo = StepOutcome(filling.name, store.schema.n_token), store.todo()
    progress.start(outcome.name, outcome.n_token, outcome.n_token - sum(map(len, todo)))
    began, started = time.time(), time.perf_counter()
    for unit in todo:
        if stop.is_set():
            break
        record = filling.write(store, unit)
        outcome.tokens, outcome.nbytes = outcome.tokens + len(unit), outcome.nbytes + record["bytes"]
        progress.advance(len(unit))
        progress.recorded(unit, record)
    outcome.seconds, outcome.left = time.perf_counter() - started, sum(map(len, store.todo()))
    if not outcome.left:
        store.sweep(before=began)
    return outcome


def check_space(folder: Place, fillings: Sequence[Filling], advice: str) -> None:
    """DiskFull, with some advice, if what is left to write is more than what is free, before anything is written."""
    there = folder
    while isinstance(there, Path) and not there.exists():
        there = there.parent
    free, left = free_space(there), 0
    for one in fillings:
        todo = one.schema.grid.left(Ledger(one.folder).done())
        left += -(-one.schema.nbytes * sum(map(len, todo)) // one.schema.n_token)
    if free is not None and left > free:
        raise DiskFull(
            f"{folder} needs {left:,} more bytes (before compression), and {free:,} are free. {advice}, or write into "
            "a larger disk"
        )
