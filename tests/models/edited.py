"""transformers' Llama with one of its activations edited, by PyTorch hooks where a module takes or gives it, and by a
rewritten norm or attention where none does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

Edit = Callable[[Tensor], Tensor]

INPUTS = {"attn.hook_z": "self_attn.o_proj", "mlp.hook_in": "mlp", "mlp.hook_post": "mlp.down_proj"}
OUTPUTS = {
    "attn.hook_q": "self_attn.q_proj",
    "attn.hook_k": "self_attn.k_proj",
    "attn.hook_v": "self_attn.v_proj",
    "attn.hook_out": "self_attn.o_proj",
    "hook_attn_out": "self_attn.o_proj",
    "mlp.hook_pre": "mlp.gate_proj",
    "mlp.hook_pre_linear": "mlp.up_proj",
    "mlp.hook_out": "mlp.down_proj",
    "hook_mlp_out": "mlp",
    "hook_resid_post": "",
}
TOP = {"hook_embed": "model.embed_tokens", "hook_final_norm": "model.norm", "hook_logits": "lm_head"}
NORMS = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
BY_HEAD = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")


def edited_logits(model: LlamaForCausalLM, token_ids: Tensor, name: str, edit: Edit) -> Tensor:
    """Run the model with `edit` at the hook point `name`; it is given the tensor with the dimensions of a capture."""
    with _edited(model, name, edit):
        logits: Tensor = model(token_ids).logits
    return logits


def _edited(model: LlamaForCausalLM, name: str, edit: Edit) -> contextlib.AbstractContextManager[object]:
    if name in TOP:
        return _output_edited(model.get_submodule(TOP[name]), edit)
    if name.startswith("ln_final."):
        return _norm_edited(model.model.norm, name, edit)
    layer, kind = name.removeprefix("blocks.").split(".", 1)
    block = model.model.layers[int(layer)]
    if kind in BY_HEAD:
        edit = _by_head(edit, model.config.head_dim)
    if kind in OUTPUTS:
        return _output_edited(block.get_submodule(OUTPUTS[kind]), edit)
    if kind in INPUTS:
        return _input_edited(block.get_submodule(INPUTS[kind]), edit)
    if kind.startswith(("ln1.", "ln2.")):
        return _norm_edited(block.get_submodule(NORMS[kind[:3]]), name, edit)
    special = {
        "hook_resid_pre": lambda: _input_edited(block, edit),
        "attn.hook_in": lambda: _output_edited(block.input_layernorm, edit),
        "hook_resid_mid": lambda: _stream_edited(block.post_attention_layernorm, edit),
        "attn.hook_result": lambda: _result_edited(block.self_attn.o_proj, model.config.head_dim, edit),
    }
    return special[kind]() if kind in special else _attention_edited(int(layer), kind, edit)


def _by_head(edit: Edit, width: int) -> Edit:
    return lambda value: edit(value.unflatten(-1, (-1, width))).flatten(-2)


@contextlib.contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    with handle:
        yield


def _output_edited(module: nn.Module, edit: Edit) -> contextlib.AbstractContextManager[object]:
    return _hooked(module.register_forward_hook(lambda module, given, result: edit(result)))


def _input_edited(module: nn.Module, edit: Edit) -> contextlib.AbstractContextManager[object]:
    return _hooked(module.register_forward_pre_hook(lambda module, given: (edit(given[0]), *given[1:])))


def _stream_edited(module: nn.Module, edit: Edit) -> contextlib.AbstractContextManager[object]:
    """Edit in place what enters a module, for the stream that goes past it is the same tensor."""

    def change(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        given[0].copy_(edit(given[0].clone()))

    return _hooked(module.register_forward_pre_hook(change))


def _result_edited(module: nn.Linear, width: int, edit: Edit) -> contextlib.AbstractContextManager[object]:
    def change(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
        z = given[0].unflatten(-1, (-1, width))
        by_head = module.weight.unflatten(1, (-1, width))
        return edit(torch.stack([z[:, :, h] @ by_head[:, h].T for h in range(z.shape[2])], 2)).sum(2)

    return _hooked(module.register_forward_hook(change))


def _norm_edited(norm: nn.Module, name: str, edit: Edit) -> contextlib.AbstractContextManager[object]:
    at_scale = name.endswith("hook_scale")

    def forward(x: Tensor) -> Tensor:
        scale = (x.pow(2).mean(-1) + norm.variance_epsilon).sqrt()
        scale = edit(scale) if at_scale else scale
        normalized = x / scale[..., None]
        return (normalized if at_scale else edit(normalized)) * norm.weight

    return mock.patch.object(norm, "forward", forward)


def _attention_edited(layer: int, kind: str, edit: Edit) -> contextlib.AbstractContextManager[object]:
    plain = modeling_llama.eager_attention_forward

    def at(this: str, value: Tensor) -> Tensor:
        return edit(value) if this == kind else value

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **settings: Any) -> Any:
        if module.layer_idx != layer:
            return plain(module, q, k, v, mask, scaling, **settings)
        q = at("attn.hook_rot_q", q.transpose(1, 2)).transpose(1, 2)
        k = at("attn.hook_rot_k", k.transpose(1, 2)).transpose(1, 2)
        k, v = (modeling_llama.repeat_kv(x, module.num_key_value_groups) for x in (k, v))
        scores = (q @ k.transpose(2, 3) * scaling).masked_fill(mask < -1e30, -torch.inf)
        scores = at("attn.hook_attn_scores", scores)
        pattern = at("attn.hook_pattern", scores.softmax(-1).nan_to_num(0.0))
        return (pattern @ v).transpose(1, 2).contiguous(), pattern

    return mock.patch.object(modeling_llama, "eager_attention_forward", attend)
