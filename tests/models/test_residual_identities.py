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

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 24
WITH_MEANS = ("gpt2", "gpt_neox", "olmo", "phi", "starcoder2")
"""Families whose norms take the mean off."""
SANDWICHED = ("gemma2", "gemma3_text", "olmo2")
"""Families with norms on what attention and MLP give."""
ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")


@pytest.fixture(scope="module")
def out(ours: Model) -> Forward:
    token_ids = torch.randint(0, 101, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    return ours.forward(token_ids, HookSpec().capture("*", "blocks.*.attn.hook_result"))


def at(out: Forward, kind: str) -> Tensor:
    """The captures of a kind of point: layers, then the dimensions of a point."""
    return torch.stack([value for point, value in out.captures.items() if point.kind == kind]).double()


def has(model: Model, kind: str) -> bool:
    return any(point.kind == kind for point in model.spec.points())


def weight(model: Model, name: str, absent: float = 0.0) -> Tensor:
    """A weight as the checkpoint has it, for all layers where the name begins with a dot; else a number in its place.

    Layers are laid out to meet those of captures.
    """
    assert model.checkpoint is not None
    names = [f"blocks.{layer}{name}" for layer in range(model.spec.n_layers)] if name.startswith(".") else [name]
    if names[0] not in model.spec.weight_shapes():
        return torch.tensor(absent).double()
    values = torch.stack([model.checkpoint.read(each).double() for each in names])
    return values[:, None, None] if values.dim() == 2 else values[:, None]


def linear(x: Tensor, model: Model, name: str) -> Tensor:
    return x @ weight(model, f"{name}.weight").mT + weight(model, f"{name}.bias")


def off(left: Tensor, right: Tensor) -> list[int]:
    """The layers in which two tensors differ by more than float32 rounds, beside the largest value there."""
    left, right = left.flatten(1), right.expand_as(left).flatten(1)
    far = (left - right).abs().amax(1) > 3e-6 * right.abs().amax(1).clamp_min(1.0)
    return far.nonzero().flatten().tolist()


def normed(x: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """A value divided by its scale, and the scale."""
    epsilon = next((value for key, value in SIZES[config.model_type].items() if "eps" in key), 1e-5)  # OLMo's is fixed
    if config.model_type in WITH_MEANS:
        x = x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1) + epsilon).sqrt()
    return x / scale[..., None], scale


def weighted(normalized: Tensor, model: Model, name: str) -> Tensor:
    """What a norm gives of a value already divided by its scale. Gemma's norms add one to their weight."""
    added = 1.0 if model.spec.family.startswith("gemma") else 0.0
    return normalized * (weight(model, f"{name}.weight", absent=1.0) + added) + weight(model, f"{name}.bias")


