"""What a store adds to the bare system calls: writing whole units, reading them, making batches, recording."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from forebay.stages.models.memory import keep_freed_memory
from forebay.stores.batches import Batches
from forebay.stores.chunks import Spans
from forebay.stores.dtypes import format_of
from forebay.stores.places import Place, sync_folder
from forebay.stores.schema import Schema, along_token
from forebay.stores.store import Store
from forebay.stores.tree import open_store
from forebay.stores.writer import UnitWriter

from .measuring import Goal, Measurement, Tables, measure, reached
from .measuring import measured as shown

WIDTH, UNIT, CONTEXT = 2048, 2**14, 512
KIND = "hook_resid_post"
PIECE, SLICE = 2**20, 2**24
"""Bytes that bare reads ask for at once into memory that is used again, those of a chunk; and of an array that is kept,
as whoever asks for values gets one.
"""
BATCH = 4096


@dataclass(frozen=True)
class Case:
    """What is kept: units of 2^14 tokens by 2,048 values of some layers, an object a layer."""

    dtype: str
    n_layer: int
    compression: str = "none"
    n_unit: int = 2

    def __str__(self) -> str:
        mib = self.n_layer * UNIT * WIDTH * format_of(self.dtype).itemsize >> 20
        return f"{self.dtype}, {self.compression}, units of {mib} MiB in {self.n_layer} objects"

    @property
    def n_token(self) -> int:
        """Tokens of the store."""
        return UNIT * self.n_unit

    def schema(self) -> Schema:
        starts = np.arange(0, self.n_token, CONTEXT)
        labels = {
            "sequences/start": (("sequence",), starts),
            "sequences/document": (("sequence",), np.zeros(len(starts), dtype=np.int64)),
            "documents/start": (("document",), np.zeros(1, dtype=np.int64)),
            "documents/id": (("document",), np.array(["random"], dtype=object)),
            f"{KIND}/layer": (("layer",), np.arange(self.n_layer)),
        }
        sizes = {"layer": self.n_layer, "token": self.n_token, "d_model": WIDTH}
        array = along_token(("layer", "token", "d_model"), sizes, self.dtype, UNIT)
        return Schema(
            kind="activations",
            n_token=self.n_token,
            unit_tokens=UNIT,
            arrays={f"{KIND}/value": array},
            labels=labels,
            compression=self.compression,
        )

    def values(self) -> NDArray[Any]:
        """One unit's, [layer, token, d_model], in the kept form: normal, each dimension with a scale of its own."""
        rng = np.random.default_rng(0)
        scale = rng.lognormal(0, 0.7, WIDTH).astype(np.float32)
        found = rng.standard_normal((self.n_layer, UNIT, WIDTH), dtype=np.float32) * scale
        kept = format_of(self.dtype)
        return kept.encode(found).astype(kept.kept, copy=False)


CASES = (Case("bfloat16", 4), Case("bfloat16", 1), Case("float32", 2))
PACKED = Case("bfloat16", 2, "zstd")
LONG = Case("bfloat16", 1, n_unit=16)
"""Of which the buffers of batches hold a quarter each."""


def made(case: Case, folder: Path) -> Store:
    """An empty store in place of any that is there."""
    shutil.rmtree(folder, ignore_errors=True)
    return Store.create(folder, case.schema(), "0" * 64, {"determines": {}})


def filled(store: Store, unit: int, values: NDArray[Any]) -> UnitWriter:
    """A unit that waits for being written."""
    own = store.schema.grid[unit]
    piece = xr.Dataset(
        {"value": (("layer", "token", "d_model"), values)}, coords={"token": pd.RangeIndex(own.start, own.stop)}
    )
    writer = UnitWriter(store, own)
    writer.put(xr.DataTree.from_dict({KIND: piece}))
    return writer


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def writings(case: Case, folder: Path) -> dict[str, Measurement]:
    """A unit: its bytes alone, by zarr-python, as objects, and with its record. None replaces what is there."""
    values = case.values()

    def bare() -> float:
        shutil.rmtree(folder / "bare", ignore_errors=True)
        (folder / "bare").mkdir()
        return seconds(lambda: plainly_written(folder / "bare", values))

    def by_zarr() -> float:
        store = made(case, folder / "step")
        return seconds(lambda: written_by_zarr(store, values))

    def objects() -> float:
        store = made(case, folder / "step")
        return seconds(lambda: store.write_rows(f"{KIND}/value", {"token": slice(0, UNIT)}, values))

    def unit() -> float:
        writer = filled(made(case, folder / "step"), 0, values)
        return seconds(lambda: writer.finish({}))

    return {
        "write and fsync of the same bytes": bare,
        "zarr-python and fsync": by_zarr,
        "Store.write_rows": objects,
        "UnitWriter.finish": unit,
    }


