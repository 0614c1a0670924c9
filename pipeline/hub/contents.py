"""What of a run is published: the files that a reader needs, each of them named by a record or a header."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...stages.encode import TRAINED
from ...stores.errors import CorruptStore, IncompleteStore, SchemaError, StoreNotFound, UnsafePath
from ...stores.feature_index import index_folder
from ...stores.feature_rows import KIND, groups_of
from ...stores.ledger import read_json
from ...stores.places import Place
from ...stores.schema import DATA
from ...stores.store import Store
from ...stores.tree import run_stores
from ...stores.untrusted import label_paths
from ..audit import require_whole
from ..dictionaries import unindexed
from .names import RECIPE, part_of

MOST_SAID = 12
"""Damaged objects in one message."""


@dataclass(frozen=True)
class Contents:
    """A whole run of this machine. `files` holds bytes by path: what is about the run first, records last."""

    run: Path
    recipe: Mapping[str, Any]
    stores: tuple[Store, ...]
    files: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())


def contents(run: Place, said: Callable[[str], None]) -> Contents:
    """What is published of a run, after all of it was read again.

    IncompleteStore for a run that is not finished, CorruptStore for one that does not verify, UnsafePath for one with
    links in it, StoreNotFound and SchemaError for what is no run on this machine.
    """
    if not isinstance(run, Path):
        raise SchemaError(f"{run} lies in an object store: copy it to a folder of this machine, and push that")
    if not (run / RECIPE).is_file():
        raise StoreNotFound(f"{run} is no run: it has no {RECIPE}. Give the folder that `forebay run` wrote")
    stores = tuple(run_stores(run))
    for store in stores:
        if not store.complete:
            raise IncompleteStore(
                f"{run} is not finished: {store.name} has {len(store.done()):,} of {len(store.schema.grid):,} units. "
                "Only a whole run is pushed. Run its recipe again to finish it, or export the steps that are whole"
            )
    require_whole(run)
    paths = [*_about(run), *_dictionaries(run)]
    records: list[str] = []
    for store in (*stores, *_indexes(stores)):
        home = Path(str(store.path.parent)).relative_to(run).as_posix()
        said(f"{home}: reading it again")
        _require_sound(run, store)
        paths += [f"{home}/{DATA}/{key}" for key in _keys(store)]
        records += [f"{home}/done/{store.ledger.name(unit)}" for unit in sorted(store.done())]
    every = [part_of(path).path for path in (*paths, *records)]
    return Contents(run, read_json(run / RECIPE), stores, {path: _size(run, path) for path in every})


def _about(run: Path) -> Iterator[str]:
    yield RECIPE
    yield from (name for name in ("tokenizer.json", "tokens/counts/grown.json") if (run / name).is_file())
    counts = run / "tokens/counts/done"
    if counts.is_dir():
        yield from (f"tokens/counts/done/{name}" for name in sorted(os.listdir(counts)) if name[:-5].isdecimal())


def _dictionaries(run: Path) -> Iterator[str]:
    """Of the dictionaries that are whole, all but the state from which their training would go on."""
    trained = run / TRAINED
    for name in sorted(os.listdir(trained)) if trained.is_dir() else ():
        if name[0] != "." and (trained / name / "cfg.json").is_file():
            files = ("cfg.json", "metrics.jsonl", "sae_weights.safetensors", "training.json")
            yield from (f"{TRAINED}/{name}/{file}" for file in files if (trained / name / file).is_file())


def _indexes(stores: tuple[Store, ...]) -> Iterator[Store]:
    """The indexes of features that are there, whole and of these features."""
    for store in stores:
        if store.schema.kind == KIND:
            missing = unindexed(store.path.parent)
            yield from (Store.open(index_folder(store, one)) for one in groups_of(store) if one not in missing)


def _require_sound(run: Path, store: Store) -> None:
    if wrong := [line for lines in store.verify().values() for line in lines]:
        more = f"\n  … and {len(wrong) - MOST_SAID} more" if len(wrong) > MOST_SAID else ""
        raise CorruptStore(
            f"{run} is damaged, and was not pushed:"
            + "".join(f"\n  {line}" for line in wrong[:MOST_SAID])
            + f"{more}\n`forebay repair {run}` drops what is wrong, and running the recipe again computes it anew"
        )


def _keys(store: Store) -> list[str]:
    """What lies in a store's data and is known to belong there: metadata, labels and the objects of recorded units."""
    owned = {key for unit in store.schema.grid for key in store.objects_of(unit)}
    labels = tuple(f"{path}/c/" for path in label_paths(store.schema))
    root = Path(str(store.path))
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            key = (Path(folder) / name).relative_to(root).as_posix()
            if name == "zarr.json" or key in owned or (key.startswith(labels) and not name.endswith(".partial")):
                found.append(key)
    return sorted(found)


def _size(run: Path, path: str) -> int:
    """Bytes of a file of the run. UnsafePath where it is reached through a link: what is behind it may not be meant for
    others.
    """
    at = run
    for part in path.split("/"):
        at = at / part
        if at.is_symlink():
            raise UnsafePath(f"{at} is a symbolic link, and nothing behind one is published. Put the file itself there")
    return at.stat().st_size
