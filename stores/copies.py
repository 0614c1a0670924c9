"""A store written from rows of others: some of one, or several end to end. Unit by unit, resumable as any run is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from .chunks import read_outer
from .concat import shared
from .cuts import Cut, labels_of
from .digests import disagreement
from .dtypes import format_of
from .errors import CorruptStore, SchemaError
from .feature_rows import FeatureRows
from .fingerprint import canonical_json, fingerprint, versions
from .grid import Grid, Unit
from .ledger import Record
from .places import Place
from .schema import (
    RAGGED,
    RAGGED_CHUNK,
    SHARD_BYTES,
    Array,
    Schema,
    along_sequence,
    along_token,
    sequences_per_unit,
)
from .store import Store
from .writer import COUNT, UnitWriter

Kept = Mapping[str, Sequence[int] | None]
"""Groups of a store → the layers that are kept of each, by number; None: all, or it has none."""


@dataclass(frozen=True)
class Copy:
    """A store that will hold rows of others: `cuts` of alike, complete stores end to end, of each the groups `kept`.

    Units are as long as those of the first. What is read is verified first: CorruptStore names an object that is not
    what was recorded. Values are the same bits.
    """

    folder: Place
    cuts: tuple[Cut, ...]
    kept: Kept
    _whole: set[tuple[int, int]] = field(default_factory=set, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def _first(self) -> Store:
        return self.cuts[0].store

    @cached_property
    def schema(self) -> Schema:
        """What will be written. SchemaError for groups and layers that are not there."""
        first = self._first.schema
        labels = labels_of(self.cuts)
        n_token = sum(map(len, self.cuts))
        own = {"token": n_token, "sequence": len(labels["sequences/start"][1])}
        per_unit = sequences_per_unit(labels["sequences/start"][1], n_token, first.unit_tokens)
        arrays: dict[str, Array] = {}
        for path in self.paths:
            array, group = first.arrays[path], path.rpartition("/")[0]
            rows = self.layers(path)
            sizes = {**dict(zip(array.dims, array.shape, strict=True)), **own}
            if rows is not None:
                sizes["layer"] = len(rows)
                labels[f"{group}/layer"] = (("layer",), self._first.labels[f"{group}/layer"][1][rows])
            if array.ragged:
                arrays[path] = self._ragged(path, Grid(n_token, first.unit_tokens))
            elif "token" in array.dims:
                arrays[path] = along_token(array.dims, sizes, array.dtype, first.unit_tokens)
            else:
                arrays[path] = along_sequence(array.dims, sizes, array.dtype, per_unit)
            if (name := f"{group}/state_position") in self._first.labels:
                labels[name] = self._first.labels[name]
        return Schema(
            kind=first.kind,
            n_token=n_token,
            unit_tokens=first.unit_tokens,
            arrays=arrays,
            labels=labels,
            compression=first.compression,
        )

    def _ragged(self, path: str, grid: Grid) -> Array:
        """A ragged array whose rows have room for all that the units read for one of them could hold."""
        room, token = np.zeros(len(grid), np.int64), 0
        for cut in self.cuts:
            row = cut.store.schema.arrays[path].shape[1]
            for unit in _touched(cut):
                start, stop = max(unit.start, cut.start), min(unit.stop, cut.stop)
                first, last = (token + at - cut.start for at in (start, stop - 1))
                room[first // grid.step : last // grid.step + 1] += row
            token += len(cut)
        most = -(-int(room.max()) // RAGGED_CHUNK) * RAGGED_CHUNK
        dtype = self._first.schema.arrays[path].dtype
        return Array(dims=RAGGED, shape=(len(grid), most), dtype=dtype, chunks=(1, RAGGED_CHUNK), shards=(1, most))

    @cached_property
    def paths(self) -> list[str]:
        """The arrays that are kept."""
        groups = dict.fromkeys(path.rpartition("/")[0] for path in self._first.schema.arrays)
        if missing := [group for group in self.kept if group not in groups]:
            raise SchemaError(f"{self._first.path.parent} has no {missing[0]!r}; it has {', '.join(groups)}")
        return [path for path in self._first.schema.arrays if path.rpartition("/")[0] in self.kept]

    def layers(self, path: str) -> NDArray[np.int64] | None:
        """Rows along `layer` that are kept of an array; None where it has no layers."""
        group = path.rpartition("/")[0]
        label = self._first.labels.get(f"{group}/layer")
        if label is None or "layer" not in self._first.schema.arrays[path].dims:
            return None
        wanted = self.kept[group]
        there = label[1].tolist()
        if wanted is None:
            return np.arange(len(there))
        if missing := [layer for layer in wanted if layer not in there]:
            raise SchemaError(f"{self._first.path.parent}: {group} has no layer {missing[0]}; it has {there}")
        return np.array([there.index(layer) for layer in sorted(set(wanted))], dtype=np.int64)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What determines the values: what determined those of the sources, and which rows of which these are."""
        said = [cut.store.header.provenance for cut in self.cuts]
        about = shared(said)
        alike = {key: value for key, value in about.get("determines", {}).items() if key not in ("schema", "source")}
        rows = [{"fingerprint": cut.store.fingerprint, **cut.to_json()} for cut in self.cuts]
        payload = {**alike, "schema": self.schema.to_json(), "source": {"rows_of": rows}}
        kept: dict[str, Any] = {key: about[key] for key in ("model", "skip_positions", "imported") if key in about}
        if "dictionaries" in about:
            kept["dictionaries"] = {group: one for group, one in about["dictionaries"].items() if group in self.kept}
        runs = [str(cut.store.path.parent.parent) for cut in self.cuts]
        cut_from = [{"run": run, **row} for run, row in zip(runs, rows, strict=True)]
        determines = json.loads(canonical_json(payload))  # as a store gives it back, so that equal ones compare equal
        return {"determines": determines, **kept, "versions": versions(), "cut_from": cut_from}

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.provenance["determines"])

    def open(self) -> Store:
        """The store, made if it is not there. FingerprintMismatch if something else stands in its place."""
        return Store.create(self.folder, self.schema, self.fingerprint, self.provenance)

    # ── a unit ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, store: Store, unit: Unit) -> Record:
        """Reads, writes and records a unit. IncompleteStore and CorruptStore of what is read, DiskFull."""
        writer = UnitWriter(store, unit)
        for piece in self.pieces(unit, writer.rows["sequence"]):
            writer.put(piece)
        return writer.finish({})

    def pieces(self, unit: Unit, sequences: slice) -> Iterator[xr.DataTree]:
        """A unit's rows, cut by cut, some tokens at a time."""
        token = sequence = 0
        for number, cut in enumerate(self.cuts):
            start, stop = max(unit.start, token), min(unit.stop, token + len(cut))
            for at in range(start, stop, self._rows):
                span = slice(at - token + cut.start, min(at + self._rows, stop) - token + cut.start)
                yield self._tokens(number, cut, span, token - cut.start)
            first, beyond = cut.sequences
            own = slice(max(sequences.start, sequence), min(sequences.stop, sequence + beyond - first))
            if own.start < own.stop:
                yield self._sequences(number, cut, own, first - sequence)
            token, sequence = token + len(cut), sequence + beyond - first

    @cached_property
    def _rows(self) -> int:
        """Tokens that are read at a time."""
        arrays = [array for array in self.schema.arrays.values() if "token" in array.dims]
        row_bytes = sum(array.nbytes // max(1, self.schema.n_token) for array in arrays)
        chunk = max((array.chunks[array.dims.index("token")] for array in arrays), default=1)
        return max(chunk, SHARD_BYTES // max(1, row_bytes) // chunk * chunk)

    def _tokens(self, number: int, cut: Cut, span: slice, shift: int) -> xr.DataTree:
        """What lies along `token` of a span of a source, at its place in the whole."""
        store, coords = cut.store, {"token": np.arange(span.start + shift, span.stop + shift)}
        self._verify(number, cut, span)
        nodes = {path.rpartition("/")[0]: xr.Dataset(coords=coords) for path in self.paths}
        for path in self.paths:
            array, (group, _, name) = store.schema.arrays[path], path.rpartition("/")
            if array.ragged:
                continue
            if "token" in array.dims:
                nodes[group] = nodes[group].assign({name: (array.dims, self._read(store, path, {"token": span}))})
            if name == COUNT:
                nodes[group] = nodes[group].assign(_nonzeros(FeatureRows(store, group), span))
        for group, found in self._statistics(cut, span).items():
            if group in nodes:
                nodes[group] = nodes[group].assign_attrs(statistics=found)
        return xr.DataTree.from_dict({f"/{group}": node for group, node in nodes.items()})

    def _sequences(self, number: int, cut: Cut, own: slice, shift: int) -> xr.DataTree:
        """What lies along `sequence`: of the sequences `own` of the whole."""
        nodes = {}
        span = slice(own.start + shift, own.stop + shift)
        for path in self.paths:
            array, (group, _, name) = cut.store.schema.arrays[path], path.rpartition("/")
            if "sequence" in array.dims:
                starts = cut.store.labels["sequences/start"][1][span]
                self._verify(number, cut, slice(int(starts[0]), int(starts[-1]) + 1))
                values = self._read(cut.store, path, {"sequence": span})
                coords = {"sequence": np.arange(own.start, own.stop)}
                nodes[f"/{group}"] = xr.Dataset({name: (array.dims, values)}, coords=coords)
        return xr.DataTree.from_dict(nodes)

    def _read(self, store: Store, path: str, span: Mapping[str, slice]) -> NDArray[Any]:
        """Rows of an array in their kept form, with the layers that are kept."""
        array, layers = store.schema.arrays[path], self.layers(path)
        chosen: dict[str, slice | NDArray[np.int64]] = {**span, **({} if layers is None else {"layer": layers})}
        key = [chosen.get(dim, slice(None)) for dim in array.dims]
        return read_outer(store, path, key, decoded=False)

    def _statistics(self, cut: Cut, span: slice) -> dict[str, dict[str, NDArray[Any]]]:
        """What was recorded of the source's units that begin in a span and are wholly in the cut, to be told again.
        Nobody could say what part of a unit's numbers is that of some of its tokens.
        """
        store, found = cut.store, dict[str, dict[str, NDArray[Any]]]()
        grid = store.schema.grid
        for index in range(-(-span.start // grid.step), -(-span.stop // grid.step)):
            if grid[index].stop > cut.stop:
                continue
            for group, said in store.ledger.record(index).get("statistics", {}).items():
                label = store.labels.get(f"{group}/layer")
                layers = self.layers(f"{group}/value") if label is not None and group in self.kept else None
                known = found.setdefault(group, {})
                for name, values in said.items():
                    one = np.asarray(values)
                    one = one[layers] if layers is not None and len(one) == len(label[1]) else one  # type: ignore[index]
                    merge = np.maximum if name.endswith("_max") else np.add
                    known[name] = merge(known[name], one) if name in known else one
        return found

    def _verify(self, number: int, cut: Cut, span: slice) -> None:
        """Compares the objects that a span is read from with what was recorded of them, once for every unit."""
        store = cut.store
        for unit in _touched(Cut(store, span.start, span.stop, 0, 0)):
            if (number, unit.index) in self._whole:
                continue
            record = store.ledger.record(unit.index)
            if faults := store.record_faults(unit, record):
                raise CorruptStore(f"{faults[0]}. `forebay verify` names all that is damaged")
            for key in self._objects(store, unit):
                if wrong := disagreement(store.path / key, record["objects"][key]):
                    raise CorruptStore(
                        f"{store.path / key} is not what was recorded: {wrong}. `forebay repair` drops its unit, and "
                        "running the recipe again computes it anew"
                    )
            self._whole.add((number, unit.index))

    def _objects(self, store: Store, unit: Unit) -> Iterator[str]:
        """Keys of the objects of a unit that hold anything that is kept."""
        rows = store.schema_with_labels.rows(unit)
        for path in self.paths:
            array, layers = store.schema.arrays[path], self.layers(path)
            for index in array.objects(rows):
                if layers is None or index[array.dims.index("layer")] in layers:
                    yield store.object_key(path, index)


def _touched(cut: Cut) -> Iterator[Unit]:
    grid = cut.store.schema.grid
    return (grid[index] for index in range(cut.start // grid.step, -(-cut.stop // grid.step)))


def _nonzeros(rows: FeatureRows, span: slice) -> dict[str, Any]:
    """The ragged features of a span, in their kept form."""
    found = rows.read(span.start, span.stop)
    kept = format_of(rows.dtype)
    value = kept.encode(found.value).astype(kept.kept, copy=False)
    return {"feature": ("nonzero", found.feature.astype(np.int32)), "value": ("nonzero", value)}


def everything(store: Store) -> Kept:
    """All groups of a store, with all their layers."""
    return {path.rpartition("/")[0]: None for path in store.schema.arrays}
