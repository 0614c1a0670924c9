"""On every variant of every family, the points of one forward hold together: equations over captures and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from forebay.stages.models.forward import Forward
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec
from forebay.stages.models.unembedding import load_unembedding

from .families import SIZES

LENGTH = 24
LAYERS = range(4)
SETTINGS_OF_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")


@pytest.fixture(scope="module")
def out(ours: Model) -> Forward:
    token_ids = torch.randint(0, 101, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    return ours.forward(token_ids, HookSpec().capture("*"))


def at(out: Forward, layer: int, kind: str) -> Tensor:
    return out[f"blocks.{layer}.{kind}"].double()


def has(model: Model, kind: str) -> bool:
    return any(point.kind == kind for point in model.spec.points())


def weight(model: Model, name: str) -> Tensor:
    """A weight as the checkpoint has it."""
    assert model.checkpoint is not None
    return model.checkpoint.read(name).double()


def bias(model: Model, name: str) -> Tensor:
    return weight(model, name) if name in model.spec.weight_shapes() else torch.zeros(()).double()


def close(left: Tensor, right: Tensor) -> bool:
    """Equal up to the rounding of float32, beside the largest value there is."""
    right = right.expand_as(left)
    return bool((left - right).abs().max() <= 3e-6 * right.abs().max().clamp_min(1.0))


def epsilon(config: Any) -> float:
    """The epsilon of the norms; OLMo's configuration has none."""
    return next((value for key, value in SIZES[config.model_type].items() if "eps" in key), 1e-5)


def weighted(model: Model, normalized: Tensor, name: str) -> Tensor:
    """Weight and bias of a norm, on a value already normalised. Gemma's norms add one to their weight."""
    added = 1.0 if model.spec.family.startswith("gemma") else 0.0
    scale = weight(model, f"{name}.weight") + added if f"{name}.weight" in model.spec.weight_shapes() else 1.0
    return normalized * scale + bias(model, f"{name}.bias")


def normalized(x: Tensor, model: Model, config: Any) -> tuple[Tensor, Tensor]:
    """A value divided by its scale, and the scale; of a LayerNorm, after its mean is taken off."""
    if config.model_type in ("gpt2", "gpt_neox", "phi", "starcoder2", "olmo"):
        x = x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1) + epsilon(config)).sqrt()
    return x / scale[..., None], scale


