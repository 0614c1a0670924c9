"""Values of an array straight from its objects: many short reads take longer through Zarr than what they read.

An object is its chunks, each with its crc32c behind it, and at the end their offsets and lengths.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
from google_crc32c import value as crc32c
from numcodecs.blosc import decompress
from numpy.typing import NDArray

from .dtypes import format_of
from .errors import CorruptStore, StorageError
from .object_paths import ObjectPath
from .schema import Array
from .store import Store
from .tree import REPAIR

_Readable = BinaryIO | ObjectPath
_INDEXES = 256
"""Objects whose tables of chunks are remembered."""


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of an array's objects, each read whole and its checksum compared. Picklable; may be shared among
    threads.
    """

    store: Store
    path: str
    repair: str = REPAIR
    _indexes: dict[tuple[int, ...], NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def read(self, index: tuple[int, ...], within: int, into: NDArray[Any]) -> None:
        """Puts chunk number `within` of the object `index` into an array of its size, in its kept form. CorruptStore,
        with the advice `repair`, if it is not what was written.
        """
        path = self.store.path / self.store.object_key(self.path, index)
        target = into.reshape(-1).view(np.uint8)
        try:
            if isinstance(path, ObjectPath):
                self._read_chunk(path, index, within, target)
                return
            with open(path, "rb") as file:
                self._read_chunk(file, index, within, target)
        except StorageError:
            raise
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            raise CorruptStore(f"{path} cannot be read at chunk {within}: {error}. {self.repair}") from error

    def _read_chunk(self, file: _Readable, index: tuple[int, ...], within: int, target: NDArray[np.uint8]) -> None:
        table = self._indexes.get(index)
        if table is None:
            table = _read_index(file, self._n_chunk)
            if len(self._indexes) >= _INDEXES:  # other threads keep the tables that they hold
                self._indexes.clear()
            self._indexes[index] = table
        offset, length = table[within].tolist()
        if offset < 0:
            raise ValueError("it was never written")
        if self.store.schema.compression == "none":
            _read(file, target, offset)
        else:
            packed = np.empty(length - 4, np.uint8)
            _read(file, packed, offset)
            decompress(packed, target)

    @property
    def _n_chunk(self) -> int:
        """Chunks in an object."""
        array = self.store.schema.arrays[self.path]
        return math.prod(shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True))

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
        found = np.empty((stop - start, *array.shape[axis + 1 :]), kept.kept)
        for chunk in range(start // rows, -(-stop // rows) if start < stop else 0):
            first = chunk * rows
            low, high = max(first, start), min(first + rows, stop)
            part = found[low - start : high - start]
            if len(part) == rows and not self.keep:
                self._read_chunk(unit, chunk, part)
            else:
                part[...] = self._whole(unit, chunk)[low - first : high - first]
        return kept.decode(found)

    def _whole(self, unit: int, chunk: int) -> NDArray[Any]:
        known = self._chunks.get((unit, chunk))
        if known is None:
            array = self.array
            axis = 1 if array.ragged else 0
            known = np.empty((array.chunks[axis], *array.shape[axis + 1 :]), format_of(array.dtype).kept)
            self._read_chunk(unit, chunk, known)
            if self.keep:
                self._chunks[unit, chunk] = known
                if len(self._chunks) > self.keep:
                    self._chunks.pop(next(iter(self._chunks)), None)
        return known

    def _read_chunk(self, unit: int, chunk: int, into: NDArray[Any]) -> None:
        array = self.array
        axis = 1 if array.ragged else 0
        n_chunk = array.shards[axis] // array.chunks[axis]
        index = (*(unit,) * axis, chunk // n_chunk, *(0,) * (len(array.dims) - axis - 1))
        self._objects.read(index, chunk % n_chunk, into)

    def __reduce__(self) -> tuple[Any, ...]:
        """What was remembered stays behind."""
        return Spans, (self.store, self.path, self.repair, self.keep)


def _read_index(file: _Readable, n_chunk: int) -> NDArray[np.int64]:
    """Offset and length of every chunk of an object; −1 of one that was never written."""
    pairs = np.empty((n_chunk, 2), "<i8")
    into = pairs.reshape(-1).view(np.uint8)
    if isinstance(file, ObjectPath):
        _take(file.read_end(pairs.nbytes + 4), into)
    else:
        _read(file, into, os.fstat(file.fileno()).st_size - pairs.nbytes - 4)
    return pairs


def _take(found: bytes, into: NDArray[np.uint8]) -> None:
    """Bytes that end in their crc32c. ValueError as `_read` says."""
    if len(found) < len(into) + 4:
        raise ValueError("it is cut off")
    into[...] = np.frombuffer(found, np.uint8, len(into))
    if crc32c(into) != int.from_bytes(found[len(into) :], "little"):
        raise ValueError("its checksum is wrong")


def _read(file: _Readable, into: NDArray[np.uint8], offset: int) -> None:
    """Bytes of a file that end in their crc32c. ValueError if they are cut off or do not agree with it."""
    said = np.empty(1, "<u4")
    if offset < 0:
        raise ValueError("it is cut off")
    if isinstance(file, ObjectPath):
        _take(file.read_range(offset, len(into) + 4), into)
        return
    file.seek(offset)
    if file.readinto(into.data) < len(into) or file.readinto(said.data) < said.nbytes:  # type: ignore[attr-defined]
        raise ValueError("it is cut off")
    if crc32c(into) != said[0]:
        raise ValueError("its checksum is wrong")
