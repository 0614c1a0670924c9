"""One unit of work on its way to disk: pieces are gathered, then written as whole shards, then recorded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import format_of
from .errors import FULL, DiskFull, IncompleteStore, SchemaError
from .fingerprint import versions, whereabouts
from .grid import Unit
from .ledger import Record, sync_folder
from .places import free_space
from .schema import RAGGED, Array, check_block
from .store import Store

if TYPE_CHECKING:
    import xarray as xr

COUNT = "count"
"""Of a group with ragged arrays: how many values each token has, [token]."""
MERGE = {"sum": np.add, "max": np.maximum}
"""How statistics of pieces combine: by the last word of their name, as in `square_sum`, `abs_max`."""


class UnitWriter:
    """Gathers the pieces of one unit in memory and writes them as whole shards.

    Holds one buffer an array, as large as the unit's rows, and the values of ragged arrays. Nothing is on disk before
    `finish`; on any error no record exists.
    """

    def __init__(self, store: Store, unit: Unit) -> None:
        self.store, self.unit = store, unit
        self.rows = store.schema_with_labels.rows(unit)
        self._buffers: dict[str, NDArray[Any]] = {}
        self._filled: dict[str, NDArray[np.bool_]] = {}
        self._ragged: dict[str, list[NDArray[Any]]] = {}
        self._statistics: dict[str, dict[str, NDArray[Any]]] = {}

    def put(self, piece: xr.DataTree) -> None:
        """Takes a labelled piece: nodes are groups, variables lie along `token` or `sequence` with an integer
        coordinate that says which; those of ragged arrays lie along `nonzero`, beside the `count[token]` that says
        whose they are, and their pieces come in the order of tokens.

        Statistics travel in a node's attribute `statistics`: name → one number a layer, or a vector. SchemaError if a
        piece does not fit.
        """
        for node in piece.subtree:
            for name, variable in node.data_vars.items():
                self._put_array(f"{node.path}/{name}".strip("/"), variable)
            for name, values in node.attrs.get("statistics", {}).items():
                known = self._statistics.setdefault(node.path.strip("/"), {})
                merge = MERGE[name.rsplit("_", 1)[-1]]
                known[name] = merge(known[name], values) if name in known else np.asarray(values)

    def _put_array(self, path: str, variable: xr.DataArray) -> None:
        dims = tuple(str(dim) for dim in variable.dims)
        if dims == RAGGED[1:]:
            check_block(self.store.schema, path, RAGGED, variable.dtype)
            self._ragged.setdefault(path, []).append(variable.values)
            return
        array = check_block(self.store.schema, path, dims, variable.dtype)
        long = "token" if "token" in dims else "sequence"
        axis, own = dims.index(long), self.rows[long]
        if path not in self._buffers:
            shape = tuple(
                own.stop - own.start if dim == long else size for dim, size in zip(dims, array.shape, strict=True)
            )
            self._buffers[path] = np.empty(shape, dtype=variable.dtype)
            self._filled[path] = np.zeros(own.stop - own.start, dtype=bool)
        buffer = self._buffers[path]
        first, beyond = _rows_of(path, variable, long)
        if path.rpartition("/")[2] == COUNT and not self._filled[path][: first - own.start].all():
            raise SchemaError(f"{path}: pieces of ragged rows come in order; {long} {first} came before those below it")
        start, stop = first - own.start, beyond - own.start
        where = (*(slice(None),) * axis, slice(start, stop))
        if start < 0 or stop > len(self._filled[path]) or buffer[where].shape != variable.shape:
            raise SchemaError(
                f"{path}: a piece of shape {variable.shape} at {long} {first}…{beyond - 1} does not fit unit "
                f"{self.unit.index}, "
                f"which owns {long} {own.start}…{own.stop - 1} of an array of shape {array.shape}"
            )
        if self._filled[path][start:stop].any():
            raise SchemaError(f"{path}: {long} {first}…{beyond - 1} came twice in unit {self.unit.index}")
        buffer[where] = variable.values
        self._filled[path][start:stop] = True

    def finish(self, timing: Mapping[str, float]) -> Record:
        """Writes every object of the unit, makes them durable, and puts the unit's record, which it gives back.

        SchemaError if rows are missing; DiskFull names what did not fit.
        """
        self._check_complete()
        started = time.perf_counter()
        data = self.store.path
        objects: dict[str, dict[str, Any]] = {}
        try:
            for path, array in self.store.schema.arrays.items():
                if array.ragged:
                    objects |= self.store.write_rows(path, self.rows, self._ragged_values(path))
                elif path in self._buffers:
                    objects |= self.store.write_rows(path, self.rows, self._buffers[path])
            for folder in {(data / key).parent for key in objects}:
                sync_folder(folder)
            record = self._record(objects, {**timing, "write": time.perf_counter() - started})
            self.store.ledger.complete(self.unit.index, record)
            self._require_current()
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise self._disk_full(error) from error
        return record

    def gathered(self) -> dict[str, NDArray[Any]]:
        """The unit's values in their kept form: `[…]` as the array has them, of a ragged one those that it has, end to
        end. An array of which the unit owns no row is left out. SchemaError if rows are missing.
        """
        self._check_complete()
        ragged = {path: self._ragged_values(path) for path, array in self.store.schema.arrays.items() if array.ragged}
        return self._buffers | ragged

    def _require_current(self) -> None:
        """Takes the record back if the store has grown meanwhile: what was computed is of a corpus that was shorter."""
        try:
            self.store.require_current()
        except IncompleteStore:
            self.store.ledger.drop(self.unit.index)
            raise

    def _check_complete(self) -> None:
        for path, array in self.store.schema.arrays.items():
            if array.ragged:
                self._check_ragged(path, array)
                continue
            long = "token" if "token" in array.dims else "sequence"
            own = self.rows[long]
            filled = self._filled.get(path, np.zeros(own.stop - own.start, dtype=bool))
            if not filled.all():
                first = own.start + int(np.argmin(filled))
                raise SchemaError(
                    f"{path}: unit {self.unit.index} lacks {int((~filled).sum())} rows, the first is {long} {first}"
                )

    def _check_ragged(self, path: str, array: Array) -> None:
        """SchemaError unless there are as many values as the group's counts say, and room for them."""
        counts = self._buffers.get(f"{path.rpartition('/')[0]}/{COUNT}", np.zeros(0))
        due, found = int(counts.sum()), sum(map(len, self._ragged.get(path, ())))
        if due != found:
            raise SchemaError(f"{path}: unit {self.unit.index} has {found:,} values; its counts add up to {due:,}")
        if found > array.shape[1]:
            raise SchemaError(
                f"{path}: unit {self.unit.index} has {found:,} nonzeros, {found / len(self.unit):,.0f} a token; there "
                f"is room for {array.shape[1]:,}. Raise the step's `most_active`, or look whether this is sparse at all"
            )

    def _ragged_values(self, path: str) -> NDArray[Any]:
        """The unit's values end to end; where it has none a single zero, for every unit has its object."""
        pieces = [piece for piece in self._ragged.get(path, ()) if len(piece)]
        kept = format_of(self.store.schema.arrays[path].dtype).kept
        return np.concatenate(pieces) if pieces else np.zeros(1, dtype=kept)

    def _record(self, objects: dict[str, dict[str, Any]], timing: Mapping[str, float]) -> Record:
        statistics = {
            group: {name: v.tolist() for name, v in values.items()} for group, values in self._statistics.items()
        }
        return {
            "unit": self.unit.index,
            "fingerprint": self.store.fingerprint,
            "rows": {dim: [self.rows[dim].start, self.rows[dim].stop] for dim in ("token", "sequence")},
            "objects": objects,
            "bytes": sum(entry["bytes"] for entry in objects.values()),
            "statistics": statistics,
            "seconds": {name: round(value, 6) for name, value in timing.items()},
            "finished": time.time(),
            "versions": versions(),
            **whereabouts(),
        }

    def _disk_full(self, error: OSError) -> DiskFull:
        free = free_space(self.store.path)
        need = sum(buffer.nbytes for buffer in self._buffers.values())
        need += sum(piece.nbytes for pieces in self._ragged.values() for piece in pieces)
        return DiskFull(
            f"no space for unit {self.unit.index} of {self.store.path}: it takes {need:,} bytes, "
            f"{free or 0:,} are free "
            f"({error.strerror}). {len(self.store.ledger.done())} units are recorded and safe. Free some space and "
            "run again"
        )


def _rows_of(path: str, variable: xr.DataArray, long: str) -> tuple[int, int]:
    """First and last row plus one of a piece along its long axis. SchemaError if it does not say which, one by one."""
    if long not in variable.indexes:
        raise SchemaError(f"{path}: the piece does not say which rows it holds: give it a coordinate on {long}")
    labels = variable.indexes[long].to_numpy()
    first = int(labels[0]) if len(labels) else 0
    if not len(labels) or not np.array_equal(labels, np.arange(first, first + len(labels))):
        raise SchemaError(
            f"{path}: a piece holds consecutive rows, at least one; its coordinate on {long} is {labels[:6]}"
            + ("…" if len(labels) > 6 else "")
        )
    return first, first + len(labels)
