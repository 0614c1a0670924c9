"""Random sparse features, the stores that hold them, and what is asked of them, worked out the long way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from forebay.stores.dtypes import format_of
from forebay.stores.schema import Array, Schema, along_token, along_unit
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """Features of tokens, a row a nonzero: in the order of tokens, in a token of features."""

    n_feature: int
    lengths: tuple[int, ...]
    token: NDArray[np.int64]
    feature: NDArray[np.int64]
    value: NDArray[np.float32]

    @property
    def n_token(self) -> int:
        return sum(self.lengths)

    @property
    def table(self) -> pd.DataFrame:
        """One row a nonzero, with the labels of its token."""
        table = pd.DataFrame({"token": self.token, "feature": self.feature, "value": self.value})
        return table.join(labels_of(self.lengths), on="token")

    @property
    def dense(self) -> NDArray[np.float32]:
        dense = np.zeros((self.n_token, self.n_feature), np.float32)
        dense[self.token, self.feature] = self.value
        return dense


def labels_of(lengths: tuple[int, ...]) -> pd.DataFrame:
    """The labels of every token, written out. A document is two sequences; every odd document is an empty one."""
    return pd.DataFrame(
        {
            "sequence": [s for s, n in enumerate(lengths) for _ in range(n)],
            "position": [p for n in lengths for p in range(n)],
            "document": [s // 2 * 2 for s, n in enumerate(lengths) for _ in range(n)],
        }
    )


def random_sparse(
    seed: int,
    n_feature: int,
    lengths: tuple[int, ...],
    *,
    most: int,
    dtype: str = "float32",
    levels: int | None = None,
    signed: bool = False,
) -> Sparse:
    """Up to `most` features a token, some features much oftener than others and some never. `levels` makes values equal
    each other often; `dtype` is one that holds them exactly.
    """
    rng = np.random.default_rng(seed)
    rates = rng.lognormal(0, 2, n_feature) * (rng.random(n_feature) < 0.8)
    rates = rates / rates.sum() if rates.sum() else np.eye(n_feature)[0]
    token, feature = [], []
    for t in range(sum(lengths)):
        n = min(rng.integers(0, most + 1), np.count_nonzero(rates))
        chosen = np.sort(rng.choice(n_feature, n, replace=False, p=rates))
        token += [t] * n
        feature += chosen.tolist()
    value = rng.lognormal(0, 1, len(token)) if levels is None else rng.integers(1, levels + 1, len(token)) / 2
    if signed:
        value = value * rng.choice([-1, 1], len(token))
    kept = format_of(dtype)
    exact = kept.decode(kept.encode(np.asarray(value, np.float32))).astype(np.float32)
    return Sparse(
        n_feature=n_feature,
        lengths=lengths,
        token=np.array(token, np.int64),
        feature=np.array(feature, np.int64),
        value=exact,
    )


def label_arrays(lengths: tuple[int, ...]) -> dict[str, Any]:
    """What a store tells of sequences and documents of these labels."""
    edges = np.cumsum([0, *lengths])
    n_document = len(lengths) + len(lengths) % 2
    start = [edges[min((d + d % 2), len(lengths))] for d in range(n_document)]  # an empty one starts as the next does
    return {
        "sequences/start": (("sequence",), edges[:-1]),
        "sequences/document": (("sequence",), np.arange(len(lengths)) // 2 * 2),
        "documents/start": (("document",), np.array(start)),
        "documents/id": (("document",), np.array([f"d{d}" for d in range(n_document)], dtype=object)),
    }


def schema_of(
    groups: dict[str, Sparse], unit_tokens: int, *, rank: int | None, dtype: str, compression: str = "none"
) -> Schema:
    """`rank` says that rows are regular, None that they are ragged."""
    arrays: dict[str, Array] = {}
    one = next(iter(groups.values()))
    for group, sparse in groups.items():
        n_token = sparse.n_token
        if rank is not None:
            sizes, dims = {"token": n_token, "rank": rank}, ("token", "rank")
            arrays[f"{group}/feature"] = along_token(dims, sizes, "int32", unit_tokens)
            arrays[f"{group}/value"] = along_token(dims, sizes, dtype, unit_tokens)
        else:
            arrays[f"{group}/count"] = along_token(("token",), {"token": n_token}, "int32", unit_tokens)
            arrays[f"{group}/feature"] = along_unit(n_token, "int32", unit_tokens, sparse.n_feature)
            arrays[f"{group}/value"] = along_unit(n_token, dtype, unit_tokens, sparse.n_feature)
    return Schema(
        kind="features",
        n_token=one.n_token,
        unit_tokens=unit_tokens,
        arrays=arrays,
        labels=label_arrays(one.lengths),
        compression=compression,
    )


def write_features(
    folder: Path,
    groups: dict[str, Sparse],
    unit_tokens: int,
    *,
    rank: int | None = None,
    dtype: str = "float32",
    fingerprint: str = "f" * 64,
    units: list[int] | None = None,
) -> Store:
    """A store of features as the step [encode] writes it; of all units, or of some."""
    schema = schema_of(groups, unit_tokens, rank=rank, dtype=dtype)
    about = {group: {"n_feature": s.n_feature, "hook": f"blocks.1.{group}"} for group, s in groups.items()}
    store = Store.create(folder, schema, fingerprint, {"determines": {}, "dictionaries": about, "skip_positions": 1})
    for unit in schema.grid:
        if units is not None and unit.index not in units:
            continue
        writer = UnitWriter(store, unit)
        for group, sparse in groups.items():
            node = _piece(sparse, unit.start, unit.stop, rank, dtype)
            writer.put(xr.DataTree.from_dict({f"/{group}": node}))
        writer.finish({})
    return store


def _piece(sparse: Sparse, start: int, stop: int, rank: int | None, dtype: str) -> xr.Dataset:
    own = (start <= sparse.token) & (sparse.token < stop)
    token, feature, value = sparse.token[own] - start, sparse.feature[own], sparse.value[own]
    encode = format_of(dtype).encode
    coords = {"token": np.arange(start, stop)}
    if rank is None:
        count = np.bincount(token, minlength=stop - start).astype(np.int32)
        ragged = {"feature": ("nonzero", feature.astype(np.int32)), "value": ("nonzero", encode(value))}
        return xr.Dataset({"count": ("token", count), **ragged}, coords=coords)
    features, values = np.full((stop - start, rank), -1, np.int32), np.zeros((stop - start, rank), np.float32)
    for t in range(stop - start):
        mine = np.flatnonzero(token == t)
        order = mine[np.lexsort([feature[mine], -value[mine]])]
        features[t, : len(mine)], values[t, : len(mine)] = feature[order], value[order]
    dims = ("token", "rank")
    return xr.Dataset({"feature": (dims, features), "value": (dims, encode(values))}, coords=coords)


def write_tokens(folder: Path, lengths: tuple[int, ...], token_id: NDArray[np.uint32], unit_tokens: int) -> Store:
    """A store of tokens, of which only the ids matter."""
    n_token = sum(lengths)
    schema = Schema(
        kind="tokens",
        n_token=n_token,
        unit_tokens=unit_tokens,
        arrays={"token_id": along_token(("token",), {"token": n_token}, "uint32", unit_tokens)},
        labels=label_arrays(lengths),
    )
    store = Store.create(folder, schema, "e" * 64, {"determines": {}})
    for unit in schema.grid:
        writer = UnitWriter(store, unit)
        own = {"token_id": ("token", token_id[unit.start : unit.stop])}
        writer.put(xr.DataTree.from_dict({"/": xr.Dataset(own, coords={"token": np.arange(unit.start, unit.stop)})}))
        writer.finish({})
    return store


def postings_of(sparse: Sparse, skip_positions: int) -> pd.DataFrame:
    """The nonzeros that an index holds, in its order, sorted by pandas."""
    table = sparse.table.query("position >= @skip_positions")
    return table.sort_values(["feature", "value", "token"], ascending=[True, False, True], kind="stable")


def every_file(folder: Path) -> dict[str, bytes]:
    """The data of an index, byte for byte, but for what Zarr wrote aside and never takes for its own."""
    data = folder / "data.zarr"
    return {
        str(path.relative_to(data)): path.read_bytes()
        for path in sorted(data.rglob("*"))
        if path.is_file() and path.suffix != ".partial"
    }
