"""A measured minute: real batches of a recipe's first unit on this device, written aside, read back, and removed.

Every step computes the first unit of its own store, or as much of it as there is time for, from what the step before
it has written aside; then the same again, without keeping it, until its time is over. So rates, bytes and memory are
those of the recipe's own texts, model, batches and shards.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np

from ..stages.capture import Capture
from ..stages.encode import Encode
from ..stages.stage import Apply
from ..stores.chunks import read_outer
from ..stores.grid import Unit
from ..stores.ledger import Record
from ..stores.places import Place, delete_tree
from ..stores.schema import Array, Schema
from ..stores.store import Store
from ..stores.writer import COUNT, UnitWriter
from .plan import CapturesSource, Plan, Source, Step, StoreSource, steps_before
from .profile import Profile, StepProfile, Traffic, here, settings_of
from .report.costs import value_bytes
from .stopping import Stopped

if TYPE_CHECKING:
    import xarray as xr

ASIDE = ".measuring."
"""How the hidden folder's name begins, in the run's."""
FORGOTTEN = 86_400.0
"""Seconds after which such a folder has been left behind by a process that was killed."""
TOKENIZED = 2**20
"""Tokens of the corpus that are made, at most, unless the first batch of a later step takes more."""
WRITES = 3
SHARE_OF_TOKENIZING = 0.1


@dataclass(frozen=True)
class Computed:
    """The pieces of a unit, the tokens that they cover, and what they took: seconds of all but the first batch."""

    pieces: tuple[xr.DataTree, ...]
    unit: Unit
    tokens: int
    seconds: float


def measure(plan: Plan, seconds: float, stop: Event) -> Profile:
    """Measures every step of a plan for about `seconds` in all; loading and the first batch of each come on top.

    Writes into a hidden folder in the run's and removes it. Stopped when `stop` is set; DiskFull, and what a stage
    refuses.
    """
    sweep(plan.folder)
    aside = plan.folder / f"{ASIDE}{uuid.uuid4().hex}"
    found: list[StepProfile] = []
    stores: dict[str, Store] = {}
    others = max(1, len(plan.steps) - 1)
    try:
        for step in plan.steps:
            share = SHARE_OF_TOKENIZING if step.stage.source is None else (1 - SHARE_OF_TOKENIZING) / others
            before = tuple(stores[one.stage.store] for one in steps_before(step.stage, plan.steps))
            profile, store = _measure_step(plan, step, before, aside, share * seconds, stop)
            found.append(profile)
            stores[step.stage.store] = store
    finally:
        delete_tree(aside)
    return Profile(
        origin="measured",
        model=plan.recipe.model.about(),
        folder=str(plan.folder),
        steps=tuple(found),
        **here(plan.device),
    )


def _measure_step(
    plan: Plan, step: Step, before: tuple[Store, ...], aside: Place, seconds: float, stop: Event
) -> tuple[StepProfile, Store]:
    source = _source(plan, step, before)
    unit = _unit(plan, step, min((store.schema.n_token for store in before), default=0))
    memory = HostMemory.begin()
    device = _reset_device(plan.device)
    began = time.perf_counter()
    apply = step.stage.load(plan.device, step.schema)
    loaded = time.perf_counter() - began
    block = source.read(step.stage.span(unit, step.source_schema, step.schema))
    deadline = None if step.stage.source is None else time.perf_counter() + seconds
    computed = _compute(apply, block, unit, step.schema, deadline, stop)
    again = _repeat(apply, block, computed.unit, seconds - computed.seconds, stop)
    written, store, record = _write(step, computed, aside)
    peak, device_peak = memory.peak(), device()
    profile = StepProfile(
        name=step.stage.store,
        settings=settings_of(step.payload),
        tokens=computed.tokens + again.tokens,
        compute_seconds=max(1e-9, computed.seconds + again.seconds),
        values=_values(store.schema, computed),
        written=written,
        read=_read(store, computed, record),
        load_seconds=loaded,
        host_before=memory.before,
        host_peak=peak,
        device_peak=device_peak,
        nonzeros=_nonzeros(computed, store.schema),
    )
    return profile, store


# ── computing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _source(plan: Plan, step: Step, before: tuple[Store, ...]) -> Source:
    """What a step reads: the corpus, or what the steps before it have written aside."""
    if not before:
        return plan.documents
    return StoreSource(before[0], before[0].schema) if len(before) == 1 else CapturesSource(before, step.source_schema)


def _unit(plan: Plan, step: Step, there: int) -> Unit:
    """The first unit of a step, or the part of it whose source, `there` tokens, has been written; of the tokens at
    least what the largest batch of a later step takes.
    """
    unit, starts = step.schema.grid[0], step.schema.labels["sequences/start"][1]
    if step.stage.source is None:
        batch = max((stage.batch for stage in plan.recipe.stages if isinstance(stage, Capture | Encode)), default=1)
        first_batch = int(starts[batch]) if batch < len(starts) else step.schema.n_token
        return replace(unit, stop=max(min(unit.stop, TOKENIZED), first_batch))
    whole = int(starts[np.searchsorted(starts, there, "right") - 1])  # where the last sequence starts, maybe cut short
    for stop in (unit.stop, min(unit.stop, there), whole):
        part = replace(unit, stop=stop)
        if step.stage.span(part, step.source_schema, step.schema).stop <= there:
            break
    return part


def _compute(apply: Apply, block: xr.Dataset, unit: Unit, own: Schema, deadline: float | None, stop: Event) -> Computed:
    """A unit's pieces until the deadline, at least one."""
    pieces: list[xr.DataTree] = []
    tokens, seconds, reached = 0, 0.0, unit.start
    for piece, took in _timed(apply(block, unit), stop):
        covered = _covered(piece, unit, own)
        pieces.append(piece)
        if len(pieces) > 1:
            tokens, seconds = tokens + covered - reached, seconds + took
        else:
            first = covered - unit.start, took
        reached = max(reached, covered)
        if deadline is not None and time.perf_counter() > deadline:
            break
    tokens, seconds = (tokens, seconds) if tokens > 0 else first
    return Computed(tuple(pieces), replace(unit, stop=reached), tokens, seconds)


