"""delphi's cache of latents on disk: a file a range of latents, by its header and row by row.

Facts from delphi 0.1.3, `LatentCache.save_splits` and `TensorBuffer`: `latents/<hookpoint>/<first>_<last>.safetensors`
holds `locations` [n, 3] (sequence, position, latent less `first`), ascending, `activations` [n] and `tokens`
[sequence, position], the same in every file. What is not above 1e-5 in magnitude was left out. `log/` is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...stores.errors import SchemaError
from ...stores.feature_rows import MOST_FEATURES
from ...stores.grid import Grid
from .imported import as_token_ids, read_config

THRESHOLD = 1e-5
"""What delphi keeps is above this in magnitude."""
CONFIG = "config.json"
TENSORS = ("activations", "locations", "tokens")
VALUES = {"F16": "float16", "F32": "float32"}
LOCATIONS = {"U16": 2**16, "U32": 2**32, "I32": 2**31, "I64": 2**63}
"""Dtypes of locations, and what is too large for each."""
TOKENS = ("I64", "I32", "U32", "U16")
AT_ONCE = 2**22
"""Rows of a file that are looked at together."""
_FILE = re.compile(r"(\d{1,12})_(\d{1,12})\.safetensors")


@dataclass(frozen=True)
class Split:
    """One file of a cache: latents `first` to `last`, of which `n_row` values were kept as `dtype`."""

    path: Path
    first: int
    last: int
    n_row: int
    dtype: str
    n_sequence: int
    context: int

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of one of the file's tensors."""
        from safetensors import safe_open

        if start == stop:
            return np.zeros((0, 3) if name == "locations" else (0,), np.int64)
        with safe_open(str(self.path), framework="numpy") as file:
            found: NDArray[Any] = file.get_slice(name)[start:stop]
        return found


