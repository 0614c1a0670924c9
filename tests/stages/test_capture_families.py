"""A store of any family holds what its forward gives: points that others lack, lengths that change rotations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import forebay
from forebay.stages.models.taps import HookSpec

from ..models.families import SIZES, VARIANTS

HOOKS = {
    "gpt2": ["hook_pos_embed", "blocks.*.attn.hook_k", "blocks.1.mlp.hook_post", "blocks.*.hook_resid_mid"],
    "gpt_neox": ["blocks.*.attn.hook_rot_q", "blocks.*.hook_mlp_out", "blocks.2.attn.hook_pattern"],
    "gemma3_text": ["blocks.*.attn.hook_rot_k", "blocks.*.hook_attn_out", "blocks.[0,3].attn.hook_attn_scores"],
    "olmo2": ["blocks.*.attn.hook_in", "blocks.*.hook_resid_post", "hook_logits"],
    "phi3": ["blocks.*.attn.hook_rot_q", "blocks.*.hook_resid_post"],
}


@pytest.fixture
def model(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with a tiny random model of a family and the tokenizer of the tiny Llama."""
    family, settings = request.param
    vocabulary = forebay.load_model(tiny_model, device="cpu").spec.d_vocab
    settings = {key: value for key, value in settings.items() if (family, key) != ("gpt_neox", "num_key_value_heads")}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = AutoConfig.for_model(family, **{**settings, "vocab_size": vocabulary, "initializer_range": 0.2})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, tmp_path / family)
    return tmp_path / family


LONG = next(settings for name, (family, settings) in VARIANTS.items() if family == "phi3" and "long" in name)
CASES = [(family, LONG if family == "phi3" else SIZES[family]) for family in HOOKS]


@pytest.mark.parametrize("model", CASES, ids=list(HOOKS), indirect=True)
def test_the_store_holds_what_the_forward_gives(
    model: Path, make_recipe: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    hooks = HOOKS[model.name]
    documents: dict[str, Any] = {"context": 40, "layout": "documents", "long_documents": "split"}
    recipe = make_recipe(model.name, model=model, tokenize=documents, capture={"hooks": hooks, "unit_tokens": 200})
    assert forebay.run(recipe, tmp_path / "run").code == 0
    tree, loaded = forebay.open_run(tmp_path / "run"), forebay.load_model(model, device="cpu")
    tokens = tree["tokens"].to_dataset()
    for sequence in (0, 3, 5):
        ids = tokens["token_id"].values[tokens["sequence"].values == sequence]
        out = loaded.forward([ids.astype(np.int64)], HookSpec().capture(*hooks))
        for point, value in out.captures.items():
            kept = tree[f"activations/{point.kind}"].to_dataset()
            kept = kept if point.layer is None else kept.sel(layer=point.layer)
            along = "sequence" if "query" in point.dims else "token"
            chosen = kept["value"].values[kept["sequence"].values == sequence]
            if along == "sequence":
                chosen = chosen[..., : len(ids), : len(ids)]
            expected = value[0].numpy()
            np.testing.assert_allclose(
                chosen.reshape(expected.shape), expected, rtol=2e-4, atol=2e-5, err_msg=str(point)
            )
