"""Making the stores of a run longer where they lie: units that stay as they are keep their objects and records.

What a store becomes is laid out beside it first, metadata and labels. Then one journal is put into the run's folder,
and from then on everything follows from it, however often it is begun: records of units that change are taken away,
metadata and labels put over the old ones, the header last. So a record never claims what is not there, and a process
that is killed leaves work that the next one finishes.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import CorruptStore, IncompleteStore, SchemaError
from .ledger import Ledger, Record, read_json
from .places import Place, names, put_new, sync_folder, write_atomic
from .schema import DATA, GROWING, LABELS, Header, Schema, read_header
from .store import Store, lay_out
from .untrusted import check_entry, check_journal

STAGED = ".growing"
"""How the names of folders begin in which a longer store's metadata are laid out."""
_CUTS = ("token", "sequence", "unit")
"""The dimensions along which a store may become longer."""


def steady_tokens(old: Schema, new: Schema) -> int:
    """Tokens before the first sequence of `old` that is another one in `new`, its last one at most: where that is a
    window which was not full. Both carry their labels. SchemaError unless `old` begins `new`.
    """
    for path in LABELS:
        before, after = old.labels[path][1], new.labels[path][1]
        if len(after) < len(before) or not np.array_equal(before, after[: len(before)]):
            raise SchemaError(
                f"{path}: what is there is not the beginning of what would be. Documents can only be added behind "
                "those of the run: run all files into another folder"
            )
    starts = old.labels["sequences/start"][1]
    return old.n_token if old.n_token in _ends(new) else int(starts[-1])


def _ends(schema: Schema) -> NDArray[np.int64]:
    return np.append(schema.labels["sequences/start"][1], schema.n_token)


def check_geometry(step: str, old: Schema, new: Schema, n_unit: int) -> None:
    """SchemaError, naming the array, if `n_unit` units of `old` cannot stay as they are because `new` is cut otherwise,
    as attention patterns are by the longest sequence.
    """
    if not n_unit:
        return
    for path in dict.fromkeys((*old.arrays, *new.arrays)):
        before, after = old.arrays.get(path), new.arrays.get(path)
        if before is None or after is None:
            raise SchemaError(f"{step} has {', '.join(old.arrays)}; it would have {', '.join(new.arrays)}")
        for what in ("dims", "dtype", "chunks", "shards"):
            if getattr(before, what) != getattr(after, what):
                raise SchemaError(
                    f"{step}: {path} is kept in {what} {getattr(before, what)} along {before.dims}, and with these "
                    f"files they would be {getattr(after, what)}: the {n_unit} units that are whole would have to be "
                    "written anew. Run all files into another folder"
                )
        wrong = [
            dim
            for dim, one, other in zip(before.dims, before.shape, after.shape, strict=True)
            if one != other and dim not in _CUTS
        ]
        if wrong:
            raise SchemaError(
                f"{step}: {path} would be {after.shape} along {after.dims}, and is {before.shape}: {wrong[0]} cannot "
                "become longer. Run all files into another folder"
            )


def stage_growth(
    store: Store, schema: Schema, fingerprint: str, provenance: Mapping[str, Any], n_unit: int
) -> dict[str, Any]:
    """Lays out beside a store what it becomes, and gives the journal's entry for it. The store is not touched.

    The header remembers what the store was: records of the first `n_unit` units keep the fingerprint they have.
    """
    folder = Path(store.path.parent)
    before = [{**one, "n_unit": min(one["n_unit"], n_unit)} for one in store.header.grown_from]
    lineage = [*before, {"fingerprint": store.fingerprint, "n_unit": n_unit}]
    staged = folder / f"{STAGED}.{uuid.uuid4().hex}"
    lay_out(staged, Header(schema, fingerprint, {**provenance, "grown_from": lineage}))
    sync_folder(folder)
    files = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
    return {
        "step": store.name,
        "from": store.fingerprint,
        "to": fingerprint,
        "n_unit": n_unit,
        "staged": staged.name,
        "files": files,
        "gone": sorted(_objects(store.schema, store) - _objects(schema, store)) if not n_unit else [],
    }


def _objects(schema: Schema, store: Store) -> set[str]:
    return {store.object_key(path, index) for path, array in schema.arrays.items() for index in array.objects({})}