def _repeat(apply: Apply, block: xr.Dataset, unit: Unit, seconds: float, stop: Event) -> Computed:
    """The same batches over and over, for so many seconds; nothing is kept."""
    tokens, spent = 0, 0.0
    while spent < seconds:
        begun = time.perf_counter()
        for _ in _timed(apply(block, unit), stop):
            pass
        tokens, spent = tokens + len(unit), spent + time.perf_counter() - begun
    return Computed((), unit, tokens, spent)


def _timed(pieces: Iterator[xr.DataTree], stop: Event) -> Iterator[tuple[xr.DataTree, float]]:
    while True:
        begun = time.perf_counter()
        piece = next(pieces, None)
        if piece is None:
            return
        yield piece, time.perf_counter() - begun
        if stop.is_set():
            raise Stopped


def _covered(piece: xr.DataTree, unit: Unit, own: Schema) -> int:
    """The token behind the last one that a piece, and all before it, have covered."""
    starts = own.labels["sequences/start"][1]
    found = unit.start
    for node in piece.subtree:
        for dim, index in node.indexes.items():
            if dim == "token" and len(index):
                found = max(found, int(index[-1]) + 1)
            if dim == "sequence" and len(index):
                beyond = int(index[-1]) + 1
                found = max(found, int(starts[beyond]) if beyond < len(starts) else own.n_token)
    return min(found, unit.stop)


# ── writing and reading ──────────────────────────────────────────────────────────────────────────────────────────────


