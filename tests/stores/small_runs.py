"""Small runs of numbers that tell every cell from every other, written as the steps write them; and what they hold."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from forebay.stores.dtypes import format_of
from forebay.stores.schema import RAGGED_CHUNK, Schema, along_sequence, along_token, along_unit
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

N_FEATURE, CONTEXT = 12, 6
LAYERS = [0, 3, 7]


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """A run: lengths of its sequences and documents, and the values of every array by its path in the run."""

    sequences: tuple[int, ...]
    documents: dict[str, int]
    values: dict[str, NDArray[Any]]
    fires: NDArray[np.bool_]

    @property
    def n_token(self) -> int:
        return sum(self.sequences)

    @property
    def table(self) -> pd.DataFrame:
        """The labels of every token, written out."""
        return pd.DataFrame(
            {
                "sequence": [s for s, n in enumerate(self.sequences) for _ in range(n)],
                "position": [p for n in self.sequences for p in range(n)],
                "document": [d for d, n in enumerate(self.documents.values()) for _ in range(n)],
            }
        )


def numbers(seed: int, sequences: tuple[int, ...], documents: dict[str, int]) -> Numbers:
    """Random values, as bfloat16 and float32 hold them; some features that never fire and tokens without any."""
    assert sum(sequences) == sum(documents.values())
    rng, n, s = np.random.default_rng(seed), sum(sequences), len(sequences)
    bfloat16 = format_of("bfloat16")

    def rounded(*shape: int) -> NDArray[Any]:
        return bfloat16.decode(bfloat16.encode(rng.normal(size=shape).astype(np.float32)))

    resid = rounded(3, n, 5)
    resid[1, 0] = [np.nan, np.inf, -np.inf, -0.0, 9.183549615799121e-41]
    fires = (rng.random((n, N_FEATURE)) < rng.random(N_FEATURE)) & (rng.random((n, 1)) < 0.8)
    values = {
        "tokens/token_id": rng.integers(0, 300, n).astype(np.uint32),
        "tokens/char_start": np.arange(n, dtype=np.uint32) * 5,
        "tokens/char_end": np.arange(n, dtype=np.uint32) * 5 + 4,
        "activations/hook_resid_post": resid,
        "activations/hook_embed": rng.normal(size=(n, 5)).astype(np.float32),
        "activations/attn.hook_pattern": rng.random((2, s, 2, CONTEXT, CONTEXT)).astype(np.float32),
        "features-sae/sae": np.where(fires, rng.lognormal(size=(n, N_FEATURE)), 0).astype(np.float32),
        "features-top/top": rounded(n, 2).clip(0) + 1,
    }
    return Numbers(sequences=sequences, documents=documents, values=values, fires=fires)


def write_run(
    folder: Path, run: Numbers, unit: int = 8, *, steps: tuple[str, ...] = ("tokens", "activations", "features-sae")
) -> Path:
    """Writes some steps of a run, with units of `unit` tokens (tokens: twice as many)."""
    for step in steps:
        write_step(folder / step, run, unit)
    said = {"recipe": {"name": "small", "tokenize": {"context": CONTEXT}}, "fingerprints": {}, "device": "cpu"}
    (folder / "recipe.json").write_text(json.dumps({**said, "corpus": {"files": [folder.name]}}))
    return folder


def labels_of(run: Numbers) -> dict[str, Any]:
    starts = np.cumsum([0, *run.sequences[:-1]])
    documents = np.cumsum([0, *list(run.documents.values())[:-1]])
    return {
        "sequences/start": (("sequence",), starts),
        "sequences/document": (("sequence",), run.table["document"].to_numpy()[starts]),
        "documents/start": (("document",), documents),
        "documents/id": (("document",), np.array(list(run.documents), dtype=object)),
    }


def schema_of(step: str, run: Numbers, unit: int) -> Schema:
    n, s = run.n_token, len(run.sequences)
    layer = {"layer": 3, "token": n, "sequence": s, "d_model": 5, "head": 2, "query": CONTEXT, "key": CONTEXT}
    arrays: dict[str, Any] = {
        "tokens": lambda: {
            name: along_token(("token",), layer, "uint32", unit) for name in ("token_id", "char_start", "char_end")
        },
        "activations": lambda: {
            "hook_resid_post/value": along_token(("layer", "token", "d_model"), layer, "bfloat16", unit),
            "hook_embed/value": along_token(("token", "d_model"), layer, "float32", unit),
            "attn.hook_pattern/value": along_sequence(
                ("layer", "sequence", "head", "query", "key"), {**layer, "layer": 2}, "float32", 1
            ),
        },
        "features-sae": lambda: {
            "sae/count": along_token(("token",), {"token": n}, "int32", unit),
            "sae/feature": along_unit(n, "int32", unit, N_FEATURE),
            "sae/value": along_unit(n, "float32", unit, N_FEATURE),
        },
        "features-top": lambda: {
            "top/feature": along_token(("token", "rank"), {"token": n, "rank": 2}, "int32", unit),
            "top/value": along_token(("token", "rank"), {"token": n, "rank": 2}, "bfloat16", unit),
        },
    }
    assert N_FEATURE * unit < RAGGED_CHUNK  # a row is one chunk
    labels = labels_of(run)
    if step == "activations":
        labels |= {"hook_resid_post/layer": (("layer",), np.array(LAYERS))}
        labels |= {"attn.hook_pattern/layer": (("layer",), np.array([0, 7]))}
    kind = step.partition("-")[0]
    return Schema(kind=kind, n_token=n, unit_tokens=unit, arrays=arrays[step](), labels=labels)


def provenance_of(step: str, run: Numbers) -> dict[str, Any]:
    group = step.partition("-")[2]
    about: dict[str, Any] = {"model": {"source": "org/name", "revision": None}, "versions": {"python": "3"}}
    if group:
        one = {"n_feature": N_FEATURE, "hook": "blocks.3.hook_resid_post", "source": "a", "activation": "relu"}
        about |= {"dictionaries": {group: one}, "skip_positions": 1}
    determines = {
        "step": step.partition("-")[0],
        "version": 1,
        "parameters": {"dtype": "float32", "batch": 8},
        "files": [["model.safetensors", "ab" * 32]],
        "identity": {},
        "source": list(run.documents),
    }
    return {"determines": determines, **about}


def write_step(folder: Path, run: Numbers, unit: int, provenance: dict[str, Any] | None = None) -> Store:
    step = folder.name
    schema = schema_of(step, run, unit * (2 if step == "tokens" else 1))
    store = Store.create(folder, schema, "0" * 63 + str(unit % 10), provenance or provenance_of(step, run))
    for one in schema.grid:
        writer = UnitWriter(store, one)
        for node in pieces(step, run, schema, writer.rows):
            writer.put(node)
        writer.finish({})
    return store


def pieces(step: str, run: Numbers, schema: Schema, rows: dict[str, slice]) -> list[xr.DataTree]:
    """What a stage would give for a unit."""
    token, sequence = (np.arange(rows[dim].start, rows[dim].stop) for dim in ("token", "sequence"))
    if step == "features-sae":
        own = run.fires[rows["token"]]
        where, feature = np.nonzero(own)
        value = run.values["features-sae/sae"][rows["token"]][where, feature]
        ragged = {"feature": ("nonzero", feature.astype(np.int32)), "value": ("nonzero", value)}
        node = xr.Dataset({"count": ("token", own.sum(1).astype(np.int32)), **ragged}, coords={"token": token})
        counted = {"token_sum": np.array([len(token)]), "l0_sum": np.array([float(own.sum())])}
        return [xr.DataTree.from_dict({"/sae": node.assign_attrs(statistics=counted)})]
    if step == "features-top":
        value = run.values["features-top/top"][rows["token"]]
        feature = np.where(value > 1.5, np.arange(2), -1).astype(np.int32)
        kept = format_of("bfloat16").encode(np.where(feature >= 0, value, 0).astype(np.float32))
        columns = {"feature": (("token", "rank"), feature), "value": (("token", "rank"), kept)}
        return [xr.DataTree.from_dict({"/top": xr.Dataset(columns, coords={"token": token})})]
    found = []
    for path, array in schema.arrays.items():
        group, _, name = path.rpartition("/")
        whole = run.values[f"{step}/{group or name}"]
        long, coords = ("token", token) if "token" in array.dims else ("sequence", sequence)
        if not len(coords):
            continue
        own = whole[(slice(None), coords) if array.dims[0] == "layer" else coords]
        node = xr.Dataset({name: (array.dims, format_of(array.dtype).encode(own))}, coords={long: coords})
        if array.dims[0] == "layer":
            peak = np.abs(np.nan_to_num(own, posinf=0, neginf=0)).reshape(len(own), -1).max(1)
            node.attrs["statistics"] = {"abs_max": peak, "square_sum": peak * 0 + len(coords)}
        found.append(xr.DataTree.from_dict({f"/{group}": node}))
    return found


def laid(runs: list[Numbers]) -> Numbers:
    """Runs end to end, in memory."""
    axes = {"activations/hook_resid_post": 1, "activations/attn.hook_pattern": 1}
    documents = {f"{n}/{name}": size for n, run in enumerate(runs) for name, size in run.documents.items()}
    return Numbers(
        sequences=tuple(n for run in runs for n in run.sequences),
        documents=documents,
        values={
            path: np.concatenate([run.values[path] for run in runs], axis=axes.get(path, 0)) for path in runs[0].values
        },
        fires=np.concatenate([run.fires for run in runs]),
    )


RUNS = [
    numbers(1, (6, 6, 2), {"a": 3, "": 0, "b": 8, "c": 3}),
    numbers(2, (6, 6, 6, 6, 6, 1), {"none": 0, "d": 29, "zwölf 🐟": 2, "end": 0}),
    numbers(3, (4,), {"a": 4}),
]
"""Three runs whose documents and sequences do not end together; shorter and longer than a unit."""
