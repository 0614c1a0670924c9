"""Runs laid end to end as one: lazily, without a copy. `copies` writes the same."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from .cuts import Cut, labels_of
from .errors import CorruptStore, SchemaError, StoreNotFound, nearest
from .joined import Joined, Part, joined_layers, lazy
from .labels import token_coords
from .ledger import read_json
from .places import Place, place
from .schema import LABELS, Array
from .store import Store
from .tree import CAPTURED, MOST_CHUNKS, TOKEN_ID, Chunks, KeptArray, home_of, label_nodes, run_stores

LONG = ("token", "sequence", "unit", "nonzero")
"""Dimensions along which runs may differ in size."""
FREE = ("hooks", "batch", "unit_tokens", "compression", "memory", "most_active", "fit_every")
"""Parameters in which runs may differ: what they cut, pack and measure; which hook points they have, the arrays say."""

Run = str | os.PathLike[str] | Place | xr.DataTree


def concat(runs: Sequence[Run], *, steps: str | Sequence[str] | None = None, chunks: Chunks = "auto") -> xr.DataTree:
    """Runs laid end to end along `token` as one lazy DataTree, like that of `open_run`: nothing is computed or copied.

    `runs` are folders, or trees that `open_run` gave. Sequences and documents are numbered through, in the order of the
    runs; documents keep their ids. `steps` chooses some of the steps' stores (default: all). `attrs["runs"]` says which
    tokens, sequences and documents are of which run; other attributes are those that all runs share. With
    `chunks="auto"` a dask chunk is whole shards of one run; None gives xarray's own lazy indexing.

    SchemaError names what keeps runs apart: steps, hook points, layers, sizes, dtypes, parameters, the files of model
    or dictionary, the tokenizer. They may differ in units, batch, compression and the machine. IncompleteStore,
    StoreNotFound, CorruptStore as `open_run`.
    """
    parts = Parts.of(runs, steps)
    for stores in parts.steps.values():
        for store in stores:
            store.require_complete()
    nodes: dict[str, xr.Dataset] = {}
    for name, stores in parts.steps.items():
        nodes[f"/{name}"] = xr.Dataset(attrs=common_attrs(stores))
        for group, dataset in _groups(parts, stores, chunks).items():
            nodes[f"/{name}/{group}".rstrip("/")] = dataset.assign_attrs(nodes[f"/{name}"].attrs)
    nodes |= _all_captures(parts, nodes, chunks) | label_nodes(parts.labels, parts.n_token)
    about: list[Mapping[str, Any]] = [
        read_json(run / "recipe.json") if (run / "recipe.json").exists() else {} for run in parts.runs
    ]
    nodes["/"] = xr.Dataset(attrs={**shared(about), "runs": parts.said})
    tree = xr.DataTree.from_dict(nodes, name="concat")
    tree.encoding["sources"] = [str(run) for run in parts.runs]
    return tree


@dataclass(frozen=True)
class Parts:
    """The runs of a concatenation: `steps` holds, by the name of a step, the store of each run. All are alike."""

    runs: tuple[Place, ...]
    steps: Mapping[str, tuple[Store, ...]]

    @classmethod
    def of(cls, runs: Sequence[Run], steps: str | Sequence[str] | None = None) -> Parts:
        """Some runs, with all their steps or some. SchemaError where they cannot be laid end to end, StoreNotFound."""
        folders = tuple(_folder(run) for run in runs)
        if not folders:
            raise SchemaError("name at least one run to concatenate")
        if twice := [run for n, run in enumerate(folders) if run in folders[:n]]:
            raise SchemaError(f"{twice[0]} is named twice")
        held = [{store.name: store for store in run_stores(run)} for run in folders]
        for run, stores in zip(folders, held, strict=True):
            if not stores:
                raise StoreNotFound(f"{run} is no run: it holds no store. Give the folder that `forebay run` wrote")
        named = [steps] if isinstance(steps, str) else steps
        wanted = list(held[0]) if named is None else list(dict.fromkeys(named))
        for run, stores in zip(folders, held, strict=True):
            _check_steps(run, stores, wanted, folders[0] if steps is None else None)
        chosen = {name: tuple(stores[name] for stores in held) for name in wanted}
        for same in chosen.values():
            _check_alike(same)
        for n, run in enumerate(folders):
            _check_tokens(run, [stores[n] for stores in chosen.values()])
        return cls(folders, chosen)

    @cached_property
    def first(self) -> tuple[Store, ...]:
        """A store of each run, for its labels."""
        return next(iter(self.steps.values()))

    @cached_property
    def n_token(self) -> int:
        return sum(store.schema.n_token for store in self.first)

    def sizes(self, dim: str) -> list[int]:
        """How many there are along `token`, `sequence` or `document`, run by run."""
        if dim == "token":
            return [store.schema.n_token for store in self.first]
        return [len(store.labels[f"{dim}s/start"][1]) for store in self.first]

    @cached_property
    def labels(self) -> dict[str, tuple[tuple[str, ...], Any]]:
        """Where sequences and documents of the whole start, and what documents are called."""
        return labels_of([Cut.whole(store) for store in self.first])

    @property
    def said(self) -> list[dict[str, Any]]:
        """Which run has which tokens, sequences and documents: first, and last plus one."""
        edges = {dim: np.cumsum([0, *self.sizes(dim)]).tolist() for dim in ("token", "sequence", "document")}
        return [
            {"run": str(run), **{dim: found[n : n + 2] for dim, found in edges.items()}}
            for n, run in enumerate(self.runs)
        ]


def _folder(run: Run) -> Place:
    if not isinstance(run, xr.DataTree):
        found = place(run)
        return found.resolve() if isinstance(found, Path) else found
    if "source" not in run.encoding:
        raise SchemaError("this tree does not say where its run lies: give the run's folder, or what `open_run` gave")
    return place(run.encoding["source"])


def _check_steps(run: Place, held: Mapping[str, Store], wanted: Sequence[str], first: Place | None) -> None:
    for name in wanted:
        if name not in held:
            whose = f", which {first} has" if first else ""
            raise SchemaError(
                f"{run} has no {name}{whose}.{nearest(name, held)} It has: {', '.join(held)}. Choose what all have "
                "with steps="
            )
    if more := [name for name in held if name not in wanted and first]:
        raise SchemaError(f"{run} has {', '.join(more)}, which {first} has not. Choose what all have with steps=")


def _check_tokens(run: Place, stores: Sequence[Store]) -> None:
    for store in stores:
        if store.schema.n_token != stores[0].schema.n_token:
            raise SchemaError(
                f"{run}: {stores[0].name} has {stores[0].schema.n_token:,} tokens, {store.name} "
                f"{store.schema.n_token:,}. Run its recipe again, so that all of its steps are of the same tokens"
            )


# ── whether runs are alike ───────────────────────────────────────────────────────────────────────────────────────────


def _check_alike(stores: Sequence[Store]) -> None:
    """SchemaError with what keeps the stores of a step apart, where anything does."""
    first = _meaning(stores[0])
    for store in stores[1:]:
        if lines := list(_unlike(first, _meaning(store))):
            told = "".join(f"\n  {key}: {_short(mine)} and {_short(other)}" for key, mine, other in lines[:12])
            raise SchemaError(f"{stores[0].path.parent} and {store.path.parent} cannot be laid end to end:{told}")


def _meaning(store: Store) -> dict[str, Any]:
    """What the values of a store mean, whatever its tokens and however it is cut."""
    said = store.header.provenance.get("determines", {})
    if not isinstance(said, Mapping) or not isinstance(said.get("parameters", {}), Mapping):
        raise CorruptStore(f"{store.path.parent} does not say what determines its values: its header is damaged")
    schema = store.schema
    named = {name: said.get(name) for name in ("step", "version", "identity")}
    parameters = {key: value for key, value in said.get("parameters", {}).items() if key not in FREE}
    files = {f"{n} {row[0]}": row[1] for n, row in enumerate(said.get("files", ())) if len(row) > 1}
    arrays: dict[str, Any] = {}
    for path, array in schema.arrays.items():
        sizes = {dim: size for dim, size in zip(array.dims, array.shape, strict=True) if dim not in LONG}
        arrays[path] = {"dims": list(array.dims), "dtype": array.dtype, **sizes}
    layers = {path: value[1].tolist() for path, value in store.labels.items() if path not in LABELS}
    skip = store.header.provenance.get("skip_positions")
    meaning = {"kind": schema.kind, **named, "parameters": parameters, "files": files, "skip_positions": skip}
    return {**meaning, "layers": layers, "arrays": arrays}


def _unlike(mine: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*mine, *other]):
        one, two = mine.get(key), other.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            yield from _unlike(one, two, f"{prefix}{key}.")
        elif one != two:
            yield f"{prefix}{key}", one, two


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def common_attrs(stores: Sequence[Store]) -> dict[str, Any]:
    """What the stores of a step say of themselves alike."""
    said = ({"fingerprint": store.fingerprint, **store.header.provenance} for store in stores)
    return shared(said)


def shared(said: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What nested mappings, at least one, say alike."""
    first, *others = said
    found = dict(first)
    for other in others:
        found = _both(found, other)
    return found


