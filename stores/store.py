"""Labelled arrays on disk with a ledger: create, open, read, write rows, verify. The only file that names zarr.

A store is the folder of a step: `data.zarr`, which any Zarr v3 reader opens, and beside it the records of the units
that are done. Nothing that one unit writes is touched by another, so there are no locks; see docs/store-format.md.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.errors import ZarrUserWarning
from zarr.storage import LocalStore

from .dtypes import format_of
from .errors import FULL, CorruptStore, DiskFull, FingerprintMismatch
from .fingerprint import differences
from .grid import Unit
from .ledger import Ledger, sync_folder
from .schema import DATA, Array, Header, Schema, read_header


def _codecs(compression: str, itemsize: int) -> list[Any]:
    """Codecs of one chunk. A Blosc block of 512 KiB keeps the exponent bytes apart from the rest: 1.44 times smaller,
    not 1.26.
    """
    if compression == "none":
        return [Crc32cCodec()]
    zstd = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=itemsize, blocksize=2**19)
    return [zstd, Crc32cCodec()]


@dataclass(frozen=True)
class Store:
    """One step's data and ledger. Picklable: a path and a header, never an open handle."""

    path: Path
    header: Header

    @property
    def schema(self) -> Schema:
        return self.header.schema

    @property
    def fingerprint(self) -> str:
        return self.header.fingerprint

    @property
    def name(self) -> str:
        """The step's name: the folder that holds the store."""
        return self.path.parent.name

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.path.parent)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Store:
        """The store of a step's folder.

        Reads one small file. StoreNotFound, CorruptStore or SchemaError say what is wrong.
        """
        path = Path(folder) / DATA
        return cls(path, read_header(path))

    @classmethod
    def create(cls, folder: Path, schema: Schema, fingerprint: str, provenance: Mapping[str, Any]) -> Store:
        """Makes an empty store, or joins the one that is there. Any number of processes may do so at once.

        `provenance["determines"]` is everything that determines the values, of which `fingerprint` is the hash.

        FingerprintMismatch names what differs if the store there was made by another recipe; CorruptStore if there are
        records but no data; DiskFull.
        """
        header = Header(schema, fingerprint, provenance)
        path = folder / DATA
        recorded = Ledger(folder).done()  # before the look at the data, which are there before any record
        if not path.exists():
            if recorded:
                raise CorruptStore(
                    f"{folder} has records of {len(recorded)} units, but {path} with their data is gone. Restore it, "
                    f"or delete {folder} to compute it anew"
                )
            aside = folder / f".{DATA}.{uuid.uuid4().hex}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _lay_out(aside, header)
                os.rename(aside, path)
            except OSError as error:
                if error.errno in FULL:
                    raise DiskFull(
                        f"no space to make {path} ({error.strerror}). Free some space and run again"
                    ) from error
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            sync_folder(folder)
        store = cls.open(folder)
        if store.fingerprint != fingerprint:
            raise mismatch(store, fingerprint, provenance)
        return store

    @cached_property
    def labels(self) -> dict[str, tuple[tuple[str, ...], NDArray[Any]]]:
        """Where sequences and documents start, and which layers there are: path → (dims, values), in memory."""
        found = {}
        for path, node in sorted(_arrays_below(self._root("r"))):
            if path not in self.schema.arrays:
                values = np.asarray(node[...])
                # numpy's own strings cannot be masked or joined with anything else, Python's can
                values = values.astype(object) if values.dtype.kind == "T" else values
                found[path] = (tuple(node.metadata.dimension_names), values)
        return found

    @cached_property
    def schema_with_labels(self) -> Schema:
        return replace(self.schema, labels=self.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        """Labels stay behind: they may be large, and are read again where they are asked for."""
        return Store, (self.path, self.header)

    def todo(self) -> list[Unit]:
        """Units without a record, in order."""
        done = self.ledger.done()
        return [unit for unit in self.schema.grid if unit.index not in done]

    @property
    def complete(self) -> bool:
        return not self.todo()

    def array(self, path: str) -> Any:
        """The open Zarr array at a path of the store, read-only."""
        return self._root("r")[path]

    def write_rows(self, path: str, rows: Mapping[str, slice], values: NDArray[Any]) -> None:
        """Writes whole shards: `values` are the `rows` of the array, in their kept form; of a ragged array the values
        that a unit has, at least one.

        An object that is there is replaced in one go and never looked at, so that a torn one does no harm, and a reader
        or another writer of the same unit finds a whole one at any time.
        """
        array = self.schema.arrays[path]
        root = zarr.open_group(_Unread(str(self.path)), mode="r+", zarr_format=3, use_consolidated=False)
        # Else a shard whose cells all equal the fill value would be left out, and its unit have no object to record.
        target: Any = root[path].with_config({"write_empty_chunks": True})  # type: ignore[union-attr]
        where = [rows.get(dim, slice(0, size)) for dim, size in zip(array.dims, array.shape, strict=True)]
        if array.ragged:
            target[where[0], : len(values)] = values[None]
            return
        if array.dims[0] != "layer":
            target[tuple(where)] = values
            return
        for layer in range(array.shape[0]):
            target[(slice(layer, layer + 1), *where[1:])] = values[layer : layer + 1]

    def object_key(self, path: str, index: tuple[int, ...]) -> str:
        """Key of an object below `data.zarr`, as the Zarr v3 default encoding names it."""
        return f"{path}/c/{'/'.join(map(str, index))}"

    def verify(self, progress: Callable[[Unit], None] = lambda unit: None) -> dict[int, list[str]]:
        """Reads every recorded object again: unit → what is wrong with it, one line an object. Empty if all is well."""
        wrong: dict[int, list[str]] = {}
        done = self.ledger.done()
        for unit in self.schema.grid:
            if unit.index not in done:
                continue
            if found := self._verify_unit(unit):
                wrong[unit.index] = found
            progress(unit)
        return wrong

    def _verify_unit(self, unit: Unit) -> list[str]:
        try:
            record = self.ledger.record(unit.index)
        except CorruptStore as error:
            return [str(error)]
        if record.get("fingerprint") != self.fingerprint:
            return [
                f"{self.ledger.path(unit.index)}: its fingerprint {record.get('fingerprint')} is not the store's "
                f"{self.fingerprint}"
            ]
        rows = self.schema_with_labels.rows(unit)
        due = {
            self.object_key(path, index) for path, array in self.schema.arrays.items() for index in array.objects(rows)
        }
        found = [f"{key}: not in the record of unit {unit.index}" for key in sorted(due - set(record["objects"]))]
        for key in sorted(due & set(record["objects"])):
            if said := _disagreement(self.path / key, record["objects"][key]):
                found.append(said)
        return found

    def sweep(self, before: float = math.inf) -> None:
        """Removes what killed writers left half-written, and touched last `before` a time (seconds of the epoch).

        Without `before` only when no run is writing.
        """
        for leftover in self.path.rglob("*.partial"):
            if _changed(leftover) < before:
                leftover.unlink(missing_ok=True)
        for leftover in self.ledger.folder.glob("*/.*.tmp"):
            if _changed(leftover) < before:
                leftover.unlink(missing_ok=True)
        for leftover in self.path.parent.glob(f".{DATA}.*"):
            if _changed(leftover) < before:
                shutil.rmtree(leftover, ignore_errors=True)

    def _root(self, mode: Any) -> Any:
        return zarr.open_group(str(self.path), mode=mode, zarr_format=3, use_consolidated=False)


class _Unread(LocalStore):
    """Writes objects as any store and has none to read: a shard that is not full is else merged with what is there."""

    async def get(self, key: str, *arguments: Any, **options: Any) -> Buffer | None:
        return None if "/c/" in key else await super().get(key, *arguments, **options)

    def get_sync(self, key: str, *arguments: Any, **options: Any) -> Buffer | None:
        return None if "/c/" in key else super().get_sync(key, *arguments, **options)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # swept by another run
        return math.inf


def mismatch(store: Store, fingerprint: str, provenance: Mapping[str, Any]) -> FingerprintMismatch:
    """The refusal of a store that another recipe made: both fingerprints, and what differs where provenance tells."""
    lines = differences(provenance["determines"], store.header.provenance["determines"])
    return FingerprintMismatch(
        f"{store.path.parent} was made by another recipe: its fingerprint is {store.fingerprint[:12]}, this recipe "
        f"gives {fingerprint[:12]}."
        + "".join(f"\n  {line}" for line in lines[:12])
        + f"\nRun into another folder, or delete {store.path.parent} to compute it anew"
    )


def _arrays_below(group: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found = [(prefix + name, array) for name, array in group.arrays()]
    for name, child in group.groups():
        found += _arrays_below(child, f"{prefix}{name}/")
    return found


def _lay_out(path: Path, header: Header) -> None:
    """Writes the metadata of all arrays, and the labels, which are small."""
    schema = header.schema
    root = zarr.create_group(str(path), zarr_format=3, attributes={"forebay": header.to_json()})
    for name, array in schema.arrays.items():
        _create_array(root, name, array, schema.compression)
    for name, (dims, values) in schema.labels.items():
        kept = "string" if values.dtype.kind in "OUT" else values.dtype
        label = root.create_array(
            name, shape=values.shape, dtype=kept, chunks=(max(1, min(len(values), 2**17)),), dimension_names=dims
        )
        label[...] = values.astype(object) if kept == "string" else values
    with warnings.catch_warnings():
        # Version 3 of Zarr does not specify consolidated metadata yet; readers that know it open faster, others ignore
        # it.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(root.store)
    for folder, _, files in os.walk(path):
        for file in files:
            with open(Path(folder) / file, "rb") as handle:
                os.fsync(handle.fileno())
        sync_folder(Path(folder))


def _create_array(root: Any, name: str, array: Array, compression: str) -> None:
    kept = format_of(array.dtype)
    root.create_array(
        name,
        shape=array.shape,
        dtype=kept.kept,
        chunks=array.chunks,
        shards=array.shards,
        dimension_names=array.dims,
        fill_value=kept.missing,
        compressors=_codecs(compression, kept.itemsize),
        attributes={"dtype": array.dtype},
    )


def _disagreement(path: Path, said: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path}: missing"
    if size != said["bytes"]:
        return f"{path}: {size:,} bytes, {said['bytes']:,} were recorded (truncated or overwritten)"
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return (
        None
        if digest == said["sha256"]
        else f"{path}: its bytes have changed since they were recorded (sha256 {digest[:12]})"
    )
