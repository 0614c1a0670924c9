"""Stores as labelled, lazy xarray: `open_store` for one step, `open_run` for a whole run. Opening computes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from .chunks import REPAIR as REPAIR
from .chunks import read_outer
from .dtypes import format_of
from .errors import StoreNotFound
from .grid import Grid
from .joined import Everywhere, common_chunks, joined_layers, lazy
from .labels import token_coords
from .ledger import read_json
from .places import Place, place
from .schema import DATA, Array, store_folders
from .selections import tokens_at
from .store import Store

MOST_CHUNKS = 10_000
"""Dask spends about half a millisecond a chunk: larger arrays are opened in chunks of several shards."""

Chunks = Literal["auto"] | None


class KeptArray(BackendArray):
    """One array of a store, read and decoded only where it is indexed.

    In a `complete` one every object must be there: CorruptStore names one that is missing, or cannot be read, and says
    how to `repair` it.
    """

    def __init__(self, store: Store, path: str, complete: bool, repair: str = REPAIR) -> None:
        array = store.schema.arrays[path]
        self.store, self.path, self.complete, self.repair = store, path, complete, repair
        self.shape, self.dtype = array.shape, np.dtype(format_of(array.dtype).read)
        self._checked = False

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        """The values at `key`: an integer, slice or array of integers a dimension, each independent of the others."""
        if not self._checked:
            self.store.check_array(self.path)
            self._checked = True
        return read_outer(self.store, self.path, key, self.complete, self.repair)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": False}


class DoneMask(BackendArray):
    """True at the tokens whose unit is recorded. Holds one number a finished unit, whatever the number of tokens."""

    def __init__(self, grid: Grid, done: set[int]) -> None:
        self.grid, self.done = grid, np.array(sorted(done), dtype=np.int64)
        self.shape, self.dtype = (grid.size,), np.dtype(bool)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[np.bool_]:
        tokens = np.asarray(tokens_at(range(self.grid.size), key[0]), dtype=np.int64)
        return np.isin(tokens // self.grid.step, self.done)


def open_store(path: str | os.PathLike[str], *, partial: bool = False, chunks: Chunks = "auto") -> xr.DataTree:
    """One step's store as a lazy DataTree, labelled with `sequence`, `position`, `document` on `token` and `layer`.

    The groups of the store are its nodes, beside `sequences` and `documents`; arrays without a group are in a node
    named by the store's kind, as in `open_store("run/tokens")["tokens"]`.

    `chunks="auto"` gives dask arrays in chunks of whole shards; None gives xarray's own lazy indexing, which is quicker
    for small looks. bfloat16 reads as float32, exactly. Nothing is computed. IncompleteStore unless every unit is
    recorded or `partial` is set, which adds the boolean coordinate `done` on `token`. StoreNotFound, CorruptStore,
    SchemaError for what is no store.
    """
    store = Store.open(path)
    nodes = _nodes(store, partial, chunks)
    if nodes["/"].dims:
        # Children inherit coordinates, and a token's `sequence` cannot be what the table of sequences lies along.
        nodes |= {"/": xr.Dataset(attrs=nodes["/"].attrs), f"/{store.schema.kind}": nodes["/"]}
    return xr.DataTree.from_dict(nodes, name=store.name)


def open_run(path: str | os.PathLike[str], *, partial: bool = False, chunks: Chunks = "auto") -> xr.DataTree:
    """A whole run as one lazy DataTree: `tokens`, `sequences`, `documents`, and a node a hook kind under `activations`.

    Every node with a `token` axis carries `token_id`, `sequence`, `position` and `document`, so that selections read
    `run["activations/hook_resid_post/value"].sel(layer=12, document=7)`. The run's recipe is in `attrs`. Arguments and
    errors as in `open_store`.

    Of a run with tables [capture.NAME], `activations` holds the kinds and layers of all captures of the same tokens,
    and says in `attrs["captures"]` which there are; `activations-NAME` holds each as it is stored.
    """
    folder = place(path)
    stores = list(run_stores(folder))
    if not stores:
        raise StoreNotFound(
            f"{folder} is no run: it holds no folder with a {DATA}. Give the folder that `forebay run` wrote"
        )
    nodes: dict[str, xr.Dataset] = {}
    tokens = next((store for store in stores if store.schema.kind == "tokens"), None)
    token_id = _kept_variables(tokens, "token_id", None, tokens.complete) if tokens else {}
    for store in stores:
        for name, dataset in _nodes(store, partial, chunks).items():
            if name in ("/sequences", "/documents"):
                nodes.setdefault(name, dataset)
            elif name == "/":
                nodes[f"/{store.name}"] = dataset
            else:
                if "token" in dataset.sizes:
                    dataset = dataset.assign_coords(token_id)
                nodes[f"/{store.name}{name}"] = dataset
    nodes |= _all_captures(stores, nodes, partial, chunks)
    recipe = folder / "recipe.json"
    nodes["/"] = xr.Dataset(attrs=read_json(recipe) if recipe.exists() else {})
    tree = xr.DataTree.from_dict(nodes, name=folder.resolve().name)
    tree.encoding["source"] = str(folder.resolve())
    return tree


def run_stores(folder: Place) -> Iterator[Store]:
    """The stores of a run, those that others read first."""
    found = [Store.open(one) for one in store_folders(folder)]
    return iter(sorted(found, key=lambda store: store.schema.kind != "tokens"))


TOKEN_ID = "token_id"
CAPTURED = "activations"
"""Kind of the stores of captures, and the node with the kinds and layers of all of them."""


def _all_captures(
    stores: Sequence[Store], nodes: Mapping[str, xr.Dataset], partial: bool, chunks: Chunks
) -> dict[str, xr.Dataset]:
    """The nodes below `activations` of a run with several captures, or a named one; empty for any other. Captures of
    other tokens (not yet grown, as the first is) stay by themselves.
    """
    captures = [store for store in stores if store.schema.kind == CAPTURED]
    if [store.name for store in captures] in ([], [CAPTURED]):
        return {}
    same = [store for store in captures if _same_tokens(store, captures[0])]
    held: dict[str, list[Store]] = {}
    for store in same:
        for path in store.schema.arrays:
            held.setdefault(path.rpartition("/")[0], []).append(store)
    said = {"captures": {store.name: store.fingerprint for store in same}}
    found = {f"/{CAPTURED}": nodes[f"/{same[0].name}"].assign_attrs(said)}
    for kind, holders in held.items():
        found[f"/{CAPTURED}/{kind}"] = _joined_node(holders, nodes, kind, partial, chunks).assign_attrs(said)
    return found


def _joined_node(
    stores: Sequence[Store], nodes: Mapping[str, xr.Dataset], kind: str, partial: bool, chunks: Chunks
) -> xr.Dataset:
    """The layers of a kind in several stores of the same tokens as one node."""
    first = nodes[f"/{stores[0].name}/{kind}"]
    path = f"{kind}/value"
    others = {dim: size for dim, size in first.sizes.items() if dim != "layer"}
    states = f"{kind}/state_position"
    stores = [
        store
        for store in stores
        if others.items() <= dict(nodes[f"/{store.name}/{kind}"].sizes).items()
        and (states not in store.labels or np.array_equal(store.labels[states][1], stores[0].labels[states][1]))
    ]
    if len(stores) == 1 or "layer" not in first.dims:
        return first
    arrays = [store.schema.arrays[path] for store in stores]
    axis = arrays[0].dims.index("layer")
    kept = [KeptArray(store, path, store.complete) for store in stores]
    joined, layers = joined_layers(
        [(one, store.labels[f"{kind}/layer"][1]) for one, store in zip(kept, stores, strict=True)], axis
    )
    cut = {dim: common_chunks([_dask_chunks(array)[dim] for array in arrays]) for dim in arrays[0].dims}
    dtypes = {array.dtype for array in arrays}
    attrs = {"dtype": dtypes.pop()} if len(dtypes) == 1 else {}
    value = lazy(joined, arrays[0].dims, attrs, cut if chunks == "auto" else None)
    whole = first.drop_vars(["value", "layer"]).assign(value=value).assign_coords(layer=layers)
    if partial and "token" in whole.sizes:
        masks = [DoneMask(store.schema.grid, store.done()) for store in stores]
        whole = whole.assign_coords(done=lazy(Everywhere(masks), ("token",), {}, None))
    attrs_of = [nodes[f"/{store.name}/{kind}"].attrs for store in stores]
    whole.attrs = {k: v for k, v in attrs_of[0].items() if all(other.get(k) == v for other in attrs_of)}
    return whole


def _same_tokens(store: Store, other: Store) -> bool:
    """Whether the rows of two stores along `token` are of the same sequences."""
    name = "sequences/start"
    return store.schema.n_token == other.schema.n_token and np.array_equal(store.labels[name][1], other.labels[name][1])


def _nodes(store: Store, partial: bool, chunks: Chunks) -> dict[str, xr.Dataset]:
    done, n_unit = store.done(), len(store.schema.grid)
    if not partial:
        store.require_complete()
    labels = store.labels
    token = token_coords(store.schema.n_token, labels["sequences/start"][1], labels["documents/start"][1])
    mask = xr.Variable(("token",), indexing.LazilyIndexedArray(DoneMask(store.schema.grid, done)))
    nodes: dict[str, xr.Dataset] = {
        "/": xr.Dataset(attrs={"fingerprint": store.fingerprint, **store.header.provenance})
    }
    # A ragged row is no array along any label; `run.features` reads them.
    regular = [path for path, array in store.schema.arrays.items() if not array.ragged]
    for group in dict.fromkeys(path.rpartition("/")[0] for path in regular):
        paths = [path for path in regular if path.rpartition("/")[0] == group]
        complete = len(done) == n_unit
        dataset = xr.Dataset(
            {k: v for path in paths for k, v in _kept_variables(store, path, chunks, complete).items()}
        )
        if "token" in dataset.sizes:
            dataset = dataset.assign_coords(token)
            dataset = dataset.assign_coords(done=mask) if partial else dataset
        else:
            n_sequence = dataset.sizes["sequence"]
            dataset = dataset.assign_coords(sequence=np.arange(n_sequence), document=labels["sequences/document"])
        own = {dim: labels[path] for dim in ("layer", "state_position") if (path := f"{group}/{dim}") in labels}
        dataset = dataset.assign_coords(own)
        nodes[f"/{group}"] = dataset.assign_attrs(nodes["/"].attrs)
    return nodes | label_nodes(labels, store.schema.n_token)


def label_nodes(labels: Mapping[str, Any], n_token: int) -> dict[str, xr.Dataset]:
    nodes = {}
    for group, dim in (("sequences", "sequence"), ("documents", "document")):
        columns = {path.split("/")[1]: variable for path, variable in labels.items() if path.startswith(f"{group}/")}
        start = columns["start"][1]
        columns["n_token"] = ((dim,), np.diff(start, append=n_token))
        nodes[f"/{group}"] = (
            xr.Dataset(columns, coords={dim: np.arange(len(start))}) if dim not in columns else xr.Dataset(columns)
        )
    return nodes


def _kept_variables(store: Store, path: str, chunks: Chunks, complete: bool) -> dict[str, xr.Variable]:
    array = store.schema.arrays[path]
    lazy = indexing.LazilyIndexedArray(KeptArray(store, path, complete))
    variable = xr.Variable(array.dims, lazy, attrs={"dtype": array.dtype})
    if chunks == "auto":
        variable = variable.chunk(_dask_chunks(array))
    if path == TOKEN_ID:
        variable.encoding["source"] = home_of(store)
    return {path.rpartition("/")[2]: variable}


def home_of(store: Store) -> str:
    """Where the run of a store lies: what token ids carry as xarray's `encoding["source"]`, through any selection, so
    that their text can be asked for.
    """
    return str(store.path.parent.parent.resolve())


def _dask_chunks(array: Array) -> dict[str, int]:
    """Whole shards, several together along the long axis where there would be too many of them."""
    counts = [-(-size // shard) for size, shard in zip(array.shape, array.shards, strict=True)]
    long = array.dims.index("token" if "token" in array.dims else "sequence")
    others = int(np.prod([count for i, count in enumerate(counts) if i != long]))
    together = -(-counts[long] * others // MOST_CHUNKS)
    return {
        dim: shard * (together if i == long else 1)
        for i, (dim, shard) in enumerate(zip(array.dims, array.shards, strict=True))
    }


def read_rows(store: Store, span: slice) -> xr.Dataset:
    """Tokens [start, stop) of a complete store, with the token's number as the coordinate.

    Root arrays are in memory. What lies in groups may be large and stays lazy, without dask: `<group>/<name>` along
    `token`, its other dimensions in the group's name too, as in `<group>/layer`, which has its coordinate.
    """
    import pandas as pd

    columns: dict[str, Any] = {}
    coords: dict[str, Any] = {"token": pd.RangeIndex(span.start, span.stop)}
    for path, array in store.schema.arrays.items():
        group = path.rpartition("/")[0]
        if not group:
            columns[path] = (array.dims, KeptArray(store, path, complete=True)._read((span,)))
        elif "token" in array.dims:
            dims = [dim if dim == "token" else f"{group}/{dim}" for dim in array.dims]
            lazy = indexing.LazilyIndexedArray(KeptArray(store, path, complete=True))
            columns[path] = xr.Variable(dims, lazy).isel(token=span)
            if "layer" in array.dims:
                coords[f"{group}/layer"] = store.labels[f"{group}/layer"][1]
    return xr.Dataset(columns, coords=coords)
