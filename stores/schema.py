"""What a store will hold, complete before its first byte: arrays, shards, labels, versions.

A `Schema` is geometry and meaning. From it follow the Zarr metadata, the objects that a unit of work owns, and every
check of what a stage hands over. It is written into the store's own attributes as JSON, so that a store explains
itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import format_of
from .errors import CorruptStore, ForebayError, SchemaError, StoreNotFound, UnsafePath, nearest
from .grid import Grid, Unit
from .ledger import read_json
from .places import Place, names
from .untrusted import check_schema, is_name

FORMAT = 1
"""Version of the layout on disk. Raised when older readers would misread a store."""

DATA = "data.zarr"
"""Name of the Zarr hierarchy in a step's folder."""

GROWING = "growing.json"
"""Name of the file beside a store, and in a run's folder, while they are made longer; see `growth`."""

MOST_HEADER_BYTES = 2**26
CHUNK_BYTES = 2**20
SHARD_BYTES = 2**26
UNIT_BYTES = 2**28
"""Bounds of what is chosen where nobody says otherwise: of an object, and of a unit over all its arrays."""
RAGGED_CHUNK = 2**16
RAGGED = ("unit", "nonzero")
"""Dimensions of what varies in number from token to token: a row a unit, filled from its start and never further."""
LABELS = ("sequences/start", "sequences/document", "documents/start", "documents/id")
"""Label arrays that every store carries, so that each can be read alone: where sequences and documents start on
`token`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """One array of a store. `chunks` is the least that is read, `shards` the object on disk; both run along `dims`."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    shards: tuple[int, ...]

    @property
    def ragged(self) -> bool:
        """Whether a unit's row of the array holds as many values as the unit happens to have, end to end."""
        return self.dims == RAGGED

    @property
    def nbytes(self) -> int:
        """Bytes on disk before compression; 0 for a ragged array, whose rows have no length beforehand."""
        return 0 if self.ragged else int(np.prod(self.shape, dtype=object)) * format_of(self.dtype).itemsize

    def objects(self, rows: Mapping[str, slice]) -> Iterator[tuple[int, ...]]:
        """Indexes of the objects that hold `rows`; whole along the dimensions that `rows` does not name."""
        spans = []
        for dim, size, shard in zip(self.dims, self.shape, self.shards, strict=True):
            part = rows.get(dim, slice(0, size))
            spans.append(range(part.start // shard, -(-part.stop // shard)))
        return itertools.product(*spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """A store before its data. `arrays` and `labels` are keyed by path in the store, as in 'hook_resid_post/value'.

    Every array lies along `token`, along `sequence`, or along `unit` and `nonzero`. A unit of `unit_tokens` tokens is
    exactly one shard along `token` and one row along `unit`; what lies along `sequence` belongs to the unit in which
    the sequence starts. Where a group has ragged arrays, its `count[token]` says how many of their values are a
    token's.
    """

    kind: str
    n_token: int
    unit_tokens: int
    arrays: Mapping[str, Array]
    labels: Mapping[str, tuple[tuple[str, ...], NDArray[Any]]] = field(default_factory=dict)
    compression: str = "none"
    format: int = FORMAT

    @property
    def grid(self) -> Grid:
        return Grid(self.n_token, self.unit_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays on disk before compression, labels and ragged arrays left out."""
        return sum(array.nbytes for array in self.arrays.values())

    def rows(self, unit: Unit) -> dict[str, slice]:
        """The part of each long axis that a unit owns: its tokens, the sequences that start among them, and its row."""
        first, last = np.searchsorted(self.labels["sequences/start"][1], [unit.start, unit.stop])
        return {
            "token": slice(unit.start, unit.stop),
            "sequence": slice(int(first), int(last)),
            "unit": slice(unit.index, unit.index + 1),
        }

    def to_json(self) -> dict[str, Any]:
        """The geometry as JSON values; label values are arrays of the store and not repeated here."""
        arrays = {
            path: {
                "dims": list(a.dims),
                "shape": list(a.shape),
                "dtype": a.dtype,
                "chunks": list(a.chunks),
                "shards": list(a.shards),
            }
            for path, a in self.arrays.items()
        }
        return {
            "kind": self.kind,
            "format": self.format,
            "n_token": self.n_token,
            "unit_tokens": self.unit_tokens,
            "compression": self.compression,
            "arrays": arrays,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Schema:
        """The schema that `to_json` wrote, without labels."""
        arrays = {
            path: Array(
                dims=tuple(a["dims"]),
                shape=tuple(a["shape"]),
                dtype=a["dtype"],
                chunks=tuple(a["chunks"]),
                shards=tuple(a["shards"]),
            )
            for path, a in value["arrays"].items()
        }
        return cls(
            kind=value["kind"],
            n_token=value["n_token"],
            unit_tokens=value["unit_tokens"],
            arrays=arrays,
            compression=value["compression"],
            format=value["format"],
        )


@dataclass(frozen=True, slots=True)
class Header:
    """What a store says about itself, read from one small JSON file."""

    schema: Schema
    fingerprint: str
    provenance: Mapping[str, Any]

    @property
    def grown_from(self) -> list[dict[str, Any]]:
        """What the store was before it grew, oldest first: `fingerprint`, and `n_unit`, how many units it kept."""
        said = self.provenance.get("grown_from")
        kinds = {"fingerprint": str, "n_unit": int}
        return [
            one
            for one in (said if isinstance(said, list) else ())
            if isinstance(one, dict) and all(isinstance(one.get(key), kind) for key, kind in kinds.items())
        ]

    def accepts(self, fingerprint: Any, unit: int) -> bool:
        """Whether a record of `unit` with this fingerprint is one of the store's: its own, or that of what it has grown
        from, where the unit was kept.
        """
        return fingerprint == self.fingerprint or any(
            before["fingerprint"] == fingerprint and unit < before["n_unit"] for before in self.grown_from
        )

    def to_json(self) -> dict[str, Any]:
        return {"schema": self.schema.to_json(), "fingerprint": self.fingerprint, "provenance": dict(self.provenance)}


def holds_store(folder: Place) -> bool:
    """Whether a step's folder holds a store. In an object store it does when its root's metadata stand, which are put
    last.
    """
    return (folder / DATA).exists() if isinstance(folder, Path) else (folder / DATA / "zarr.json").is_file()


def store_folders(run: Place) -> list[Place]:
    """The folders of a run that hold a store, by name. UnsafePath for a name that no step has: what is told of a step
    names it.
    """
    found = [name for name in sorted(names(run)) if name[0] != "." and holds_store(run / name)]
    if wrong := [name for name in found if not is_name(name)]:
        raise UnsafePath(f"{run} holds a store in the folder {wrong[0]!r:.199}, which is no name of a step")
    return [run / name for name in found]


def read_header(data: Place) -> Header:
    """The header of the store at `data` (a `data.zarr` folder). Opens no array and imports no Zarr.

    StoreNotFound if there is none; CorruptStore if it is not forebay's; SchemaError if a newer forebay wrote it.
    """
    path = data / "zarr.json"
    if not path.is_file():
        raise StoreNotFound(
            f"{data} holds no store: {path.name} is missing. Give the folder of a run, or of one of its steps"
        )
    attributes = read_json(path, MOST_HEADER_BYTES).get("attributes")
    said = attributes.get("forebay") if isinstance(attributes, dict) else None
    if not isinstance(said, dict):
        raise CorruptStore(f"{path} is Zarr, but not a store of forebay: its attributes have no 'forebay' entry")
    written = said["schema"].get("format") if isinstance(said.get("schema"), dict) else None
    if written != FORMAT:
        raise SchemaError(
            f"{data} has format {written!r:.99}; this forebay reads format {FORMAT}. Update forebay, or capture again"
        )
    try:
        header = Header(Schema.from_json(said["schema"]), said["fingerprint"], said["provenance"])
        check_schema(header.schema, path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ForebayError):
            raise
        raise CorruptStore(f"{path}: the 'forebay' entry of its attributes is damaged ({error!r:.199})") from error
    known = isinstance(header.fingerprint, str) and isinstance(header.provenance, dict)
    former = header.provenance.get("grown_from", []) if known else None
    if not isinstance(former, list) or not all(map(_is_former, former)):
        raise CorruptStore(f"{path}: the 'forebay' entry of its attributes has no fingerprint or no provenance")
    return header


def _is_former(one: object) -> bool:
    return isinstance(one, dict) and isinstance(one.get("fingerprint"), str) and isinstance(one.get("n_unit"), int)


def unit_tokens_for(row_bytes: int, context: int, *, token_bytes: int = 0, least: int = 1) -> int:
    """Tokens in a unit whose largest shard, of `row_bytes` a token, stays within 64 MiB, and all of whose values, of
    `token_bytes` a token, within 256 MiB, or of which there are `least`: `context` times a power of two, at least once.
    """
    unit = context
    while 2 * unit * row_bytes <= SHARD_BYTES and (unit < least or 2 * unit * token_bytes <= UNIT_BYTES):
        unit *= 2
    return unit


def along_token(dims: Sequence[str], sizes: Mapping[str, int], dtype: str, unit_tokens: int) -> Array:
    """An array with a `token` axis: one shard a unit and, where there is a `layer` axis, a layer; chunks of about 1
    MiB.
    """
    whole = {"token": sizes["token"], "layer": sizes.get("layer", 1)}
    row_bytes = format_of(dtype).itemsize * int(np.prod([sizes[dim] for dim in dims if dim not in whole]))
    rows = _divisor(unit_tokens, max(1, CHUNK_BYTES // row_bytes))
    return Array(
        dims=tuple(dims),
        shape=tuple(sizes[dim] for dim in dims),
        dtype=dtype,
        chunks=tuple({"token": rows, "layer": 1}.get(dim, sizes[dim]) for dim in dims),
        shards=tuple({"token": unit_tokens, "layer": 1}.get(dim, sizes[dim]) for dim in dims),
    )


def along_sequence(dims: Sequence[str], sizes: Mapping[str, int], dtype: str, per_unit: int) -> Array:
    """An array with a `sequence` axis: chunks of one sequence and, of states, one `state_position`; shards of one layer
    and as many positions, then as many of a unit's sequences, as make 64 MiB.
    """
    cut = ("sequence", "layer", "state_position")
    cell_bytes = format_of(dtype).itemsize * int(np.prod([sizes[dim] for dim in dims if dim not in cut]))
    positions = sizes["state_position"] if "state_position" in dims else 1
    positions = _divisor(positions, max(1, SHARD_BYTES // cell_bytes))
    sequences = _divisor(per_unit, max(1, SHARD_BYTES // (cell_bytes * positions)))
    shards = {"sequence": sequences, "layer": 1, "state_position": positions}
    return Array(
        dims=tuple(dims),
        shape=tuple(sizes[dim] for dim in dims),
        dtype=dtype,
        chunks=tuple(1 if dim in cut else sizes[dim] for dim in dims),
        shards=tuple(shards.get(dim, sizes[dim]) for dim in dims),
    )


def sequences_per_unit(starts: NDArray[Any], n_token: int, unit_tokens: int) -> int:
    """Sequences in a shard: as many as start in every unit, if that is the same for all but the last; else one."""
    edges = np.arange(0, n_token + unit_tokens, unit_tokens)
    counts = np.diff(np.searchsorted(starts, edges))
    full = counts[:-1] if len(counts) > 1 else counts
    return int(full[0]) if len(full) and (full == full[0]).all() and counts[-1] <= full[0] and full[0] > 0 else 1


def along_unit(n_token: int, dtype: str, unit_tokens: int, most: int) -> Array:
    """A ragged array: a row a unit, with room for `most` values a token on average. What is not filled takes 16 bytes
    of the object's index for every 65,536 values.
    """
    n_unit = len(Grid(n_token, unit_tokens))
    row = -(-most * min(unit_tokens, n_token) // RAGGED_CHUNK) * RAGGED_CHUNK
    return Array(dims=RAGGED, shape=(n_unit, row), dtype=dtype, chunks=(1, RAGGED_CHUNK), shards=(1, row))


def check_block(schema: Schema, path: str, dims: Sequence[str], dtype: np.dtype[Any]) -> Array:
    """The array that a block's variable belongs to.

    SchemaError if the name, dimensions or stored dtype are not the schema's.
    """
    if path not in schema.arrays:
        raise SchemaError(
            f"{path!r} is not in the schema of {schema.kind}.{nearest(path, schema.arrays)} It has: "
            f"{', '.join(schema.arrays)}"
        )
    array = schema.arrays[path]
    if tuple(dims) != array.dims:
        raise SchemaError(f"{path} has dimensions {tuple(dims)}; the schema of {schema.kind} says {array.dims}")
    kept = np.dtype(format_of(array.dtype).kept)
    if dtype != kept:
        raise SchemaError(f"{path} came as {dtype}; {array.dtype} is kept as {kept}")
    return array


def _divisor(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`."""
    return next(d for d in range(min(size, most), 0, -1) if size % d == 0)
