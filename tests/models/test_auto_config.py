"""An unknown model_type is read from settings and tensors, announced, and refused where anything is in doubt."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from forebay.stages.models.checkpoint import Checkpoint
from forebay.stages.models.errors import UnverifiedModelWarning
from forebay.stages.models.families.report import TensorComparison
from forebay.stages.models.load import load_model
from forebay.stages.models.source import check_compatibility, open_checkpoint

from .families import AS_IT_IS, SIZES, VARIANTS
from .old_spelling import respell
from .renaming import (
    HEADS,
    SLIDING,
    SMALL,
    Json,
    edit_config,
    edit_weights,
    foreign,
    open_unknown,
    refused,
    renamed,
    save,
)

WORST_TOKEN = 1e-5


def logits_of(folder: Path, token_ids: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnverifiedModelWarning)
        logits = load_model(folder, device="cpu").forward(token_ids).logits
    assert logits is not None
    return logits


def differences(one: Checkpoint, other: Checkpoint) -> Mapping[str, tuple[object, object]]:
    names = (field.name for field in dataclasses.fields(one.spec) if field.name != "family")
    pairs = {name: (getattr(one.spec, name), getattr(other.spec, name)) for name in names}
    return {name: (mine, its) for name, (mine, its) in pairs.items() if mine != its}


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(1, 101, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny Llama that calls itself something new."""
    save(f"llama: {AS_IT_IS}", tmp_path / "model")
    edit_config(tmp_path / "model", **renamed("llama"))
    return tmp_path / "model"


# ── families that are known by another name ──────────────────────────────────────────────────────────────────────────

NO_WEIGHTS = "olmo"
"""The one family whose checkpoints, renamed, are refused: norms without weights say nothing of themselves."""

ODDEST = (
    "llama: llama3, biases",
    "qwen2: windows in the upper layers",
    "qwen3: biases, one key-value head",
    "mistral: window",
    "gemma: silu, biases",
    "gemma2: soft-caps and window",
    "gemma3_text: two rotary tables",
    "phi3: longrope of four channels in ten, window",
    "phi: norms of queries and keys",
    "starcoder2: no biases, untied",
    "gpt2: scaled by the layer",
    "gpt_neox: one after another",
    "olmo2: biases, one key-value head",
    "granite: everything at once",
)
READABLE = [*(f"{family}: {AS_IT_IS}" for family in SIZES if family != NO_WEIGHTS), *ODDEST]


@pytest.mark.parametrize("variant", READABLE)
def test_a_known_family_under_an_unknown_name_is_the_same_model(
    variant: str, tmp_path: Path, token_ids: Tensor, worst_token: Callable[[Tensor, Tensor], float]
) -> None:
    family, _ = VARIANTS[variant]
    theirs = save(variant, tmp_path)
    own = open_checkpoint(tmp_path)
    edit_config(tmp_path, **renamed(family))
    assert differences(open_unknown(tmp_path), own) == {}
    with torch.no_grad():
        assert worst_token(logits_of(tmp_path, token_ids), theirs(token_ids).logits) < WORST_TOKEN


@pytest.mark.parametrize("family", [family for family in SIZES if family != NO_WEIGHTS])
def test_the_old_spelling_says_the_same(family: str, tmp_path: Path) -> None:
    save(f"{family}: {AS_IT_IS}", tmp_path)
    own = open_checkpoint(tmp_path)
    old = respell(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(old))
    edit_config(tmp_path, **renamed(family))
    assert differences(open_unknown(tmp_path), own) == {}


def test_norms_without_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    save(f"olmo: {AS_IT_IS}", tmp_path)
    edit_config(tmp_path, **renamed("olmo"))
    report = refused(tmp_path)
    assert report.problems == ("its norms have no weights, so that neither their kind nor their epsilon can be told",)
    assert report.tensors == TensorComparison()
    assert report.unhonoured == {}


def test_a_base_model_alone_is_read_too(llama: Path) -> None:
    own = open_unknown(llama).spec
    edit_config(llama, tie_word_embeddings=True)

    def bare(weights: dict[str, Tensor]) -> None:
        del weights["lm_head.weight"]
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)

    edit_weights(llama, bare)
    assert open_unknown(llama).spec == dataclasses.replace(own, tied=True)


# ── parts that no family has together ────────────────────────────────────────────────────────────────────────────────


def fuse(weights: dict[str, Tensor], parts: tuple[str, ...], whole: str) -> None:
    for layer in range(4):
        stem = f"model.layers.{layer}."
        weights[f"{stem}{whole}.weight"] = torch.cat([weights.pop(f"{stem}{part}.weight") for part in parts])


