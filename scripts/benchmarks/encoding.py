"""Encoding with a dictionary beside the bare matrix product of its encoder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
import xarray as xr

from forebay.pipeline.executors.this_process import run_step
from forebay.pipeline.plan import Plan, Source, Step, StoreSource
from forebay.pipeline.progress import Quiet
from forebay.pipeline.recipe import Recipe
from forebay.stages.dictionaries.activation import Activation
from forebay.stages.dictionaries.dictionary import Dictionary, Provenance
from forebay.stages.dictionaries.encoding import PIECE_TOKENS, load_encodings
from forebay.stages.dictionaries.save import save_dictionary
from forebay.stages.encode import Encode
from forebay.stages.models.memory import keep_freed_memory
from forebay.stages.tokenize import ModelSource
from forebay.stores.documents import Documents
from forebay.stores.schema import Schema, along_token
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

from .measuring import Measurement

TOKENS = 2**15
ROWS = (1024, 2048, 4096)
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
    Case(576, 16384, 32, "topk"),
    Case(576, 16384, 64, "topk"),
    Case(576, 16384, 50, "jumprelu"),
    Case(2304, 16384, 64, "topk"),
)
PRODUCT = "the encoder's matrix product, float32"


def dictionary_of(case: Case, hook: str = HOOK) -> Dictionary:
    """A random dictionary of a hook point whose preactivations of unit-normal inputs are unit-normal too."""
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
        hook=hook,
        hook_out=hook,
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
    """The product alone, with the choice of features, and the whole step over stored activations, in float32 and in
    bfloat16.
    """
    keep_freed_memory()
    dictionary = dictionary_of(case)
    save_dictionary(dictionary, folder / "sae")
    store = stored(case, folder / "activations")
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((TOKENS, case.d_in), dtype=np.float32)).to(device)
    variants = {PRODUCT: product(dictionary.to(device), x)}
    for dtype in ("float32", "bfloat16"):
        encode = Encode(name="sae", model=ModelSource(source="none"), dictionary=str(folder / "sae"), dtype=dtype)  # type: ignore[arg-type]
        variants[f"{dtype}: product and features"] = features(encode, x, device)
        variants[f"{dtype}: the step, activations read, features written"] = step(encode, store, folder, device)
    return variants


def product(dictionary: Dictionary, x: torch.Tensor) -> Measurement:
    """The product that is fastest: into an array that is there, of as many rows at a time as take the least time."""
    out = torch.empty(max(ROWS), dictionary.n_feature, device=x.device)

    def of_all(rows: int) -> None:
        for at in range(0, TOKENS, rows):
            torch.addmm(dictionary.b_enc, x[at : at + rows], dictionary.W_enc, out=out[:rows])

    of_all(ROWS[0])
    best = min(ROWS, key=lambda rows: seconds(lambda: of_all(rows), x.device))
    return lambda: seconds(lambda: of_all(best), x.device)


def features(encode: Encode, x: torch.Tensor, device: str) -> Measurement:
    """The encoder over activations in memory, in the blocks of the step, features dropped."""
    (site,) = encode.sites
    (encoding,) = load_encodings(encode, device)
    encoder = encoding.encoder

    def of_all() -> None:
        for piece in x.split(PIECE_TOKENS):
            for cut in encoding.blocks(len(piece)):
                found = piece[cut]
                encoder.encode_sparse(found) if site.rank is None else encoder.encode_ranked(found)

    return lambda: seconds(of_all, x.device)


def seconds(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@dataclass(frozen=True)
class StepOf(Step):
    """A step of no model, of which nothing is told."""

    @property
    def provenance(self) -> dict[str, Any]:
        return {"determines": {}}


@dataclass(frozen=True)
class PlanOf(Plan):
    """One step over a store that is there."""

    read: StoreSource | None = None

    def source(self, step: Step) -> Source:
        assert self.read is not None
        return self.read


def step(encode: Encode, store: Store, folder: Path, device: str) -> Measurement:
    """Seconds of the step as a run does it, units read, computed and written at once: reading, products, features, fit,
    shards, fsync, checksums, records; without loading.
    """
    source = StoreSource(store, store.schema_with_labels)
    own = encode.schema(source.schema)
    into = folder / f"features-{encode.dtype}"
    one = StepOf(encode, own, source.schema, {"numerics": {}}, "0" * 64, into)
    plan = PlanOf(cast(Recipe, None), folder, device, cast(Documents, None), (one,), read=source)

    def run() -> float:
        shutil.rmtree(into, ignore_errors=True)
        outcome = run_step(plan, one, Quiet(), Event())
        assert outcome.tokens == TOKENS
        return outcome.seconds

    return run
