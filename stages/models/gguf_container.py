"""The GGUF container: metadata and the list of tensors, read straight from the mapped file.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. It is read here because a vocabulary is a
metadata array of some 10⁵ strings, on which the `gguf` package's own reader spends seconds; what the bytes of a
quantised block mean is left to that package.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMS = 4
_MOST_VALUES = 2**26
_DEFAULT_ALIGNMENT = 32
_DAMAGED = (struct.error, UnicodeDecodeError, KeyError, IndexError, OverflowError, MemoryError, RecursionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One entry of the list of tensors: `shape` as torch would have it (rows first), `kind` the number of its ggml
    type, `start` the position of its first byte in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A mapped GGUF file: its metadata as Python values, its tensors by name, and the bytes of all."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    bytes_: mmap.mmap

    def release(self, start: int, n_bytes: int) -> None:
        """Have the system take back the pages that hold these bytes; whoever reads them again reads the file again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            begun = start % mmap.PAGESIZE
            self.bytes_.madvise(mmap.MADV_DONTNEED, start - begun, n_bytes + begun)


def read_container(path: Path) -> Container:
    """Map a GGUF file and read everything but its tensors' values.

    Raises ModelError for a file that is no GGUF file, is of another version or byte order, or is damaged.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24 or file.read(4) != _MAGIC:
            raise ModelError(f"{path} is no GGUF file")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _parse(mapped, path)
    except _DAMAGED as error:
        raise ModelError(f"{path} is cut off or damaged: its header cannot be read to the end ({error})") from error


def _parse(mapped: mmap.mmap, path: Path) -> Container:
    cursor = _Cursor(mapped, len(_MAGIC))
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        why = "it was written for big-endian machines" if version & 0xFFFF == 0 else f"its version is {version}"
        raise ModelError(f"{path} cannot be read: {why}, but only little-endian files of versions 2 and 3 are")
    n_tensors, n_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.string()
        if key in metadata:
            raise ModelError(f"{path} is damaged: it has the key {key!r} twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    entries = []
    for _ in range(n_tensors):
        name, n_dims = cursor.string(), cursor.scalar("I")
        if not 1 <= n_dims <= _MOST_DIMS:
            raise ModelError(f"{path} is damaged: its tensor {name!r} has {n_dims} dimensions")
        dims = [cursor.scalar("Q") for _ in range(n_dims)]
        if not all(dims):
            raise ModelError(f"{path} is damaged: its tensor {name!r} has no values")
        entries.append((name, tuple(reversed(dims)), cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ModelError(f"{path} is damaged: its tensors are aligned to {alignment!r} bytes")
    base = math.ceil(cursor.at / alignment) * alignment
    tensors = {name: StoredTensor(shape=shape, kind=kind, start=base + at) for name, shape, kind, at in entries}
    if len(tensors) < len(entries):
        raise ModelError(f"{path} is damaged: two of its tensors have the same name")
    return Container(path=path, metadata=metadata, tensors=tensors, bytes_=mapped)


class _Cursor:
    """A position in the mapped file that moves over what it reads."""

    def __init__(self, mapped: mmap.mmap, at: int) -> None:
        self._mapped = mapped
        self.at = at

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._mapped, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        raw = self._mapped[self.at : self.at + length]
        if len(raw) < length:
            raise IndexError(f"a string of {length} bytes starts {len(raw)} bytes before the end")
        self.at += length
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        inner, length = self.scalar("I"), self.scalar("Q")
        if length > _MOST_VALUES:
            raise OverflowError(f"an array of {length:,} values, of which at most {_MOST_VALUES:,} are read")
        if inner in (_STRING, _ARRAY):
            return [self.value(inner) for _ in range(length)]
        layout = f"<{length}{_SCALARS[inner]}"
        values = struct.unpack_from(layout, self._mapped, self.at)
        self.at += struct.calcsize(layout)
        return list(values)
