"""Executors at work on units that take a fixed time and no processor: what is lost between units, and as workers are
added.

The stage sleeps, and everything else is real: plans, stores, records, ranks in processes of their own, a Dask cluster.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import xarray as xr
from rich.console import Console
from rich.table import Table

from forebay.pipeline.executors import Executor, Ranks, ThisProcess
from forebay.pipeline.executors.unit_tasks import UnitTasks
from forebay.pipeline.plan import Plan, Step
from forebay.pipeline.progress import Quiet
from forebay.stages.stage import Apply, Stage
from forebay.stores.grid import Unit
from forebay.stores.ledger import Record
from forebay.stores.schema import Schema, along_token
from forebay.stores.writer import UnitWriter

UNIT_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Sleeping(Stage):
    """Numbers every token, and sleeps `seconds` a unit."""

    verb: ClassVar[str] = "sleep"
    version: ClassVar[int] = 1

    seconds: float
    units: int

    @property
    def store(self) -> str:
        return "slept"

    @property
    def source(self) -> str | None:
        return None

    def check(self) -> None: ...

    def schema(self, source: Schema) -> Schema:
        n_token = self.units * UNIT_TOKENS
        array = along_token(("token",), {"token": n_token}, "uint32", UNIT_TOKENS)
        labels = {"sequences/start": (("sequence",), np.arange(0, n_token, UNIT_TOKENS))}
        return Schema(kind="slept", n_token=n_token, unit_tokens=UNIT_TOKENS, arrays={"n": array}, labels=labels)

    def files(self) -> tuple[Path, ...]:
        return ()

    def span(self, unit: Unit, source: Schema, own: Schema) -> slice:
        return slice(unit.start, unit.stop)

    def load(self, device: str, own: Schema) -> Apply:
        def apply(block: xr.Dataset, unit: Unit) -> Iterator[xr.DataTree]:
            time.sleep(self.seconds)
            rows = np.arange(unit.start, unit.stop, dtype=np.uint32)
            yield xr.DataTree(
                xr.Dataset({"n": (("token",), rows)}, coords={"token": pd.RangeIndex(unit.start, unit.stop)})
            )

        return apply


class Nothing:
    """A source that has nothing to read."""

    schema = Schema(kind="documents", n_token=1, unit_tokens=1, arrays={})

    def read(self, span: slice) -> xr.Dataset:
        return xr.Dataset()


def planned(folder: Path, seconds: float, units: int) -> Plan:
    stage: Any = Sleeping(seconds=seconds, units=units)
    payload = {"parameters": stage.parameters(), "numerics": {}}
    step = Step(stage, stage.schema(Nothing.schema), Nothing.schema, payload, "0" * 64, folder / stage.store)
    source: Any = Nothing()
    recipe: Any = None
    return Plan(recipe, folder, "cpu", source, (step,))


def warm(folder: Path) -> None:
    """A unit of another run, for what is done once in a process: imports, above all."""
    plan = planned(folder.parent / "warm" / str(os.getpid()), 0.0, 1)
    ThisProcess().run_step(plan, plan.steps[0], Quiet(), Event())


def in_process(executor: Executor, folder: Path, seconds: float, units: int, ready: Any, go: Any) -> None:
    """What a rank does: everything that is done once, then its units when all ranks are ready."""
    warm(folder)
    plan = planned(folder, seconds, units)
    plan.steps[0].open()
    ready.release()
    go.wait()
    executor.run_step(plan, plan.steps[0], Quiet(), Event())


def with_processes(executors: list[Executor], folder: Path, seconds: float, units: int) -> float:
    """Seconds from the first unit to the end of the last process."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Semaphore(0), context.Event()
    arguments = folder, seconds, units, ready, go
    processes = [context.Process(target=in_process, args=(one, *arguments)) for one in executors]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    started = time.perf_counter()
    go.set()
    ledger = planned(folder, seconds, units).steps[0].ledger
    while len(ledger.done()) < units:
        time.sleep(0.002)
    taken = time.perf_counter() - started
    for process in processes:
        process.join()
    return taken


def sleep_task(folder: str, step: str, index: int, device: str) -> Record:
    """As `run_unit` does it, of the plan that `folder` names: its last two parts are seconds and units."""
    *_, seconds, units = Path(folder).parts
    plan = planned(Path(folder), float(seconds), int(units))
    store, unit = plan.steps[0].open(), plan.steps[0].schema.grid[index]
    writer = UnitWriter(store, unit)
    for piece in plan.steps[0].stage.load(device, store.schema)(Nothing().read(slice(0)), unit):
        writer.put(piece)
    record = writer.finish({})
    return {key: record[key] for key in ("unit", "bytes", "seconds")}


def with_dask(workers: int, folder: Path, seconds: float, units: int) -> float:
    from forebay.pipeline.executors import clusters

    plan = planned(folder, seconds, units)
    with clusters.quiet():
        client = clusters.connect(f"local:{workers}")
        client.wait_for_workers(workers)
        client.run(warm, folder)
        started = time.perf_counter()
        UnitTasks(client, plan, plan.steps[0], sleep_task, Quiet(), Event()).run()
        taken = time.perf_counter() - started
        clusters.close(client)
    return taken


def measured(folder: Path, seconds: float, units: int, workers: tuple[int, ...] = (1, 2, 4)) -> list[dict[str, object]]:
    """Shows how much of n times one worker's speed n workers reach, and what each executor adds to a unit."""
    variants: dict[str, tuple[int, Callable[[Path], float]]] = {
        "this process": (1, lambda to: with_processes([ThisProcess()], to, seconds, units))
    }
    for n in workers:
        ranks: list[Executor] = [Ranks(i, n) for i in range(n)]
        variants[f"{n} ranks"] = n, lambda to, ranks=ranks: with_processes(ranks, to, seconds, units)  # type: ignore[misc]
        variants[f"{n} Dask workers"] = n, lambda to, n=n: with_dask(n, to, seconds, units)  # type: ignore[misc]
    table = Table(box=None, pad_edge=False, title=f"{units} units that sleep {seconds} s", title_justify="left")
    for name in ("executor", "of the sum of its workers", "seconds a unit besides"):
        table.add_column(name, justify="left" if name == "executor" else "right")
    rows: list[dict[str, object]] = []
    for name, (n, run) in variants.items():
        taken = run(folder / name.replace(" ", "-") / str(seconds) / str(units))
        share, besides = units * seconds / (n * taken), (n * taken - units * seconds) / units
        table.add_row(name, f"{share:.3f}", f"{besides:.4f}")
        rows.append({"variant": name, "share": share, "seconds_besides": besides})
    Console().print(table)
    return rows