def test_the_residual_stream_is_a_sum(out: Forward, ours: Model) -> None:
    pre, attn, mlp, post = (at(out, f"hook_{kind}") for kind in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
    assert off(pre + attn + mlp, post) == []
    if has(ours, "hook_resid_mid"):
        assert off(pre + attn, at(out, "hook_resid_mid")) == []
        assert off(at(out, "hook_resid_mid") + mlp, post) == []
    assert torch.equal(pre[1:], post[:-1])
    embedded = (
        at(out, "hook_embed") + at(out, "hook_pos_embed") if has(ours, "hook_pos_embed") else at(out, "hook_embed")
    )
    assert off(pre[:1], embedded) == []


def test_norms_before_attention_and_mlp(out: Forward, ours: Model, theirs: PreTrainedModel) -> None:
    mlp_reads = "hook_resid_mid" if has(ours, "hook_resid_mid") else "hook_resid_pre"
    for name, given, taken in (("ln1", "hook_resid_pre", "attn.hook_in"), ("ln2", mlp_reads, "mlp.hook_in")):
        if theirs.config.model_type == "olmo2":
            assert torch.equal(at(out, given), at(out, taken))
        elif (theirs.config.model_type, name) == ("phi", "ln2"):
            assert torch.equal(at(out, "attn.hook_in"), at(out, taken))
        else:
            quotient, scale = normed(at(out, given), theirs.config)
            assert off(at(out, f"{name}.hook_normalized"), quotient) == []
            assert off(at(out, f"{name}.hook_scale"), scale) == []
            assert off(at(out, taken), weighted(quotient, ours, f".{name}")) == []


def test_what_is_added_is_the_raw_output_normed_and_multiplied(
    out: Forward, ours: Model, theirs: PreTrainedModel
) -> None:
    multiplier = getattr(theirs.config, "residual_multiplier", 1.0)
    for part, norm in (("attn", ".ln1_post"), ("mlp", ".ln2_post")):
        raw = at(out, f"{part}.hook_out")
        if theirs.config.model_type in SANDWICHED:
            raw = weighted(normed(raw, theirs.config)[0], ours, norm)
        assert off(at(out, f"hook_{part}_out"), raw * multiplier) == []


def test_queries_keys_and_values_are_projections_within_the_clip(
    out: Forward, ours: Model, theirs: PreTrainedModel
) -> None:
    bound = getattr(theirs.config, "clip_qkv", None) or torch.inf
    for letter in "qkv":
        projected = linear(at(out, "attn.hook_in"), ours, f".attn.{letter}").clamp(-bound, bound)
        assert off(at(out, f"attn.hook_{letter}").flatten(-2), projected) == []


def visible(config: Any) -> Tensor:
    """Which keys a query sees, [layer, query, key], by the configuration of transformers."""
    past = torch.ones(LENGTH, LENGTH).tril().bool()
    if (window := getattr(config, "sliding_window", None)) is None:
        return past.expand(config.num_hidden_layers, -1, -1)
    near = past & torch.ones(LENGTH, LENGTH).triu(1 - window).bool()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return torch.stack([near if kind == "sliding_attention" else past for kind in kinds])


def edges(mask: Tensor, like: Tensor) -> Tensor:
    return mask[:, None, None].expand_as(like)


def test_scores_are_scaled_and_capped_products_of_what_a_query_sees(
    out: Forward, ours: Model, theirs: PreTrainedModel
) -> None:
    rotary = "rot_" if has(ours, "attn.hook_rot_q") else ""
    queries, keys = (at(out, f"attn.hook_{rotary}{letter}") for letter in "qk")
    keys = keys.repeat_interleave(queries.shape[3] // keys.shape[3], 3)
    scales = torch.tensor([module.scaling for module in theirs.modules() if hasattr(module, "scaling")]).double()
    expected = torch.einsum("lbqhe,lbkhe,l->lbhqk", queries, keys, scales)
    if theirs.config.model_type == "gemma2" and (cap := theirs.config.attn_logit_softcapping) is not None:
        expected = cap * torch.tanh(expected / cap)
    scores = at(out, "attn.hook_attn_scores")
    seen = edges(visible(theirs.config), scores)
    assert torch.equal(scores == -torch.inf, ~seen)
    assert off(scores.masked_fill(~seen, 0.0), expected.masked_fill(~seen, 0.0)) == []


def test_patterns_are_softmaxes_over_what_a_query_sees(out: Forward, theirs: PreTrainedModel) -> None:
    pattern = at(out, "attn.hook_pattern")
    assert off(pattern.sum(-1), torch.ones(()).double()) == []
    assert (pattern[~edges(visible(theirs.config), pattern)] == 0.0).all()
    assert off(pattern, at(out, "attn.hook_attn_scores").softmax(-1)) == []


def test_heads_weigh_values_and_add_up(out: Forward, ours: Model) -> None:
    z, values = at(out, "attn.hook_z"), at(out, "attn.hook_v")
    values = values.repeat_interleave(z.shape[3] // values.shape[3], 3)
    assert off(z, torch.einsum("lbhqk,lbkhe->lbqhe", at(out, "attn.hook_pattern"), values)) == []
    matrix = weight(ours, ".attn.out.weight").squeeze(1).unflatten(-1, z.shape[-2:])
    results = at(out, "attn.hook_result")
    assert off(results, torch.einsum("lbqhe,ldhe->lbqhd", z, matrix)) == []
    assert off(at(out, "attn.hook_out"), results.sum(3) + weight(ours, ".attn.out.bias")) == []


def test_the_mlp(out: Forward, ours: Model, theirs: PreTrainedModel) -> None:
    activation = next(getattr(theirs.config, key) for key in ACTIVATIONS if hasattr(theirs.config, key))
    x, pre, post = (at(out, f"mlp.hook_{kind}") for kind in ("in", "pre", "post"))
    if has(ours, "mlp.hook_pre_linear"):
        up = at(out, "mlp.hook_pre_linear")
        assert off(pre, linear(x, ours, ".mlp.gate")) == []
        assert off(up, linear(x, ours, ".mlp.up")) == []
        assert off(post, ACT2FN[activation](pre) * up) == []
    else:
        assert off(pre, linear(x, ours, ".mlp.up")) == []
        assert off(post, ACT2FN[activation](pre)) == []
    assert off(at(out, "mlp.hook_out"), linear(post, ours, ".mlp.down")) == []


def test_the_final_norm_and_the_logits(out: Forward, ours: Model, theirs: PreTrainedModel) -> None:
    quotient, scale = normed(at(out, "hook_resid_post")[-1:], theirs.config)
    assert off(at(out, "ln_final.hook_normalized"), quotient) == []
    assert off(at(out, "ln_final.hook_scale"), scale) == []
    assert off(at(out, "hook_final_norm"), weighted(quotient, ours, "ln_final")) == []
    matrix = weight(ours, "embed.weight" if theirs.config.tie_word_embeddings else "unembed.weight")
    logits = at(out, "hook_final_norm") @ matrix.mT + weight(ours, "unembed.bias")
    logits = logits / getattr(theirs.config, "logits_scaling", 1.0)
    if (cap := getattr(theirs.config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    assert off(at(out, "hook_logits"), logits) == []


def test_the_unembedding_alone_gives_the_logits(out: Forward, ours: Model) -> None:
    assert ours.checkpoint is not None
    last, logits = out[f"blocks.{ours.spec.n_layers - 1}.hook_resid_post"], at(out, "hook_logits")
    for unembedding in (ours.unembedding, load_unembedding(ours.checkpoint.source, device="cpu")):
        assert off(unembedding.project_to_vocab(last)[None].double(), logits) == []
        assert off(unembedding.project(out["hook_final_norm"])[None].double(), logits) == []
