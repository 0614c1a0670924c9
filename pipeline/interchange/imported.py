"""Runs written from other libraries' files: what their stores say of themselves, and the run's folder around them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ...stages.models.points import HookPoint
from ...stores.errors import FingerprintMismatch, SchemaError, nearest
from ...stores.fingerprint import canonical_json, fingerprint, sha256_files, versions
from ...stores.grid import Unit
from ...stores.ledger import Record, read_json
from ...stores.places import Place, write_atomic
from ...stores.schema import Schema, along_token
from ...stores.store import Store
from ...stores.untrusted import require_no_links
from ...stores.writer import UnitWriter
from ..filling import check_space, fill
from ..progress import Progress
from ..run import Outcome

if TYPE_CHECKING:
    import xarray as xr

VERSION = 1
"""Raised when other values may come of the same files."""
UNIT_TOKENS = 2**20
MOST_CONFIG_BYTES = 2**20

Pieces = Callable[[Unit], "Iterator[xr.DataTree]"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a run was imported from: the `format`, the folder, its configuration as it was read, the model's name as it
    is given there, sha256 of every file by its path in the folder, and the text of a tokenizer.json.
    """

    format: str
    source: Path
    config: Mapping[str, Any]
    model: str
    files: Mapping[str, str]
    tokenizer: str | None

    def to_json(self) -> dict[str, Any]:
        return {"format": self.format, "source": str(self.source), "config": dict(self.config)}


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A store that will hold what other files say: `pieces` gives the labelled rows of a unit.

    `parameters` are what the caller chose and the values follow from; `about` is what its header says besides.
    """

    folder: Place
    schema: Schema
    origin: Origin
    parameters: Mapping[str, Any]
    pieces: Pieces
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What determines the values: the files, and what was chosen. See docs/store-format.md."""
        origin = self.origin
        tokenizer = None if origin.tokenizer is None else fingerprint(origin.tokenizer)
        payload = {
            "step": "import",
            "version": VERSION,
            "parameters": {"format": origin.format, **self.parameters},
            "files": [],
            "identity": {"model": origin.model, "tokenizer": tokenizer},
            "numerics": {},
            "schema": self.schema.to_json(),
            "source": {"files": dict(origin.files)},
        }
        return {
            "determines": json.loads(canonical_json(payload)),  # as a store gives it back, so that equal ones are equal
            "model": {"source": origin.model, "revision": None},
            "versions": versions(),
            "imported": origin.to_json(),
            **self.about,
        }

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.provenance["determines"])

    def open(self) -> Store:
        """The store, made if it is not there. FingerprintMismatch if something else stands in its place."""
        return Store.create(self.folder, self.schema, self.fingerprint, self.provenance)

    def write(self, store: Store, unit: Unit) -> Record:
        """Reads, writes and records a unit. SchemaError for values that are refused, DiskFull."""
        writer = UnitWriter(store, unit)
        for piece in self.pieces(unit):
            writer.put(piece)
        return writer.finish({})


def import_stores(stores: Sequence[Imported], folder: Place, progress: Progress) -> Outcome:
    """Writes the stores of a run that is imported into `folder`, or goes on with it."""
    check_space(folder, stores, "Import fewer hook points")
    _save(stores, folder)
    return fill(stores, folder, progress)


def _save(stores: Sequence[Imported], folder: Place) -> None:
    """Writes recipe.json, which says that there is no recipe, and tokenizer.json. FingerprintMismatch where another run
    lies in the folder.
    """
    origin, path = stores[0].origin, folder / "recipe.json"
    said = {
        "imported": {**origin.to_json(), "model": origin.model},
        "fingerprints": {one.name: one.fingerprint for one in stores},
    }
    if path.is_file():
        standing = read_json(path)
        if "imported" not in standing or standing.get("fingerprints") != said["fingerprints"]:
            raise FingerprintMismatch(
                f"{folder} holds another run, or the same files imported with other settings, or files that have "
                "changed since. Import into another folder, or delete it"
            )
    else:
        write_atomic(path, canonical_json({**said, "versions": versions()}).encode())
    if origin.tokenizer is not None and not (folder / "tokenizer.json").is_file():
        write_atomic(folder / "tokenizer.json", origin.tokenizer.encode())


# ── what formats have in common ──────────────────────────────────────────────────────────────────────────────────────


def digests(source: Path, paths: Sequence[Path], folder: Place) -> dict[str, str]:
    """sha256 of files by their path in `source`, kept in the run's files.json, so that none is read twice for it."""
    folder.mkdir(parents=True, exist_ok=True)
    require_no_links(folder, folder / "files.json")
    found = sha256_files(paths, folder / "files.json")
    return {path.relative_to(source).as_posix(): digest for path, digest in found.items()}