def commit_growth(run: Path, stores: Sequence[Mapping[str, Any]], files: Mapping[str, str]) -> None:
    """Decides that the staged stores grow, and with them `files` of the run's folder (name → text), and does it.

    IncompleteStore if another process does so already, or did since the stores were staged.
    """
    text = json.dumps({"stores": list(stores), "files": dict(files)}, indent=1)
    if not put_new(run / GROWING, text.encode()):
        raise IncompleteStore(f"{run} is being made longer by another process ({GROWING} lies in it). Wait for its end")
    roll_forward(run)


def roll_forward(run: Place) -> bool:
    """Finishes the growth of a run's stores that was decided, if there is one. Whether there was.

    Any number of processes may do so at once. IncompleteStore if it was decided of stores that had grown since;
    CorruptStore if one was replaced. In object stores none grows.
    """
    if not isinstance(run, Path):
        return False
    announced = [run / name for name in names(run) if (run / name / GROWING).exists()]
    try:
        journal = read_json(run / GROWING)
    except FileNotFoundError:
        for folder in announced:  # by a process that was killed when another had finished the same growth
            entry = read_json(folder / GROWING)
            check_entry(run, entry)
            if entry["to"] == read_header(folder / DATA).fingerprint:
                _settle(folder, entry)
        return False
    check_journal(run, journal)
    _check_journal(run, journal["stores"])
    for entry in journal["stores"]:
        write_atomic(run / entry["step"] / GROWING, _entry_text(entry))
    for entry in journal["stores"]:
        _grow(run / entry["step"], entry)
    for name, text in journal["files"].items():
        write_atomic(run / name, text.encode())
    for entry in journal["stores"]:
        _settle(run / entry["step"], entry)
    (run / GROWING).unlink(missing_ok=True)
    sync_folder(run)
    return True


def _check_journal(run: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a growth whose stores are not those of which it was decided."""
    stages = [_stage_of(run / entry["step"], entry) for entry in entries]
    if "gone" not in stages:
        return
    where = run / entries[stages.index("gone")]["step"]
    if "grown" in stages:
        raise CorruptStore(
            f"{where} is neither what it was nor what it becomes by {run / GROWING}: it was replaced since, or what "
            f"was laid out for it is gone. Restore it, or delete {where} and {run / GROWING} to compute it anew"
        )
    (run / GROWING).unlink(missing_ok=True)
    raise IncompleteStore(f"{where} has been changed by another process meanwhile: append again")


def _stage_of(folder: Path, entry: Mapping[str, Any]) -> str:
    laid_out = (folder / entry["staged"] / "zarr.json").exists()  # looked at first: it goes when the header has come
    found = read_header(folder / DATA).fingerprint if (folder / DATA).exists() else None
    if found == entry["to"]:
        return "grown"
    return "staged" if found == entry["from"] and laid_out else "gone"


def _grow(folder: Path, entry: Mapping[str, Any]) -> None:
    """Makes one store longer, whatever was done of it before: records go first, the header comes last."""
    data, staged = folder / DATA, folder / entry["staged"]
    if read_header(data).fingerprint == entry["to"]:
        return
    _drop_records(Ledger(folder), entry)
    for key in entry["gone"]:
        (data / key).unlink(missing_ok=True)
    try:
        for name in sorted(entry["files"], key=lambda name: name == "zarr.json"):
            _put(data / name, (staged / name).read_bytes())
    except FileNotFoundError:
        if read_header(data).fingerprint != entry["to"]:  # else another process was faster
            raise


def _put(path: Path, data: bytes) -> None:
    if path.exists() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def _drop_records(ledger: Ledger, entry: Mapping[str, Any]) -> None:
    """Takes away the records of units that change, but for those that were put since the store has grown."""
    for index in sorted(ledger.done(), reverse=True):
        if index >= entry["n_unit"] and _whose(ledger, index) != entry["to"]:
            ledger.drop(index)


def _whose(ledger: Ledger, index: int) -> str | None:
    try:
        record: Record = ledger.record(index)
    except (CorruptStore, FileNotFoundError):
        return None
    return record.get("fingerprint")


def _settle(folder: Path, entry: Mapping[str, Any]) -> None:
    """Takes the announcement of this growth away, and all that was laid out, for this one or for one that was killed
    before it was decided.
    """
    try:
        if read_json(folder / GROWING) == entry:
            (folder / GROWING).unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    for leftover in folder.glob(f"{STAGED}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for place in {(folder / DATA / name).parent for name in entry["files"]}:
        for leftover in place.glob(".*.tmp"):  # of a process that was killed while it put one
            leftover.unlink(missing_ok=True)
    sync_folder(folder)


def _entry_text(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, indent=1, sort_keys=True).encode()
