"""The index of a large features store: how fast it is built, how soon it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import forebay
from forebay.stages.models.source import open_checkpoint
from forebay.stores.index_builder import build_index
from forebay.stores.schema import Schema, along_token, along_unit
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

from .measuring import Rows, Settings, Tables

N_FEATURE, L0, CONTEXT, UNIT = 131_072, 55.0, 1024, 2**18
"""Of the synthetic dictionary: its width, and the features that fire on a token; tokens of a sequence and of a unit."""
ROOM = 1024
LOOKUPS = 200


def written(run: Path, n_nonzero: float, source: str) -> int:
    """A run with random tokens and ragged features, whose firing rates are log-normal with sigma 2; how many nonzeros
    it has.
    """
    rng = np.random.default_rng(0)
    rates = np.cumsum(rng.lognormal(0, 2, N_FEATURE))
    n_token = max(1, round(n_nonzero / L0 / CONTEXT)) * CONTEXT
    features, tokens = stores(run, n_token)
    tokenizer = open_checkpoint(source).tokenizer()
    (run / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    found = 0
    for unit in features.schema.grid:
        count, feature, value = of_unit(rng, rates / rates[-1], len(unit))
        found += len(feature)
        token_id = rng.integers(0, tokenizer.get_vocab_size(), len(unit), dtype=np.uint32)
        coords = {"token": pd.RangeIndex(unit.start, unit.stop)}
        ragged = {"count": ("token", count), "feature": ("nonzero", feature), "value": ("nonzero", value)}
        for store, path, columns in ((features, "/sae", ragged), (tokens, "/", {"token_id": ("token", token_id)})):
            writer = UnitWriter(store, unit)
            writer.put(xr.DataTree.from_dict({path: xr.Dataset(columns, coords=coords)}))
            writer.finish({})
    return found


def stores(run: Path, n_token: int) -> tuple[Store, Store]:
    """Empty stores of features and of tokens."""
    start = np.arange(0, n_token, CONTEXT)
    labels = {
        "sequences/start": (("sequence",), start),
        "sequences/document": (("sequence",), np.arange(len(start))),
        "documents/start": (("document",), start),
        "documents/id": (("document",), np.array([f"{i}" for i in range(len(start))], dtype=object)),
    }
    sizes = {"token": n_token}
    ragged = {
        "sae/count": along_token(("token",), sizes, "int32", UNIT),
        "sae/feature": along_unit(n_token, "int32", UNIT, ROOM),
        "sae/value": along_unit(n_token, "float32", UNIT, ROOM),
    }
    token_id = {"token_id": along_token(("token",), sizes, "uint32", UNIT)}
    about = {"sae": {"n_feature": N_FEATURE, "hook": "blocks.8.hook_resid_post"}}
    made = []
    for kind, folder, arrays in (("features", "features-sae", ragged), ("tokens", "tokens", token_id)):
        schema = Schema(kind=kind, n_token=n_token, unit_tokens=UNIT, arrays=arrays, labels=labels, compression="zstd")
        provenance = {"determines": {}, "dictionaries": about, "skip_positions": 1}
        made.append(Store.create(run / folder, schema, "0" * 64, provenance))
    return made[0], made[1]


def of_unit(
    rng: np.random.Generator, rates: NDArray[np.float64], n_token: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Counts, features and values of some tokens."""
    n = rng.poisson(L0 * n_token)
    token = rng.integers(0, n_token, n, dtype=np.uint64)
    feature = np.searchsorted(rates, rng.random(n)).astype(np.uint64)
    pairs = np.unique(token << np.uint64(32) | feature)
    count = np.bincount((pairs >> np.uint64(32)).astype(np.int64), minlength=n_token).astype(np.int32)
    value = rng.lognormal(0, 1, len(pairs)).astype(np.float32)
    return count, (pairs & np.uint64(0xFFFFFFFF)).astype(np.int32), value


def index(settings: Settings, folder: Path) -> Tables:
    """Prints, and gives for machines, the rate of building and the milliseconds of lookups, the files being cached."""
    found = written(folder, settings.nonzeros, settings.source)
    started = time.perf_counter()
    build_index(folder / "features-sae")
    seconds = time.perf_counter() - started
    sae = forebay.open_run(folder).features("sae")
    active = np.flatnonzero(sae.statistics().n_active.values)
    chosen = np.random.default_rng(1).choice(active, LOOKUPS, replace=False).tolist()
    lookups = {
        "top_contexts, 20 windows of ±10 tokens": milliseconds(lambda f: sae.top_contexts(f, text=False), chosen),
        "the same with decoded text": milliseconds(lambda f: sae.top_contexts(f), chosen),
        "activations, everywhere a feature fires": milliseconds(sae.activations, chosen),
    }
    table = Table(box=None, pad_edge=False, title=f"{found:,} nonzeros of {N_FEATURE:,} features", title_justify="left")
    for name in ("work", "median", "95 %"):
        table.add_column(name, justify="left" if name == "work" else "right")
    table.add_row("building the index", f"{found / seconds / 1e6:.1f} M/s", "")
    rows: Rows = [{"work": "index", "nonzeros": found, "seconds": seconds}]
    for name, times in lookups.items():
        middle, late = np.quantile(times, [0.5, 0.95])
        table.add_row(name, f"{middle:.1f} ms", f"{late:.1f} ms")
        rows.append({"work": name, "median_ms": middle, "late_ms": late})
    Console().print(table)
    return {"features": rows}


def milliseconds(look: Callable[[int], object], features: Sequence[int]) -> list[float]:
    """Of each lookup, after one that opens the files."""
    look(features[0])
    times = []
    for feature in features:
        started = time.perf_counter()
        look(feature)
        times.append(1000 * (time.perf_counter() - started))
    return times
