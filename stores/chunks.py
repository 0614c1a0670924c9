"""Values of an array straight from its objects, in threads: through Zarr they take longer than what is read.

An object is its chunks in any order, each with its crc32c behind it, and at the end their offsets and lengths.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from crc32c import crc32c
from numcodecs.blosc import decompress
from numpy.typing import NDArray

from .dtypes import format_of
from .errors import CorruptStore, StorageError
from .object_paths import ObjectPath
from .schema import Array
from .shards import chunks_in
from .store import Store
from .threads import N_CORE, at_once

REPAIR = (
    "`forebay verify` names the damaged objects, `forebay repair` drops their units, and running the recipe again "
    "computes them anew"
)
_TASK_BYTES = 2**21
"""What a thread reads of a file at least."""
_TABLES = 256
"""Objects whose tables of chunks are remembered."""
_Readable = BinaryIO | ObjectPath
_Ints = NDArray[np.int64]
_Where = tuple[slice | _Ints, ...]


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of an array's objects, each read whole and its checksum compared. Picklable; may be shared among
    threads.
    """

    store: Store
    path: str
    repair: str = REPAIR
    _tables: dict[tuple[int, ...], NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def read(self, index: tuple[int, ...], within: int, into: NDArray[Any]) -> None:
        """Puts chunk number `within` of the object `index` into an array of its size, in its kept form. CorruptStore,
        with the advice `repair`, if it is not what was written.
        """
        with _object(self.store, self.path, index, self.repair) as file:
            table = self._tables.get(index)
            if table is None:
                table = _table(file, _n_chunk(self.store.schema.arrays[self.path]))
                if len(self._tables) >= _TABLES:  # other threads keep the tables that they hold
                    self._tables.clear()
                self._tables[index] = table
            if not _read_chunk(file, table, within, self.store.schema.compression, into):
                raise ValueError(f"chunk {within} was never written")

    def __reduce__(self) -> tuple[Any, ...]:
        """What was remembered stays behind."""
        return Chunks, (self.store, self.path, self.repair)


@dataclass(frozen=True, eq=False)
class Spans:
    """An array of a complete store, read by spans of its long axis: the first, or of a ragged array the second. Its
    chunks are whole along all axes behind; the last `keep` of them that were read are kept in memory. Picklable; may be
    shared among threads.
    """

    store: Store
    path: str
    repair: str = REPAIR
    keep: int = 0
    _chunks: dict[tuple[int, int], NDArray[Any]] = field(default_factory=dict, repr=False)

    @cached_property
    def _objects(self) -> Chunks:
        return Chunks(self.store, self.path, self.repair)

    @property
    def array(self) -> Array:
        return self.store.schema.arrays[self.path]

    def read(self, start: int, stop: int, unit: int = 0) -> NDArray[Any]:
        """Rows [start, stop) of the long axis, decoded; of a ragged array those of a unit. CorruptStore if they are not
        what was written, with the advice `repair`.
        """
        array = self.array
        axis = 1 if array.ragged else 0
        rows, kept = array.chunks[axis], format_of(array.dtype)
        if not self.keep:
            lead, behind = (slice(unit, unit + 1),) * axis, (slice(None),) * (len(array.dims) - axis - 1)
            found = read_outer(self.store, self.path, (*lead, slice(start, stop), *behind), repair=self.repair)
            return found[0] if axis else found
        found = np.empty((stop - start, *array.shape[axis + 1 :]), kept.kept)
        for chunk in range(start // rows, -(-stop // rows) if start < stop else 0):
            first = chunk * rows
            low, high = max(first, start), min(first + rows, stop)
            found[low - start : high - start] = self._whole(unit, chunk)[low - first : high - first]
        return kept.decode(found)

    def _whole(self, unit: int, chunk: int) -> NDArray[Any]:
        known = self._chunks.get((unit, chunk))
        if known is None:
            array = self.array
            axis = 1 if array.ragged else 0
            known = np.empty((array.chunks[axis], *array.shape[axis + 1 :]), format_of(array.dtype).kept)
            shard, within = divmod(chunk, array.shards[axis] // array.chunks[axis])
            index = (*(unit,) * axis, shard, *(0,) * (len(array.dims) - axis - 1))
            self._objects.read(index, within, known)
            self._chunks[unit, chunk] = known
            if len(self._chunks) > self.keep:
                self._chunks.pop(next(iter(self._chunks)), None)
        return known

    def __reduce__(self) -> tuple[Any, ...]:
        """What was remembered stays behind."""
        return Spans, (self.store, self.path, self.repair, self.keep)


# ── values at some rows of every dimension ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Part:
    """What is wanted of one chunk: its number in its object, which of its cells, and where in the result they go."""

    within: int
    cells: _Where
    target: _Where


def read_outer(
    store: Store,
    path: str,
    key: Sequence[int | slice | _Ints],
    complete: bool = True,
    repair: str = REPAIR,
    decoded: bool = True,
) -> NDArray[Any]:
    """Values of an array at `key`, `decoded` or in their kept form: an integer, slice or array of integers a dimension,
    each independent of the others. Every chunk that holds any is read once, whole, and its checksum compared; the
    result is all that is held, and in each of a few threads a chunk, or of an object store an object.

    Of a `complete` store CorruptStore, with the advice `repair`, if anything is missing or not what was written; of
    another what is missing reads as the dtype's fill value. IndexError.
    """
    array = store.schema.arrays[path]
    kept = format_of(array.dtype)
    axes = [_axis(*one) for one in zip(key, array.shape, array.chunks, strict=True)]
    out = np.empty([length for length, _ in axes], kept.read if decoded else kept.kept)
    wanted = _parts(array, [pieces for _, pieces in axes])
    read = _Read(store, path, complete, repair, out)
    share = -(-sum(map(len, wanted.values())) // N_CORE)
    at_once(read.some, [(index, some) for index, parts in wanted.items() for some in read.tasks(parts, share)])
    return out[tuple(0 if isinstance(one, int | np.integer) else slice(None) for one in key)]


def _axis(key: Any, size: int, chunk: int) -> tuple[int, list[tuple[int, Any, Any]]]:
    """How many rows of a dimension are wanted; and of each chunk that holds any its number, which of its rows, and
    their places among those that are wanted.
    """
    if isinstance(key, int | np.integer):
        if not -size <= key < size:
            raise IndexError(f"row {key} of a dimension of {size}")
        key = slice(int(key) % size, int(key) % size + 1)
    if isinstance(key, slice):
        start, stop, step = key.indices(size)
        if step == 1:
            pieces = []
            for n in range(start // chunk, -(-stop // chunk) if start < stop else 0):
                low, high = max(start, n * chunk), min(stop, (n + 1) * chunk)
                pieces.append((n, slice(low - n * chunk, high - n * chunk), slice(low - start, high - start)))
            return max(0, stop - start), pieces
        key = np.arange(start, stop, step)
    rows = np.asarray(key, np.int64)
    if len(rows) and not -size <= rows.min() <= rows.max() < size:
        raise IndexError(f"rows {rows.min()} to {rows.max()} of a dimension of {size}")
    rows = np.where(rows < 0, rows + size, rows)
    order = np.argsort(rows // chunk, kind="stable")
    numbers, first = np.unique(rows[order] // chunk, return_index=True)
    return len(rows), [
        (n, rows[own] - n * chunk, own) for n, own in zip(numbers.tolist(), np.split(order, first)[1:], strict=True)
    ]


def _parts(array: Array, axes: Sequence[Sequence[tuple[int, Any, Any]]]) -> dict[tuple[int, ...], list[_Part]]:
    """What is wanted of every object, by its index."""
    found: dict[tuple[int, ...], list[_Part]] = {}
    grid = chunks_in(array)
    for pieces in itertools.product(*axes):
        places = [divmod(n, size) for (n, _, _), size in zip(pieces, grid, strict=True)]
        within = 0
        for (_, at), size in zip(places, grid, strict=True):
            within = within * size + at
        part = _Part(within, _outer([cells for _, cells, _ in pieces]), _outer([target for _, _, target in pieces]))
        found.setdefault(tuple(n for n, _ in places), []).append(part)
    return found


def _outer(rows: Sequence[slice | _Ints]) -> _Where:
    """What numpy takes for rows of each dimension, independent of the others."""
    if sum(isinstance(one, np.ndarray) for one in rows) < 2:
        return tuple(rows)
    return np.ix_(*(np.arange(one.start, one.stop) if isinstance(one, slice) else one for one in rows))


@dataclass(frozen=True, slots=True)
class _Read:
    """One read of an array, in which threads fill `out`."""

    store: Store
    path: str
    complete: bool
    repair: str
    out: NDArray[Any]

    @property
    def array(self) -> Array:
        return self.store.schema.arrays[self.path]

    def tasks(self, parts: list[_Part], share: int) -> Iterator[list[_Part]]:
        """Those of one object, a thread's `share` at a time; of an object store all together, for each would ask for
        the table.
        """
        size = max(share, 1, _TASK_BYTES // (math.prod(self.array.chunks) * self.out.itemsize))
        size = size if isinstance(self.store.path, Path) else len(parts)
        return (parts[at : at + size] for at in range(0, len(parts), size))

    def some(self, index: tuple[int, ...], parts: Sequence[_Part]) -> None:
        """Puts some of what is wanted of an object into the result."""
        array, compression = self.array, self.store.schema.compression
        cells = np.empty(array.chunks, format_of(array.dtype).kept)  # whose pages are made where they are used
        whole = len(parts) == self._n_held(index)
        try:
            with _object(self.store, self.path, index, self.repair, self.complete, whole) as file:
                table = _table(file, _n_chunk(array))
                for part in parts:
                    target = self._direct(part)
                    written = _read_chunk(file, table, part.within, compression, cells if target is None else target)
                    if not written and self.complete:
                        raise ValueError(f"chunk {part.within} was never written")
                    if not written:
                        self._leave_out(part)
                    elif target is None:
                        self._put(part, cells)
        except _Absent:
            for part in parts:
                self._leave_out(part)

    def _n_held(self, index: tuple[int, ...]) -> int:
        """Chunks of an object that lie within the array."""
        each = zip(index, self.array.shape, self.array.shards, self.array.chunks, strict=True)
        return math.prod(-(-min(shard, size - n * shard) // chunk) for n, size, shard, chunk in each)

    def _direct(self, part: _Part) -> NDArray[Any] | None:
        """Where a chunk lies in the result just as in its object, if it does."""
        if self.out.dtype != format_of(self.array.dtype).kept or not all(isinstance(one, slice) for one in part.target):
            return None
        target = self.out[part.target]
        return target if target.shape == self.array.chunks and target.flags.c_contiguous else None

    def _put(self, part: _Part, cells: NDArray[Any]) -> None:
        if all(isinstance(one, slice) for one in part.target):
            decode_into(cells[part.cells], self.array.dtype, self.out[part.target])
        else:
            self.out[part.target] = self._as_asked(cells[part.cells])

    def _leave_out(self, part: _Part) -> None:
        kept = format_of(self.array.dtype)
        self.out[part.target] = self._as_asked(np.full(1, kept.missing, kept.kept))[0]

    def _as_asked(self, values: NDArray[Any]) -> NDArray[Any]:
        kept = format_of(self.array.dtype)
        return values if self.out.dtype == kept.kept else kept.decode(values)


def decode_into(values: NDArray[Any], dtype: str, into: NDArray[Any]) -> None:
    """Puts kept values into an array of their shape: decoded if it is for that, else as they are."""
    if dtype == "bfloat16" and into.dtype == np.float32:  # as bfloat16_to_float32, in one pass
        np.left_shift(values, 16, out=into.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        into[...] = values


# ── objects ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Absent(Exception):
    """There is no object, or nothing in it: the text says which."""


@contextmanager
def _object(
    store: Store, path: str, index: tuple[int, ...], repair: str, complete: bool = True, whole: bool = False
) -> Iterator[_Readable]:
    """An object of an array that is being read, of an object store at once if it is the `whole`. What goes wrong is
    CorruptStore, but for one that is not there where the store is not `complete`: _Absent.
    """
    where = f"{store.path}/{store.object_key(path, index)}"
    try:
        if isinstance(store.path, Path):
            with open(where, "rb", buffering=0) as file:
                yield file
        else:
            there = ObjectPath(where)
            yield io.BytesIO(there.read_bytes()) if whole else there
    except StorageError:
        raise
    except (FileNotFoundError, _Absent) as error:
        what = str(error) if isinstance(error, _Absent) else "is missing, though its unit is recorded"
        if not complete:
            raise _Absent(what) from error
        raise CorruptStore(f"{where} {what}. {repair}") from error
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise CorruptStore(f"{where} cannot be read: {error}. {repair}") from error


def _n_chunk(array: Array) -> int:
    return math.prod(chunks_in(array))


def _table(file: _Readable, n_chunk: int) -> NDArray[np.int64]:
    """Offset and length of every chunk of an object; −1 of one that was never written."""
    pairs = np.empty((n_chunk, 2), "<i8")
    into = pairs.reshape(-1).view(np.uint8)
    if isinstance(file, ObjectPath):
        found = file.read_end(len(into) + 4)
        if not found:
            raise _Absent("is empty")
        _read(io.BytesIO(found), into, len(found) - len(into) - 4, "the table of its chunks")
    else:
        size = file.seek(0, os.SEEK_END)
        if not size:
            raise _Absent("is empty")
        _read(file, into, size - len(into) - 4, "the table of its chunks")
    return pairs


def _read_chunk(file: _Readable, table: NDArray[np.int64], within: int, compression: str, target: NDArray[Any]) -> bool:
    """Puts a chunk into an array of its size; False if it was never written."""
    into = target.reshape(-1).view(np.uint8)
    offset, length = table[within].tolist()
    if offset < 0:
        return False
    if compression == "none":
        if length != len(into) + 4:
            raise ValueError(f"chunk {within} has {length:,} bytes, not {len(into) + 4:,}")
        _read(file, into, offset, f"chunk {within}")
        return True
    packed = np.empty(length - 4, np.uint8)
    _read(file, packed, offset, f"chunk {within}")
    if int.from_bytes(packed[4:8], "little") != len(into):  # else memory that was never filled would be given
        raise ValueError(f"chunk {within} does not unpack to {len(into):,} bytes")
    decompress(packed, into)
    return True


def _read(file: _Readable, into: NDArray[np.uint8], offset: int, what: str) -> None:
    """Bytes of an object that end in their crc32c. ValueError if they are cut off or do not agree with it."""
    said = bytearray(4)
    if isinstance(file, ObjectPath):
        file, offset = io.BytesIO(file.read_range(offset, len(into) + 4)), 0
    if offset < 0 or not (
        _in_one_call(file, into.data, said, offset) or _bit_by_bit(file, (into.data, memoryview(said)), offset)
    ):
        raise ValueError(f"{what} is cut off")
    if crc32c(into.data) != int.from_bytes(said, "little"):
        raise ValueError(f"{what}: its checksum is wrong")


def _in_one_call(file: BinaryIO, into: memoryview, said: bytearray, offset: int) -> bool:
    """Whether one call gave everything: threads wait for each other at every call."""
    return isinstance(file, io.FileIO) and os.preadv(file.fileno(), [into, said], offset) == len(into) + len(said)


def _bit_by_bit(file: BinaryIO, parts: Sequence[memoryview], offset: int) -> bool:
    """Whether there was everything: one call gives less where a signal comes."""
    file.seek(offset)
    for left in parts:
        while left:
            n = file.readinto(left)  # type: ignore[attr-defined]
            if not n:
                return False
            left = left[n:]
    return True
