"""Analyses over a store beside the bare products that they come down to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import forebay
from forebay.stages.models.unembedding import load_unembedding

from . import forwards
from .measuring import Settings, Tables, compare, timed

ROWS = 512
"""Of a product with the unembedding."""


def over_a_store(settings: Settings, folder: Path) -> Tables:
    """The logit lens and principal components of a store of the layers asked for, read from its shards, beside products
    over the same values in memory: with the unembedding, and of all values with themselves."""
    layers = forwards.Layers(settings.layers, 0)
    plan = forwards.planned(folder / "captured", settings, layers, "float32")
    forwards.stored(plan)
    unembedding = load_unembedding(settings.source, device="cpu")
    path = Path(str(plan.folder))
    values = forebay.open_run(path)["activations/hook_resid_post"]["value"].values
    rows = torch.from_numpy(values.reshape(-1, values.shape[-1]))
    n_vectors = len(rows)

    def node() -> object:
        return forebay.open_run(path)["activations/hook_resid_post"].to_dataset()

    def unembed() -> None:
        with torch.inference_mode():
            for piece in rows.split(ROWS):
                F.linear(unembedding.normalize(piece), unembedding.weight)

    def by_hand() -> None:
        with torch.inference_mode():
            for piece in rows.split(ROWS):
                F.linear(unembedding.normalize(piece), unembedding.weight).log_softmax(-1).topk(5)

    lens = {
        "the product with the unembedding": lambda: timed(unembed),
        "and its five largest, by hand": lambda: timed(by_hand),
        "logit_lens of the store": lambda: timed(lambda: forebay.logit_lens(node(), unembedding).compute()),
    }

    def gram() -> None:
        for layer in values:
            wide = layer.astype(np.float64)
            wide -= wide.mean(0)
            np.linalg.eigh(wide.T @ wide)

    pca = {
        "the product of the values with themselves, and its eigenvectors": lambda: timed(gram),
        "pca of the store": lambda: timed(lambda: forebay.pca(node(), 8).compute()),
        "pca of the store, randomized": lambda: timed(lambda: forebay.pca(node(), 8, method="randomized").compute()),
    }
    return {"lens": compare(settings, lens, n_vectors), "pca": compare(settings, pca, n_vectors)}
