"""Encoding with a dictionary beside the bare matrix product of its encoder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from forebay.pipeline.plan import StoreSource
from forebay.stages.dictionaries.activation import Activation
from forebay.stages.dictionaries.dictionary import Dictionary, Provenance
from forebay.stages.dictionaries.save import save_dictionary
from forebay.stages.encode import Encode
from forebay.stages.models.memory import keep_freed_memory
from forebay.stages.tokenize import ModelSource
from forebay.stores.schema import Schema, along_token
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

from .measuring import Measurement

TOKENS = 2**14
ROWS = 2**12
"""In a matrix product."""
HOOK = "blocks.15.hook_resid_post"


@dataclass(frozen=True)
class Case:
    """A dictionary's sizes, and how its features are chosen: the k largest, or as many on average by a threshold."""

    d_in: int
    n_feature: int
    k: int
    kind: str

    def __str__(self) -> str:
        return f"{self.kind}, {self.d_in} × {self.n_feature:,}, L0 {self.k}"


CASES = (
    Case(576, 2048, 32, "topk"),
    Case(2304, 16384, 64, "topk"),
    Case(2304, 16384, 64, "jumprelu"),
)


def dictionary_of(case: Case) -> Dictionary:
    """A random dictionary whose preactivations of unit-normal inputs are unit-normal too."""
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(case.d_in, case.n_feature, generator=generator) / case.d_in**0.5
    threshold = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - case.k / case.n_feature))
    thresholds = {"topk": None, "jumprelu": threshold.expand(case.n_feature)}
    return Dictionary(
        W_enc=W_enc,
        b_enc=torch.zeros(case.n_feature),
        W_dec=W_enc.T.contiguous(),
        b_dec=torch.zeros(case.d_in),
        activation=Activation(
            kind=case.kind,  # type: ignore[arg-type]
            k=case.k if case.kind == "topk" else None,
            threshold=thresholds[case.kind],
        ),
        hook=HOOK,
        hook_out=HOOK,
        provenance=Provenance(source="random", format="none"),
    )


def stored(case: Case, folder: Path) -> Store:
    """A store of unit-normal activations at one hook point, as a capture leaves it."""
    kind = HOOK.removeprefix("blocks.15.")
    starts = np.arange(0, TOKENS, 512)
    labels = {
        "sequences/start": (("sequence",), starts),
        "sequences/document": (("sequence",), np.zeros(len(starts), dtype=np.int64)),
        "documents/start": (("document",), np.zeros(1, dtype=np.int64)),
        "documents/id": (("document",), np.array(["random"], dtype=object)),
        f"{kind}/layer": (("layer",), np.array([15])),
    }
    sizes = {"layer": 1, "token": TOKENS, "d_model": case.d_in}
    array = along_token(("layer", "token", "d_model"), sizes, "float32", TOKENS // 4)
    schema = Schema(
        kind="activations", n_token=TOKENS, unit_tokens=TOKENS // 4, arrays={f"{kind}/value": array}, labels=labels
    )
    store = Store.create(folder, schema, "0" * 64, {"determines": {}})
    rng = np.random.default_rng(0)
    for unit in schema.grid:
        values = rng.standard_normal((1, len(unit), case.d_in), dtype=np.float32)
        piece = xr.Dataset(
            {"value": (("layer", "token", "d_model"), values)}, coords={"token": pd.RangeIndex(unit.start, unit.stop)}
        )
        writer = UnitWriter(store, unit)
        writer.put(xr.DataTree.from_dict({kind: piece}))
        writer.finish({})
    return store


def encodings(case: Case, folder: Path, device: str) -> dict[str, Measurement]:
    """The product alone, with the choice of features, and the whole step over stored activations."""
    keep_freed_memory()
    dictionary = dictionary_of(case).to(device)
    save_dictionary(dictionary, folder / "sae")
    store = stored(case, folder / "activations")
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((ROWS, case.d_in), dtype=np.float32)).to(device)
    encode = Encode(
        name="sae", model=ModelSource(source="none"), dictionary=str(folder / "sae"), memory=ROWS * case.n_feature * 12
    )

    def product() -> None:
        torch.addmm(dictionary.b_enc, x, dictionary.W_enc)

    def features() -> None:
        dictionary.encode_ranked(x) if case.kind == "topk" else dictionary.encode_sparse(x)

    return {
        "the encoder's matrix product": lambda: seconds(product, device),
        "and its features": lambda: seconds(features, device),
        "the step: activations read, features written": lambda: step(encode, store, folder / "features", device),
    }


def seconds(work: Callable[[], None], device: str) -> float:
    """Of as many rows as the store has tokens."""
    started = time.perf_counter()
    for _ in range(TOKENS // ROWS):
        work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def step(encode: Encode, store: Store, folder: Path, device: str) -> float:
    """Seconds of encoding a store: reading, products, features, shards, fsync, checksums, records; without loading."""
    shutil.rmtree(folder, ignore_errors=True)
    source = StoreSource(store, store.schema_with_labels)
    own = encode.schema(source.schema)
    target = Store.create(folder, own, "0" * 64, {"determines": {}})
    apply = encode.load(device, own)
    started = time.perf_counter()
    for unit in own.grid:
        writer = UnitWriter(target, unit)
        for piece in apply(source.read(encode.span(unit, source.schema, own)), unit):
            writer.put(piece)
        writer.finish({})
    return time.perf_counter() - started
