"""Runs of activations whose true features are known, for the tests of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from forebay.stores.dtypes import float32_to_bfloat16
from forebay.stores.schema import Schema, along_token
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

LAYER, CONTEXT, UNIT = 3, 50, 1000
RESID, MLP_OUT = f"blocks.{LAYER}.hook_resid_post", f"blocks.{LAYER}.hook_mlp_out"
Floats = NDArray[np.floating[Any]]


def write_run(folder: Path, values: Mapping[str, Floats], dtype: str = "float32") -> Path:
    """A run of one layer: `values` are [token, d] by kind of hook point, in sequences of 50 tokens, four a document."""
    n_token = len(next(iter(values.values())))
    starts, documents = np.arange(0, n_token, CONTEXT), np.arange(0, n_token, 4 * CONTEXT)
    labels: dict[str, Any] = {
        "sequences/start": (("sequence",), starts),
        "sequences/document": (("sequence",), starts // (4 * CONTEXT)),
        "documents/start": (("document",), documents),
        "documents/id": (("document",), np.array([f"d{n}" for n in range(len(documents))], dtype=object)),
    }
    dims, arrays = ("layer", "token", "d_model"), {}
    for kind, value in values.items():
        sizes = {"layer": 1, "token": n_token, "d_model": value.shape[1]}
        arrays[f"{kind}/value"] = along_token(dims, sizes, dtype, UNIT)
        labels[f"{kind}/layer"] = (("layer",), np.array([LAYER]))
    schema = Schema(kind="activations", n_token=n_token, unit_tokens=UNIT, arrays=arrays, labels=labels)
    store = Store.create(folder / "activations", schema, "f" * 64, {"determines": {}, "model": {"source": "a-model"}})
    for unit in schema.grid:
        own = slice(unit.start, unit.stop)
        writer = UnitWriter(store, unit)
        for kind, value in values.items():
            rows = value[own].astype(np.float32)
            kept = float32_to_bfloat16(rows) if dtype == "bfloat16" else rows
            piece = xr.Dataset({"value": (dims, kept[None])}, coords={"token": np.arange(unit.start, unit.stop)})
            writer.put(xr.DataTree.from_dict({f"/{kind}": piece}))
        writer.finish({})
    return folder


def unit_atoms(random: np.random.Generator, n: int, d: int) -> Floats:
    atoms = random.standard_normal((n, d))
    return atoms / np.linalg.norm(atoms, axis=1, keepdims=True)


def sparse_coefficients(random: np.random.Generator, n_token: int, n_atom: int, active: float) -> Floats:
    """Between 1 and 3 where an atom takes part, which `active` do a token on average."""
    takes_part = random.random((n_token, n_atom)) < active / n_atom
    return takes_part * random.uniform(1, 3, (n_token, n_atom))
