"""The feature-major index of a store of features: for every feature the tokens at which it fires, strongest first.

`index/<group>/data.zarr` beside the store's own data holds, for any Zarr v3 reader,

* `ptr[edge]` int64: the postings of feature f are [ptr[f], ptr[f + 1]) of
* `token[nonzero]` (uint32, or int64 where there are more tokens) and `value[nonzero]` (in the store's dtype): values
  descending, of equal values the earlier token first;
* a number a feature: `n_active[feature]`, `max`, `min` (float32, NaN where it never fires), `sum`, `square_sum`
  (float64), and `histogram[feature, bin]` of its values: 50 bins of equal width from `min(min, 0)` to `max(max, 0)`,
  each with its lower edge, the last with its upper one too.

The first `skip_positions` tokens of every sequence are left out of all of it. An index is there when its record is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.core import indexing

from .chunks import Spans
from .errors import CorruptStore, FingerprintMismatch, ForebayError, IncompleteStore, SchemaError
from .feature_rows import FeatureRows
from .ledger import Ledger
from .places import Place, changed_at
from .postings import BINS
from .schema import Array, Schema
from .store import Store
from .tree import KeptArray

VERSION = 1
"""Version of the index's layout. Raised when older readers would misread one: they say that it is to be built again."""

FOLDER = "index"
FEATURES = 2**14
SHARD_FEATURES = 2**18
"""Features in a chunk, and in an object, of what has a number a feature."""
_DIMS = {
    **dict.fromkeys(("n_active", "max", "min", "sum", "square_sum"), ("feature",)),
    **dict.fromkeys(("token", "value"), ("nonzero",)),
    "ptr": ("edge",),
    "histogram": ("feature", "bin"),
}
_KEEP = {"ptr": 0, "token": 8, "value": 8}
"""Chunks that are remembered: the beginning of a list of postings is read before the whole, and next to others."""


def index_folder(source: Store, group: str) -> Place:
    """The folder of a group's index."""
    return source.path.parent / FOLDER / group


def again(index: Store) -> str:
    """What to do about an index that is damaged: an advice for messages. Building verifies what is there."""
    return f"Build the index in {index.path.parent} again with `forebay index`"


def determines(source: Store, group: str, skip_positions: int) -> dict[str, Any]:
    """What determines the values of an index, of which its fingerprint is the hash."""
    return {"version": VERSION, "source": source.fingerprint, "group": group, "skip_positions": skip_positions}


