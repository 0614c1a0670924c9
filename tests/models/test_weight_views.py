"""Weights under TransformerLens' names multiply hook points as the forward does, in every family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forebay.stages.models.errors import ModelError
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

from .families import STRUCTURES

TOKENS = torch.randint(0, 101, (2, 15), generator=torch.Generator().manual_seed(8))


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", STRUCTURES, indirect=True)
def test_views_multiply_as_the_forward_does(ours: Model) -> None:
    out, views, spec = ours.forward(TOKENS, HookSpec().capture("*", "blocks.*.attn.hook_result")), ours.views, ours.spec
    for layer in range(spec.n_layers):
        at = f"blocks.{layer}."
        entered, z = out[at + "attn.hook_in"], out[at + "attn.hook_z"]
        heads = {"q": (views.W_Q, views.b_Q), "k": (views.W_K, views.b_K), "v": (views.W_V, views.b_V)}
        for letter, (matrix, bias) in heads.items():
            expected = torch.einsum("btd,hde->bthe", entered, matrix(layer))
            expected = expected + bias(layer) if spec.qkv_bias else expected
            expected = expected if spec.clip_qkv is None else expected.clamp(-spec.clip_qkv, spec.clip_qkv)
            assert close(out[at + f"attn.hook_{letter}"], expected)
        result = torch.einsum("bthe,hed->bthd", z, views.W_O(layer))
        assert close(out[at + "attn.hook_result"], result)
        summed = result.sum(2) + views.b_O(layer) if spec.out_bias else result.sum(2)
        assert close(out[at + "attn.hook_out"], summed)
        linear = out[at + "mlp.hook_in"] @ views.W_in(layer)
        linear = linear + views.b_in(layer) if spec.mlp_bias else linear
        assert close(out[at + ("mlp.hook_pre_linear" if spec.gated else "mlp.hook_pre")], linear)
        hidden = out[at + "mlp.hook_post"] @ views.W_out(layer)
        assert close(out[at + "mlp.hook_out"], hidden + views.b_out(layer) if spec.mlp_bias else hidden)
    assert close(out["hook_embed"], views.W_E[TOKENS] * spec.embed_scale)
    logits = out["hook_final_norm"] @ views.W_U * spec.logit_scale
    logits = logits + views.b_U if spec.unembed_bias else logits
    cap = spec.logit_softcap
    assert close(out["hook_logits"], logits if cap is None else cap * torch.tanh(logits / cap))


def test_views_are_no_copies(tiny: Model) -> None:
    block, views = tiny.weights.blocks[1], tiny.views
    for view, whole in [
        (views.W_Q(1), block.qkv),
        (views.W_V(1), block.qkv),
        (views.W_O(1), block.out),
        (views.W_gate(1), block.gate_up),
        (views.W_in(1), block.gate_up),
        (views.W_U, tiny.weights.unembed),
    ]:
        assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_weights_that_a_model_does_not_have_are_refused(tiny: Model) -> None:
    views = tiny.views
    with pytest.raises(ModelError, match="has no learned positions"):
        _ = views.W_pos
    for bias in (views.b_Q, views.b_O, views.b_in, views.b_out):
        with pytest.raises(ModelError, match=r"this model \(llama\) has no bias"):
            bias(0)
    for layer in (-1, 3):
        with pytest.raises(ModelError, match=f"there is no layer {layer}; the layers of this model are 0 to 2"):
            views.W_Q(layer)
