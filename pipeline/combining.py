"""Runs written from rows of others: a part of one, or several end to end. Each is a run of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..stages.capture import stored_points
from ..stages.models.points import HookPoint, expand
from ..stores.concat import Parts, Run
from ..stores.copies import Copy, Kept, everything
from ..stores.cuts import Cut
from ..stores.errors import FingerprintMismatch, SchemaError, nearest
from ..stores.fingerprint import canonical_json, versions
from ..stores.ledger import read_json
from ..stores.places import Place, place, write_atomic
from ..stores.store import Store
from ..stores.tree import CAPTURED
from .filling import check_space, fill
from .progress import Progress, Quiet
from .run import Outcome


def export(
    runs: Run | Sequence[Run],
    to: str | os.PathLike[str] | Place,
    *,
    steps: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    hooks: str | Sequence[str] | None = None,
    documents: slice | None = None,
    tokens: slice | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Writes a part of a run, or several runs end to end, as a run of its own in `to`, or goes on with that.

    `steps` (names of stores, as "tokens"), `hooks` (names and patterns, as a recipe has them) and `layers` choose what
    is kept; `layers` leaves what has none, and features, alone. Of one run, `documents` or `tokens` choose a range by
    number, stop left out: every sequence that holds any of it is kept whole. Sequences and documents are numbered from
    0 again; documents keep their ids, and the provenance says which rows of which stores these are.

    Values are the same bits, in units as long as the first run's; every object that is read is verified. Features get
    their index anew. Ctrl-C and SIGTERM stop between two units; killed at any time, the same call goes on, to the same
    bytes. Holds about twice a unit in memory. SchemaError, HookError for what is not there; IncompleteStore,
    CorruptStore of what is read; FingerprintMismatch where `to` holds something else; DiskFull.
    """
    several = list(runs) if isinstance(runs, list | tuple) else [cast(Run, runs)]
    parts, folder, progress = Parts.of(several, steps), place(to), progress or Quiet()
    chosen = [hooks] if isinstance(hooks, str) else hooks
    copies = _copies(parts, folder, _kept(parts, chosen, layers), documents, tokens)
    check_space(folder, copies, "Keep fewer steps, hooks or documents")
    _save(parts, copies, folder)
    return fill(copies, folder, progress)


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _kept(parts: Parts, hooks: Sequence[str] | None, layers: Sequence[int] | None) -> dict[str, Kept]:
    """Steps → what is kept of each. Steps of which nothing is kept are left out."""
    captures = {name: held[0] for name, held in parts.steps.items() if held[0].schema.kind == CAPTURED}
    points = {name: _points(store) for name, store in captures.items()}
    every = {point for held in points.values() for point in held}
    if not every and (hooks is not None or layers is not None):
        raise SchemaError("nothing that is chosen has hooks or layers: there are no activations among the steps")
    wanted = set(expand(tuple(hooks), sorted(every, key=str))) if hooks is not None else every
    if layers is not None:
        there = {point.layer for point in every if point.layer is not None}
        if missing := sorted(set(layers) - there):
            raise SchemaError(f"no capture has layer {missing[0]}; there are {', '.join(map(str, sorted(there)))}")
        wanted = {point for point in wanted if point.layer is None or point.layer in layers}
    found: dict[str, Kept] = {}
    for name, stores in parts.steps.items():
        if name not in captures:
            found[name] = everything(stores[0])
            continue
        kept: dict[str, list[int] | None] = {}
        for point in (point for point in points[name] if point in wanted):
            if point.layer is None:
                kept[point.kind] = None
            else:
                kept[point.kind] = [*(kept.get(point.kind) or []), point.layer]
        if kept:
            found[name] = kept
    if not found:
        raise SchemaError("nothing is left to be kept: choose more steps, hooks or layers")
    return found


def _points(store: Store) -> list[HookPoint]:
    return [HookPoint.parse(name) for name in stored_points(store.schema_with_labels)]


def _copies(
    parts: Parts, folder: Place, kept: Mapping[str, Kept], documents: slice | None, tokens: slice | None
) -> list[Copy]:
    """What will be written, checked."""
    if documents is not None and tokens is not None:
        raise SchemaError("choose documents or tokens, not both")
    if (documents or tokens) and len(parts.runs) > 1:
        raise SchemaError("documents and tokens are chosen of one run: cut each first, then concatenate")
    resolved = folder.resolve() if isinstance(folder, Path) else folder
    if resolved in parts.runs:
        raise SchemaError(f"{folder} is the run that is read: write into another folder")
    found = []
    for name, stores in parts.steps.items():
        if name not in kept:
            continue
        for store in stores:
            store.require_complete()
        cuts = tuple(_cut(store, documents, tokens) for store in stores)
        found.append(Copy(folder / name, cuts, kept[name]))
        found[-1].schema  # noqa: B018  refuses what is not there
    return found


def _cut(store: Store, documents: slice | None, tokens: slice | None) -> Cut:
    if documents is not None:
        return Cut.of_documents(store, documents)
    return Cut.of_tokens(store, tokens) if tokens is not None else Cut.whole(store)


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _save(parts: Parts, copies: Sequence[Copy], folder: Place) -> None:
    """Writes recipe.json and tokenizer.json. FingerprintMismatch where another run lies in the folder."""
    about = [_recipe(run) for run in parts.runs]
    rows = [
        {
            "run": str(run),
            "fingerprints": one.get("fingerprints", {}),
            "corpus": one.get("recipe", {}).get("corpus", {}),
            **cut.to_json(),
        }
        for run, one, cut in zip(parts.runs, about, copies[0].cuts, strict=True)
    ]
    said: dict[str, Any] = {key: value for key, value in about[0].items() if key in ("recipe", "device", "imported")}
    said |= {"fingerprints": {copy.name: copy.fingerprint for copy in copies}, "cut_from": rows}
    path, tokenizer = folder / "recipe.json", parts.runs[0] / "tokenizer.json"
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        standing = {key: value for key, value in read_json(path).items() if key != "versions"}
        if standing.get("fingerprints") != said["fingerprints"] or "cut_from" not in standing:
            raise FingerprintMismatch(
                f"{folder} holds another run, or another part of this one. Write into another folder, or delete it"
            )
    else:
        write_atomic(path, canonical_json({**said, "versions": versions()}).encode())
    if tokenizer.is_file() and not (folder / "tokenizer.json").is_file():
        write_atomic(folder / "tokenizer.json", tokenizer.read_bytes())


def _recipe(run: Place) -> dict[str, Any]:
    path = run / "recipe.json"
    return read_json(path) if path.is_file() else {}


def parse_range(text: str, what: str) -> slice:
    """FIRST:STOP, as Python slices: `0:100`, `100:`, `:100`. SchemaError for anything else."""
    first, colon, stop = text.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (first, stop)):
        raise SchemaError(f"{what} {text!r} are not FIRST:STOP, as in 0:100 or 100: (STOP left out)")
    return slice(int(first) if first else None, int(stop) if stop else None)


def parse_layers(text: str, held: Sequence[str] = ()) -> list[int]:
    """Layers such as 0,10-12. SchemaError for anything else."""
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise SchemaError(f"layers {text!r} are not a list such as 0,10-12.{nearest(text, held)}")
        found += range(int(low), int(high or low) + 1)
    return found
