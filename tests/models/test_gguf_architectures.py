"""A GGUF file of every architecture holds the same model as transformers, from which it was made."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import RopeScalingType
from torch import Tensor
from transformers import PreTrainedModel

from forebay.stages.models.errors import ModelError
from forebay.stages.models.gguf_specs import ARCHITECTURES
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.source import open_checkpoint
from forebay.stages.models.spec import RopeSpec
from forebay.stages.models.taps import HookSpec

from . import gguf_writing
from .families import make
from .gguf_writing import round_trip, write_gguf
from .reference import reference_points

# Two correct float32 implementations differ by about 2e-6 in a vector of these models.
WORST_TOKEN = 1e-5
WINDOW, LONG = 7, 40

# Rows of every matrix are whole blocks of 32 values, for quantisation; heads together are wider than the stream.
_SIZES = {
    "vocab_size": 101,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": False,
}
_QWEN2 = {key: value for key, value in _SIZES.items() if key != "head_dim"}
_GEMMA = {**_SIZES, "tie_word_embeddings": True}
_GEMMA2 = {
    **_GEMMA,
    "num_hidden_layers": 4,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 0.9,
    "final_logit_softcapping": 1.7,
    "query_pre_attn_scalar": 32,
}
_GEMMA3 = {**_GEMMA, "num_hidden_layers": 7, "sliding_window": WINDOW, "query_pre_attn_scalar": 32}


def _rope(kind: str, base: float = 500.0, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **settings}}


_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=16)
# The two ends of the ramp fall on channels that are turned.
_RAMP = _rope("yarn", 50.0, factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.05)
_WIDTH_OF_THE_STREAM = {"query_pre_attn_scalar": _SIZES["hidden_size"] // _SIZES["num_attention_heads"]}


def _two_tables(whole: dict[str, Any], local: dict[str, Any]) -> dict[str, Any]:
    tables = {"full_attention": whole["rope_parameters"], "sliding_attention": local["rope_parameters"]}
    return {"rope_parameters": tables}


VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", _SIZES),
    "llama, tied": ("llama", {**_SIZES, "tie_word_embeddings": True}),
    "llama, one key-value head": ("llama", {**_SIZES, "num_key_value_heads": 1}),
    "llama, biases": ("llama", {**_SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama, llama3 scaling as divisors": ("llama", {**_SIZES, **_LLAMA3}),
    "llama, linear": ("llama", {**_SIZES, **_rope("linear", factor=4.0)}),
    "llama, yarn": ("llama", {**_SIZES, **_YARN}),
    "qwen2": ("qwen2", _QWEN2),
    "qwen2, yarn with a ramp of its own, tied": ("qwen2", {**_QWEN2, **_RAMP, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", _SIZES),
    "qwen3, yarn": ("qwen3", {**_SIZES, **_YARN}),
    "gemma": ("gemma", _GEMMA),
    "gemma2": ("gemma2", _GEMMA2),
    "gemma2 of the 46 layers of 27B": ("gemma2", {**_GEMMA2, "num_hidden_layers": 46, **_WIDTH_OF_THE_STREAM}),
    "gemma3": ("gemma3_text", {**_GEMMA3, **_two_tables(_rope("default"), _rope("default", 1e4))}),
    "gemma3, linear": ("gemma3_text", {**_GEMMA3, **_two_tables(_rope("linear", factor=8.0), _rope("default", 1e4))}),
    "gemma3, another base of the layers that slide": (
        "gemma3_text",
        {**_GEMMA3, **_two_tables(_rope("default"), _rope("default", 30.0))},
    ),
    "gemma3, soft-cap of the logits": ("gemma3_text", {**_GEMMA3, "final_logit_softcapping": 1.7}),
    "gemma3 without windows": ("gemma3_text", {**_GEMMA3, "layer_types": ["full_attention"] * 7}),
    "gemma3 of the 62 layers of 27B": ("gemma3_text", {**_GEMMA3, "num_hidden_layers": 62, **_WIDTH_OF_THE_STREAM}),
}
"""By a name, transformers' family and a configuration of it that such files can hold."""

PLAIN = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


def build(variant: str) -> PreTrainedModel:
    """Make the model of a variant."""
    return make(*VARIANTS[variant])


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Matrices are so small here that threads would mostly wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def token_ids() -> Tensor:
    """Two sequences longer than the window, and than the context before scaling."""
    return torch.randint(0, 101, (2, LONG), generator=torch.Generator().manual_seed(3))


def vectors(value: Tensor, name: str) -> Tensor:
    """What one token has at a point, as one vector: that of all heads together."""
    return (value.transpose(1, 2) if name.endswith("pattern") else value).flatten(2).double()


def errors(model: Model, theirs: PreTrainedModel, token_ids: Tensor) -> dict[str, float]:
    """By point, how far its worst token is from what transformers computes, relative to the norm of its vector.

    Logits are taken twice: patterns are captured where attention is computed step by step, and only there.
    """
    reference = reference_points(theirs, token_ids)
    fused = model.forward(token_ids).logits
    out = model.forward(token_ids, HookSpec().capture("blocks.*.{hook_resid_post,attn.hook_pattern}"))
    assert fused is not None
    assert out.logits is not None
    found = {str(point): value for point, value in out.captures.items()} | {"hook_logits": out.logits}
    pairs = [(name, value, reference[name]) for name, value in found.items()]
    pairs.append(("hook_logits of the fused kernel", fused, reference["hook_logits"]))
    return {
        name: float(
            ((vectors(mine, name) - vectors(other, name)).norm(dim=-1) / vectors(other, name).norm(dim=-1)).max()
        )
        for name, mine, other in pairs
    }


