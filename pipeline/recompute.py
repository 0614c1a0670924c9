"""Computes units of a finished run again and holds them, bit for bit, against what is stored. Writes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..stores.chunks import read_outer
from ..stores.dtypes import format_of
from ..stores.grid import Unit
from ..stores.ledger import read_json
from ..stores.schema import Array
from ..stores.store import Store
from ..stores.writer import COUNT, UnitWriter
from .executors.units import load, read, settle_threads
from .plan import Plan, Step, load_plan
from .recipe import Recipe

Looked = Callable[[str, Unit], None]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first row in which a unit's array is not what it comes to when it is computed again. `index` is where, along
    the array's dimensions; `differing` counts the values that differ.
    """

    step: str
    unit: int
    array: str
    index: dict[str, int]
    stored: Any
    computed: Any
    differing: int

    def __str__(self) -> str:
        where = ", ".join(f"{dim} {at}" for dim, at in self.index.items())
        return (
            f"{self.step}: unit {self.unit}: {self.array} at {where}: {self.stored} is stored, {self.computed} is "
            f"computed ({self.differing:,} values differ)"
        )


def recompute(
    folder: Path, n_unit: int, device: str, seed: int = 0, progress: Looked = lambda step, unit: None
) -> Iterator[Difference]:
    """Computes `n_unit` recorded units of every step again, chosen at random by `seed`, in memory, and gives the first
    difference of each array.

    Needs what the run was made from: CorpusError, ModelError and SchemaError if corpus, model or dictionary are gone,
    FingerprintMismatch if they, the kind of device or the libraries have changed, for then other bits may be right too.
    """
    path = folder / "recipe.json"
    if path.is_file():
        settle_threads(Recipe.from_json(read_json(path).get("recipe")).stages, folder, None)
    plan = load_plan(folder, device)
    for step in plan.steps:
        done = sorted(step.open().done())
        chosen = sorted(random.Random(f"{seed} {step.stage.store}").sample(done, min(n_unit, len(done))))
        if not chosen:
            continue
        apply = load(step, plan.device)
        for index in chosen:
            unit = step.schema.grid[index]
            yield from _differences(plan, step, unit, apply)
            progress(step.stage.store, unit)


def _differences(plan: Plan, step: Step, unit: Unit, apply: Any) -> Iterator[Difference]:
    store, source = step.open(), plan.source(step)
    block = read(step, source, unit)
    writer = UnitWriter(store, unit)
    for piece in apply(block, unit):
        writer.put(piece)
    computed = writer.gathered()
    for path in sorted(computed, key=lambda path: path.rpartition("/")[2] != COUNT):
        if found := _first(store, unit, path, computed[path], writer.rows):
            yield found


def _first(store: Store, unit: Unit, path: str, computed: NDArray[Any], rows: dict[str, slice]) -> Difference | None:
    """The first row, along the long axis, in which what is stored has other bits than what is computed."""
    array = store.schema.arrays[path]
    where = tuple(rows.get(dim, slice(None)) for dim in array.dims)
    if array.ragged:
        where, computed = (where[0], slice(0, len(computed))), computed[None]
    stored = read_outer(store, path, where, decoded=False)
    differs = _bits(stored) != _bits(computed)
    if not differs.any():
        return None
    axis = _long(array)
    row = int(np.argmax(differs.any(axis=tuple(at for at in range(differs.ndim) if at != axis))))
    beside = np.argwhere(differs.take(row, axis))[0]
    first = tuple(int(at) for at in np.insert(beside, axis, row))
    origin = [rows[dim].start if dim in rows else 0 for dim in array.dims]
    index = {dim: at + start for dim, at, start in zip(array.dims, first, origin, strict=True)}
    decode = format_of(array.dtype).decode
    here, anew = (decode(np.atleast_1d(one[first]))[0].item() for one in (stored, computed))
    return Difference(store.name, unit.index, path, index, here, anew, int(differs.sum()))


def _long(array: Array) -> int:
    return next(array.dims.index(dim) for dim in ("token", "sequence", "nonzero") if dim in array.dims)


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    """Values as unsigned integers, so that a NaN equals itself and zero does not equal its negative."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
