"""Zarr hierarchies: laid out, opened, written by whole shards, on this machine and in object stores. The only file that
names zarr.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import ByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.errors import ZarrUserWarning
from zarr.storage import LocalStore, MemoryStore, ObjectStore

from .dtypes import format_of
from .object_paths import ObjectPath
from .places import Place, sync_folder
from .schema import Array, Header

Known = dict[str, Buffer]
"""Metadata that were read from an object store and do not change: key → bytes."""


def open_group(data: Place, known: Known | None = None) -> Any:
    """The root of the hierarchy at `data`, read-only. A chunk that is missing reads as fill values."""
    if isinstance(data, Path):
        return zarr.open_group(str(data), mode="r", zarr_format=3, use_consolidated=False)
    return _open(_Objects(data, read_only=True, known=known), data, "r")


def open_recorded(data: Place, known: Known | None = None) -> Any:
    """As `open_group`, of a store whose units are recorded: in an object store a missing shard is FileNotFoundError."""
    if isinstance(data, Path):
        return open_group(data)
    return _open(_Objects(data, read_only=True, known=known, recorded=True), data, "r")


def open_unread(data: Place, known: Known | None = None) -> tuple[Any, Mapping[str, dict[str, Any]]]:
    """The root for writing shards whole, of which none is ever read; and, filled as they are put into an object store,
    their bytes and sha256 by key, which stays empty on this machine.
    """
    if isinstance(data, Path):
        return zarr.open_group(_Unread(str(data)), mode="r+", zarr_format=3, use_consolidated=False), {}
    objects = _Objects(data, read_only=False, known=known, unread=True)
    return _open(objects, data, "r+"), objects.puts


def _open(objects: _Objects, data: ObjectPath, mode: Any) -> Any:
    return zarr.open_group(objects, path=data.key, mode=mode, zarr_format=3, use_consolidated=False)


class _Unread(LocalStore):
    """Writes objects as any store and has none to read: a shard that is not full is else merged with what is there."""

    async def get(self, key: str, *arguments: Any, **options: Any) -> Buffer | None:
        return None if "/c/" in key else await super().get(key, *arguments, **options)

    def get_sync(self, key: str, *arguments: Any, **options: Any) -> Buffer | None:
        return None if "/c/" in key else super().get_sync(key, *arguments, **options)


class _Objects(ObjectStore[Any]):
    """The objects of a bucket, for the hierarchy at `data`. Keys are whole; metadata in `known` are read no more.

    With `unread` there is no shard to read, as in `_Unread`; with `recorded` every shard must be there. `puts` says of
    each object what its record will, from the very bytes that were sent.
    """

    def __init__(
        self,
        data: ObjectPath,
        *,
        read_only: bool,
        known: Known | None = None,
        unread: bool = False,
        recorded: bool = False,
    ) -> None:
        super().__init__(data.bucket, read_only=read_only)
        self.data, self.known = data, {} if known is None else known
        self.unread, self.recorded = unread, recorded
        self.puts: dict[str, dict[str, Any]] = {}

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        name = self._name(key)
        if name in self.known and byte_range is None:
            return self.known[name]
        if self.unread and "/c/" in name:
            return None
        try:
            found = await super().get(key, prototype, byte_range)
        except Exception as error:
            if (self.data / name).ends_before(error):
                raise ValueError(f"{self.data / name} is empty") from error
            raise (self.data / name).failure(error) from None
        if self.recorded and "/c/" in name:  # else Zarr would take it for one that holds nothing but fill values
            if found is None:
                raise FileNotFoundError(f"{self.data / name} is missing, though its unit is recorded")
            if not len(found):
                raise ValueError(f"{self.data / name} is empty")
        if found is not None and name.endswith("zarr.json"):
            self.known[name] = found
        return found

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def set(self, key: str, value: Buffer) -> None:
        import obstore

        name, data = self._name(key), value.as_buffer_like()
        try:
            await obstore.put_async(self.store, key, data, use_multipart=False)
        except Exception as error:
            raise (self.data / name).failure(error) from None
        digest = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        self.puts[name] = {"bytes": len(value), "sha256": digest}

    def _name(self, key: str) -> str:
        return key.removeprefix(f"{self.data.key}/")


# ── laying out ───────────────────────────────────────────────────────────────────────────────────────────────────────


def lay_out(path: Path, header: Header) -> None:
    """Writes the metadata of all arrays, and the labels, which are small, into a folder of this machine, durably."""
    _lay_out(str(path), header)
    for folder, _, files in os.walk(path):
        for file in files:
            with open(Path(folder) / file, "rb") as handle:
                os.fsync(handle.fileno())
        sync_folder(Path(folder))


def layout_of(header: Header) -> dict[str, bytes]:
    """What `lay_out` writes, in memory: key → bytes."""
    kept: dict[str, Buffer] = {}
    _lay_out(MemoryStore(kept), header)
    return {key: value.to_bytes() for key, value in kept.items()}


def _lay_out(store: str | MemoryStore, header: Header) -> None:
    schema = header.schema
    root = zarr.create_group(store, zarr_format=3, attributes={"forebay": header.to_json()})
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


def _codecs(compression: str, itemsize: int) -> list[Any]:
    """Codecs of one chunk. A Blosc block of 512 KiB keeps the exponent bytes apart from the rest: 1.44 times smaller,
    not 1.26.
    """
    if compression == "none":
        return [Crc32cCodec()]
    zstd = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=itemsize, blocksize=2**19)
    return [zstd, Crc32cCodec()]
