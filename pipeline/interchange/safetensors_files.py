"""A run's activations as safetensors files: a tensor a hook point, by its name, beside the tokens' labels."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ...stores.ledger import read_json
from ...stores.places import Place, place, replacing, sync_folder, write_atomic
from ...stores.tree import CAPTURED, open_run
from ..progress import Progress, Quiet
from .columns import AT_ONCE, Column, columns_of, require_empty

INDEX = "activations.safetensors.index.json"
LABELS = ("token_id", "sequence", "position", "document")
"""Tensors beside the hook points', int64[token]."""
DTYPES = {
    "bfloat16": "BF16",
    "bool": "BOOL",
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
"""Our number formats and theirs."""


def to_safetensors(
    run: str | os.PathLike[str] | Place,
    folder: str | os.PathLike[str],
    *,
    hooks: str | Sequence[str] = "*",
    file_bytes: int = 2**30,
    progress: Progress | None = None,
) -> Path:
    """Writes the activations of a complete run as safetensors files in `folder`, a new or empty one, and gives the path
    of their index.

    Each file holds some tokens: a tensor a hook point by its name, as "blocks.5.hook_resid_post" [token, d_model] or
    "blocks.5.attn.hook_z" [token, head, d_head], with the same bits and dtype as stored (BF16 where bfloat16); and
    `token_id`, `sequence`, `position` and `document`, I64 [token]. A file is at most about `file_bytes` long; files are
    in the order of tokens. The index, a JSON file, comes last: `files` with the first token and the number of tokens of
    each, `tensors` with dtype and shape of a token's values, and `run`, the fingerprints and the recipe.

    `hooks` are names and patterns as a recipe has them; "*" leaves out what has no token axis. Holds 64 MiB at a time.
    Every chunk's checksum is compared. IncompleteStore, StoreNotFound, CorruptStore of the run; HookError for hook
    points that are not there; SchemaError for those without a token axis (attention patterns, recurrent states), and
    for a folder that holds anything. Source of the format: the README of the library safetensors.
    """
    source, target = place(run), Path(folder)
    columns = columns_of(source, hooks)
    require_empty(target)
    tokens = open_run(source, chunks=None)[f"{CAPTURED}/{columns[0].point.kind}"].to_dataset()
    n_token = tokens.sizes["token"]
    row_bytes = sum(column.row_bytes for column in columns) + len(LABELS) * 8
    rows = max(1, file_bytes // row_bytes)
    n_file = max(1, -(-n_token // rows))
    progress = progress or Quiet()
    files = []
    with progress:
        progress.start("safetensors", n_token, 0)
        for n in range(n_file):
            start, stop = n * rows, min((n + 1) * rows, n_token)
            name = f"activations-{n + 1:05}-of-{n_file:05}.safetensors"
            _write(target / name, columns, tokens, start, stop)
            files.append({"file": name, "first_token": start, "n_token": stop - start})
            progress.advance(stop - start)
    sync_folder(target)
    write_atomic(target / INDEX, json.dumps(_index(source, columns, files), indent=1).encode())
    return target / INDEX


def _write(path: Path, columns: Sequence[Column], tokens: xr.Dataset, start: int, stop: int) -> None:
    """One file, tensor after tensor."""
    some = tokens.isel(token=slice(start, stop))
    labels = {name: np.ascontiguousarray(some[name].values, dtype="<i8") for name in LABELS}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "first_token": str(start)}}
    at = 0
    for name, dtype, shape, n_bytes in [
        *((name, "I64", [stop - start], values.nbytes) for name, values in labels.items()),
        *(
            (str(c.point), DTYPES[c.array.dtype], [stop - start, *c.shape], (stop - start) * c.row_bytes)
            for c in columns
        ),
    ]:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n_bytes]}
        at += n_bytes
    said = json.dumps(header).encode()
    said += b" " * (-len(said) % 8)
    with replacing(path) as file:
        file.write(len(said).to_bytes(8, "little") + said)
        for values in labels.values():
            file.write(values.data)
        for column in columns:
            step = max(1, AT_ONCE // column.row_bytes)
            for first in range(start, stop, step):
                values = column.read(first, min(first + step, stop))
                file.write(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data)


def _index(run: Any, columns: Sequence[Column], files: list[dict[str, Any]]) -> dict[str, Any]:
    recipe = run / "recipe.json"
    return {
        "files": files,
        "tensors": {str(c.point): {"dtype": DTYPES[c.array.dtype], "shape": list(c.shape)} for c in columns},
        "run": {
            "name": run.name,
            "stores": {c.store.name: c.store.fingerprint for c in columns},
            "model": columns[0].store.header.provenance.get("model"),
            "recipe": read_json(recipe) if recipe.exists() else None,
        },
    }
