"""A small run as it should be, and how a stranger would change it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from forebay.stores.fingerprint import fingerprint
from forebay.stores.schema import Schema, along_token
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

N_TOKEN, UNIT = 12, 8
LABELS = {
    "sequences/start": (("sequence",), np.array([0, 4, 8])),
    "sequences/document": (("sequence",), np.array([0, 0, 1])),
    "documents/start": (("document",), np.array([0, 8])),
    "documents/id": (("document",), np.array(["a", "b"], dtype=object)),
}
DETERMINES = {"step": "capture", "source": {"files": {}}}


def write_run(folder: Path, compression: str = "zstd") -> Store:
    """A finished store of activations, two layers of vectors of three, in a run's folder."""
    sizes = {"layer": 2, "token": N_TOKEN, "d_model": 3}
    schema = Schema(
        kind="activations",
        n_token=N_TOKEN,
        unit_tokens=UNIT,
        compression=compression,
        arrays={"hook_embed/value": along_token(("layer", "token", "d_model"), sizes, "float32", UNIT)},
        labels={**LABELS, "hook_embed/layer": (("layer",), np.array([0, 2]))},
    )
    store = Store.create(folder / "activations", schema, fingerprint(DETERMINES), {"determines": DETERMINES})
    for unit in schema.grid:
        write_unit(store, unit.index)
    return Store.open(folder / "activations")


def write_unit(store: Store, index: int) -> None:
    unit = store.schema.grid[index]
    values = np.arange(2 * len(unit) * 3, dtype=np.float32).reshape(2, len(unit), 3)
    node = xr.Dataset(
        {"value": (("layer", "token", "d_model"), values)}, coords={"token": pd.RangeIndex(unit.start, unit.stop)}
    )
    writer = UnitWriter(store, unit)
    writer.put(xr.DataTree.from_dict({"/hook_embed": node}))
    writer.finish({"compute": 0.0})


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON file."""
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


def edit_header(run: Path, change: Callable[[dict[str, Any]], object], step: str = "activations") -> None:
    """Changes what a store's header says."""
    edit(run / step / "data.zarr" / "zarr.json", lambda said: change(said["attributes"]["forebay"]))


def edit_schema(run: Path, change: Callable[[dict[str, Any]], object], step: str = "activations") -> None:
    edit_header(run, lambda said: change(said["schema"]), step)
