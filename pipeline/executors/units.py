"""One unit, wherever it is computed; and what a process needs before its first one."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import lru_cache
from threading import Lock

import xarray as xr

from ...stages.stage import Apply, Stage
from ...stores.errors import DiskFull, StorageError, StoreNotFound
from ...stores.fingerprint import versions, whereabouts
from ...stores.grid import Unit
from ...stores.ledger import Ledger, Record, read_json
from ...stores.places import Place, place
from ...stores.schema import DATA, holds_store, read_header
from ...stores.store import Store
from ...stores.writer import UnitWriter
from ..plan import Plan, Source, Step, load_plan, resolve_device
from ..recipe import Recipe

_ONE = Lock()
"""One unit is computed at a time in a process, however many threads a worker has: they would share its device."""


def run_unit(folder: str | Place, step: str, index: int, device: str = "auto") -> Record:
    """Computes one unit of a run that is there and gives its record: read, compute, write, record, one after the other.

    The only call that ever crosses a process boundary: three words in, one record out. A process loads each step once.
    A unit that is recorded is not computed again. One that fails is recorded as such, and the record of the failure,
    with `error`, `traceback` and its own `path`, is what comes back. StoreNotFound, IndexError, FingerprintMismatch,
    DiskFull are no failures of the unit, and are raised.
    """
    folder = place(folder)
    plan, this, store, apply = _ready(folder, step, device)
    unit = this.schema.grid[index]
    if is_recorded(store.ledger, unit):
        return store.ledger.record(index)
    try:
        with _ONE:
            block = read(this, plan.source(this), unit)
            started = time.perf_counter()
            writer = UnitWriter(store, unit)
            for piece in apply(block, unit):
                writer.put(piece)
            seconds = time.perf_counter() - started
        return store.ledger.record(index) if is_recorded(store.ledger, unit) else writer.finish({"compute": seconds})
    except (DiskFull, StorageError):
        raise
    except Exception as error:
        path = fail(store.ledger, unit, error)
        return {**read_json(path), "unit": index, "path": str(path)}


def _ready(folder: Place, step: str, device: str) -> tuple[Plan, Step, Store, Apply]:
    """The plan, the step, its store and what computes it, loaded once; again only if the store is another by now."""
    if not (folder / "recipe.json").is_file():
        load_plan(folder, device)  # says that there is no run
    try:
        fingerprint = read_header(folder / step / DATA).fingerprint
    except StoreNotFound:
        fingerprint = ""
    with _ONE:
        return _loaded(folder, step, resolve_device(device), fingerprint)


@lru_cache(maxsize=1)
def _loaded(folder: Place, step: str, device: str, fingerprint: str) -> tuple[Plan, Step, Store, Apply]:
    recipe = Recipe.from_json(read_json(folder / "recipe.json").get("recipe"))
    settle_threads(recipe.stages, folder, None)
    plan = load_plan(folder, device)
    this = plan.step(step)
    return plan, this, this.open(), load(this, device)


def load(step: Step, device: str) -> Apply:
    """Makes ready to compute a step, with the number of threads that its fingerprint says."""
    _set_threads(step.payload["numerics"].get("threads"))
    return step.stage.load(device, step.schema)


def settle_threads(stages: Iterable[Stage], folder: Place, otherwise: int | None) -> None:
    """Sets the number of torch's threads where a recipe leaves it open: what a store that is there was begun with, so
    that any machine may go on with it; else `otherwise`. None: torch's own number.
    """
    for stage in stages:
        if stage.parameters().get("threads", 0) is None and holds_store(folder / stage.store):
            header = read_header(folder / stage.store / DATA)
            begun = header.provenance.get("determines", {}).get("numerics", {}).get("threads")
            if begun is not None:
                otherwise = begun
                break
    _set_threads(otherwise)


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def read(step: Step, source: Source, unit: Unit) -> xr.Dataset:
    """What a unit is computed from."""
    return source.read(step.stage.span(unit, source.schema, step.schema))


def is_recorded(ledger: Ledger, unit: Unit) -> bool:
    """Whether anyone has recorded a unit by now. Then its objects must not be touched again."""
    return ledger.path(unit.index).is_file()


def fail(ledger: Ledger, unit: Unit, error: BaseException) -> Place:
    """Records a failed attempt with its traceback, and who made it."""
    return ledger.fail(unit.index, error, {**whereabouts(), "versions": versions()})
