"""Objects in the sharding format of Zarr v3, byte for byte as zarr-python writes them, and as fast as they are hashed.

An object is its chunks, each with its crc32c behind it, and at the end their offsets and lengths, with theirs. While a
file is written and made durable, other threads make the next chunks and hash those that are written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from .digests import recorded
from .dtypes import format_of
from .errors import SchemaError
from .object_paths import ObjectPath
from .places import Place, replacing
from .schema import Array

THREADS = 3
"""Of one object, beside the one that writes."""
BLOSC_BLOCK = 2**19
"""Bytes of a Blosc block: exponent bytes are apart from the rest then, which makes it 1.44 times smaller, not 1.26."""
NEVER = 2**64 - 1
"""Offset and length of a chunk that was not written."""
_AT_ONCE = 2**20

Parts = Sequence[Future[list[Any]]]
"""Bytes of an object, in order, as they are made."""


def _zstd(data: NDArray[np.uint8], itemsize: int) -> bytes:
    from numcodecs.blosc import SHUFFLE, compress

    return compress(data, b"zstd", 1, SHUFFLE, BLOSC_BLOCK, itemsize)  # type: ignore[no-any-return]


PACKED: dict[str, Callable[[NDArray[np.uint8], int], Any]] = {"none": lambda data, itemsize: data, "zstd": _zstd}
"""What a chunk's bytes are to each compression."""


def chunks_in(array: Array) -> tuple[int, ...]:
    """How many chunks an object has along each dimension."""
    return tuple(shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True))


def cut(
    array: Array, rows: Mapping[str, slice], values: NDArray[Any]
) -> Iterator[tuple[tuple[int, ...], NDArray[Any]]]:
    """Index of every object that holds `rows`, whole along the dimensions that `rows` does not name, and its part of
    their `values`, which is not copied. SchemaError where rows begin amid an object.
    """
    starts = [rows.get(dim, slice(0, size)).start for dim, size in zip(array.dims, array.shape, strict=True)]
    if any(start % shard for start, shard in zip(starts, array.shards, strict=True)):
        raise SchemaError(f"rows {dict(rows)} of {array.dims} begin amid an object: each is of {array.shards}")
    for index in array.objects(rows):
        lows = [n * shard - start for n, shard, start in zip(index, array.shards, starts, strict=True)]
        yield index, values[tuple(slice(low, low + shard) for low, shard in zip(lows, array.shards, strict=True))]


def put_object(path: Place, values: NDArray[Any], array: Array, compression: str) -> dict[str, Any]:
    """Puts an object whole, over any that is there, which is never looked at, and gives the entry of a record
    for it, of what was handed over. On this machine it is durable before it has its name, and its name is not yet.

    `values` are its cells, in their kept form, as many as the array has there. Holds an object of `zstd`, or one for an
    object store, in memory; of others no more than `values`, and those chunks that do not lie in them end to end.
    """
    with ThreadPoolExecutor(THREADS, "object") as pool:
        parts = _encoded(values, array, compression, pool)
        said = pool.submit(recorded, itertools.chain.from_iterable(part.result() for part in parts))
        if isinstance(path, ObjectPath):
            path.put(b"".join(itertools.chain.from_iterable(part.result() for part in parts)))
        else:
            with replacing(path) as file:
                for part in parts:
                    file.writelines(part.result())
        return said.result()


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _encoded(values: NDArray[Any], array: Array, compression: str, pool: ThreadPoolExecutor) -> Parts:
    """Chunks that hold any of the `values`, then the table of all."""
    grid = chunks_in(array)
    places = morton_order(grid)
    held = [-(-size // chunk) for size, chunk in zip(values.shape, array.chunks, strict=True)]
    places = places[(places < held).all(1)]
    chunk_bytes = math.prod(array.chunks) * format_of(array.dtype).itemsize
    some = max(1, _AT_ONCE // chunk_bytes)
    chunks = [
        pool.submit(_chunks, values, places[at : at + some].tolist(), array, compression)
        for at in range(0, len(places), some)
    ]
    return [*chunks, pool.submit(_table, grid, places, chunks)]


def _chunks(values: NDArray[Any], places: Sequence[Sequence[int]], array: Array, compression: str) -> list[Any]:
    """Bytes of each chunk, and of its checksum."""
    found: list[Any] = []
    for place in places:
        data = PACKED[compression](_chunk(values, place, array), format_of(array.dtype).itemsize)
        found += [data, crc32c(memoryview(data)).to_bytes(4, "little")]
    return found


def _chunk(values: NDArray[Any], place: Sequence[int], array: Array) -> NDArray[np.uint8]:
    """A chunk's bytes: of the values themselves where they lie end to end, and fill values where there are none."""
    kept = format_of(array.dtype)
    found = values[tuple(slice(n * size, (n + 1) * size) for n, size in zip(place, array.chunks, strict=True))]
    if found.shape != array.chunks:
        whole = np.full(array.chunks, kept.missing, kept.kept)
        whole[tuple(map(slice, found.shape))] = found
        found = whole
    return np.ascontiguousarray(found, np.dtype(kept.kept).newbyteorder("<")).reshape(-1).view(np.uint8)


def _table(grid: tuple[int, ...], places: NDArray[np.int64], chunks: Parts) -> list[Any]:
    """Offset and length of every chunk of the object, in C order, and their checksum."""
    sizes = [len(data) for data in itertools.chain.from_iterable(part.result() for part in chunks)]
    lengths = np.array(sizes, np.uint64).reshape(-1, 2).sum(1)
    table = np.full((*grid, 2), NEVER, "<u8")
    table[tuple(places.T)] = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
    data = table.reshape(-1).view(np.uint8)
    return [data, crc32c(data.data).to_bytes(4, "little")]


def morton_order(grid: tuple[int, ...]) -> NDArray[np.int64]:
    """Places [chunk, dimension] of a grid of chunks in Morton's order: by the bits of the place's coordinates in turn,
    of each as many as the grid needs, the lowest of the first dimension being the lowest. Source: the compressed Morton
    code of Neuroglancer's sharded format, in which zarr-python writes.
    """
    places = np.indices(grid).reshape(len(grid), -1)
    code = np.zeros(places.shape[1], np.int64)
    bits = [(size - 1).bit_length() for size in grid]
    taken = [(bit, dim) for bit in range(max(bits)) for dim, n in enumerate(bits) if bit < n]
    for at, (bit, dim) in enumerate(taken):
        code |= (places[dim] >> bit & 1) << at
    return places.T[np.argsort(code)]