def index_schema(rows: FeatureRows, n_posting: int, chunk: int, shard: int) -> Schema:
    """What the index of `n_posting` nonzeros will hold: one unit, which is all of it."""
    schema, n_feature = rows.store.schema, rows.n_feature
    n_token = schema.n_token

    def features(dtype: str) -> Array:
        return _array(("feature",), (n_feature,), dtype, (FEATURES,), (SHARD_FEATURES,))

    number = "uint32" if n_token < 2**32 else "int64"
    arrays = {
        "ptr": _array(("edge",), (n_feature + 1,), "int64", (FEATURES,), (SHARD_FEATURES,)),
        "token": _array(("nonzero",), (n_posting,), number, (chunk,), (shard,)),
        "value": _array(("nonzero",), (n_posting,), rows.dtype, (chunk,), (shard,)),
        "n_active": features("int64"),
        "max": features("float32"),
        "min": features("float32"),
        "sum": features("float64"),
        "square_sum": features("float64"),
        "histogram": _array(
            ("feature", "bin"), (n_feature, BINS), number, (FEATURES // 8, BINS), (SHARD_FEATURES, BINS)
        ),
    }
    labels = {"sequences/start": (("sequence",), rows.store.labels["sequences/start"][1])}
    return Schema(
        kind="feature index",
        n_token=n_token,
        unit_tokens=max(1, n_token),
        arrays=arrays,
        labels=labels,
        compression=schema.compression,
    )


def _array(
    dims: tuple[str, ...], shape: tuple[int, ...], dtype: str, chunks: tuple[int, ...], shards: tuple[int, ...]
) -> Array:
    return Array(dims=dims, shape=shape, dtype=dtype, chunks=chunks, shards=shards)


def built(source: Store, group: str) -> Store | None:
    """The store of a finished index, of whatever features; None if there is none."""
    folder = index_folder(source, group)
    return Store.open(folder) if Ledger(folder).done() else None


@dataclass(frozen=True)
class FeatureIndex:
    """A finished index. Picklable; arrays are opened when they are first read. `made` is when it was finished, in
    nanoseconds, for an index may be built anew where this one lay.
    """

    store: Store
    made: int

    @classmethod
    def open(cls, source: Store, group: str) -> FeatureIndex:
        """The index of a group of the features in `source`.

        IncompleteStore if it was not built, or not to the end; FingerprintMismatch if it was built of other features,
        or by an older forebay.
        """
        how = f"Build it with `forebay index {source.path.parent.parent} {group}`"
        try:
            found = built(source, group)
        except ForebayError as error:
            raise FingerprintMismatch(f"the index of {group!r} cannot be used: {error}. {how} again") from error
        if found is None:
            raise IncompleteStore(f"{source.path.parent} has no index of {group!r}. {how}")
        if fault := _fault(found, source):
            raise FingerprintMismatch(f"the index of {group!r} in {found.path.parent} is damaged: {fault}. {how} again")
        said: Mapping[str, Any] = found.header.provenance["determines"]
        due = determines(source, group, said.get("skip_positions", -1))
        if said != due:
            wrong = ", ".join(
                f"{key} {said.get(key)!r} instead of {due[key]!r}" for key in due if said.get(key) != due[key]
            )
            raise FingerprintMismatch(
                f"the index of {group!r} in {found.path.parent} is not of these features: it says {wrong}. {how} again"
            )
        return cls(found, _made(found))

    @property
    def current(self) -> bool:
        """Whether this is still the index that lies there."""
        return _made(self.store) == self.made

    @property
    def skip_positions(self) -> int:
        """How many tokens at the start of every sequence are left out."""
        return int(self.store.header.provenance["determines"]["skip_positions"])

    @property
    def n_token(self) -> int:
        """How many tokens were counted."""
        return int(self.store.header.provenance["tokens"])

    @cached_property
    def _spans(self) -> dict[str, Spans]:
        return {name: Spans(self.store, name, again(self.store), keep) for name, keep in _KEEP.items()}

    @cached_property
    def ptr(self) -> NDArray[np.int64]:
        """Where the postings of each feature begin [edge], in memory: 8 bytes a feature."""
        found: NDArray[np.int64] = self._spans["ptr"].read(0, self.store.schema.arrays["ptr"].shape[0])
        n_posting = self.store.schema.arrays["token"].shape[0]
        if found[0] != 0 or found[-1] > n_posting or (np.diff(found) < 0).any():
            raise CorruptStore(
                f"{self.store.path}/ptr does not ascend from 0 to at most {n_posting}. {again(self.store)}"
            )
        return found

    def variable(self, name: str) -> xr.Variable:
        """One of the arrays named above, read and decoded where it is indexed."""
        lazy = indexing.LazilyIndexedArray(KeptArray(self.store, name, complete=True, repair=again(self.store)))
        return xr.Variable(self.store.schema.arrays[name].dims, lazy)

    def postings(self, feature: int, most: int | None = None) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """Tokens and values of a feature, strongest first; of the first `most` only if given."""
        n_feature = len(self.ptr) - 1
        if not 0 <= feature < n_feature:
            raise SchemaError(f"feature {feature} does not exist: there are {n_feature}, numbered from 0")
        start, stop = int(self.ptr[feature]), int(self.ptr[feature + 1])
        stop = stop if most is None else min(stop, start + most)
        token = self._spans["token"].read(start, stop).astype(np.int64)
        if len(token) and not 0 <= int(token.min()) <= int(token.max()) < self.store.schema.n_token:
            raise CorruptStore(f"{self.store.path}/token names tokens that do not exist. {again(self.store)}")
        return token, self._spans["value"].read(start, stop)

    def __reduce__(self) -> tuple[Any, ...]:
        """Open arrays stay behind."""
        return FeatureIndex, (self.store, self.made)


def _fault(index: Store, source: Store) -> str | None:
    """What an index's header lacks for it to be read at all."""
    missing = [name for name in _DIMS if _DIMS[name] != getattr(index.schema.arrays.get(name), "dims", None)]
    said = index.header.provenance
    determines = said.get("determines")
    skipped = determines.get("skip_positions") if isinstance(determines, dict) else None
    if missing or index.schema.n_token != source.schema.n_token:
        return f"its arrays are not those of an index of {source.schema.n_token} tokens"
    if any(type(n) is not int or n < 0 for n in (skipped, said.get("tokens"))):
        return "its header does not say how many tokens it counts"
    return None


def _made(store: Store) -> int:
    """When the record of an index was put; 0 if there is none."""
    try:
        return changed_at(store.ledger.path(0))
    except FileNotFoundError:
        return 0
