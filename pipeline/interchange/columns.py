"""The hook points of a run that other formats take: rows of tokens, in firing order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...stages.capture import stored_points
from ...stages.models.points import HookPoint, expand
from ...stores.chunks import read_outer
from ...stores.dtypes import format_of
from ...stores.errors import SchemaError
from ...stores.places import Place
from ...stores.schema import Array
from ...stores.store import Store
from ...stores.tree import CAPTURED, run_stores

AT_ONCE = 2**26
"""Bytes of a tensor that are read, and written, at once."""


@dataclass(frozen=True)
class Column:
    """One hook point's values of every token: an array of a store, at one layer (a number along its axis `layer`)."""

    point: HookPoint
    store: Store
    path: str
    layer: int | None

    @property
    def array(self) -> Array:
        return self.store.schema.arrays[self.path]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one token's values."""
        return self.array.shape[self.array.dims.index("token") + 1 :]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * format_of(self.array.dtype).itemsize

    def has_tokens_of(self, other: Column) -> bool:
        """Whether both are of the same tokens, in the same sequences and documents."""
        ours, theirs = self.store, other.store
        return ours.schema.n_token == theirs.schema.n_token and all(
            np.array_equal(ours.labels[f"{axis}/start"][1], theirs.labels[f"{axis}/start"][1])
            for axis in ("sequences", "documents")
        )

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens [start, stop) in their kept form. CorruptStore."""
        lead = () if self.layer is None else (self.layer,)
        key = (*lead, slice(start, stop), *(slice(None),) * len(self.shape))
        return read_outer(self.store, self.path, key, decoded=False)


def columns_of(run: Place, hooks: str | Sequence[str]) -> list[Column]:
    """The hook points of a run that `hooks`, names and patterns, choose, in firing order; "*" leaves out those without
    a token axis. SchemaError where none is left, one that was named has none, or not all are of the same tokens;
    HookError, IncompleteStore.
    """
    there = {column.point: column for store in run_stores(run) for column in _stored(store)}
    if not there:
        raise SchemaError(f"{run} holds no activations: its recipe has no [capture]")
    patterns = (hooks,) if isinstance(hooks, str) else tuple(hooks)
    chosen = expand(patterns, sorted(there, key=str))
    by_token = [point for point in chosen if "token" in there[point].array.dims]
    spelt = [point for point in chosen if point not in by_token and any("*" not in pattern for pattern in patterns)]
    if spelt or not by_token:
        point = (spelt or chosen)[0]
        raise SchemaError(
            f"{point} of {run} lies along {', '.join(there[point].array.dims)}, without a token axis: choose other "
            "hooks, or keep it in a run with `forebay export`"
        )
    columns = [there[point] for point in by_token]
    for column in columns:
        column.store.require_complete()
        if not column.has_tokens_of(columns[0]):
            raise SchemaError(
                f"{column.point} of {column.store.path.parent} has other tokens than {columns[0].point} of "
                f"{columns[0].store.path.parent}, and cannot stand beside it: run the recipe again if "
                "one has not grown yet"
            )
    return columns


def _stored(store: Store) -> Iterator[Column]:
    if store.schema.kind != CAPTURED:
        return
    kinds = {path.rpartition("/")[0]: path for path in store.schema.arrays}
    for point in map(HookPoint.parse, stored_points(store.schema_with_labels)):
        layers = store.labels.get(f"{point.kind}/layer")
        layer = None if layers is None else layers[1].tolist().index(point.layer)
        yield Column(point, store, kinds[point.kind], layer)


def require_empty(folder: Path) -> None:
    """SchemaError where a folder holds anything."""
    if folder.exists() and any(folder.iterdir()):
        raise SchemaError(f"{folder} holds something already: name a new folder, or empty it")
