"""Tensors at rest: where their bytes lie in a file, and reading those rows that are asked for, and no others.

Bytes are read at their places, each run that lies end to end at once. The files are not mapped into memory: the
safetensors library maps them so that they could be written, which the system refuses for a file larger than memory.
"""

import json
import math
import struct
import tokenize
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import DictionaryError

MOST_HEADER_BYTES = 100_000_000
"""The longest header of a safetensors file, which is the safetensors library's own limit."""
_READ_AT_ONCE = 2**24
_NO_HEADER = (SyntaxError, tokenize.TokenError, RuntimeError, OSError)
"""What is raised for an array's header that is none, which numpy reads as Python's text, of literals only."""

_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_NUMPY = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16, "<i8": torch.int64, "<i4": torch.int32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor in a file: `shape`, `dtype`, and the `offset` of its first byte. Nothing is read until it is asked for,
    and no file is held open. Where it is `transposed` the file holds the transpose of this matrix.
    """

    path: Path
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False

    @property
    def T(self) -> "Stored":
        """The transpose of this matrix; nothing is read."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    def read(self) -> Tensor:
        """The whole tensor, in its dtype. DictionaryError where the file ends before it."""
        shape = self.shape[::-1] if self.transposed else self.shape
        whole = self._blocks(torch.zeros(1, dtype=torch.int64), math.prod(shape)).view(shape)
        return whole.T if self.transposed else whole

    def rows(self, rows: slice | Tensor, part: int = 0) -> Tensor:
        """Some rows of a matrix [row, width], or of [row, part, width] what stands at one `part`: [rows, width].

        `rows` are numbers, int64, in any order. Only their bytes are read; where the file holds the transpose, of each
        of its lines the span from the first of them to the last.
        """
        if isinstance(rows, slice):
            numbers = range(*rows.indices(self.shape[0]))
            rows = torch.arange(len(numbers)) * numbers.step + numbers.start
        if self.transposed:
            return self._columns(rows)
        width = self.shape[-1]
        return self._blocks(rows * math.prod(self.shape[1:]) + part * width, width)

    def _columns(self, columns: Tensor) -> Tensor:
        width, lines = self.shape
        found = torch.empty(len(columns), lines, dtype=self.dtype)
        if not len(columns):
            return found
        first = int(columns.min())
        span = int(columns.max()) + 1 - first
        step = max(1, _READ_AT_ONCE // (span * self.dtype.itemsize))
        for start in range(0, lines, step):
            some = torch.arange(start, min(start + step, lines))
            found[:, some] = self._blocks(some * width + first, span)[:, columns - first].T
        return found

    def _blocks(self, starts: Tensor, length: int) -> Tensor:
        """Blocks of `length` elements that start at these elements: [block, length]."""
        found = torch.empty(len(starts), length, dtype=self.dtype)
        if not found.numel():
            return found
        buffer = found.view(torch.uint8).numpy().data.cast("B")
        breaks = (starts.diff() != length).nonzero().flatten() + 1
        ends = [*breaks.tolist(), len(starts)]
        size = length * self.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            begin = 0
            for end, start in zip(ends, starts[[0, *ends[:-1]]].tolist(), strict=True):
                file.seek(self.offset + start * self.dtype.itemsize)
                self._fill(file, buffer[begin * size : end * size])
                begin = end
        return found

    def _fill(self, file: Any, buffer: memoryview) -> None:
        while len(buffer):  # the system reads at most 2 GiB at once
            got = file.readinto(buffer)
            if not got:
                raise DictionaryError(f"{self.path} is cut off: it ends within {self.name}")
            buffer = buffer[got:]


def finite(value: Tensor, stored: Stored) -> Tensor:
    """The value, which was read from there. DictionaryError if any of it is NaN or infinite."""
    if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
        n = int((~torch.isfinite(value)).sum())
        raise DictionaryError(f"{stored.path}: {stored.name} has {n:,} values that are NaN or infinite")
    return value


def safetensors_headers(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds; its header is read and nothing else. DictionaryError if it is damaged or cut off,
    or holds a dtype other than floating point of 16 bits and more, int32 and int64.
    """
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise DictionaryError(f"{path} is no safetensors file, or it is damaged or cut off")
        text = file.read(length)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("it is no object")
        header.pop("__metadata__", None)
        return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, DictionaryError):
            raise
        raise DictionaryError(f"{path} has a damaged header: {error!r}") from error


def _stored(path: Path, name: str, entry: Mapping[str, Any], data: int, size: int) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in _SAFETENSORS:
        known = ", ".join(_SAFETENSORS)
        raise DictionaryError(f"{path}: {name} is of dtype {entry['dtype']}; known are {known}")
    dtype = _SAFETENSORS[entry["dtype"]]
    if any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
        raise ValueError(f"sizes and places of {name}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} takes {end - begin} bytes, and its shape is {shape}")
    if data + end > size:
        raise DictionaryError(f"{path} is cut off: {name} ends at byte {data + end:,}, the file at {size:,}")
    return Stored(path=path, name=name, offset=data + begin, shape=shape, dtype=dtype)


def npz_headers(path: Path) -> dict[str, Stored]:
    """The arrays of an .npz file, of their headers only. DictionaryError if it is damaged, if arrays are compressed, so
    that no part of one can be read alone, or hold anything but floating point numbers, int32 and int64.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            entries = archive.infolist()
            return {entry.filename.removesuffix(".npy"): _stored_array(path, entry, file) for entry in entries}
    except (zipfile.BadZipFile, ValueError, EOFError, TypeError, KeyError, struct.error, *_NO_HEADER) as error:
        if isinstance(error, DictionaryError):
            raise
        raise DictionaryError(f"{path} is no .npz file of plain arrays, or it is damaged: {error}") from error


def _stored_array(path: Path, entry: zipfile.ZipInfo, file: BinaryIO) -> Stored:
    from numpy.lib import format as npy

    name = entry.filename.removesuffix(".npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise DictionaryError(f"{path}: {name} is compressed; save it again with numpy.savez")
    file.seek(entry.header_offset)
    _, name_length, extra_length = struct.unpack("<26sHH", file.read(30))
    begin = file.seek(entry.header_offset + 30 + name_length + extra_length)
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, transposed, dtype = read_header(file)
    if dtype.str not in _NUMPY:
        raise DictionaryError(f"{path}: {name} is of dtype {dtype}; known are {', '.join(_NUMPY)}")
    offset, expected = file.tell(), math.prod(shape) * dtype.itemsize
    if any(n < 0 for n in shape) or begin + entry.file_size != offset + expected:
        raise ValueError(f"{name} of shape {shape} takes {entry.file_size} bytes")
    stored = Stored(path=path, name=name, offset=offset, shape=shape, dtype=_NUMPY[dtype.str])
    return replace(stored, transposed=transposed and len(shape) > 1)
