"""Rows in are rows out: whether the records of a run, taken together, cover every token and sequence exactly once.

Reads records and labels, and no values: a few seconds for a hundred thousand units, and memory for a thousand of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..stores.errors import CorruptStore
from ..stores.grid import Unit
from ..stores.ledger import Record, read_json
from ..stores.places import Place, place
from ..stores.records import LONG
from ..stores.schema import LABELS
from ..stores.store import Store
from ..stores.tree import run_stores

READERS, AT_ONCE = 8, 1024
"""Threads that read records, and how many are held at a time."""
MOST_SAID = 12
"""Findings in one message."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it must be: in the record of a `unit` of a step, or of the step as a whole (None)."""

    step: str
    unit: int | None
    said: str

    def __str__(self) -> str:
        return f"{self.step}: {self.said}" if self.unit is None else f"{self.step}: unit {self.unit}: {self.said}"


def audit(folder: str | Place, *, partial: bool = False) -> list[Finding]:
    """What is wrong with the records of the run in `folder`; empty if rows in are rows out.

    The records of every step must cover its tokens and its sequences exactly once, name every object that the schema
    gives their unit and no other, and add up to the tokens of the run; a step of features must have counted every token
    that it does not skip. With `partial`, units that have no record are no finding. Reads no values: that is `verify`.
    """
    stores = list(run_stores(place(folder)))
    found = _missing_steps(place(folder), stores)
    for store in stores:
        found += _labels(store, stores[0])
        found += _records(store, partial)
    return found


def require_whole(folder: str | Place) -> None:
    """CorruptStore, an error on disk, unless `audit` finds nothing wrong with the run in `folder`."""
    if found := audit(folder):
        more = f"\n  … and {len(found) - MOST_SAID} more" if len(found) > MOST_SAID else ""
        raise CorruptStore(
            f"{folder}: the rows that are recorded are not the rows of the corpus:"
            + "".join(f"\n  {one}" for one in found[:MOST_SAID])
            + f"{more}\n`forebay repair {folder}` drops what is wrong, and running the recipe again computes it anew"
        )


def _missing_steps(folder: Place, stores: list[Store]) -> list[Finding]:
    path, there = folder / "recipe.json", {store.name: store for store in stores}
    if not path.is_file():
        return []
    found = []
    for name, due in read_json(path).get("fingerprints", {}).items():
        if name not in there:
            found.append(Finding(name, None, "the run's recipe.json names this step, and its store is missing"))
        elif there[name].fingerprint != due:
            said = f"its fingerprint is {there[name].fingerprint[:12]}; the run's recipe.json says {due[:12]}"
            found.append(Finding(name, None, said))
    return found


def _labels(store: Store, first: Store) -> list[Finding]:
    """Every store of a run says the same of where sequences and documents start."""
    if store.schema.n_token != first.schema.n_token:
        said = f"it has {store.schema.n_token:,} tokens; {first.name} has {first.schema.n_token:,}"
        return [Finding(store.name, None, said)]
    return [
        Finding(store.name, None, f"its {path} is not that of {first.name}")
        for path in LABELS
        if not np.array_equal(store.labels[path][1], first.labels[path][1])
    ]


@dataclass
class _Tally:
    """Where the records of a step have come to on each axis, and what they have added up to."""

    at: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LONG, 0))
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LONG, 0))
    counted: dict[str, int] = field(default_factory=dict)

    def add(self, record: Record) -> Iterator[str]:
        """Counts a record in, and says where it does not begin at the row at which the one before it ended."""
        for dim in LONG:
            if dim not in record["rows"]:
                yield f"its record does not say which {dim}s it has"
                continue
            start, stop = record["rows"][dim]
            if start != self.at[dim]:
                yield f"its {dim} begin at {start}, those before it end at {self.at[dim]}"
            self.at[dim] = stop
            self.rows[dim] += stop - start
        for group, sums in record.get("statistics", {}).items():
            if "token_sum" in sums:
                self.counted[group] = self.counted.get(group, 0) + round(sums["token_sum"][0])


def _records(store: Store, partial: bool) -> Iterator[Finding]:
    """Findings of one step, unit after unit; then what the units do not add up to."""
    tally, whole = _Tally(), True
    for unit, record, faults in _read(store):
        if record is None and not faults:
            whole = False
            if not partial:
                yield Finding(store.name, unit.index, "it is not recorded")
        elif record is None or faults:
            whole = False
            yield from (Finding(store.name, unit.index, said) for said in faults)
        elif whole:
            yield from (Finding(store.name, unit.index, said) for said in tally.add(record))
    for index in sorted(store.ledger.done() - store.done()):
        said = f"{store.ledger.path(index)}: there are {len(store.schema.grid)} units, numbered from 0"
        yield Finding(store.name, index, said)
    if whole:
        yield from (Finding(store.name, None, said) for said in _sums(store, tally))


def _sums(store: Store, tally: _Tally) -> Iterator[str]:
    starts = store.labels["sequences/start"][1]
    due = {"token": store.schema.n_token, "sequence": len(starts)}
    for dim in LONG:
        if tally.rows[dim] != due[dim]:
            yield f"its records have {tally.rows[dim]:,} rows along {dim}; the corpus has {due[dim]:,}"
    skipped = int(store.header.provenance.get("skip_positions", 0))
    lengths = np.diff(starts, append=store.schema.n_token)
    counted = int(np.maximum(lengths - skipped, 0).sum())
    for group, found in tally.counted.items():
        if found != counted:
            yield f"{group} has counted {found:,} tokens; there are {counted:,} beyond the first {skipped} of sequences"


def _read(store: Store) -> Iterator[tuple[Unit, Record | None, list[str]]]:
    """Every unit with its record, or None, and what is wrong with that in itself."""
    done, grid = store.done(), store.schema.grid
    _ = store.schema_with_labels  # read once, before threads ask for it

    def look(index: int) -> tuple[Unit, Record | None, list[str]]:
        unit = grid[index]
        if index not in done:
            return unit, None, []
        try:
            record: dict[str, Any] = store.ledger.record(index)
        except FileNotFoundError:  # dropped since
            return unit, None, []
        except CorruptStore as error:
            return unit, None, [str(error)]
        return unit, record, store.record_faults(unit, record)

    with ThreadPoolExecutor(READERS, "audit") as pool:
        for at in range(0, len(grid), AT_ONCE):
            yield from pool.map(look, range(at, min(at + AT_ONCE, len(grid))))
