"""Number formats: what a value means, and the form in which Zarr keeps it.

bfloat16 is kept bit for bit as uint16, with the attribute `dtype: bfloat16`, so that every Zarr reader can open it. It
comes back as float32, which holds every bfloat16 exactly (negatives, NaN payloads, infinities and subnormals included).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import SchemaError, nearest


@dataclass(frozen=True, slots=True)
class Format:
    """A number format. `kept` is the numpy dtype on disk, `read` the one that readers get; `missing` marks a cell
    without a value.
    """

    kept: str
    read: str
    missing: int | float
    decode: Callable[[NDArray[Any]], NDArray[Any]]
    encode: Callable[[NDArray[Any]], NDArray[Any]]

    @property
    def itemsize(self) -> int:
        """Bytes on disk for one value, before compression."""
        return np.dtype(self.kept).itemsize


def bfloat16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 with the same value (and NaN payload) as each bfloat16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even, as torch and IEEE 754 round.

    NaN stays NaN, with the upper bits of its payload.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    upper = bits >> np.uint32(16)
    rounded = (bits + (np.uint32(0x7FFF) + (upper & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), upper | np.uint32(0x40), rounded).astype(np.uint16)


def _same(values: NDArray[Any]) -> NDArray[Any]:
    return values


def _plain(dtype: str, missing: int | float) -> Format:
    return Format(dtype, dtype, missing, decode=_same, encode=partial(np.asarray, dtype=dtype))


FORMATS: dict[str, Format] = {
    "bfloat16": Format("uint16", "float32", 0x7FC0, bfloat16_to_float32, float32_to_bfloat16),
    "float16": _plain("float16", np.nan),
    "float32": _plain("float32", np.nan),
    "float64": _plain("float64", np.nan),
    **{f"{sign}int{bits}": _plain(f"{sign}int{bits}", 0) for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bool": _plain("bool", 0),
}


def format_of(dtype: str) -> Format:
    """The row of a dtype's name. SchemaError lists the known ones."""
    try:
        return FORMATS[dtype]
    except KeyError:
        raise SchemaError(
            f"dtype {dtype!r} cannot be kept.{nearest(dtype, FORMATS)} Known: {', '.join(sorted(FORMATS))}"
        ) from None
