"""The real ledger with a million real records: how long it takes to write, list, and read the state of a run."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from forebay.pipeline.report.status import status
from forebay.stores.fingerprint import fingerprint, versions, whereabouts
from forebay.stores.grid import Unit
from forebay.stores.ledger import Record
from forebay.stores.schema import Schema, along_token
from forebay.stores.store import Store

UNIT_TOKENS, CONTEXT, D_MODEL, LAYERS = 8192, 512, 576, (5, 10, 15)
SYNCED = 500
"""Records that are put as a run puts them, each made durable by itself; of a million that would take hours."""
LEFT = 1000
"""Units that have no record: what `todo` finds."""


MADE = {"versions": versions(), **whereabouts()}


def record_of(store: Store, unit: Unit) -> Record:
    """A record as a run writes them: three objects, statistics of three layers."""
    objects = {
        store.object_key("hook_resid_post/value", (layer, unit.index, 0)): {
            "bytes": UNIT_TOKENS * D_MODEL * 2,
            "blake3": fingerprint([layer, unit.index]),
        }
        for layer in range(len(LAYERS))
    }
    statistics = {name: [1234.5678 * unit.index + layer for layer in LAYERS] for name in ("abs_max", "square_sum")}
    return {
        "unit": unit.index,
        "fingerprint": store.fingerprint,
        "rows": {"token": [unit.start, unit.stop], "sequence": [unit.start // CONTEXT, unit.stop // CONTEXT]},
        "objects": objects,
        "bytes": sum(entry["bytes"] for entry in objects.values()),
        "statistics": {"hook_resid_post": statistics},
        "seconds": {"compute": 7.654321, "write": 0.123456},
        "finished": 1.7e9,
        **MADE,
    }


def make_store(folder: Path, n_unit: int) -> Store:
    """An empty store of so many units; its labels are those of one document."""
    n_token = n_unit * UNIT_TOKENS
    sizes = {"layer": len(LAYERS), "token": n_token, "d_model": D_MODEL}
    labels = {
        "sequences/start": (("sequence",), np.zeros(1, np.int64)),
        "sequences/document": (("sequence",), np.zeros(1, np.int64)),
        "documents/start": (("document",), np.zeros(1, np.int64)),
        "documents/id": (("document",), np.array(["corpus"], dtype=object)),
        "hook_resid_post/layer": (("layer",), np.array(LAYERS)),
    }
    schema = Schema(
        kind="activations",
        n_token=n_token,
        unit_tokens=UNIT_TOKENS,
        arrays={"hook_resid_post/value": along_token(("layer", "token", "d_model"), sizes, "bfloat16", UNIT_TOKENS)},
        labels=labels,
    )
    determines = {"step": "simulation", "units": n_unit}
    return Store.create(folder, schema, fingerprint(determines), {"determines": determines})


def measure_ledger(folder: Path, n_unit: int) -> dict[str, dict[str, float]]:
    """Figures by name: seconds of this process and on the clock, and counts, of a run of `n_unit` units with all but
    `LEFT` (at most half) recorded.
    """
    store = make_store(folder / "activations", n_unit)
    ledger, grid = store.ledger, store.schema.grid
    left = min(LEFT, n_unit // 2)
    synced = min(SYNCED, n_unit - left)
    found: dict[str, dict[str, float]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        cpu, clock = time.process_time(), time.perf_counter()
        yield
        found[name] = {"cpu_s": time.process_time() - cpu, "clock_s": time.perf_counter() - clock}

    def each(n: int, put: Callable[[Unit], None], first: int = 0) -> None:
        for index in range(first, first + n):
            put(grid[index])

    with timed(f"complete(), {synced:,} records, each made durable"):
        each(synced, lambda unit: ledger.complete(unit.index, record_of(store, unit)))
    text = json.dumps(record_of(store, grid[n_unit - 1]), indent=1, sort_keys=True).encode()

    def plainly(unit: Unit) -> None:
        with open(ledger.path(unit.index), "wb") as file:
            file.write(text)

    rest = n_unit - left - synced
    with timed(f"the other {rest:,} as plain files"):
        each(rest, plainly, synced)
    for name, call in {
        "done(): one listing": ledger.done,
        "todo(): units without a record": store.todo,
        "status of the run": lambda: status(folder),
        "a record read": lambda: ledger.record(n_unit // 3),
    }.items():
        with timed(name):
            call()
    assert len(store.todo()) == left
    disk = os.stat(ledger.path(synced)).st_blocks * 512
    found["a record"] = {"bytes": len(text), "disk_bytes": disk}
    found["the ledger on disk"] = {"disk_bytes": disk * (n_unit - left)}
    found["peak memory of the process"] = {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return found