def read_config(path: Path, what: str) -> dict[str, Any]:
    """A configuration, a JSON object. SchemaError where there is none, with `what` the library keeps in it."""
    if not path.is_file():
        raise SchemaError(f"{path} is missing: it holds {what}. Copy it from where the files were made")
    if path.stat().st_size > MOST_CONFIG_BYTES:
        raise SchemaError(f"{path} is larger than {MOST_CONFIG_BYTES:,} bytes, as no configuration is")

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"{word} is no number of JSON's")

    try:
        found = json.loads(path.read_bytes(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise SchemaError(f"{path} holds {type(found).__name__}; a JSON object was expected")
    return found


def read_tokenizer_text(path: Path | None) -> str | None:
    """The text of a tokenizer.json, which must be one. SchemaError."""
    if path is None:
        return None
    from ...stages.models.errors import ModelError
    from ...stages.models.tokenizer_json import read_tokenizer

    try:
        text = path.read_text(encoding="utf-8")
        read_tokenizer(text)
    except (OSError, ValueError, ModelError) as error:
        raise SchemaError(f"{path} is no tokenizer.json: {error}") from error
    return text


def model_name(given: str | None, found: object, where: Path, key: str) -> str:
    """The name of the model: the one that is given, or what the configuration says."""
    name = found if given is None else given
    if not isinstance(name, str) or not name:
        raise SchemaError(f"{where} does not name the model ({key} is {found!r:.99}). Say which with model=, --model")
    return name


def check_renamed(rename: Mapping[str, str], there: Sequence[str], where: Path) -> None:
    """SchemaError for new names of hook points that are not there."""
    for name in rename:
        if name not in there:
            raise SchemaError(
                f"{where} has no hook point {name!r} to rename.{nearest(name, there)} It has: {', '.join(there)}"
            )


def chosen(asked: Sequence[str] | None, there: Sequence[str], where: Path) -> list[str]:
    """The names that are asked for, or all, in the order in which they are there. SchemaError."""
    if not there:
        raise SchemaError(f"{where} holds no hook point: it has no folder but those whose names begin with a dot")
    for name in asked or ():
        if name not in there:
            raise SchemaError(f"{where} has no {name!r}.{nearest(name, there)} It has: {', '.join(there)}")
    return [name for name in there if asked is None or name in asked]


def folders_of(source: Path) -> list[str]:
    """Names of the folders in a folder. SchemaError where there is no such folder."""
    if not source.is_dir():
        raise SchemaError(f"{source} is no folder of this machine: download the files, and give the folder")
    return sorted(path.name for path in source.iterdir() if path.is_dir() and path.name[0] != ".")


def tokens_store(
    folder: Place, origin: Origin, labels: Mapping[str, Any], context: int, unit_tokens: int, pieces: Pieces
) -> Imported:
    """The store of the tokens, all sequences `context` long: ids alone, for where they lie in a text is not known."""
    n_token = len(labels["sequences/start"][1]) * context
    schema = Schema(
        kind="tokens",
        n_token=n_token,
        unit_tokens=unit_tokens,
        arrays={"token_id": along_token(("token",), {"token": n_token}, "uint32", unit_tokens)},
        labels=labels,
    )
    return Imported(folder=folder / "tokens", schema=schema, origin=origin, parameters={}, pieces=pieces)


def labels_of(n_sequence: int, context: int, ids: Sequence[str]) -> dict[str, tuple[tuple[str, ...], NDArray[Any]]]:
    """Labels of sequences of one length, each of which stands as a document of its own: where documents begin is not
    known.
    """
    starts = np.arange(n_sequence, dtype=np.int64) * context
    return {
        "sequences/start": (("sequence",), starts),
        "sequences/document": (("sequence",), np.arange(n_sequence, dtype=np.int64)),
        "documents/start": (("document",), starts),
        "documents/id": (("document",), np.array(ids, dtype=object)),
    }


def token_unit(context: int, given: int | None) -> int:
    """Tokens in a unit of the tokens, a multiple of the sequences' length. SchemaError for a given one that is none."""
    if given is not None and (given < 1 or given % context):
        raise SchemaError(f"unit_tokens = {given} must be a multiple of the sequences' length, {context}")
    return given or max(1, UNIT_TOKENS // context) * context


def as_token_ids(found: NDArray[Any], where: Path) -> NDArray[np.uint32]:
    """Token ids as they are kept, end to end. SchemaError for a number that is no id."""
    ids = found.reshape(-1)
    wrong = np.flatnonzero((ids < 0) | (ids >= 2**32))
    if len(wrong):
        raise SchemaError(f"{where} holds {ids[wrong[0]]} among its tokens, which is the id of none")
    return ids.astype(np.uint32)


def parse_point(name: str, meant: str) -> HookPoint:
    """The hook point that a name of theirs is to have. HookError for what is none; SchemaError for one without a vector
    a token.
    """
    point = HookPoint.parse(meant)
    if point.dims[:2] != ("sequence", "position") or len(point.dims) != 3:
        raise SchemaError(f"{name!r} holds a vector a token; {point} is [{', '.join(point.dims)}]: choose another name")
    return point