def plainly_written(folder: Path, values: NDArray[Any]) -> None:
    """A file a layer."""
    for layer, part in enumerate(values):
        with open(folder / f"{layer}.bin", "wb", buffering=0) as file:
            left = memoryview(part).cast("B")
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
    sync_folder(folder)


def written_by_zarr(store: Store, values: NDArray[Any]) -> None:
    """A layer at a time, so that no more than one object is held besides."""
    import zarr

    root: Any = zarr.open_group(str(store.path), mode="r+", zarr_format=3, use_consolidated=False)
    array = root[f"{KIND}/value"].with_config({"write_empty_chunks": True})
    for layer, part in enumerate(values):
        array[layer : layer + 1, :UNIT] = part[None]
    for path in Path(store.path, KIND, "value", "c").rglob("0"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def recordings(case: Case, folder: Path) -> dict[str, Measurement]:
    """A unit with its record, and the record alone: the later ratio is how many times as long the unit takes."""
    values = case.values()
    store = made(case, folder / "step")

    def unit() -> float:
        writer = filled(store, 0, values)
        return seconds(lambda: writer.finish({}))

    def record() -> float:
        said = store.ledger.record(0)
        return seconds(lambda: store.ledger.complete(0, said))

    return {"UnitWriter.finish": unit, "its record": record}


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def written(case: Case, folder: Path) -> tuple[Store, Path]:
    """A complete store, and its values, layer by layer, as one bare file."""
    store, values = made(case, folder / "run" / "activations"), case.values()
    for unit in store.schema.grid:
        filled(store, unit.index, values).finish({})
    with open(folder / "bare.bin", "wb") as file:
        for part in values:
            for _ in store.schema.grid:
                file.write(part.data)
    return store, folder / "bare.bin"


def into_arrays(file: Path, size: int) -> None:
    """Reads a file's bytes, an array for so many at a time."""
    with open(file, "rb", buffering=0) as opened:
        while len(np.fromfile(opened, np.uint8, size)):
            pass


INTO_ARRAYS = "reads of the same bytes, into arrays"


def opened(store: Store, chunks: Any) -> xr.DataArray:
    found = open_store(store.path.parent, chunks=chunks)[f"{KIND}/value"]
    assert isinstance(found, xr.DataArray)
    return found


def readings(case: Case, folder: Path) -> dict[str, Measurement]:
    """All values, from memory that the system keeps of the files: by bare reads into memory that is used again and into
    new arrays, decoded by numpy, through xarray some at a time and all at once, and by Dask, a task a shard."""
    store, bare = written(case, folder)
    memory, kept = np.empty(PIECE, np.uint8), format_of(case.dtype)
    values, lazy = (opened(store, chunks) for chunks in (None, "auto"))
    mapped = np.memmap(bare, kept.kept, "r", shape=(case.n_layer, case.n_token, WIDTH))

    def reads() -> None:
        with open(bare, "rb", buffering=0) as file:
            while file.readinto(memory.data):
                pass

    def slices(given: xr.DataArray | NDArray[Any], rows: int) -> None:
        for layer in range(case.n_layer):
            for start in range(0, case.n_token, rows):
                part = given[layer, start : start + rows]
                kept.decode(part.copy()) if isinstance(part, np.ndarray) else part.values

    rows = SLICE // (WIDTH * kept.itemsize)
    return {
        INTO_ARRAYS: lambda: seconds(lambda: into_arrays(bare, SLICE)),
        "reads of the same bytes, into one MiB": lambda: seconds(reads),
        "decoded 16 MiB at a time by numpy": lambda: seconds(lambda: slices(mapped, rows)),
        "open_store, slices of 16 MiB": lambda: seconds(lambda: slices(values, rows)),
        "open_store, slices of a shard": lambda: seconds(lambda: slices(values, UNIT)),
        "open_store, all at once": lambda: seconds(lambda: values.copy().values),
        "dask's maximum over token": lambda: seconds(lambda: lazy.max("token", skipna=False).values),
    }


def spans(folder: Path) -> dict[str, Measurement]:
    """Tokens' numbers in order: by bare reads, and by Spans."""
    n_token = 2**26
    sizes, labels = {"token": n_token}, Case("uint32", 1, n_unit=n_token // UNIT).schema().labels
    arrays = {"token_id": along_token(("token",), sizes, "uint32", n_token // 4)}
    schema = Schema(kind="tokens", n_token=n_token, unit_tokens=n_token // 4, arrays=arrays, labels=labels)
    shutil.rmtree(folder / "tokens", ignore_errors=True)
    store = Store.create(folder / "tokens", schema, "0" * 64, {"determines": {}})
    values = np.random.default_rng(0).integers(0, 2**17, n_token // 4, dtype=np.uint32)
    for unit in schema.grid:
        store.write_rows("token_id", {"token": slice(unit.start, unit.stop)}, values)
    with open(folder / "bare.bin", "wb") as file:
        for _ in schema.grid:
            file.write(values.data)
    memory = np.empty(PIECE, np.uint8)
    ids = Spans(store, "token_id")

    def reads() -> None:
        with open(folder / "bare.bin", "rb", buffering=0) as file:
            while file.readinto(memory.data):
                pass

    def in_order(rows: int) -> None:
        for start in range(0, n_token, rows):
            ids.read(start, start + rows)

    return {
        INTO_ARRAYS: lambda: seconds(lambda: into_arrays(folder / "bare.bin", SLICE)),
        "reads of the same bytes, into one MiB": lambda: seconds(reads),
        "Spans, 1 MiB at a time": lambda: seconds(lambda: in_order(2**18)),
        "Spans, 16 MiB at a time": lambda: seconds(lambda: in_order(SLICE // 4)),
    }


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def shuffled(case: Case, folder: Path, cold: bool) -> dict[str, Measurement]:
    """One layer's rows: in order into an array a batch, copied from a memory map into memory that is used again, in
    random MiB, in shuffled batches as kept and as float32.
    Where `cold`, the system is asked to forget the files before each."""
    store, bare = written(case, folder)
    kept = format_of(case.dtype)
    files = [bare, *(store.path / key for unit in store.schema.grid for key in store.objects_of(unit))]
    mapped = np.memmap(bare, kept.kept, "r", shape=(case.n_layer, case.n_token, WIDTH))[0]
    memory = np.empty((BATCH, WIDTH), kept.kept)
    rows = PIECE // memory[0].nbytes

    def in_order() -> None:
        for start in range(0, case.n_token, BATCH):
            np.copyto(memory, mapped[start : start + BATCH])

    def blocks() -> None:
        with open(bare, "rb", buffering=0) as file:
            for block in np.random.default_rng(0).permutation(case.n_token // rows).tolist():
                file.seek(block * PIECE)
                file.readinto(memory[:rows].reshape(-1).view(np.uint8).data)

    def batches(found: Batches) -> None:
        for _ in found:
            pass

    def timed(work: Callable[[], object]) -> Measurement:
        def once() -> float:
            for file in files if cold else ():
                forgotten(file)
            return seconds(work)

        return once

    loader = partial(Batches, run=folder / "run", hooks=f"blocks.0.{KIND}", batch=BATCH)
    as_kept, as_float32 = loader(dtype="stored"), loader(dtype="float32")
    each = partial(into_arrays, bare, memory.nbytes)
    in_place = {INTO_ARRAYS: timed(each), "memmap, in order, into one batch": timed(in_order)}
    warm, after = ({}, ", cold") if cold else (in_place, "")
    return {
        **warm,
        "reads of random MiB": timed(blocks),
        f"run.batches, as kept{after}": timed(lambda: batches(as_kept)),
        f"run.batches, float32{after}": timed(lambda: batches(as_float32)),
    }


def forgotten(file: Place) -> None:
    with open(file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ── all ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


GOALS = (
    Goal(variant="UnitWriter.finish", beside="write and fsync of the same bytes", ratio=0.78),
    Goal(variant="its record", beside="UnitWriter.finish", ratio=100),
    Goal(variant="open_store, slices of 16 MiB", beside=INTO_ARRAYS, ratio=0.4),
    Goal(variant="Spans, 16 MiB at a time", beside=INTO_ARRAYS, ratio=0.9),
    Goal(variant="run.batches, as kept", beside=INTO_ARRAYS, ratio=0.6),
    Goal(variant="run.batches, as kept, cold", beside="reads of random MiB", ratio=0.9),
)


def subjects(folder: Path) -> Iterator[tuple[str, Callable[[], dict[str, Measurement]], int]]:
    """Title, what is measured, and of how many tokens."""
    for case in (*CASES, PACKED):
        yield f"write {case}", partial(writings, case, folder), UNIT
    yield f"record {CASES[0]}", partial(recordings, CASES[0], folder), UNIT
    for case in (*CASES[::2], PACKED):
        yield f"read {case}", partial(readings, case, folder), case.n_layer * case.n_token
    yield "read token_id", partial(spans, folder), 2**26
    yield f"batches {LONG}", partial(shuffled, LONG, folder, cold=False), LONG.n_token
    yield f"batches {LONG}, cold", partial(shuffled, LONG, folder, cold=True), LONG.n_token


def measured(folder: Path, rounds: int) -> Tables:
    """Prints each subject's table, and gives it for machines. Takes 2 GiB of disk; freed memory is kept, as in a
    process that has loaded a model."""
    keep_freed_memory()
    tables: Tables = {}
    for title, variants_of, n_token in subjects(folder):
        print(title)
        variants = variants_of()
        measure(variants, 1)
        times = measure(variants, rounds)
        goals = () if PACKED.compression in title else GOALS  # which are for bytes as they are
        tables[title] = shown(times, n_token) + reached(times, goals)
        del variants  # which map the files
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tables
