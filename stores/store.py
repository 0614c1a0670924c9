"""Labelled arrays at rest with a ledger: create, open, read, write rows, verify.

A store is the folder of a step: `data.zarr`, which any Zarr v3 reader opens, and beside it the records of the units
that are done. Nothing that one unit writes is touched by another, so there are no locks; see docs/store-format.md.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .digests import disagreement, is_entry
from .errors import FULL, CorruptStore, DiskFull, FingerprintMismatch, IncompleteStore
from .fingerprint import canonical_json, differences
from .grid import Unit
from .hierarchy import Known, layout_of, open_group
from .hierarchy import lay_out as lay_out
from .html import html_table
from .ledger import Ledger, Record, read_json
from .object_paths import ObjectPath
from .places import Place, place, put_new, sync_folder, write_atomic
from .records import record_faults
from .schema import DATA, GROWING, Header, Schema, holds_store, read_header
from .shards import cut, put_object
from .untrusted import check_array, check_label, check_labels, check_schema, label_paths, require_no_links

VERIFIERS = 4
"""Threads that hash objects, without Python's lock."""
WRITERS = 4
"""Objects of an array that are written at once: while one is on its way to the disk, others are hashed."""
PUTTERS = 8
"""Requests at a time while a store is laid out in an object store."""
CLAIM = "claim.json"
"""Beside a store in an object store: which recipe's it is, from before its first byte."""
AT_ONCE = 1024
"""Units that are given to them at a time, so that a million need no memory."""


