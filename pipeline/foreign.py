"""Runs that come from elsewhere: what their own recipe may have this machine read."""

from __future__ import annotations

import os

from ..stages.tokenize import Tokenize
from ..stores.errors import FingerprintMismatch
from ..stores.fingerprint import known_hashes, sha256_file
from ..stores.places import Place
from ..stores.schema import holds_store
from ..stores.store import Store
from .recipe import Recipe


def require_same_corpus(recipe: Recipe, folder: Place) -> None:
    """FingerprintMismatch unless the files that the recipe of a run names are those of which its tokens were made, by
    name and sha256; nothing is asked of a run without tokens.

    A run's recipe.json is whoever's made it. Without this, one from a stranger could have any text on this machine
    tokenized and counted into its folder. Files are hashed, and no more; nothing is written.
    """
    name = next(stage.store for stage in recipe.stages if isinstance(stage, Tokenize))
    if not holds_store(folder / name):
        return
    determines = Store.open(folder / name).header.provenance.get("determines", {})
    source = determines.get("source") if isinstance(determines, dict) else None
    due = source.get("files") if isinstance(source, dict) else None
    paths = recipe.corpus.paths()
    named = [f"{i:06d} {os.path.relpath(path, recipe.corpus.root)}" for i, path in enumerate(paths)]
    if not isinstance(due, dict) or sorted(due) != sorted(named):
        raise FingerprintMismatch(
            f"{folder}/recipe.json names {len(named)} corpus files, which are not those that its tokens were made of. "
            "Files may have been added or moved; else somebody has changed the recipe, and nothing is read for it"
        )
    known = known_hashes(folder / "files.json")
    for key, path in zip(named, paths, strict=True):
        stat = path.stat()
        entry = known.get(str(path.resolve()))
        same = entry is not None and entry[:2] == [stat.st_size, stat.st_mtime_ns]
        if (entry[2] if entry is not None and same else sha256_file(path)) != due[key]:
            raise FingerprintMismatch(
                f"{path} is not the file of that name of which {folder} was made: its sha256 is another one. Put that "
                "one back to go on with this run"
            )