@pytest.mark.parametrize("layer", LAYERS)
def test_the_residual_stream_is_a_sum(out: Forward, ours: Model, layer: int) -> None:
    pre, attn, mlp, post = (at(out, layer, f"hook_{kind}") for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
    assert close(pre + attn + mlp, post)
    if has(ours, "hook_resid_mid"):
        mid = at(out, layer, "hook_resid_mid")
        assert close(pre + attn, mid)
        assert close(mid + mlp, post)
    if layer > 0:
        assert torch.equal(pre, at(out, layer - 1, "hook_resid_post"))


def test_the_first_residual_stream_is_the_embedding(out: Forward, ours: Model) -> None:
    embedded = out["hook_embed"] + out["hook_pos_embed"] if has(ours, "hook_pos_embed") else out["hook_embed"]
    assert torch.equal(out["blocks.0.hook_resid_pre"], embedded)


@pytest.mark.parametrize("layer", LAYERS)
def test_norms_before_attention_and_mlp(out: Forward, ours: Model, theirs: PreTrainedModel, layer: int) -> None:
    mlp_reads = "hook_resid_mid" if has(ours, "hook_resid_mid") else "hook_resid_pre"
    for name, given, taken in (("ln1", "hook_resid_pre", "attn.hook_in"), ("ln2", mlp_reads, "mlp.hook_in")):
        x, into = at(out, layer, given), at(out, layer, taken)
        if theirs.config.model_type == "olmo2":
            assert torch.equal(x, into)
        elif (theirs.config.model_type, name) == ("phi", "ln2"):
            assert torch.equal(at(out, layer, "attn.hook_in"), into)
        else:
            quotient, scale = normalized(x, ours, theirs.config)
            assert close(at(out, layer, f"{name}.hook_normalized"), quotient)
            assert close(at(out, layer, f"{name}.hook_scale"), scale)
            assert close(weighted(ours, quotient, f"blocks.{layer}.{name}"), into)


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_added_is_the_raw_output_normed_and_multiplied(
    out: Forward, ours: Model, theirs: PreTrainedModel, layer: int
) -> None:
    multiplier = getattr(theirs.config, "residual_multiplier", 1.0)
    for part, norm in (("attn", "ln1_post"), ("mlp", "ln2_post")):
        raw, added = at(out, layer, f"{part}.hook_out"), at(out, layer, f"hook_{part}_out")
        if theirs.config.model_type in ("gemma2", "gemma3_text", "olmo2"):
            raw = weighted(ours, normalized(raw, ours, theirs.config)[0], f"blocks.{layer}.{norm}")
        assert close(raw * multiplier, added)


@pytest.mark.parametrize("layer", LAYERS)
def test_queries_keys_and_values_are_projections(
    out: Forward, ours: Model, theirs: PreTrainedModel, layer: int
) -> None:
    bound = getattr(theirs.config, "clip_qkv", None) or torch.inf
    for letter in "qkv":
        name = f"blocks.{layer}.attn.{letter}"
        projected = at(out, layer, "attn.hook_in") @ weight(ours, f"{name}.weight").T + bias(ours, f"{name}.bias")
        assert close(at(out, layer, f"attn.hook_{letter}").flatten(-2), projected.clamp(-bound, bound))


def visible(config: Any, layer: int) -> Tensor:
    """Which keys [query, key] a layer sees, from the configuration of transformers."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[layer] == "sliding_attention"
    window = getattr(config, "sliding_window", None) if slides else None
    past = torch.ones(LENGTH, LENGTH).tril().bool()
    return past if window is None else past & torch.ones(LENGTH, LENGTH).triu(1 - window).bool()


@pytest.mark.parametrize("layer", LAYERS)
def test_scores_are_scaled_and_capped_products_of_what_a_query_sees(
    out: Forward, ours: Model, theirs: PreTrainedModel, layer: int
) -> None:
    rotary = "rot_" if has(ours, "attn.hook_rot_q") else ""
    queries, keys = (at(out, layer, f"attn.hook_{rotary}{letter}") for letter in "qk")
    keys = keys.repeat_interleave(queries.shape[2] // keys.shape[2], 2)
    attention = next(m for m in theirs.modules() if getattr(m, "layer_idx", None) == layer and hasattr(m, "scaling"))
    expected = torch.einsum("bqhe,bkhe->bhqk", queries, keys) * attention.scaling
    if theirs.config.model_type == "gemma2" and (cap := theirs.config.attn_logit_softcapping) is not None:
        expected = cap * torch.tanh(expected / cap)
    scores, seen = at(out, layer, "attn.hook_attn_scores"), visible(theirs.config, layer)
    assert (scores[..., ~seen] == -torch.inf).all()
    assert close(scores[..., seen], expected[..., seen])


@pytest.mark.parametrize("layer", LAYERS)
def test_patterns_are_softmaxes_over_what_a_query_sees(
    out: Forward, theirs: PreTrainedModel, layer: int
) -> None:
    pattern = at(out, layer, "attn.hook_pattern")
    assert torch.allclose(pattern.sum(-1), torch.ones(()).double(), rtol=0, atol=1e-6)
    assert (pattern[..., ~visible(theirs.config, layer)] == 0).all()
    assert close(pattern, at(out, layer, "attn.hook_attn_scores").softmax(-1))


@pytest.mark.parametrize("layer", LAYERS)
def test_heads_weigh_values_and_add_up(out: Forward, ours: Model, layer: int) -> None:
    z, values = at(out, layer, "attn.hook_z"), at(out, layer, "attn.hook_v")
    values = values.repeat_interleave(z.shape[2] // values.shape[2], 2)
    assert close(torch.einsum("bhqk,bkhe->bqhe", at(out, layer, "attn.hook_pattern"), values), z)
    matrix = weight(ours, f"blocks.{layer}.attn.out.weight").unflatten(-1, z.shape[-2:])
    results = at(out, layer, "attn.hook_result")
    assert close(torch.einsum("bqhe,dhe->bqhd", z, matrix), results)
    assert close(results.sum(2) + bias(ours, f"blocks.{layer}.attn.out.bias"), at(out, layer, "attn.hook_out"))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_mlp(out: Forward, ours: Model, theirs: PreTrainedModel, layer: int) -> None:
    name, x = f"blocks.{layer}.mlp", at(out, layer, "mlp.hook_in")
    activation = next(getattr(theirs.config, key) for key in SETTINGS_OF_ACTIVATIONS if hasattr(theirs.config, key))

    def through(x: Tensor, matrix: str) -> Tensor:
        return x @ weight(ours, f"{name}.{matrix}.weight").T + bias(ours, f"{name}.{matrix}.bias")

    gated = has(ours, "mlp.hook_pre_linear")
    pre, post = at(out, layer, "mlp.hook_pre"), at(out, layer, "mlp.hook_post")
    assert close(through(x, "gate" if gated else "up"), pre)
    factor = at(out, layer, "mlp.hook_pre_linear") if gated else torch.ones_like(pre)
    assert close(factor, through(x, "up") if gated else factor)
    assert close(ACT2FN[activation](pre) * factor, post)
    assert close(through(post, "down"), at(out, layer, "mlp.hook_out"))


def test_the_final_norm_and_the_logits(out: Forward, ours: Model, theirs: PreTrainedModel) -> None:
    quotient, scale = normalized(at(out, LAYERS[-1], "hook_resid_post"), ours, theirs.config)
    assert close(out["ln_final.hook_normalized"].double(), quotient)
    assert close(out["ln_final.hook_scale"].double(), scale)
    assert close(out["hook_final_norm"].double(), weighted(ours, quotient, "ln_final"))
    matrix = weight(ours, "embed.weight" if theirs.config.tie_word_embeddings else "unembed.weight")
    logits = out["hook_final_norm"].double() @ matrix.T + bias(ours, "unembed.bias")
    logits = logits / getattr(theirs.config, "logits_scaling", 1.0)
    if (cap := getattr(theirs.config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    assert close(out["hook_logits"].double(), logits)


def test_the_unembedding_alone_gives_the_logits(out: Forward, ours: Model) -> None:
    assert ours.checkpoint is not None
    last = out[f"blocks.{LAYERS[-1]}.hook_resid_post"]
    for unembedding in (ours.unembedding, load_unembedding(ours.checkpoint.source, device="cpu")):
        assert close(unembedding.project_to_vocab(last), out["hook_logits"])
        assert close(unembedding.project(out["hook_final_norm"]), out["hook_logits"])
