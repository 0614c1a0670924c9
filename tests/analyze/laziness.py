"""What tests of laziness put in the place of a scheduler, of a function, or of values."""

from __future__ import annotations

from typing import Any, NoReturn

import dask.array as da
import numpy as np
from numpy.typing import NDArray


def forbidden(*args: Any, **kwargs: Any) -> NoReturn:
    """A scheduler, or a function, that must not be called while a result is only described."""
    raise AssertionError("something was computed")


def watched(value: NDArray[Any], chunks: tuple[tuple[int, ...], ...]) -> tuple[da.Array, list[tuple[int, ...]]]:
    """The same values in lazy chunks, and a list that grows by where a chunk begins whenever one is read."""
    read: list[tuple[int, ...]] = []

    def block(block_info: Any = None) -> NDArray[Any]:
        place = tuple(slice(*span) for span in block_info[None]["array-location"])
        read.append(tuple(span.start for span in place))
        return value[place]

    return da.map_blocks(block, chunks=chunks, dtype=value.dtype, meta=np.empty((0,) * value.ndim)), read
