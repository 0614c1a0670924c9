"""One unit of work on its way to disk: pieces are gathered, then written as whole shards, then recorded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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
ARRAYS = 2
"""Arrays that are written at once, each by several objects."""
MERGE = {"sum": np.add, "max": np.maximum}
"""How statistics of pieces combine: by the last word of their name, as in `square_sum`, `abs_max`."""


class UnitWriter:
    """Gathers the pieces of one unit in memory and writes them as whole shards.

    Holds one buffer an array, as large as the unit's rows (a piece that has all of them is that buffer, and must not be
    changed afterwards), and the values of ragged arrays; while it writes compressed
    objects, or into an object store, up to eight objects besides. Nothing is on disk before `finish`; on any error no
    record exists.
    """

    def __init__(self, store: Store, unit: Unit) -> None:
        self.store, self.unit = store, unit
        self.rows = store.schema_with_labels.rows(unit)
        self._buffers: dict[str, NDArray[Any]] = {}
        self._filled: dict[str, NDArray[np.bool_]] = {}
        self._ragged: dict[str, list[NDArray[Any]]] = {}
        self._counted: dict[str, list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = {}
        self._statistics: dict[str, dict[str, NDArray[Any]]] = {}

    def put(self, piece: xr.DataTree) -> None:
        """Takes a labelled piece: nodes are groups, variables lie along `token` or `sequence` with an integer
        coordinate that says which, ascending; those of ragged arrays lie along `nonzero`, beside the `count[token]`
        that says whose they are. Pieces come in any order.

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
            self._filled[path] = np.zeros(own.stop - own.start, dtype=bool)
        rows, filled = _rows_of(path, variable, long), self._filled[path]
        start, stop = int(rows[0]) - own.start, int(rows[-1]) + 1 - own.start
        # A slice is copied at the speed of memory, and most pieces are one.
        at = slice(start, stop) if stop - start == len(rows) else rows - own.start
        expected = (*array.shape[:axis], len(rows), *array.shape[axis + 1 :])
        if start < 0 or stop > len(filled) or expected != variable.shape:
            raise SchemaError(
                f"{path}: a piece of shape {variable.shape} at {long} {rows[0]}…{rows[-1]} does not fit unit "
                f"{self.unit.index}, "
                f"which owns {long} {own.start}…{own.stop - 1} of an array of shape {array.shape}"
            )
        if (twice := filled[at]).any():
            raise SchemaError(f"{path}: {long} {rows[int(np.argmax(twice))]} came twice in unit {self.unit.index}")
        if len(rows) == len(filled):
            self._buffers[path] = variable.values
        else:
            self._buffer(path, array, axis)[(*(slice(None),) * axis, at)] = variable.values
        filled[at] = True
        group, _, name = path.rpartition("/")
        if name == COUNT:
            self._counted.setdefault(group, []).append((rows, variable.values.astype(np.int64)))

    def _buffer(self, path: str, array: Array, axis: int) -> NDArray[Any]:
        if path not in self._buffers:
            shape = (*array.shape[:axis], len(self._filled[path]), *array.shape[axis + 1 :])
            self._buffers[path] = np.empty(shape, dtype=format_of(array.dtype).kept)
        return self._buffers[path]

    def finish(self, timing: Mapping[str, float]) -> Record:
        """Writes every object of the unit, makes them durable, and puts the unit's record, which it gives back.

        SchemaError if rows are missing; DiskFull names what did not fit.
        """
        self._check_complete()
        started = time.perf_counter()
        data, arrays = self.store.path, self.store.schema.arrays
        due = [path for path, array in arrays.items() if array.ragged or path in self._buffers]
        objects: dict[str, dict[str, Any]] = {}
        try:
            with ThreadPoolExecutor(ARRAYS, "arrays") as pool:
                for found in pool.map(lambda path: self.store.write_rows(path, self.rows, self._values(path)), due):
                    objects |= found
                list(pool.map(sync_folder, {(data / key).parent for key in objects}))
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
        ragged = {path: self._values(path) for path, array in self.store.schema.arrays.items() if array.ragged}
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
        """SchemaError unless every piece has as many values as its counts say, and there is room for all of them."""
        due = [int(counts.sum()) for _, counts in self._counted.get(path.rpartition("/")[0], ())]
        came = [len(values) for values in self._ragged.get(path, ())]
        found = sum(came)
        if due != came:
            raise SchemaError(
                f"{path}: unit {self.unit.index} has {found:,} values; its counts add up to {sum(due):,}"
                + (", piece by piece to others" if found == sum(due) else "")
            )
        if found > array.shape[1]:
            raise SchemaError(
                f"{path}: unit {self.unit.index} has {found:,} nonzeros, {found / len(self.unit):,.0f} a token; there "
                f"is room for {array.shape[1]:,}. Raise the step's `most_active`, or look whether this is sparse at all"
            )

    def _values(self, path: str) -> NDArray[Any]:
        """The unit's values; of a ragged array end to end in the order of tokens, and where it has none a single zero,
        for every unit has its object.
        """
        if path in self._buffers:
            return self._buffers[path]
        if not any(map(len, self._ragged.get(path, ()))):
            return np.zeros(1, dtype=format_of(self.store.schema.arrays[path].dtype).kept)
        values = np.concatenate(self._ragged[path])
        rows, counts = (np.concatenate(column) for column in zip(*self._counted[path.rpartition("/")[0]], strict=True))
        if (np.diff(rows) > 0).all():
            return values
        order, begins = np.argsort(rows), np.cumsum(counts) - counts
        counts = counts[order]
        return values[np.repeat(begins[order] - (np.cumsum(counts) - counts), counts) + np.arange(len(values))]

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


def _rows_of(path: str, variable: xr.DataArray, long: str) -> NDArray[np.int64]:
    """The rows of a piece along its long axis. SchemaError if it does not say which, one by one."""
    if long not in variable.indexes:
        raise SchemaError(f"{path}: the piece does not say which rows it holds: give it a coordinate on {long}")
    labels = variable.indexes[long].to_numpy()
    if not len(labels) or labels.dtype.kind not in "iu" or (np.diff(labels) <= 0).any():
        raise SchemaError(
            f"{path}: a piece holds ascending rows, at least one; its coordinate on {long} is {labels[:6]}"
            + ("…" if len(labels) > 6 else "")
        )
    return np.asarray(labels, dtype=np.int64)
