"""Features as arrays that are worked out where they are looked at: dense columns, and which features fire together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from .feature_rows import FeatureRows, Rows
from .grid import Unit
from .selections import expanded, tokens_at

PIECE = 2**15
"""Tokens that are read at a time."""
PAIRS = 2**22
"""Pairs that are listed at a time."""
PRODUCT = 64
"""A matrix product does as many multiplications in the time of one pair."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Some features of some tokens: row by row the nonzeros, with the feature's place among those chosen."""

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    value: NDArray[Any]


def chosen(rows: Rows, n_feature: int, features: NDArray[np.int64]) -> Chosen:
    """The nonzeros of `features`, which are distinct."""
    place = np.full(n_feature, -1)
    place[features] = np.arange(len(features))
    column = place.take(rows.feature)
    own = np.flatnonzero(column >= 0)
    row = np.searchsorted(np.cumsum(rows.count), own, side="right")
    return Chosen(row, column[own], rows.value[own])


class Dense(BackendArray):
    """Some features of every token [token, feature], zero where they do not fire."""

    def __init__(self, rows: FeatureRows, features: NDArray[np.int64]) -> None:
        self.rows, self.features = rows, features
        self.shape, self.dtype = (rows.store.schema.n_token, len(features)), rows.read_dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        tokens = tokens_at(range(self.shape[0]), key[0])
        wanted, features = np.atleast_1d(np.asarray(tokens, np.int64)), self.features[key[1]]
        columns, places = np.unique(features, return_inverse=True)
        found = np.zeros((len(wanted), len(columns)), self.dtype)
        for start in range(0, len(wanted), PIECE):
            some = chosen(self.rows.at(wanted[start : start + PIECE]), self.rows.n_feature, columns)
            found[start + some.row, some.column] = some.value
        return found[:, places.ravel()].reshape(np.shape(tokens) + np.shape(features))


class Cooccurrence(BackendArray):
    """In how many tokens of each unit two features fire both [unit, feature, other], the first `skip_positions` of
    every sequence left out.
    """

    def __init__(self, rows: FeatureRows, features: NDArray[np.int64], skip_positions: int) -> None:
        self.rows, self.features, self.skip_positions = rows, features, skip_positions
        self.shape = (len(rows.store.schema.grid), len(features), len(features))
        self.dtype = np.dtype(np.int64)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[np.int64]:
        units = np.arange(self.shape[0])[key[0]]
        found = [self._count(self.rows.store.schema.grid[index])[key[1]][..., key[2]] for index in np.atleast_1d(units)]
        return np.stack(found) if np.ndim(units) else found[0]

    def _count(self, unit: Unit) -> NDArray[np.int64]:
        n = len(self.features)
        found = np.zeros((n, n), np.int64)
        for start in range(unit.start, unit.stop, PIECE):
            stop = min(start + PIECE, unit.stop)
            some = chosen(self.rows.read(start, stop), self.rows.n_feature, self.features)
            counted = self.rows.tables.labels("position", range(start, stop)) >= self.skip_positions
            own = counted[some.row]
            found += _together(some.row[own], some.column[own], n)
        return found


def _together(row: NDArray[np.int64], column: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """How often two of `n` columns stand in the same row. Rows ascend."""
    _, place, count = np.unique(row, return_inverse=True, return_counts=True)
    if n * n * len(count) < PRODUCT * int((count * count).sum()):
        return _by_product(place, column, len(count), n)
    found = np.zeros(n * n, np.int64)
    first = np.cumsum(count) - count
    for some in _slices(count[place], PAIRS):
        each = count[place[some]]
        other = column[expanded(first[place[some]], each)]
        found += np.bincount(np.repeat(column[some], each) * n + other, minlength=n * n)
    return found.reshape(n, n)


def _by_product(row: NDArray[np.int64], column: NDArray[np.int64], n_row: int, n: int) -> NDArray[np.int64]:
    """The same out of a product of dense matrices, exact in float32 for as many rows as a piece has."""
    found = np.zeros((n, n), np.int64)
    step = max(1, 2**24 // n)
    for start in range(0, n_row, step):
        own = slice(*np.searchsorted(row, [start, start + step]))
        fires = np.zeros((min(step, n_row - start), n), np.float32)
        fires[row[own] - start, column[own]] = 1
        found += (fires.T @ fires).astype(np.int64)
    return found


def _slices(sizes: NDArray[np.int64], most: int) -> Iterator[slice]:
    """Consecutive slices whose sizes add up to about `most`."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        stop = max(start + 1, int(np.searchsorted(ends, most + (ends[start - 1] if start else 0), side="right")))
        yield slice(start, stop)
        start = stop