def test_fused_projections_and_norms_of_queries_may_come_together(
    tmp_path: Path, token_ids: Tensor, worst_token: Callable[[Tensor, Tensor], float]
) -> None:
    theirs = save(f"qwen3: {AS_IT_IS}", tmp_path)
    edit_config(tmp_path, **renamed("qwen3"))
    plain = open_unknown(tmp_path).spec
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    edit_weights(tmp_path, lambda weights: fuse(weights, qkv, "self_attn.qkv_proj"))
    edit_weights(tmp_path, lambda weights: fuse(weights, ("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_up_proj"))
    fused = open_unknown(tmp_path)
    assert fused.spec == plain
    assert "the tensor of gate and up holds the gate first" in check_compatibility(tmp_path).assumed
    with torch.no_grad():
        assert worst_token(logits_of(tmp_path, token_ids), theirs(token_ids).logits) < WORST_TOKEN


UNKNOWN: Mapping[str, tuple[str, Json]] = {
    "layer norms, a gate, biased queries": ("stablelm", {**SMALL, "use_qkv_bias": True, "layer_norm_eps": 1e-3}),
    "side by side behind one layer norm": ("stablelm", {**SMALL, "use_parallel_residual": True}),
    "norms behind, over all heads, windows": ("olmo3", {**SMALL, "sliding_window": 7}),
    "biases of queries alone": ("seed_oss", {**HEADS, "attention_bias": True, "attention_out_bias": False}),
    "alternating windows and soft-caps": ("vaultgemma", {**SLIDING, "attn_logit_softcapping": 1.5}),
    "windows in every layer": ("ministral", SLIDING),
}


@pytest.mark.parametrize(("model_type", "settings"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_kind_of_model_without_a_row_agrees_with_transformers(
    model_type: str, settings: Json, tmp_path: Path, token_ids: Tensor, worst_token: Callable[[Tensor, Tensor], float]
) -> None:
    theirs = foreign(model_type, settings)
    theirs.save_pretrained(tmp_path)
    assert open_unknown(tmp_path).spec.family == model_type
    with torch.no_grad():
        assert worst_token(logits_of(tmp_path, token_ids), theirs(token_ids).logits) < WORST_TOKEN


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_announced_with_what_was_inferred_and_what_was_assumed(llama: Path) -> None:
    with pytest.warns(UnverifiedModelWarning) as caught:
        open_checkpoint(llama)
    [warning] = caught
    text = str(warning.message)
    assert text.startswith(f"{llama} is of unknown model_type 'something_new'; it is read as a relative of 'llama'.")
    assert "RMSNorm of epsilon 0.0001 with weights before attention and MLP" in text
    assert "rotary embedding turns channel i of n with channel i + n/2" in text
    assert text.endswith("Compare its logits with its own implementation before you trust a number.")
    assert f"{check_compatibility(llama)}\n" in text


@pytest.mark.parametrize(
    ("model_type", "beginning"),
    [
        ("lama", "is of unknown model_type 'lama'; it is read as a relative of 'llama'. Did you mean 'llama'?"),
        ("absent", "has no model_type; it is read as a relative of 'llama'."),
        (None, "has no model_type; it is read as a relative of 'llama'."),
    ],
)
def test_a_misspelt_or_missing_model_type_is_an_unknown_one(
    llama: Path, model_type: str | None, beginning: str
) -> None:
    spec = open_unknown(llama).spec
    edit_config(llama, model_type=model_type)
    assert str(check_compatibility(llama)).startswith(f"{llama} {beginning}")
    family = "lama" if model_type == "lama" else "unknown"
    assert open_unknown(llama).spec == dataclasses.replace(spec, family=family)


def test_gemma_is_told_by_its_name_and_otherwise_the_difference_is_said(tmp_path: Path) -> None:
    save(f"gemma2: {AS_IT_IS}", tmp_path)
    edit_config(tmp_path, model_type="absent")
    assert open_unknown(tmp_path).spec.norm_offset == 1.0  # `architectures` still says it
    edit_config(tmp_path, architectures="absent", model_type="something_new")
    spec, report = open_unknown(tmp_path).spec, check_compatibility(tmp_path)
    assert (spec.norm_offset, spec.embed_scale, spec.norm_float32) == (0.0, 1.0, False)
    assert report.resembles == "gemma2"
    assert "unlike gemma2: norm_offset, norm_float32, embed_scale" in report.inferred
    assert any(line.startswith("unlike Gemma's, norms have the weight that is stored") for line in report.assumed)


def test_an_old_gemma_alternates_and_means_the_tanh_form(tmp_path: Path) -> None:
    save("gemma2: soft-caps and window", tmp_path)
    own = open_checkpoint(tmp_path)
    settings = {"rope_parameters": "absent", "rope_theta": 1e4, "layer_types": "absent", "sliding_window_size": 7}
    edit_config(tmp_path, **renamed("gemma2"), **settings, hidden_activation=None, hidden_act="gelu")
    assert differences(open_unknown(tmp_path), own) == {}
    assumed = " ".join(check_compatibility(tmp_path).assumed)
    assert "every other layer slides, the first one too" in assumed
    assert "tanh form" in assumed


def test_its_own_code_is_not_run_and_that_is_said(llama: Path) -> None:
    edit_config(llama, auto_map={"AutoModelForCausalLM": "modeling_new.NewForCausalLM"})
    open_unknown(llama)
    assert any("(auto_map) is not known: it is never run" in line for line in check_compatibility(llama).assumed)


def test_settings_that_are_null_ask_for_nothing(llama: Path) -> None:
    spec = open_unknown(llama).spec
    edit_config(llama, num_experts=None, logit_scale=None)
    assert open_unknown(llama).spec == spec