@dataclass(frozen=True)
class Store:
    """One step's data and ledger. Picklable: a path and a header, never an open handle."""

    path: Place
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

    def _repr_html_(self) -> str:
        facts = {
            "folder": self.path.parent,
            "kind": self.schema.kind,
            "tokens": f"{self.schema.n_token:,}",
            "units recorded": f"{len(self.done()):,} of {len(self.schema.grid):,}",
            "compression": self.schema.compression,
            "fingerprint": self.fingerprint[:12],
        }
        rows = [(path, ", ".join(one.dims), list(one.shape), one.dtype) for path, one in self.schema.arrays.items()]
        return html_table("Store", facts, ("array", "dimensions", "shape", "dtype"), rows)

    @classmethod
    def open(cls, folder: str | os.PathLike[str] | ObjectPath) -> Store:
        """The store of a step's folder, or of its address in an object store.

        Reads one small file. StoreNotFound, CorruptStore or SchemaError say what is wrong; IncompleteStore that the
        store is being made longer.
        """
        path = place(folder) / DATA
        header = read_header(path)
        require_settled(path.parent)  # after the header, so that none that was read amid a growth is given
        return cls(path, header)

    @classmethod
    def create(cls, folder: Place, schema: Schema, fingerprint: str, provenance: Mapping[str, Any]) -> Store:
        """Makes an empty store, or joins the one that is there. Any number of processes may do so at once.

        `provenance["determines"]` is everything that determines the values, of which `fingerprint` is the hash.

        FingerprintMismatch names what differs if the store there was made by another recipe; CorruptStore if there are
        records but no data; DiskFull; StorageError.
        """
        header = Header(schema, fingerprint, provenance)
        path = folder / DATA
        check_schema(schema, path)
        if isinstance(folder, Path):
            require_no_links(folder.parent, folder / DATA)
        recorded = Ledger(folder).done()  # before the look at the data, which are there before any record
        if not holds_store(folder):
            if recorded:
                raise CorruptStore(
                    f"{folder} has records of {len(recorded)} units, but {path} with their data is gone. Restore it, "
                    f"or delete {folder} to compute it anew"
                )
            if isinstance(folder, Path):
                _rename_into_place(folder, header)
            else:
                _put_in_place(folder, header)
        store = cls.open(folder)
        if store.fingerprint != fingerprint:
            raise mismatch(store, fingerprint, provenance)
        return store

    @cached_property
    def labels(self) -> dict[str, tuple[tuple[str, ...], NDArray[Any]]]:
        """Where sequences and documents start, and which layers there are: path → (dims, values), in memory."""
        found = {}
        root = open_group(self.path, self._known)
        for path in label_paths(self.schema):
            if (self.path / path / "zarr.json").is_file():
                check_label(self.path / path / "zarr.json")
                node: Any = root[path]
                values = self._label(path, node)
                # numpy's own strings cannot be masked or joined with anything else, Python's can
                values = values.astype(object) if values.dtype.kind == "T" else values
                found[path] = (tuple(node.metadata.dimension_names or ()), values)
        self.require_current()
        check_labels(found, self.schema, self.path)
        return found

    def _label(self, path: str, node: Any) -> NDArray[Any]:
        try:
            return np.asarray(node[...])
        except (ValueError, OSError, RuntimeError) as error:
            self.require_current()
            raise CorruptStore(
                f"{self.path / path} cannot be read: {error}. What it was lies in the other stores of the run, under "
                "the same name, unless it is of layers"
            ) from error

    def require_current(self) -> None:
        """IncompleteStore if the store has grown since it was opened, or is growing: this header is no longer its own.

        Call it after what must belong to the header was read or written. Reads one small file.
        """
        if isinstance(self.path, ObjectPath):  # where no store grows
            return
        require_settled(self.path.parent)
        if read_header(self.path).fingerprint != self.fingerprint:
            raise IncompleteStore(f"{self.path.parent} has grown, or was made anew, since it was opened: open it again")

    @cached_property
    def schema_with_labels(self) -> Schema:
        return replace(self.schema, labels=self.labels)

    def __reduce__(self) -> tuple[Any, ...]:
        """Labels stay behind: they may be large, and are read again where they are asked for."""
        return Store, (self.path, self.header)

    def done(self) -> set[int]:
        """Units with a record. One of a unit that does not exist, left in the folder by mistake, does not count."""
        return self.schema.grid.known(self.ledger.done())

    def todo(self) -> list[Unit]:
        """Units without a record, in order."""
        return self.schema.grid.left(self.ledger.done())

    @property
    def complete(self) -> bool:
        return len(self.done()) == len(self.schema.grid)

    def array(self, path: str) -> Any:
        """The open Zarr array at a path of the store, read-only. A shard that is missing reads as fill values."""
        self.check_array(path)
        return open_group(self.path, self._known)[path]

    def check_array(self, path: str) -> None:
        """Holds the metadata of an array against the header; those of an object store once, for they are not read
        again.
        """
        if isinstance(self.path, ObjectPath) and path in self._checked:
            return
        check_array(self.path / path / "zarr.json", self.schema.arrays[path], self.schema.compression)
        self._checked.add(path)

    @cached_property
    def _known(self) -> Known:
        """Metadata in an object store, of which this process has read some."""
        return {}

    @cached_property
    def _checked(self) -> set[str]:
        """Arrays whose metadata agreed with the header."""
        return set()

    def write_rows(self, path: str, rows: Mapping[str, slice], values: NDArray[Any]) -> dict[str, dict[str, Any]]:
        """Writes whole shards: `values` are the `rows` of the array, in their kept form; of a ragged array the values
        that a unit has, at least one. Gives what a record says of each object, by its key, of what was handed to the
        system, and on this machine made durable. Folders' names are not durable yet.

        An object that is there is replaced in one go and never looked at, so that a torn one does no harm, and a reader
        or another writer of the same unit finds a whole one at any time. A few objects are written at once; see
        `put_object` for what each of them holds in memory.
        """
        array = self.schema.arrays[path]
        self.check_array(path)
        parts = cut(array, rows, values[None] if array.ragged else values)
        due = {self.object_key(path, index): part for index, part in parts}
        if isinstance(self.path, Path):
            require_no_links(self.path.parent, *{(self.path / key).parent for key in due})
        with ThreadPoolExecutor(WRITERS, "objects") as pool:
            said = pool.map(lambda key: put_object(self.path / key, due[key], array, self.schema.compression), due)
            return dict(zip(due, said, strict=True))

    def object_key(self, path: str, index: tuple[int, ...]) -> str:
        """Key of an object below `data.zarr`, as the Zarr v3 default encoding names it."""
        return f"{path}/c/{'/'.join(map(str, index))}"

    def require_complete(self) -> None:
        """IncompleteStore unless every unit is recorded: it says how many are, and how to look at them."""
        done, n_unit = len(self.done()), len(self.schema.grid)
        if done < n_unit:
            raise IncompleteStore(
                f"{self.path.parent} is incomplete: {done} of {n_unit} units are recorded. Run its recipe again to "
                "finish it, or look at what is there with open_run or open_store and partial=True, which adds the "
                "coordinate `done` on `token`"
            )

    def objects_of(self, unit: Unit) -> set[str]:
        """Keys below `data.zarr` of every object that a unit owns."""
        rows, arrays = self.schema_with_labels.rows(unit), self.schema.arrays
        return {self.object_key(path, index) for path, array in arrays.items() for index in array.objects(rows)}

    def verify(self, progress: Callable[[Unit], None] = lambda unit: None) -> dict[int, list[str]]:
        """Reads every recorded object again: unit → what is wrong with it, one line an object. Empty if all is well.

        A record of a unit that does not exist is wrong as well.
        """
        recorded, grid = sorted(self.ledger.done()), self.schema.grid
        units = [grid[index] for index in recorded if index < len(grid)]
        wrong = {
            index: [f"{self.ledger.path(index)}: there are {len(grid)} units, numbered from 0"]
            for index in recorded[len(units) :]
        }
        self.schema_with_labels  # noqa: B018  read once, before threads ask for it
        with ThreadPoolExecutor(VERIFIERS, "verify") as pool:
            for at in range(0, len(units), AT_ONCE):
                some = units[at : at + AT_ONCE]
                for unit, found in zip(some, pool.map(self._verify_unit, some), strict=True):
                    if found:
                        wrong[unit.index] = found
                    progress(unit)
        return dict(sorted(wrong.items()))

    def _verify_unit(self, unit: Unit) -> list[str]:
        try:
            record = self.ledger.record(unit.index)
        except FileNotFoundError:  # dropped since
            return []
        except CorruptStore as error:
            return [str(error)]
        faults = self.record_faults(unit, record)
        if not isinstance(record.get("objects"), dict):
            return faults
        whole = [key for key in record["objects"] if key in self.objects_of(unit) and is_entry(record["objects"][key])]
        wrong = {self.path / key: disagreement(self.path / key, record["objects"][key]) for key in sorted(whole)}
        return faults + [f"{path}: {what}" for path, what in wrong.items() if what]

    def record_faults(self, unit: Unit, record: Record) -> list[str]:
        """What is wrong with a unit's record in itself, one line a fault; see `records`. Reads no object."""
        where, said = self.ledger.path(unit.index), record.get("fingerprint")
        if not self.header.accepts(said, unit.index):
            return [f"{where}: its fingerprint {said} is not the store's {self.fingerprint}"]
        found = record_faults(record, unit, self.schema_with_labels.rows(unit), self.objects_of(unit))
        return [f"{where}: {line}" for line in found]

    def sweep(self, before: float = math.inf) -> None:
        """Removes what killed writers left half-written, and touched last `before` a time (seconds of the epoch).

        Without `before` only when no run is writing. In an object store nothing is ever half-written.
        """
        if isinstance(self.path, ObjectPath):
            return
        require_no_links(self.path.parent, self.path)
        for leftover in self.path.rglob("*.partial"):
            if _changed(leftover) < before:
                leftover.unlink(missing_ok=True)
        for leftover in self.path.parent.glob("*/.*.tmp"):
            if _changed(leftover) < before and not leftover.parent.is_symlink():
                leftover.unlink(missing_ok=True)
        for leftover in self.path.parent.glob(f".{DATA}.*"):
            if _changed(leftover) < before:
                shutil.rmtree(leftover, ignore_errors=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # swept by another run
        return math.inf


def require_settled(folder: Place) -> None:
    """IncompleteStore while the store of a step is made longer, and after that was killed. In object stores none is."""
    if isinstance(folder, Path) and (folder / GROWING).exists():
        raise IncompleteStore(
            f"{folder} is being made longer, or was when that was killed ({GROWING} lies in it). Wait a moment, or "
            f"finish it with `forebay append {folder.parent}`"
        )


def mismatch(store: Store, fingerprint: str, provenance: Mapping[str, Any]) -> FingerprintMismatch:
    """The refusal of a store that another recipe made: both fingerprints, and what differs where provenance tells."""
    lines = differences(provenance["determines"], store.header.provenance["determines"])
    return FingerprintMismatch(
        f"{store.path.parent} was made by another recipe: its fingerprint is {store.fingerprint[:12]}, this recipe "
        f"gives {fingerprint[:12]}."
        + "".join(f"\n  {line}" for line in lines[:12])
        + f"\nRun into another folder, or delete {store.path.parent} to compute it anew"
    )


def _rename_into_place(folder: Path, header: Header) -> None:
    """Lays a store out aside and renames it into place, unless another process has done so meanwhile."""
    path, aside = folder / DATA, folder / f".{DATA}.{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lay_out(aside, header)
        os.rename(aside, path)
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(f"no space to make {path} ({error.strerror}). Free some space and run again") from error
        # Another process may have put the store, and even finished it and swept `aside` away.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not path.exists():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(folder)


def _put_in_place(folder: ObjectPath, header: Header) -> None:
    """Lays a store out in an object store, where nothing can be renamed: first a claim that names the fingerprint, then
    what is equal whoever puts it, and last the root's metadata, with which the store is there.
    """
    path, claim = folder / DATA, folder / CLAIM
    if not put_new(claim, canonical_json(header.to_json()).encode()):
        said = read_json(claim)
        if said.get("fingerprint") != header.fingerprint:
            if not isinstance(said.get("fingerprint"), str) or "determines" not in (said.get("provenance") or {}):
                raise CorruptStore(f"{claim} says of no store which it is. Delete {folder} to compute it anew")
            there = Store(path, Header(header.schema, said["fingerprint"], said["provenance"]))
            raise mismatch(there, header.fingerprint, header.provenance)
    objects = layout_of(header)
    root = objects.pop("zarr.json")
    with ThreadPoolExecutor(PUTTERS, "put") as pool:
        list(pool.map(lambda key: write_atomic(path / key, objects[key]), objects))
    put_new(path / "zarr.json", root)