def _both(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in one:
        if isinstance(one[key], Mapping) and isinstance(two.get(key), Mapping):
            found[key] = _both(one[key], two[key])
        elif key in two and one[key] == two[key]:
            found[key] = one[key]
    return found


# ── nodes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _groups(parts: Parts, stores: Sequence[Store], chunks: Chunks) -> dict[str, xr.Dataset]:
    """The groups of a step's stores end to end, labelled; the root's is ''."""
    found: dict[str, dict[str, xr.Variable]] = {}
    for path, array in stores[0].schema.arrays.items():
        if not array.ragged:
            group, _, name = path.rpartition("/")
            found.setdefault(group, {})[name] = _end_to_end(stores, path, chunks, {"dtype": array.dtype})
    nodes = {}
    for group, variables in found.items():
        own = {dim: stores[0].labels.get(f"{group}/{dim}") for dim in ("layer", "state_position")}
        coords = {dim: label for dim, label in own.items() if label is not None}
        nodes[group] = _labelled(xr.Dataset(variables).assign_coords(coords), parts, group != "")
    return nodes


def _labelled(dataset: xr.Dataset, parts: Parts, with_ids: bool) -> xr.Dataset:
    labels = parts.labels
    if "token" not in dataset.sizes:
        n_sequence = dataset.sizes["sequence"]
        return dataset.assign_coords(sequence=np.arange(n_sequence), document=labels["sequences/document"])
    starts = (labels[f"{name}/start"][1] for name in ("sequences", "documents"))
    dataset = dataset.assign_coords(token_coords(parts.n_token, *starts))
    tokens = next((stores for stores in parts.steps.values() if stores[0].schema.kind == "tokens"), None)
    if tokens is None or not with_ids:
        return dataset
    return dataset.assign_coords(token_id=_end_to_end(tokens, "token_id", None, {"dtype": "uint32"}))


def _end_to_end(stores: Sequence[Store], path: str, chunks: Chunks, attrs: dict[str, Any]) -> xr.Variable:
    dims = stores[0].schema.arrays[path].dims
    cut = _cut([store.schema.arrays[path] for store in stores]) if chunks == "auto" else None
    found = lazy(end_to_end(stores, path), dims, attrs, cut)
    if path == TOKEN_ID:
        found.encoding["source"] = home_of(stores[0])  # any will do: runs of several tokenizers are refused
    return found


def end_to_end(stores: Sequence[Store], path: str) -> Joined:
    """An array of complete stores laid end to end along `token`, or `sequence`."""
    dims = stores[0].schema.arrays[path].dims
    axis = dims.index("token" if "token" in dims else "sequence")
    kept = [KeptArray(store, path, complete=True) for store in stores]
    return Joined([Part(one, 0, one.shape[axis]) for one in kept if one.shape[axis]], axis)


def _cut(arrays: Sequence[Array]) -> dict[str, tuple[int, ...]]:
    """Dask chunks: whole shards of one run each, several together where there would be too many of them."""
    first = arrays[0]
    axis = first.dims.index("token" if "token" in first.dims else "sequence")
    others = {dim: shard for n, (dim, shard) in enumerate(zip(first.dims, first.shards, strict=True)) if n != axis}
    fixed = {dim: _chunks(first.shape[first.dims.index(dim)], size) for dim, size in others.items()}
    many = int(np.prod([len(one) for one in fixed.values()]))
    together = -(-sum(-(-array.shape[axis] // array.shards[axis]) for array in arrays) * many // MOST_CHUNKS)
    along = (_chunks(array.shape[axis], array.shards[axis] * together) for array in arrays if array.shape[axis])
    return {**fixed, first.dims[axis]: tuple(size for one in along for size in one)}


def _chunks(size: int, chunk: int) -> tuple[int, ...]:
    return (chunk,) * (size // chunk) + ((size % chunk,) if size % chunk else ())


def _all_captures(parts: Parts, nodes: Mapping[str, xr.Dataset], chunks: Chunks) -> dict[str, xr.Dataset]:
    """The nodes below `activations` where runs have several captures, or a named one: the layers of all of them."""
    captures = [name for name, stores in parts.steps.items() if stores[0].schema.kind == CAPTURED]
    if captures in ([], [CAPTURED]):
        return {}
    found = {f"/{CAPTURED}": nodes[f"/{captures[0]}"].assign_attrs(captures=captures)}
    held: dict[str, list[str]] = {}
    for name in captures:
        for path in parts.steps[name][0].schema.arrays:
            held.setdefault(path.rpartition("/")[0], []).append(name)
    for kind, names in held.items():
        path, first = f"{kind}/value", nodes[f"/{names[0]}/{kind}"]
        if len(names) > 1 and "layer" in first.dims:
            axis = first["value"].dims.index("layer")
            arrays = [(end_to_end(parts.steps[n], path), nodes[f"/{n}/{kind}"].layer.values) for n in names]
            joined, layers = joined_layers(arrays, axis)
            cut = {dim: size for dim, size in first["value"].chunksizes.items() if dim != "layer"}
            value = lazy(joined, first["value"].dims, {}, {**cut, "layer": 1} if chunks == "auto" else None)
            first = first.drop_vars(["value", "layer"]).assign(value=value).assign_coords(layer=layers)
        found[f"/{CAPTURED}/{kind}"] = first.assign_attrs(captures=captures)
    return found