def disagreements(path: Path, theirs: PreTrainedModel, token_ids: Tensor) -> dict[str, float]:
    """The points at which the model in a file is off by more than rounding."""
    found = errors(load_model(path, device="cpu"), theirs, token_ids)
    assert len(found) == 2 * theirs.config.num_hidden_layers + 2
    return {name: error for name, error in found.items() if not error < WORST_TOKEN}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_holds_the_model_it_was_made_from(variant: str, token_ids: Tensor, tmp_path: Path) -> None:
    theirs = build(variant)
    assert disagreements(write_gguf(theirs, tmp_path / "tiny.gguf"), theirs, token_ids) == {}


@pytest.mark.parametrize("variant", PLAIN)
def test_a_quantised_file_holds_what_its_blocks_stand_for(variant: str, token_ids: Tensor, tmp_path: Path) -> None:
    theirs = build(variant)
    path = write_gguf(theirs, tmp_path / "tiny.gguf", kind="Q8_0")
    assert max(errors(load_model(path, device="cpu"), theirs, token_ids).values()) > 100 * WORST_TOKEN
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(round_trip(weight, "Q8_0"))
    assert disagreements(path, theirs, token_ids) == {}


def test_every_architecture_is_written() -> None:
    assert set(PLAIN) == set(ARCHITECTURES)
    assert {family for family, _ in VARIANTS.values()} == set(gguf_writing.ARCHITECTURES)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("gemma", {"embed_scale": 1.0}),
        ("gemma2", {"sliding": (False,) * 4}),
        ("gemma2", {"sliding": (False, True) * 2}),
        ("gemma2 of the 46 layers of 27B", {"attn_scale": 32**-0.5}),
        ("gemma3", {"sliding": (True,) * 7}),
        ("gemma3", {"sliding": (False, *(True,) * 5, False)}),
        ("gemma3", {"sliding_rope": None}),
        ("gemma3, linear", {"sliding_rope": RopeSpec(base=1e4, kind="linear", factor=8.0)}),
        ("gemma3 of the 62 layers of 27B", {"attn_scale": 32**-0.5}),
        ("llama, llama3 scaling as divisors", {"rope": RopeSpec(base=500.0)}),
    ],
)
def test_what_a_file_implies_matters(variant: str, changes: dict[str, Any], token_ids: Tensor, tmp_path: Path) -> None:
    """What no key of the metadata says is far above the tolerance, so that it cannot be wrong unnoticed."""
    theirs = build(variant)
    model = load_model(write_gguf(theirs, tmp_path / "tiny.gguf"), device="cpu")
    other = dataclasses.replace(model, spec=dataclasses.replace(model.spec, **changes))
    assert max(errors(other, theirs, token_ids).values()) > 100 * WORST_TOKEN


def test_a_scaling_of_type_none_has_no_factor(tmp_path: Path) -> None:
    settings = {"add_rope_scaling_type": (RopeScalingType.NONE,), "add_rope_scaling_factor": (4.0,)}
    path = write_gguf(build("llama"), tmp_path / "tiny.gguf", **settings)
    assert open_checkpoint(path).spec.rope == RopeSpec(base=1e4)


def test_scaling_without_a_type_is_linear_in_either_spelling(tmp_path: Path) -> None:
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        path = write_gguf(build("llama"), tmp_path / f"{name}.gguf", add_float32=(f"llama.{name}", 4.0))
        assert open_checkpoint(path).spec.rope == RopeSpec(base=1e4, kind="linear", factor=4.0)


def test_yarn_makes_the_context_longer(tmp_path: Path) -> None:
    """Its context_length is that of the model before scaling in some files, and after it in others."""
    path = write_gguf(build("llama, yarn"), tmp_path / "tiny.gguf")
    assert open_checkpoint(path).spec.n_ctx == 64
    path = write_gguf(build("llama, yarn"), tmp_path / "tiny.gguf", add_context_length=(16,))
    assert open_checkpoint(path).spec.n_ctx == 64


EXTRA = {
    "llama": "blk.1.attn_q_norm.weight",
    "qwen2": "blk.1.post_attention_norm.weight",
    "qwen3": "blk.1.ffn_gate_inp.weight",
    "gemma": "blk.1.post_ffw_norm.weight",
    "gemma2": "blk.1.attn_k_norm.weight",
    "gemma3": "blk.1.layer_output_norm.weight",
}
"""Tensors that other architectures have, or none."""


@pytest.mark.parametrize("variant", PLAIN)
def test_tensors_that_nothing_reads_and_tensors_that_lack(variant: str, tmp_path: Path) -> None:
    theirs = build(variant)
    more = write_gguf(theirs, tmp_path / "more.gguf", tensors={EXTRA[variant]: np.ones(32, dtype=np.float32)})
    with pytest.raises(ModelError, match=rf"more\.gguf holds {re.escape(EXTRA[variant])}, which nothing here reads"):
        open_checkpoint(more)
    for name in gguf_writing.stored_tensors(theirs):
        if name.startswith(("blk.2.", "output_norm", "token_embd")):
            less = write_gguf(theirs, tmp_path / "less.gguf", tensors={name: None})
            with pytest.raises(ModelError, match=r"less\.gguf lacks .*, which its configuration asks for"):
                open_checkpoint(less)
