"""What a stranger's store may not ask for: checks of everything that is read from its metadata.

A store is data of somebody's. Its header names arrays, and its arrays name codecs, shapes and chunks; before any of it
is believed it is held against what forebay writes, here and nowhere else. Bounds are far above what real stores hold,
and the checks read nothing but what is being opened anyway.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import FORMATS
from .errors import CorruptStore, UnsafePath, nearest

if TYPE_CHECKING:
    from .places import Place
    from .schema import Array, Schema

Labels = Mapping[str, tuple[tuple[str, ...], NDArray[Any]]]
"""Path of a label → its dimensions and its values."""

MOST_TOKENS = 2**48
MOST_UNITS = 2**24
MOST_ARRAYS = 2**16
MOST_OBJECTS = 2**20
"""Objects of one array in one unit."""
MOST_CHUNK_BYTES = 2**36
MOST_DIMS = 16
MOST_NAME = 200
"""Characters of a part of a name."""
MOST_METADATA_BYTES = 2**20
"""Of the metadata of one array."""
LABEL_CHUNK = 2**17
UNBACKED = 2**24
"""Values of a label array that may be absent from the disk, as zeros and empty strings are."""
MOST_STRING_BYTES = 2**31
"""Of the strings in one chunk of a label array, unpacked."""

MOST_LABEL_BYTES = 2**35

_LABEL_TYPES = {"int64": 8, "int32": 4, "uint64": 8, "uint32": 4, "string": 0, "variable_length_utf8": 0}
_LONG = ("token", "sequence", "unit")
_FRAME_HEADER = 18
"""The most bytes that tell how long a frame of Zstandard is."""


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_name(text: object) -> bool:
    """Whether a text may be one part of a path in a store: printable, no way out, no name that Zarr needs."""
    return (
        isinstance(text, str)
        and 0 < len(text) <= MOST_NAME
        and text.isprintable()
        and text[0] != "."
        and "/" not in text
        and "\\" not in text
        and text not in ("c", "zarr.json")
    )


def is_path(text: object) -> bool:
    """Whether a text may be the path of an array or a group: names with slashes between them, at most eight."""
    return isinstance(text, str) and len(text) <= 8 * MOST_NAME and all(map(is_name, text.split("/")))


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def require_no_links(root: Place, *places: Place) -> None:
    """UnsafePath if any of these places, or a folder between them and `root` above them, is a symbolic link: whoever
    made it would have what is written, or removed, fall elsewhere. `root` itself may be reached by any way. Object
    stores have no links.
    """
    for place in places if isinstance(root, Path) else ():
        at, place = root, Path(str(place))
        for part in place.relative_to(root).parts:
            at = at / part
            if os.path.islink(str(at)):
                raise UnsafePath(
                    f"{at} is a symbolic link, and nothing is written or removed through one: what lies behind it may "
                    "not be this run's. Put the whole run where the room is, and link to the run's folder if need be"
                )


# ── growth ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_STAGED = re.compile(r"\.growing\.[0-9a-f]{32}")
_REPLACED = ("recipe.json",)
"""Files of a run's folder that a growth replaces."""


def check_journal(run: Place, journal: Mapping[str, Any]) -> None:
    """UnsafePath unless the journal of a growth names what such a journal does, all of it in the run's folder and
    through no link: whoever wrote it decides what is written and removed.
    """
    stores, files = journal.get("stores"), journal.get("files")
    if not isinstance(stores, list) or not isinstance(files, dict):
        raise UnsafePath(f"{run}: what is to be made longer is not said as forebay says it. Delete growing.json")
    if wrong := [name for name, text in files.items() if name not in _REPLACED or not isinstance(text, str)]:
        raise UnsafePath(f"{run}: a growth would write {wrong[0]!r:.199}; it replaces {', '.join(_REPLACED)} only")
    for entry in stores:
        check_entry(run, entry)


def check_entry(run: Place, entry: Any) -> None:
    """The same of one store's part."""
    keys = ("step", "from", "to", "staged", "n_unit", "files", "gone")
    if not isinstance(entry, dict) or not {*keys} <= entry.keys():
        raise UnsafePath(f"{run}: a growth says {entry!r:.199}, without one of {', '.join(keys)}")
    if not is_name(entry["step"]) or not _STAGED.fullmatch(str(entry["staged"])) or type(entry["n_unit"]) is not int:
        raise UnsafePath(f"{run}: a growth is of {entry['step']!r:.99}, from {entry['staged']!r:.99}")
    step = run / entry["step"]
    for kind in ("files", "gone"):
        for key in entry[kind] if isinstance(entry[kind], list) else (None,):
            if not is_key(key):
                raise UnsafePath(f"{step}: a growth has {key!r:.199} among its {kind}, which leads out of its store")
            for place in (step / "data.zarr" / key, step / entry["staged"] / key):
                require_no_links(run, place.parent)


