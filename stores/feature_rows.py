"""Sparse features as they are kept, token by token: the rows of either layout read as compressed rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .chunks import Spans
from .dtypes import format_of
from .errors import CorruptStore, SchemaError, nearest
from .grid import Unit
from .labels import TokenIndex
from .selections import LabelTables, expanded
from .store import Store
from .tree import REPAIR

KIND = "features"
VALUES = ("float32", "bfloat16", "float16")
"""Dtypes in which a feature's values may be kept."""
MOST_FEATURES = 2**27
FAR = 2**12
"""Tokens further apart than this are read one by one, others with all between them."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Features of consecutive tokens: `count[token]` int64 and, token after token, `feature[nonzero]` int32 and
    `value[nonzero]` (float32, or float16 where it is kept so). What does not fire is absent.
    """

    count: NDArray[np.int64]
    feature: NDArray[np.int32]
    value: NDArray[Any]


def groups_of(store: Store) -> list[str]:
    """The groups of a store of features, one a dictionary. SchemaError if the store holds something else."""
    if store.schema.kind != KIND:
        raise SchemaError(
            f"{store.path.parent} holds {store.schema.kind}, not features. Give the folder of an [encode] step"
        )
    return list(dict.fromkeys(path.rpartition("/")[0] for path in store.schema.arrays))


