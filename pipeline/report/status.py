"""The state of a run from its ledgers: one listing a step, a handful of small files, no Zarr, no torch, while it runs
or after.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...stores.errors import StoreNotFound
from ...stores.ledger import Ledger
from ...stores.schema import DATA, Schema, read_header

NEWEST = 8
"""Records that the rate is taken from."""


@dataclass(frozen=True)
class StepStatus:
    """One step: units and tokens done and in all, bytes before compression, tokens a second lately, failed attempts by
    unit.
    """

    name: str
    kind: str
    units: int
    units_done: int
    n_token: int
    tokens_done: int
    nbytes: int
    tokens_per_second: float | None
    failed: dict[int, str]

    @property
    def left(self) -> float | None:
        """Seconds of work left at the rate of the newest units."""
        if self.units_done == self.units:
            return 0.0
        return (self.n_token - self.tokens_done) / self.tokens_per_second if self.tokens_per_second else None


def status(folder: Path) -> list[StepStatus]:
    """The steps of a run that have a store, those that others read first. StoreNotFound if there is none."""
    found = []
    for data in sorted(folder.glob(f"*/{DATA}")):
        header = read_header(data)
        found.append(step_status(data.parent, header.schema))
    if not found:
        raise StoreNotFound(
            f"{folder} is no run: it holds no folder with a {DATA}. Give the folder that `forebay run` wrote"
        )
    return sorted(found, key=lambda step: step.kind != "tokens")


def step_status(folder: Path, schema: Schema) -> StepStatus:
    ledger = Ledger(folder)
    done = ledger.done()
    return StepStatus(
        name=folder.name,
        kind=schema.kind,
        units=len(schema.grid),
        units_done=len(done),
        n_token=schema.n_token,
        tokens_done=sum(len(schema.grid[index]) for index in done),
        nbytes=schema.nbytes,
        tokens_per_second=_rate(ledger, done),
        failed={unit: ledger.failure(unit, attempt)["error"] for unit, attempt in ledger.failed().items()},
    )


def _rate(ledger: Ledger, done: set[int]) -> float | None:
    records = [ledger.record(index) for index in sorted(done)[-NEWEST:]]
    seconds = sum(record["seconds"].get("compute", 0.0) for record in records)
    tokens = sum(record["rows"]["token"][1] - record["rows"]["token"][0] for record in records)
    return tokens / seconds if seconds else None