def is_key(text: object) -> bool:
    """Whether a text may be the key of an object or of metadata below data.zarr."""
    return (
        isinstance(text, str)
        and 0 < len(text) <= 16 * MOST_NAME
        and all(part.isprintable() and part not in ("", ".", "..") and "\\" not in part for part in text.split("/"))
    )


# ── the header ───────────────────────────────────────────────────────────────────────────────────────────────────────


def check_schema(schema: Schema, where: object) -> None:
    """CorruptStore unless a schema is one that forebay could have written: names, numbers, and how they fit."""
    for fault in _schema_faults(schema):
        raise CorruptStore(f"{where}: {fault}. No store of forebay's says so: it is damaged, or made to do harm")


def _schema_faults(schema: Schema) -> Iterator[str]:
    if not isinstance(schema.kind, str) or not schema.kind.isprintable() or len(schema.kind) > MOST_NAME:
        yield f"its kind is {schema.kind!r:.99}"
    if schema.compression not in ("none", "zstd"):
        yield f"its compression is {schema.compression!r:.99}; 'none' and 'zstd' are known"
    for name, least in (("n_token", 0), ("unit_tokens", 1)):
        value = getattr(schema, name)
        if type(value) is not int or not least <= value <= MOST_TOKENS:
            yield f"{name} is {value!r:.99}; a number from {least} to {MOST_TOKENS:,} was expected"
            return
    if len(schema.grid) > MOST_UNITS:
        yield f"{schema.n_token:,} tokens in units of {schema.unit_tokens:,} are more than {MOST_UNITS:,} units"
        return
    if len(schema.arrays) > MOST_ARRAYS:
        yield f"it names {len(schema.arrays):,} arrays; at most {MOST_ARRAYS:,} are read"
        return
    sizes = {"token": schema.n_token, "unit": len(schema.grid)}
    for path, array in schema.arrays.items():
        if not is_path(path):
            yield f"it names an array {path!r:.199}, which is no path in a store"
        for fault in _array_faults(array, sizes, schema.unit_tokens):
            yield f"{path}: {fault}"