@dataclass(frozen=True)
class Cache:
    """The files of one hookpoint, by ascending latents, with its configuration."""

    name: str
    config: Mapping[str, Any]
    splits: tuple[Split, ...]

    @property
    def n_feature(self) -> int:
        return self.splits[-1].last + 1

    @property
    def n_row(self) -> int:
        return sum(split.n_row for split in self.splits)

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences, and tokens of each."""
        return self.splits[0].n_sequence, self.splits[0].context


# ── what a folder holds ──────────────────────────────────────────────────────────────────────────────────────────────


def open_cache(folder: Path) -> Cache:
    """The cache of a hookpoint, by the headers of its files. SchemaError."""
    config = read_config(folder / CONFIG, "delphi's settings, and the model's name")
    splits = sorted((_split(path) for path in folder.glob("*.safetensors")), key=lambda split: split.first)
    if not splits:
        raise SchemaError(f"{folder} holds no <first>_<last>.safetensors: there are no latents to import")
    due = config.get("n_splits")
    if isinstance(due, int) and len(splits) < due:
        raise SchemaError(f"{folder} holds {len(splits)} of the {due} files that its {CONFIG} speaks of (n_splits)")
    beyond = 0
    for split in splits:
        if split.first < beyond:
            raise SchemaError(
                f"{split.path} begins with latent {split.first}; the file before it ends with {beyond - 1}"
            )
        if split.first > beyond:
            raise SchemaError(
                f"{folder}: latents {beyond} to {split.first - 1} are in no file: one is missing. Copy it from where "
                "the cache was made"
            )
        beyond = split.last + 1
        for name in ("n_sequence", "context", "dtype"):
            mine, theirs = getattr(split, name), getattr(splits[0], name)
            if mine != theirs:
                raise SchemaError(f"{split.path} differs from {splits[0].path.name}: {name} is {mine}, not {theirs}")
    if beyond > MOST_FEATURES:
        raise SchemaError(f"{folder} has {beyond:,} latents; at most {MOST_FEATURES:,} can be kept")
    return Cache(folder.name, config, tuple(splits))


def _split(path: Path) -> Split:
    """A file by its name and its header. SchemaError for what delphi does not write."""
    from safetensors import SafetensorError, safe_open

    found = _FILE.fullmatch(path.name)
    if found is None or int(found[2]) < int(found[1]):
        raise SchemaError(f"{path} is not named <first>_<last>.safetensors by a range of latents, as 0_127.safetensors")
    try:
        with safe_open(str(path), framework="numpy") as file:
            held = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
            shapes = {name: tuple(one.get_shape()) for name, one in held.items()}
            dtypes = {name: str(one.get_dtype()) for name, one in held.items()}
    except (SafetensorError, OSError) as error:
        raise SchemaError(f"{path} is no safetensors file, or it is damaged or cut off: {error}") from error
    if "tokens" not in shapes:
        raise SchemaError(
            f"{path} has no tokens: cache again with save_tokens=True, so that it is known what fired where"
        )
    if sorted(shapes) != list(TENSORS):
        raise SchemaError(f"{path} holds {', '.join(sorted(shapes))}; expected were {', '.join(TENSORS)}")
    n = shapes["activations"][0] if shapes["activations"] else 0
    if shapes["activations"] != (n,) or shapes["locations"] != (n, 3) or len(shapes["tokens"]) != 2:
        said = ", ".join(f"{name} {list(shapes[name])}" for name in TENSORS)
        raise SchemaError(f"{path} holds {said}; expected were [n], [n, 3] and [sequence, position]")
    if 0 in shapes["tokens"]:
        raise SchemaError(f"{path} holds no tokens: its tensor of them is {list(shapes['tokens'])}")
    known: Mapping[str, Sequence[str]] = {"activations": [*VALUES], "locations": [*LOCATIONS], "tokens": TOKENS}
    for name, dtype in dtypes.items():
        if dtype not in known[name]:
            raise SchemaError(f"{path}: {name} are {dtype}; expected was one of {', '.join(known[name])}")
    n_sequence, context = shapes["tokens"]
    if context > LOCATIONS[dtypes["locations"]] and n:
        raise SchemaError(
            f"{path}: positions up to {context - 1} do not fit its locations, which are {dtypes['locations']}: delphi "
            "has cut them off. Cache again with a shorter context, or with fewer splits"
        )
    return Split(path, int(found[1]), int(found[2]), n, VALUES[dtypes["activations"]], n_sequence, context)


# ── what the files hold ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Survey:
    """How a cache is cut into units: where the rows of each begin in each file, and end, `edges[split, unit + 1]`."""

    unit_tokens: int
    edges: NDArray[np.int64]


def survey_of(cache: Cache, tokens: Split, unit_tokens: int) -> Survey:
    """Looks at every row. SchemaError for those that are out of range, out of order or not finite, and for tokens that
    differ from those of the file `tokens`.
    """
    n_token = cache.shape[0] * cache.shape[1]
    n_unit = len(Grid(n_token, unit_tokens))
    edges = np.zeros((len(cache.splits), n_unit + 1), np.int64)
    for row, split in enumerate(cache.splits):
        _check_tokens(split, tokens)
        counts, last = np.zeros(n_unit, np.int64), -1
        for start in range(0, split.n_row, AT_ONCE):
            stop = min(start + AT_ONCE, split.n_row)
            found = split.rows("locations", start, stop).astype(np.int64)
            _check_range(split, found, start)
            token = found[:, 0] * split.context + found[:, 1]
            key = token * (split.last - split.first + 1) + found[:, 2]
            _check_order(split, key, last, start)
            last = int(key[-1])
            _check_finite(split, split.rows("activations", start, stop), start)
            counts += np.bincount(token // unit_tokens, minlength=n_unit)
        edges[row, 1:] = np.cumsum(counts)
    return Survey(unit_tokens, edges)


def _check_tokens(split: Split, first: Split) -> None:
    if (split.n_sequence, split.context) != (first.n_sequence, first.context):
        raise SchemaError(
            f"{split.path} is of {split.n_sequence} sequences of {split.context} tokens, {first.path} of "
            f"{first.n_sequence} of {first.context}: import each hookpoint into a run of its own"
        )
    rows = max(1, AT_ONCE // split.context)
    for start in range(0, split.n_sequence, rows):
        stop = min(start + rows, split.n_sequence)
        found = split.rows("tokens", start, stop)
        as_token_ids(found, split.path)
        differ = (found != first.rows("tokens", start, stop)).any(axis=1)
        if differ.any():
            raise SchemaError(
                f"{split.path} has other tokens than {first.path}, first in sequence {start + int(differ.argmax())}: "
                "the files are of different caches. Files of one hookpoint must be of one; of several hookpoints, "
                "import each into a run of its own"
            )


def _check_range(split: Split, found: NDArray[np.int64], start: int) -> None:
    limits = np.array([split.n_sequence, split.context, split.last - split.first + 1])
    wrong = ((found < 0) | (found >= limits)).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        raise SchemaError(
            f"{split.path}: row {start + row} of its locations is {found[row].tolist()}; there are {limits[0]} "
            f"sequences of {limits[1]} tokens, and {limits[2]} latents in this file"
        )


def _check_order(split: Split, key: NDArray[np.int64], last: int, start: int) -> None:
    wrong = np.diff(key, prepend=last) <= 0
    if wrong.any():
        raise SchemaError(
            f"{split.path}: row {start + int(wrong.argmax())} of its locations does not come behind the one before it. "
            "delphi writes them ascending by sequence, position and latent: sort them so, and take out what is there "
            "twice"
        )


def _check_finite(split: Split, values: NDArray[Any], start: int) -> None:
    wrong = ~np.isfinite(values)
    if wrong.any():
        row = int(wrong.argmax())
        raise SchemaError(
            f"{split.path}: row {start + row} of its activations is {values[row]}. delphi keeps them as float16, up to "
            "65504: scale the dictionary, or leave this hookpoint out"
        )
