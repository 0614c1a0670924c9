"""Deleting a part of a run: what there is, what still needs it, and how it goes at once, whatever happens meanwhile."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..stages.capture import stored_points
from ..stages.encode import TRAINED
from ..stores.errors import ForebayError, SchemaError, StoreNotFound, UnsafePath, nearest
from ..stores.feature_index import FOLDER as INDEX
from ..stores.ledger import read_json
from ..stores.places import Place, sync_folder
from ..stores.schema import store_folders
from ..stores.store import Store
from .dictionaries import is_trained

STORE = re.compile(r"tokens|activations(-[\w-]+)?|features-[\w.-]+")
GOING = ".deleted"
"""Ending of the name of what is on its way out. It begins with a dot, which readers pass over."""


def deletable(run: Place) -> dict[str, Path]:
    """What a run has that can be deleted, by the names that `delete` takes: stores by their folders' names, and
    `index-NAME` and `dictionary-NAME`. SchemaError for a run in an object store, StoreNotFound for none.
    """
    if not isinstance(run, Path):
        raise SchemaError(f"{run} lies in an object store: delete there with the store's own tools")
    if not run.is_dir():
        raise StoreNotFound(f"{run} is no run: there is no such folder")
    stores = {name: run / name for name in sorted(os.listdir(run)) if STORE.fullmatch(name) and (run / name).is_dir()}
    features = {name: folder for name, folder in stores.items() if name.startswith("features-")}
    found = dict(stores)
    for name, folder in features.items():
        if (folder / INDEX).is_dir():
            found[f"index-{name.removeprefix('features-')}"] = folder / INDEX
    trained = run / TRAINED
    if trained.is_dir():
        found |= {f"dictionary-{n}": trained / n for n in sorted(os.listdir(trained)) if n[0] != "."}
    return found


def delete(run: Place, name: str) -> int:
    """Deletes a part of a run and gives the bytes that it took. It goes in one step, by a new name, and its files after
    that: killed at any time, the part is there whole or not at all, and the next call removes what was left over. No
    link is followed. Not while the run is being written.

    SchemaError for what is not there, with what is, and for what something else still needs (`needed_by`); UnsafePath
    where a link stands in its place.
    """
    folder = check(run, name)
    for leftover in _leftovers(folder.parent):
        shutil.rmtree(leftover)
    size = sum(os.lstat(Path(at) / file).st_size for at, _, files in os.walk(folder) for file in files)
    going = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{GOING}")
    os.rename(folder, going)
    sync_folder(folder.parent)
    shutil.rmtree(going)
    return size


def check(run: Place, name: str) -> Path:
    """The folder of a part that may be deleted. Refusals as of `delete`."""
    found = deletable(run)
    if name not in found:
        raise SchemaError(f"{run} has no {name!r}.{nearest(name, found)} It has: {', '.join(found) or 'nothing'}")
    folder = found[name]
    for place in (folder, folder.parent):
        if place != run and place.is_symlink():
            raise UnsafePath(f"{place} is a symbolic link to {os.readlink(place)}, and nothing is deleted through one")
    if reasons := needed_by(run, name):
        raise SchemaError(f"{name} of {run} is still needed: " + "; ".join(reasons))
    return folder


def _leftovers(folder: Path) -> Iterator[Path]:
    """What a deletion that was killed has left."""
    for name in os.listdir(folder):
        if name.startswith(".") and name.endswith(GOING) and not (folder / name).is_symlink():
            yield folder / name


def needed_by(run: Place, name: str) -> list[str]:
    """Why a part of a run cannot be deleted yet, one reason an entry: what is not finished and reads it. Empty if
    nothing does.
    """
    stores = {folder.name: folder for folder in store_folders(run)}
    if name == "tokens":
        others = [other for other in stores if other != name]
        return [f"it is what says which tokens {', '.join(others)} are of; delete these first"] if others else []
    recipe = _recipe(run)
    waiting = {
        f"features-{one}": table
        for one, table in recipe.get("encode", {}).items()
        if not table.get("fused") and not _complete(stores.get(f"features-{one}"))
    }
    if name.startswith("dictionary-"):
        own = name.removeprefix("dictionary-")
        reading = waiting.get(f"features-{own}", {"dictionary": ""})
        return [f"features-{own} are not finished, and are encoded with it"] if reading["dictionary"] is None else []
    if not name.startswith("activations") or name not in stores:
        return []
    store = Store.open(stores[name])
    points = stored_points(store.schema_with_labels)
    found = [f"{one} is not finished, and reads it" for one in waiting if _reads(stores.get(one), store)]
    return found + [
        f"[train.{one}] is not finished, and reads {table['hook']} of it"
        for one, table in recipe.get("train", {}).items()
        if isinstance(run, Path) and not is_trained(run, one) and {table["hook"], table.get("hook_out")} & {*points}
    ]


def _reads(features: Place | None, store: Store) -> bool:
    """Whether features read a store; those that are not begun may."""
    if features is None:
        return True
    source = Store.open(features).header.provenance.get("determines", {}).get("source")
    return store.fingerprint in (source.values() if isinstance(source, dict) else (source,))


def _complete(folder: Place | None) -> bool:
    try:
        return folder is not None and Store.open(folder).complete
    except ForebayError:
        return False


def stays(run: Place, name: str) -> str:
    """What is left of a run, and of what use, when a part of it is gone: a sentence or two."""
    gone = {name, name.replace("features-", "index-", 1)}  # features take their index with them
    rest = [other for other in deletable(run) if other not in gone]
    said = f"Stays, and stays readable: {', '.join(rest)}. " if rest else "Nothing else is left. "
    if name.startswith("activations"):
        said += "What was computed from it is valid as it is; training on it and encoding it again need it anew. "
    if name.startswith("index-"):
        return said + "`forebay index` builds it again."
    return said + "Running the recipe again computes it anew."


def _recipe(run: Place) -> dict[str, Any]:
    path = run / "recipe.json"
    found = read_json(path).get("recipe") if path.is_file() else None
    return found if isinstance(found, dict) else {}