def _array_faults(array: Array, sizes: Mapping[str, int], unit_tokens: int) -> Iterator[str]:
    dims, parts = array.dims, (array.shape, array.chunks, array.shards)
    if not (isinstance(array.dtype, str) and array.dtype in FORMATS):
        yield f"dtype {array.dtype!r:.99} cannot be kept.{nearest(str(array.dtype)[:99], FORMATS)}"
        return
    if not 0 < len(dims) <= MOST_DIMS or len(set(dims)) < len(dims) or not all(map(is_name, dims)):
        yield f"its dimensions are {dims!r:.199}"
        return
    if any(len(part) != len(dims) or any(type(n) is not int for n in part) for part in parts):
        yield f"shape, chunks and shards are not one number for each of {', '.join(dims)}"
        return
    for dim, size, chunk, shard in zip(dims, *parts, strict=True):
        if not 0 <= size <= MOST_TOKENS or chunk < 1 or shard < 1 or shard % chunk:
            yield f"{dim} is {size} long, in chunks of {chunk} and shards of {shard}"
            return
        if size != sizes.get(dim, size) or (dim == "token" and shard != unit_tokens):
            yield f"{dim} is {size} long, in shards of {shard}; the store has {sizes[dim]}, in units of {unit_tokens}"
        if dim == "sequence" and size > sizes["token"]:
            yield f"{size:,} sequences have only {sizes['token']:,} tokens"
    n_object = math.prod(-(-n // m) for d, n, m in zip(dims, array.shape, array.shards, strict=True) if d not in _LONG)
    if n_object > MOST_OBJECTS:
        yield f"a unit of it would be {n_object:,} objects; at most {MOST_OBJECTS:,} are read"
    n_byte = math.prod(array.chunks) * np.dtype(FORMATS[array.dtype].kept).itemsize
    if n_byte > MOST_CHUNK_BYTES:
        yield f"its chunks are {n_byte:,} bytes; at most {MOST_CHUNK_BYTES:,} are read"


# ── labels ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_OFFSETS = ("sequences/start", "documents/start")


def label_paths(schema: Schema) -> list[str]:
    """Where a store may have labels: the offsets of sequences and documents, and what lies along an axis of a group."""
    own = {
        f"{path.rpartition('/')[0]}/{dim}".lstrip("/")
        for path, array in schema.arrays.items()
        for dim in array.dims
        if dim not in _LONG
    }
    return sorted({*_OFFSETS, "sequences/document", "documents/id", *own} - {*schema.arrays})


def check_labels(labels: Labels, schema: Schema, where: object) -> None:
    """CorruptStore unless the labels that were read are on the axes that they label, as long as these, and offsets
    ascend from 0 to the tokens' number.
    """
    for fault in _label_faults(labels, schema):
        raise CorruptStore(f"{where}: {fault}. No store of forebay's says so: it is damaged, or made to do harm")


def _label_faults(labels: Labels, schema: Schema) -> Iterator[str]:
    if _OFFSETS[0] not in labels:
        yield f"it has no {_OFFSETS[0]}"
        return
    sizes: dict[str, int] = {}
    for path, (dims, values) in labels.items():
        group, _, name = path.rpartition("/")
        dim = {"sequences": "sequence", "documents": "document"}.get(group, name)
        if dims != (dim,) or values.ndim != 1:
            yield f"{path} lies along {dims!r:.99}, not along {dim}"
            return
        due = [array.shape[array.dims.index(dim)] for array in _arrays_of(schema, group) if dim in array.dims]
        if any(size != len(values) for size in [*due, sizes.setdefault(f"{group}/{dim}", len(values))]):
            yield f"{path} has {len(values)} values for {due or sizes[f'{group}/{dim}']}"
    for path in _OFFSETS:
        start = labels[path][1] if path in labels else np.zeros(0, np.int64)
        if start.dtype.kind not in "iu":
            yield f"{path} holds no numbers"
        elif len(start) and (
            start[0] != 0 or np.diff(start.astype(np.int64), append=schema.n_token).min() < (path == _OFFSETS[0])
        ):
            yield f"{path} does not ascend from 0 to {schema.n_token:,}"


def _arrays_of(schema: Schema, group: str) -> list[Array]:
    return [array for path, array in schema.arrays.items() if path.rpartition("/")[0] == group]


# ── the metadata of arrays ───────────────────────────────────────────────────────────────────────────────────────────


def check_array(path: Place, array: Array, compression: str) -> None:
    """CorruptStore unless the zarr.json at `path` describes the array of the header, packed as forebay packs: so no
    codec, data type or chunk layout comes into play but those few, whatever else the installed Zarr knows.
    """
    said = _metadata(path)
    _agree(path, "data_type", said.get("data_type"), FORMATS[array.dtype].kept)
    _agree(path, "chunks", _of(said, "chunk_grid", "chunk_shape"), list(array.shards))
    shape = said.get("shape")
    if not isinstance(shape, list) or len(shape) != len(array.dims) or any(type(n) is not int for n in shape):
        raise _damaged(path, "shape", shape, list(array.shape))
    for dim, size, due in zip(array.dims, shape, array.shape, strict=True):
        # A store that grows has the longer array before its header says so.
        if not (due <= size <= MOST_TOKENS if dim in _LONG else size == due):
            raise _damaged(path, f"size along {dim}", size, due)
    _agree(path, "codecs", _names(said.get("codecs")), ["sharding_indexed"])
    inner: Any = said["codecs"][0].get("configuration", {})
    packed = ["bytes", "blosc", "crc32c"] if compression == "zstd" else ["bytes", "crc32c"]
    _agree(path, "inner chunks", inner.get("chunk_shape"), list(array.chunks))
    _agree(path, "codecs of chunks", _names(inner.get("codecs")), packed)
    _agree(path, "codecs of the index", _names(inner.get("index_codecs")), ["bytes", "crc32c"])
    _agree(path, "place of the index", inner.get("index_location", "end"), "end")
    for codec in [*inner["codecs"], *inner["index_codecs"]]:
        _check_codec(path, codec)


def check_label(path: Place) -> int:
    """The length of the label array whose zarr.json is at `path`. CorruptStore unless it is one as forebay writes:
    integers or strings along one dimension, in chunks that unpack to what they should, and not mostly absent.
    """
    said = _metadata(path)
    kind, shape, chunk = said.get("data_type"), said.get("shape"), _of(said, "chunk_grid", "chunk_shape")
    if not isinstance(kind, str) or kind not in _LABEL_TYPES:
        raise _damaged(path, "data_type", kind, "one of " + ", ".join(_LABEL_TYPES))
    if not (isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int and 0 <= shape[0] <= MOST_TOKENS):
        raise _damaged(path, "shape", shape, "one length")
    if not (isinstance(chunk, list) and len(chunk) == 1 and type(chunk[0]) is int and 0 < chunk[0] <= LABEL_CHUNK):
        raise _damaged(path, "chunks", chunk, f"one number up to {LABEL_CHUNK:,}")
    first = "bytes" if _LABEL_TYPES[kind] else "vlen-utf8"
    _agree(path, "codecs", _names(said.get("codecs")), [first, "zstd"])
    for codec in said["codecs"]:
        _check_codec(path, codec)
    n_byte = chunk[0] * _LABEL_TYPES[kind] or MOST_STRING_BYTES
    n_chunk = sum(1 for _ in _checked_chunks(path.parent / "c", n_byte)) if isinstance(path, Path) else math.inf
    if shape[0] > UNBACKED + n_chunk * chunk[0]:
        raise _damaged(path, "chunks that are there", n_chunk, -(-shape[0] // chunk[0]))
    return shape[0]


def _checked_chunks(folder: Path, most: int) -> Iterator[str]:
    """The chunks of a label array. CorruptStore for one that would unpack to more than `most` bytes, or all to more
    than can be meant.
    """
    import zstandard

    total = 0
    for name in os.listdir(folder) if folder.is_dir() else ():
        path = folder / name
        with open(_regular(path), "rb") as file:
            head = file.read(_FRAME_HEADER)
        try:
            size = zstandard.frame_content_size(head)
        except zstandard.ZstdError as error:
            raise CorruptStore(f"{path} cannot be unpacked: {error}") from error
        if not 0 <= size <= most:
            raise CorruptStore(f"{path} would unpack to {size:,} bytes; at most {most:,} belong there")
        total += size
        if total > MOST_LABEL_BYTES:
            raise CorruptStore(f"{folder} would unpack to more than {MOST_LABEL_BYTES:,} bytes")
        yield name


def _check_codec(path: Place, codec: Mapping[str, Any]) -> None:
    settings = codec.get("configuration") or {}
    if settings.get("endian", "little") != "little" or settings.get("cname", "zstd") != "zstd":
        raise _damaged(path, "codec", codec, "little-endian bytes, or Blosc with zstd")


def _names(codecs: object) -> object:
    if not isinstance(codecs, list) or not all(isinstance(codec, dict) for codec in codecs):
        return codecs
    return [codec.get("name") for codec in codecs]


def _of(said: Mapping[str, Any], name: str, key: str) -> Any:
    """A setting of the regular chunk grid; None of any other."""
    found = said.get(name)
    if (
        not isinstance(found, dict)
        or found.get("name") != "regular"
        or not isinstance(found.get("configuration"), dict)
    ):
        return None
    return found["configuration"].get(key)


def _agree(path: Place, what: str, said: object, due: object) -> None:
    if said != due:
        raise _damaged(path, what, said, due)


def _damaged(path: Place, what: str, said: object, due: object) -> CorruptStore:
    return CorruptStore(f"{path}: {what}: {said!r:.199}; {due!r} was expected. It is damaged, or no store of forebay's")


def _metadata(path: Place) -> dict[str, Any]:
    """The metadata of a Zarr array, from a file of bounded size that is read without Zarr."""
    if isinstance(path, Path) and _regular(path).stat().st_size > MOST_METADATA_BYTES:
        raise CorruptStore(f"{path} is larger than {MOST_METADATA_BYTES:,} bytes, as no array's metadata are")
    try:
        said = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptStore(f"{path} is not readable as JSON ({error})") from error
    known = isinstance(said, dict) and said.get("node_type") == "array" and said.get("zarr_format") == 3
    if not known or said.get("storage_transformers"):
        raise CorruptStore(f"{path} does not describe an array as forebay writes them")
    return said  # type: ignore[no-any-return]


def _regular(path: Path) -> Path:
    """The path again. CorruptStore for what is there and no file: a pipe would be waited on for ever."""
    if path.exists() and not path.is_file():
        raise CorruptStore(f"{path} is no file")
    return path
