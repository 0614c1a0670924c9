"""The state of a run from its ledgers: one listing a step, a few hundred small files, no Zarr, no torch, while it runs
or after.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...stores.errors import CorruptStore, StoreNotFound
from ...stores.ledger import Ledger, Record
from ...stores.places import Place, changed_at
from ...stores.schema import DATA, Schema, read_header, store_folders

NEWEST = 256
"""Records that rate and workers are taken from."""
LOOKED_AT = 4096
"""Records whose time of change is looked at to find the newest, where there are more."""
MOST_FAILURES = 100
"""Failed units whose records are read."""
PAUSE = 60.0
"""Seconds without a record that are no pause, beside several times those that a unit takes."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A process that has recorded units: `host`:`pid`, how many of the newest, and when the last, in seconds since
    1970. It counts as `live` if that was not long ago, by what its units take.
    """

    name: str
    units: int
    last_seen: float
    live: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """A unit that has failed and is not done: attempts so far, the last one's error, and where its traceback is."""

    unit: int
    attempts: int
    error: str
    record: str


@dataclass(frozen=True)
class StepStatus:
    """One step: units and tokens done and in all, bytes before compression, tokens a second lately of all workers
    together, the `workers` of the newest units, the units `failed` and what is known of (the first hundred of) them,
    and records among the newest that are `unreadable`, with the reason.
    """

    name: str
    kind: str
    units: int
    units_done: int
    n_token: int
    tokens_done: int
    nbytes: int
    tokens_per_second: float | None
    workers: tuple[Worker, ...]
    failed: tuple[int, ...]
    failures: tuple[Failure, ...]
    unreadable: tuple[str, ...]

    @property
    def left(self) -> float | None:
        """Seconds of work left at the rate of the newest units."""
        if self.units_done == self.units:
            return 0.0
        return (self.n_token - self.tokens_done) / self.tokens_per_second if self.tokens_per_second else None


def status(folder: Place) -> list[StepStatus]:
    """The steps of a run that have a store, those that others read first. StoreNotFound if there is none."""
    found = [step_status(step, read_header(step / DATA).schema) for step in store_folders(folder)]
    if not found:
        raise StoreNotFound(
            f"{folder} is no run: it holds no folder with a {DATA}. Give the folder that `forebay run` wrote"
        )
    return sorted(found, key=lambda step: step.kind != "tokens")


def step_status(folder: Place, schema: Schema) -> StepStatus:
    ledger = Ledger(folder)
    done = schema.grid.known(ledger.done())
    records, unreadable = _read(ledger, _newest(ledger, done))
    attempts = ledger.failed()
    return StepStatus(
        name=folder.name,
        kind=schema.kind,
        units=len(schema.grid),
        units_done=len(done),
        n_token=schema.n_token,
        tokens_done=schema.grid.tokens(done),
        nbytes=schema.nbytes,
        tokens_per_second=_rate(records),
        workers=_workers(records, time.time()),
        failed=tuple(attempts),
        failures=tuple(_failure(ledger, *one) for one in list(attempts.items())[:MOST_FAILURES]),
        unreadable=tuple(unreadable),
    )


def _newest(ledger: Ledger, done: set[int]) -> list[int]:
    """The units that were recorded last, by their files' time of change, the newest first.

    Of very many, only those at either end of a stretch of finished units are looked at, and their neighbours: workers
    walk the units up or down.
    """
    units = np.fromiter(done, dtype=np.int64, count=len(done))
    units.sort()
    if len(units) > LOOKED_AT:
        units = units[_at_edges(units)]
    changed = {}
    for unit in units.tolist():
        try:
            changed[unit] = changed_at(ledger.path(unit))
        except FileNotFoundError:  # dropped since
            continue
    return sorted(changed, key=lambda unit: (changed[unit], unit), reverse=True)[:NEWEST]


def _at_edges(units: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places in `units`, which ascend, at the ends of stretches without a gap: the highest ones, of each a few."""
    gaps = np.flatnonzero(np.diff(units) > 1)
    ends, starts = np.append(gaps, len(units) - 1), np.append(gaps + 1, 0)
    most = LOOKED_AT // 4
    ends, starts = ends[-most:], starts[-most:]
    near = np.arange(LOOKED_AT // (len(ends) + len(starts)))
    places = np.concatenate([(ends[:, None] - near).ravel(), (starts[:, None] + near).ravel()])
    return np.unique(places[(places >= 0) & (places < len(units))])


def _read(ledger: Ledger, units: Sequence[int]) -> tuple[list[Record], list[str]]:
    """The records of units, those that say what they should; and what is wrong with the others."""
    records, wrong = [], []
    for unit in units:
        try:
            record = ledger.record(unit)
            numbers = float(_tokens(record)), _seconds(record), float(record["finished"]), float(int(record["pid"]))
            if not all(0 <= number < float("inf") for number in numbers):
                raise ValueError("numbers that nothing can have")
            str(record["host"])
            records.append(record)
        except FileNotFoundError:  # dropped since
            continue
        except CorruptStore as error:
            wrong.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            wrong.append(f"{ledger.path(unit)} is not the record of a unit ({error!r})")
    return records, wrong


def _tokens(record: Record) -> int:
    start, stop = record["rows"]["token"]
    return int(stop) - int(start)


def _seconds(record: Record) -> float:
    return float(sum(record["seconds"].values()))


def _rate(records: Sequence[Record]) -> float | None:
    """Tokens a second by the times at which units were finished, so that workers side by side add up.

    From the last pause on, which is longer than a unit takes several times over. Units that began together end
    together: the clock starts when the first of them all have ended.
    """
    ended = sorted((float(r["finished"]), _tokens(r), _seconds(r)) for r in records)
    if not ended:
        return None
    for i in range(len(ended) - 1, 0, -1):
        if ended[i][0] - ended[i - 1][0] > PAUSE + 5 * ended[i][2]:
            ended = ended[i:]
            break
    began = max(at for at, _, _ in ended if at <= ended[0][0] + ended[0][2] / 10)
    behind = [tokens for at, tokens, _ in ended if at > began]
    tokens, seconds = sum(behind), ended[-1][0] - began
    if not behind:
        tokens, seconds = sum(n for _, n, _ in ended), max(s for _, _, s in ended)
    return tokens / seconds if seconds > 0 else None


def _workers(records: Sequence[Record], now: float) -> tuple[Worker, ...]:
    """Who has recorded the newest units, those seen last first."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(f"{record['host']}:{record['pid']}", []).append(record)
    workers = []
    for name, own in found.items():
        last = max(own, key=lambda record: float(record["finished"]))
        seen = float(last["finished"])
        workers.append(Worker(name, len(own), seen, abs(now - seen) < PAUSE + 5 * _seconds(last)))
    return tuple(sorted(workers, key=lambda worker: -worker.last_seen))


def _failure(ledger: Ledger, unit: int, attempts: int) -> Failure:
    path = ledger.failed_folder / f"{unit:06d}.{attempts}.json"
    try:
        error = str(ledger.failure(unit, attempts).get("error"))
    except (CorruptStore, FileNotFoundError) as broken:
        error = str(broken)
    return Failure(unit, attempts, error, str(path))


def as_values(folder: Place, steps: Sequence[StepStatus]) -> dict[str, Any]:
    """The state of a run as JSON values: the fields of every step, the seconds `left`, and whether all is done."""
    said = [{**asdict(step), "left": step.left} for step in steps]
    return {"run": str(folder), "complete": all(step.left == 0 for step in steps), "steps": said}
