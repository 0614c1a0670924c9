"""Several arrays as one, along an axis that they share: nothing is copied, and nothing read before it is asked for."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from .selections import tokens_at


class Readable(Protocol):
    """What xarray's lazy indexing reads from."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any: ...


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, stop) of an array's axis."""

    array: Readable
    start: int
    stop: int


class Joined(BackendArray):
    """Rows of several arrays laid end to end along `axis`; what lies beyond is of one size. Reads from a part only the
    rows that are asked of it, and gives them in the dtype that holds those of all parts. Picklable if its parts are.
    """

    def __init__(self, parts: Sequence[Part], axis: int) -> None:
        first = parts[0].array
        self.parts, self.axis = tuple(parts), axis
        self.edges = np.cumsum([0, *(part.stop - part.start for part in parts)])
        self.shape = (*first.shape[:axis], int(self.edges[-1]), *first.shape[axis + 1 :])
        self.dtype = np.result_type(*(part.array.dtype for part in parts))

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """The values at `key`: an integer, slice or array of integers a dimension, each independent of the others."""
        rows = tokens_at(range(self.shape[self.axis]), key[self.axis])
        if isinstance(rows, int | np.integer):
            [(part, own)] = self._places(np.array([rows]))
            return self._of_part(part, int(own[0]), key)
        asked = np.asarray(rows, dtype=np.int64)
        order = np.argsort(asked, kind="stable")
        found = [self._of_part(part, _compact(own), key) for part, own in self._places(asked[order])]
        if not found:
            return self._of_part(self.parts[0], slice(0, 0), key)
        at = self.axis - sum(np.ndim(one) == 0 and not isinstance(one, slice) for one in key[: self.axis])
        whole = np.concatenate(found, axis=at) if len(found) > 1 else found[0]
        return whole if (np.diff(order) == 1).all() else whole.take(np.argsort(order), axis=at)

    def _places(self, ascending: NDArray[np.int64]) -> Iterator[tuple[Part, NDArray[np.int64]]]:
        """Which rows of which parts some rows are, neighbours of one array together."""
        owners = np.searchsorted(self.edges, ascending, side="right") - 1
        held: tuple[Part, NDArray[np.int64]] | None = None
        for owner in np.unique(owners):
            part = self.parts[owner]
            own = ascending[owners == owner] - self.edges[owner] + part.start
            if held and held[0].array is part.array and held[1][-1] < own[0]:
                held = part, np.concatenate([held[1], own])
                continue
            if held:
                yield held
            held = part, own
        if held:
            yield held

    def _of_part(self, part: Part, rows: Any, key: tuple[Any, ...]) -> NDArray[Any]:
        inner = (*key[: self.axis], rows, *key[self.axis + 1 :])
        return np.asarray(part.array[indexing.OuterIndexer(inner)]).astype(self.dtype, copy=False)


def _compact(rows: NDArray[np.int64]) -> Any:
    """Consecutive rows as a slice, which is read in one go."""
    consecutive = int(rows[-1]) - int(rows[0]) == len(rows) - 1 and bool((np.diff(rows) == 1).all())
    return slice(int(rows[0]), int(rows[-1]) + 1) if consecutive else rows


def joined_layers(values: Sequence[tuple[Readable, Iterable[int]]], axis: int) -> tuple[Joined, list[int]]:
    """Arrays with the layers that each holds along `axis`, as one of ascending layers, and those layers. A layer that
    several hold is the first one's.
    """
    held: dict[int, Part] = {}
    for array, layers in values:
        for row, layer in enumerate(layers):
            held.setdefault(int(layer), Part(array, row, row + 1))
    layers = sorted(held)
    return Joined([held[layer] for layer in layers], axis), layers


class Everywhere(BackendArray):
    """Where all of some boolean arrays of one shape are true."""

    def __init__(self, masks: Sequence[Readable]) -> None:
        first = masks[0]
        self.masks, self.shape, self.dtype = tuple(masks), first.shape, np.dtype(bool)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        found = [np.asarray(mask[indexing.OuterIndexer(key)]) for mask in self.masks]
        return np.logical_and.reduce(found)


def common_chunks(shards: Sequence[int], most: int = 4) -> int:
    """Rows of a chunk that is whole shards of every part, if that is at most `most` of the largest; else that."""
    together = math.lcm(*shards)
    return together if together <= most * max(shards) else max(shards)


def lazy(array: Readable, dims: Iterable[Hashable], attrs: dict[str, Any], chunks: Any) -> xr.Variable:
    """A variable that reads nothing before it is indexed; a dask array where `chunks` are given."""
    variable = xr.Variable(tuple(dims), indexing.LazilyIndexedArray(array), attrs=attrs)
    return variable.chunk(chunks) if chunks is not None else variable
