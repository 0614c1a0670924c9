"""A run of two steps that becomes longer, without a model; as a script, the same killed before each of its steps.

`python growing_stores.py BASE OUT EVERY` copies the run in BASE to OUT/0, OUT/1, …, makes each longer in a process of
its own, and kills that before its n-th change of the file system; one in EVERY of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from forebay.stores.growth import STAGED, commit_growth, stage_growth
from forebay.stores.schema import Schema, along_sequence, along_token, along_unit
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

SHORT, LONG = (4, 4, 4, 4, 4, 3), (4, 4, 4, 4, 4, 4, 4, 4, 2)
"""Windows of at most four tokens: the last one of the short run is not full, and is in the long one."""
UNIT = {"tokens": 12, "activations": 8}
KEPT = {"tokens": 1, "activations": 2}
"""Of 23 tokens; and of the 20 before the window that becomes longer."""
CHANGES = ("replace", "rename", "link", "unlink", "rmdir")


def schema_of(step: str, lengths: tuple[int, ...]) -> Schema:
    """Arrays along `token`, along `sequence`, and ragged; labels of two documents, and of a third in the long run."""
    n_token, unit = sum(lengths), UNIT[step]
    sizes = {"token": n_token, "sequence": len(lengths), "layer": 2, "d_model": 3, "query": 4, "key": 4}
    arrays = {"token_id": along_token(("token",), sizes, "uint32", unit)}
    starts = np.cumsum([0, *lengths[:-1]])
    documents = np.array([start for start in (0, 10, 23) if start < n_token])
    labels: dict[str, Any] = {
        "sequences/start": (("sequence",), starts),
        "sequences/document": (("sequence",), np.searchsorted(documents, starts, "right") - 1),
        "documents/start": (("document",), documents),
        "documents/id": (("document",), np.array(["one", "zwölf 🐟", "three"][: len(documents)], dtype=object)),
    }
    if step == "activations":
        arrays = {
            "resid/value": along_token(("layer", "token", "d_model"), sizes, "bfloat16", unit),
            "pattern/value": along_sequence(("layer", "sequence", "query", "key"), sizes, "float32", 2),
            "sparse/count": along_token(("token",), sizes, "int32", unit),
            "sparse/feature": along_unit(n_token, "int32", unit, 4),
        }
        labels["resid/layer"] = (("layer",), np.array([0, 5]))
    return Schema(kind=step, n_token=n_token, unit_tokens=unit, arrays=arrays, labels=labels)


def fingerprint_of(step: str, lengths: tuple[int, ...]) -> str:
    return f"{len(step)}{sum(lengths):063d}"


def provenance_of(lengths: tuple[int, ...]) -> dict[str, Any]:
    return {"determines": {"tokens": sum(lengths)}, "versions": {}}


def create(run: Path, lengths: tuple[int, ...]) -> None:
    """The run with all of its units."""
    for step in UNIT:
        Store.create(run / step, schema_of(step, lengths), fingerprint_of(step, lengths), provenance_of(lengths))
    (run / "recipe.json").write_text(f'{{"tokens": {sum(lengths)}}}')
    fill(run)


def fill(run: Path) -> dict[str, list[int]]:
    """Computes what has no record, and says what that was."""
    found = {}
    for step in UNIT:
        store = Store.open(run / step)
        found[step] = [unit.index for unit in store.todo()]
        for unit in store.todo():
            writer = UnitWriter(store, unit)
            writer.put(piece_of(store, writer.rows))
            writer.finish({})
    return found


def piece_of(store: Store, rows: dict[str, slice]) -> xr.DataTree:
    """Values that tell where they belong; a pattern, how long its sequence is."""
    token = np.arange(rows["token"].start, rows["token"].stop)
    along = {"token": pd.RangeIndex(token[0], token[-1] + 1)}
    if store.schema.kind == "tokens":
        return xr.DataTree(xr.Dataset({"token_id": ("token", (7 * token + 1).astype(np.uint32))}, coords=along))
    value = (1000 * np.arange(2)[:, None, None] + 10 * token[:, None] + np.arange(3)).astype(np.uint16)
    nodes = {
        "resid": xr.Dataset({"value": (("layer", "token", "d_model"), value)}, coords=along),
        "sparse": xr.Dataset(
            {
                "count": ("token", (token % 3).astype(np.int32)),
                "feature": ("nonzero", np.repeat(token, token % 3).astype(np.int32)),
            },
            coords=along,
        ),
    }
    own = np.arange(rows["sequence"].start, rows["sequence"].stop)
    if len(own):
        patterns = (("layer", "sequence", "query", "key"), np.stack([patterns_of(store, own)] * 2))
        coords = {"sequence": pd.RangeIndex(own[0], own[-1] + 1)}
        nodes["pattern"] = xr.Dataset({"value": patterns}, coords=coords)
    return xr.DataTree.from_dict(nodes)


def patterns_of(store: Store, sequences: Iterable[int]) -> NDArray[np.float32]:
    ends = [*store.labels["sequences/start"][1].tolist(), store.schema.n_token]
    found = np.full((len(list(sequences)), 4, 4), np.nan, dtype=np.float32)
    for row, sequence in enumerate(sequences):
        n = ends[sequence + 1] - ends[sequence]
        found[row, :n, :n] = 100 * sequence + n
    return found


def grown(run: Path, step: str, lengths: tuple[int, ...], n_unit: int) -> dict[str, Any]:
    """What a store becomes, laid out beside it."""
    schema, fingerprint = schema_of(step, lengths), fingerprint_of(step, lengths)
    return stage_growth(Store.open(run / step), schema, fingerprint, provenance_of(lengths), n_unit)


def grow(run: Path, lengths: tuple[int, ...] = LONG) -> None:
    """Makes both stores longer, and computes nothing."""
    entries = [grown(run, step, lengths, KEPT[step]) for step in UNIT]
    commit_growth(run, entries, {"recipe.json": f'{{"tokens": {sum(lengths)}}}'})


# ── killed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def changed_by(run: Path, before: int | None, log: Path) -> int:
    """Makes a run longer in a process that is killed before the change of that number. Its wait status; the changes go
    to a log.
    """
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    seen: list[str] = []

    def counted(name: str, change: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if len(seen) == before:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(f"{name} {arguments[-1] if name in ('replace', 'rename', 'link') else arguments[0]}")
            return change(*arguments, **options)

        return call

    for name in CHANGES:
        setattr(os, name, counted(name, getattr(os, name)))
    code = 1
    try:
        grow(run)
        log.write_text("\n".join(seen))
        code = 0
    finally:
        os._exit(code)


def main(base: Path, out: Path, every: int) -> None:
    """Of what is laid out aside, where nobody looks, two changes are enough; of the others one in `every`."""
    shutil.copytree(base, out / "unharmed")
    if changed_by(out / "unharmed", None, out / "log.txt"):
        raise SystemExit("it fails without being killed")
    changes = (out / "log.txt").read_text().splitlines()
    aside = [n for n, change in enumerate(changes) if f"/{STAGED}." in change]
    seen = [n for n in range(len(changes)) if n not in aside]
    for n in dict.fromkeys((*aside[:: len(aside) // 2], *seen[::every], seen[-1])):
        shutil.copytree(base, out / f"{n:03d}", dirs_exist_ok=True)
        status = changed_by(out / f"{n:03d}", n, out / "log.txt")
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(f"it was not killed before {changes[n]}: status {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