def prefix(schema: Schema, n_token: int) -> Schema:
    """The schema of a store's first tokens: the same shards, and labels as far as they reach."""
    starts = {dim: schema.labels[f"{dim}s/start"][1] for dim in ("sequence", "document")}
    sizes = {dim: int(np.searchsorted(each, n_token, "left")) for dim, each in starts.items()}
    sizes |= {"token": n_token, "unit": -(-n_token // schema.unit_tokens)}

    def cut(array: Array) -> Array:
        return replace(array, shape=tuple(sizes.get(dim, n) for dim, n in zip(array.dims, array.shape, strict=True)))

    labels = {
        path: (dims, values[: sizes[dims[0]]] if dims[0] in sizes else values)
        for path, (dims, values) in schema.labels.items()
    }
    arrays = {path: cut(array) for path, array in schema.arrays.items()}
    return replace(schema, n_token=n_token, arrays=arrays, labels=labels)


def _write(step: Step, computed: Computed, aside: Place) -> tuple[dict[str, Traffic], Store, Record]:
    """Writes a unit with and without compression, a few times each. Gives the traffic by compression, and the store and
    record of the recipe's own.
    """
    first = prefix(step.schema, computed.unit.stop)
    traffic: dict[str, Traffic] = {}
    kept: tuple[Store, Record] | None = None
    for compression in dict.fromkeys((step.schema.compression, "none", "zstd")):
        schema = replace(first, compression=compression)
        folder = aside / compression / step.stage.store
        store = Store.create(folder, schema, step.fingerprint, {"determines": dict(step.payload)})
        nbytes, seconds = 0, 0.0
        for _ in range(WRITES):
            writer = UnitWriter(store, computed.unit)
            for piece in computed.pieces:
                writer.put(piece)
            record = writer.finish({})
            del writer  # else there would be two, where a run has one beside the unit that is computed
            nbytes, seconds = nbytes + record["bytes"], seconds + record["seconds"]["write"]
        traffic[compression] = Traffic(nbytes, seconds)
        kept = kept or (store, record)
    assert kept is not None
    return traffic, *kept


def _read(store: Store, computed: Computed, record: Record) -> Traffic:
    """Reads a unit back, an array and a layer at a time, after asking the system to forget what it holds of it."""
    for key in record["objects"]:
        _forget(store.path / key)
    begun = time.perf_counter()
    for path, array in store.schema.arrays.items():
        behind = [slice(None)] * (len(array.dims) - 1)
        if array.ragged:
            read_outer(store, path, (0, slice(max(1, _ragged_length(path, computed)))))
        elif array.dims[0] == "layer":
            for layer in range(array.shape[0]):
                read_outer(store, path, (layer, *behind))
        else:
            read_outer(store, path, (slice(None), *behind))
    return Traffic(record["bytes"], time.perf_counter() - begun)


def _forget(path: Place) -> None:
    """Has the system drop an object's pages, where it can be asked to: else a read would come from memory."""
    if sys.platform == "linux" and isinstance(path, Path):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _ragged_length(path: str, computed: Computed) -> int:
    count = f"{path.rpartition('/')[0]}/{COUNT}"
    return sum(int(np.asarray(piece[count]).sum()) for piece in computed.pieces)


def _nonzeros(computed: Computed, schema: Schema) -> dict[str, float]:
    ragged = [path for path, array in schema.arrays.items() if array.ragged]
    return {path: _ragged_length(path, computed) / len(computed.unit) for path in ragged}


def _values(schema: Schema, computed: Computed) -> float:
    nonzeros = _nonzeros(computed, schema)
    return WRITES * sum(
        value_bytes(array, schema.n_token, nonzeros.get(path, 0.0)) for path, array in schema.arrays.items()
    )


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class HostMemory:
    """What this process held, in bytes, `before` something, and the most that it has held since; None where the system
    does not tell (it does on Linux).
    """

    before: int | None

    @classmethod
    def begin(cls) -> HostMemory:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on what is held now
        except OSError:
            return cls(None)
        return cls(_status("VmRSS"))

    def peak(self) -> int | None:
        return None if self.before is None else _status("VmHWM")


def _status(name: str) -> int | None:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _reset_device(device: str) -> Callable[[], int | None]:
    """Forgets the most that tensors held on a CUDA device, and gives what tells the most since."""
    import torch

    if not device.startswith("cuda"):
        return lambda: None
    torch.cuda.reset_peak_memory_stats(device)
    return lambda: torch.cuda.max_memory_allocated(device)


def sweep(folder: Place) -> None:
    """Removes what measurements that were killed have left on this machine."""
    if not isinstance(folder, Path):
        return
    for left in folder.glob(f"{ASIDE}*"):
        if time.time() - left.stat().st_mtime > FORGOTTEN:
            shutil.rmtree(left, ignore_errors=True)