@dataclass(frozen=True)
class FeatureRows:
    """The rows of one dictionary in a complete store of features. Picklable; nothing is opened before it is read.

    Counted features (TopK) are kept as `feature` and `value` [token, rank], strongest first, with the feature -1 where
    fewer fire. Others are ragged: `count[token]`, and `feature` and `value` [unit, nonzero] end to end, ascending in a
    token.
    """

    store: Store
    group: str

    @classmethod
    def open(cls, store: Store, group: str) -> FeatureRows:
        """The rows of `group`. SchemaError for a group that is not there, IncompleteStore."""
        groups = groups_of(store)
        if group not in groups:
            raise SchemaError(
                f"{store.path.parent} has no features {group!r}.{nearest(group, groups)} It has: {', '.join(groups)}"
            )
        store.require_complete()
        return cls(store, group)

    @property
    def attrs(self) -> dict[str, Any]:
        """What the store tells of the dictionary: its source, hook, activation, and so on."""
        said = self.store.header.provenance.get("dictionaries")
        found = said.get(self.group) if isinstance(said, dict) else None
        if not isinstance(found, dict):
            raise CorruptStore(f"{self.store.path} does not say which dictionary made {self.group!r}")
        return dict(found)

    @property
    def n_feature(self) -> int:
        found = self.attrs.get("n_feature")
        if type(found) is not int or not 0 < found <= MOST_FEATURES:
            raise CorruptStore(f"{self.store.path}: {self.group!r} has {found!r:.99} features by its header")
        return found

    @property
    def counted(self) -> bool:
        """Whether rows are regular: at most `rank` features a token."""
        return f"{self.group}/count" not in self.store.schema.arrays

    @property
    def dtype(self) -> str:
        """The dtype in which values are kept, one of `VALUES`."""
        return self.store.schema.arrays[f"{self.group}/value"].dtype

    @property
    def read_dtype(self) -> np.dtype[Any]:
        """The dtype in which values are given: float32, or float16."""
        return np.dtype(format_of(self.dtype).read)

    @cached_property
    def tables(self) -> LabelTables:
        """Where sequences and documents start."""
        labels = self.store.labels
        return LabelTables.checked(
            self.store.schema.n_token, labels["sequences/start"][1], labels["documents/start"][1]
        )

    @cached_property
    def _kept(self) -> dict[str, Spans]:
        names = ("feature", "value") if self.counted else ("count", "feature", "value")
        return {name: Spans(self.store, f"{self.group}/{name}") for name in names}

    def read(self, start: int, stop: int) -> Rows:
        """Rows of the tokens [start, stop), in memory, each in the order in which it is kept. SchemaError for tokens
        that are not there, CorruptStore for rows that cannot be read.
        """
        if not 0 <= start <= stop <= self.store.schema.n_token:
            raise SchemaError(
                f"tokens {start} to {stop} are not all there: {self.group} has 0 to {self.store.schema.n_token}"
            )
        parts = [self._read_unit(unit, start, stop) for unit in self.units(start, stop)]
        if len(parts) == 1:
            return parts[0]
        return _joined([Rows(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, self.read_dtype)), *parts])

    def at(self, tokens: NDArray[np.int64]) -> Rows:
        """Rows of any tokens, in their order and as often as they are named. Errors as `read` says."""
        if not len(tokens) or (tokens[-1] - tokens[0] == len(tokens) - 1 and (np.diff(tokens) == 1).all()):
            return self.read(int(tokens[0]), int(tokens[-1]) + 1) if len(tokens) else self.read(0, 0)
        known = np.unique(tokens)
        parts = [self._only(near) for near in np.split(known, np.flatnonzero(np.diff(known) > FAR) + 1)]
        found = _joined(parts)
        place = np.searchsorted(known, tokens)
        source = expanded((np.cumsum(found.count) - found.count)[place], found.count[place])
        return Rows(found.count[place], found.feature[source], found.value[source])

    def _only(self, tokens: NDArray[np.int64]) -> Rows:
        """Rows of ascending tokens, read with all between them."""
        rows = self.read(int(tokens[0]), int(tokens[-1]) + 1)
        wanted = np.zeros(len(rows.count), bool)
        wanted[tokens - tokens[0]] = True
        theirs = np.repeat(wanted, rows.count)
        return Rows(rows.count[wanted], rows.feature[theirs], rows.value[theirs])

    def units(self, start: int, stop: int) -> Iterator[Unit]:
        """The units that own any of the tokens [start, stop)."""
        grid = self.store.schema.grid
        return (grid[index] for index in range(start // grid.step, -(-stop // grid.step) if start < stop else 0))

    def counts(self, start: int, stop: int) -> NDArray[np.int64]:
        """How many nonzeros each token of [start, stop) has, without reading them where rows are ragged."""
        if self.counted:
            count: NDArray[np.int64] = (self._kept["feature"].read(start, stop) >= 0).sum(axis=1, dtype=np.int64)
            return count
        return self._kept["count"].read(start, stop).astype(np.int64)

    def _read_unit(self, unit: Unit, start: int, stop: int) -> Rows:
        """The rows of a unit's tokens that lie in [start, stop)."""
        start, stop = max(start, unit.start), min(stop, unit.stop)
        if self.counted:
            feature, value = (self._kept[name].read(start, stop) for name in ("feature", "value"))
            fires = feature >= 0
            count, feature, value = fires.sum(axis=1, dtype=np.int64), feature[fires], value[fires]
        else:
            before = self.counts(unit.start, stop)
            count = before[start - unit.start :]
            first, beyond = int(before[: start - unit.start].sum()), int(before.sum())
            if beyond > self._kept["feature"].array.shape[1] or (before < 0).any():
                raise CorruptStore(
                    f"{self.store.path / self.group}: the counts of unit {unit.index} add up to {beyond:,}, more than "
                    f"a row holds. {REPAIR}"
                )
            feature, value = (self._kept[name].read(first, beyond, unit.index) for name in ("feature", "value"))
        if len(feature) and not 0 <= int(feature.min()) <= int(feature.max()) < self.n_feature:
            raise CorruptStore(
                f"{self.store.path / self.group}: unit {unit.index} names features {feature.min()} to {feature.max()} "
                f"of a dictionary of {self.n_feature}. {REPAIR}"
            )
        return Rows(count, feature, value)

    def labels(self, tokens: NDArray[np.int64], dim: str) -> xr.Coordinates:
        """Labels of any tokens as coordinates on `dim`: their number `token`, and the lazy `sequence`, `position` and
        `document` with their index.
        """
        own = xr.Dataset(coords={"token": (dim, tokens)}).coords
        return own.merge(xr.Coordinates.from_xindex(TokenIndex(self.tables, tokens, dim))).coords

    def __reduce__(self) -> tuple[Any, ...]:
        """Labels and open arrays stay behind."""
        return FeatureRows, (self.store, self.group)


def _joined(parts: Sequence[Rows]) -> Rows:
    return Rows(
        np.concatenate([part.count for part in parts]),
        np.concatenate([part.feature for part in parts]),
        np.concatenate([part.value for part in parts]),
    )
