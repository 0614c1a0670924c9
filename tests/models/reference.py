"""What transformers computes, under TransformerLens' names: every tensor that its modules and functions let one see."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Heads(NamedTuple):
    """How many query heads and key-value heads a model has, and how wide each is."""

    queries: int
    keys: int
    width: int


Split = Callable[[Tensor, Heads], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites:
    """Where in a family's tree of modules the points lie; paths are below the model, and within `blocks` below a block.

    `inputs` and `outputs`: kind of point → the module that takes it, or gives it. `fused`: module → the kinds that its
    output holds together, and how to take them apart. `scaled`: kind → the setting that multiplies what the module
    gives. `rotary`: whether queries and keys are turned.
    """

    embed: str = "model.embed_tokens"
    positions: str | None = None
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    fused: Mapping[str, tuple[tuple[str, ...], Split]] = field(default_factory=dict)
    scaled: Mapping[str, str] = field(default_factory=dict)
    rotary: bool = True


QKV = ("attn.hook_q", "attn.hook_k", "attn.hook_v")


def _one_after_another(qkv: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    """All queries, then all keys, then all values."""
    return qkv.split([heads.queries * heads.width, heads.keys * heads.width, heads.keys * heads.width], -1)


def _head_by_head(qkv: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    """Query, key and value of the first head, then those of the second, and so on."""
    return tuple(part.flatten(-2) for part in qkv.unflatten(-1, (heads.queries, -1)).chunk(3, -1))


def _halves(both: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    return both.chunk(2, -1)


_IN = {"hook_resid_pre": "", "attn.hook_in": "self_attn.q_proj", "attn.hook_z": "self_attn.o_proj"}
_GATED_IN = {"mlp.hook_in": "mlp.gate_proj", "mlp.hook_post": "mlp.down_proj"}
_OUT = {
    "attn.hook_q": "self_attn.q_proj",
    "attn.hook_k": "self_attn.k_proj",
    "attn.hook_v": "self_attn.v_proj",
    "attn.hook_out": "self_attn.o_proj",
    "hook_attn_out": "self_attn.o_proj",
    "hook_resid_post": "",
}
_GATED_OUT = {
    "mlp.hook_pre": "mlp.gate_proj",
    "mlp.hook_pre_linear": "mlp.up_proj",
    "mlp.hook_out": "mlp.down_proj",
    "hook_mlp_out": "mlp.down_proj",
}


def _plain_mlp(into: str, out: str) -> tuple[dict[str, str], dict[str, str]]:
    """Inputs and outputs of an MLP without a gate."""
    return {"mlp.hook_in": into, "mlp.hook_post": out}, {
        "mlp.hook_pre": into,
        "mlp.hook_out": out,
        "hook_mlp_out": out,
    }


_MID = {"hook_resid_mid": "post_attention_layernorm"}
_LLAMA = Sites(inputs=_IN | _GATED_IN | _MID, outputs=_OUT | _GATED_OUT)
_AFTER = {"hook_attn_out": "post_attention_layernorm", "hook_mlp_out": "post_feedforward_layernorm"}
_GEMMA2 = Sites(
    inputs=_IN | _GATED_IN | {"hook_resid_mid": "pre_feedforward_layernorm"}, outputs=_OUT | _GATED_OUT | _AFTER
)
_GRANITE = Sites(
    inputs=_LLAMA.inputs,
    outputs=_LLAMA.outputs,
    scaled={
        "hook_embed": "embedding_multiplier",
        "hook_attn_out": "residual_multiplier",
        "hook_mlp_out": "residual_multiplier",
    },
)
_OLMO2 = Sites(inputs=_IN | _GATED_IN | {"hook_resid_mid": "mlp.gate_proj"}, outputs=_OUT | _GATED_OUT | _AFTER)


def _phi3() -> Sites:
    inputs = _IN | _MID | {"attn.hook_in": "self_attn.qkv_proj", "mlp.hook_in": "mlp.gate_up_proj"}
    outputs = {kind: path for kind, path in (_OUT | _GATED_OUT).items() if kind not in QKV and "pre" not in kind}
    return Sites(
        inputs=inputs | {"mlp.hook_post": "mlp.down_proj"},
        outputs=outputs,
        fused={
            "self_attn.qkv_proj": (QKV, _one_after_another),
            "mlp.gate_up_proj": (("mlp.hook_pre", "mlp.hook_pre_linear"), _halves),
        },
    )


def _phi() -> Sites:
    into, out = _plain_mlp("mlp.fc1", "mlp.fc2")
    dense = {"attn.hook_out": "self_attn.dense", "hook_attn_out": "self_attn.dense"}
    return Sites(
        final_norm="model.final_layernorm",
        inputs=_IN | {"attn.hook_z": "self_attn.dense"} | into,
        outputs=_OUT | dense | out,
    )


def _starcoder2() -> Sites:
    into, out = _plain_mlp("mlp.c_fc", "mlp.c_proj")
    return Sites(inputs=_IN | into | _MID, outputs=_OUT | out)


def _gpt2() -> Sites:
    into, out = _plain_mlp("mlp.c_fc", "mlp.c_proj")
    attention = {"hook_resid_pre": "", "attn.hook_in": "attn.c_attn", "attn.hook_z": "attn.c_proj"}
    return Sites(
        embed="transformer.wte",
        positions="transformer.wpe",
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        inputs=attention | into | {"hook_resid_mid": "ln_2"},
        outputs=out | {"attn.hook_out": "attn.c_proj", "hook_attn_out": "attn.c_proj", "hook_resid_post": ""},
        fused={"attn.c_attn": (QKV, _one_after_another)},
        rotary=False,
    )


def _gpt_neox(*, parallel: bool) -> Sites:
    into, out = _plain_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    attention = {
        "hook_resid_pre": "",
        "attn.hook_in": "attention.query_key_value",
        "attn.hook_z": "attention.dense",
    }
    dense = {"attn.hook_out": "attention.dense", "hook_attn_out": "attention.dense", "hook_resid_post": ""}
    return Sites(
        embed="gpt_neox.embed_in",
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        inputs=attention | into | ({} if parallel else _MID),
        outputs=dense | out,
        fused={"attention.query_key_value": (QKV, _head_by_head)},
    )


SITES: Mapping[str, Sites] = {
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": _gpt2(),
    "granite": _GRANITE,
    "olmo2": _OLMO2,
    "phi": _phi(),
    "phi3": _phi3(),
    "starcoder2": _starcoder2(),
    **dict.fromkeys(("gemma", "llama", "mistral", "olmo", "qwen2", "qwen3"), _LLAMA),
}


def sites_of(config: Any) -> Sites:
    if config.model_type == "gpt_neox":
        return _gpt_neox(parallel=config.use_parallel_residual)
    return SITES[config.model_type]


def reference_points(model: PreTrainedModel, token_ids: Tensor, *, scores: bool = False) -> dict[str, Tensor]:
    """Run a model of transformers and give, under TransformerLens' names, what its modules and functions let one see.

    Patterns, and queries and keys after rotary, are seen where its attention is the eager one; `scores` asks for those
    too, −∞ where a key is hidden.
    """
    sites, config = sites_of(model.config), model.config
    n_heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    heads = Heads(n_heads, getattr(config, "num_key_value_heads", n_heads), width)
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_rotary_restored(model.base_model))
        stack.enter_context(_modules_watched(model, sites, heads, seen))
        if config._attn_implementation == "eager":
            stack.enter_context(_attention_watched(model, sites, seen))
        seen["hook_logits"] = model(token_ids).logits
    if sites.positions is not None:
        seen["hook_pos_embed"] = seen["hook_pos_embed"].expand_as(seen["hook_embed"])
    for name in seen:
        if (setting := sites.scaled.get(_kind(name))) is not None:
            seen[name] = seen[name] * getattr(config, setting)
        if name.endswith((*QKV, "attn.hook_z")):
            seen[name] = seen[name].unflatten(-1, (-1, width))
            assert seen[name].shape[-2] == (heads.keys if name.endswith(QKV[1:]) else heads.queries)
    return {name: value for name, value in seen.items() if scores or "scores" not in name}


def _kind(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


@contextmanager
def _rotary_restored(model: PreTrainedModel) -> Iterator[None]:
    """Run on a copy of the rotary table: some kinds remember the longest sequence that they have seen."""
    table = dict(model.named_children()).get("rotary_emb")
    if table is not None:
        model.rotary_emb = copy.deepcopy(table, {id(table.config): table.config})
    try:
        yield
    finally:
        if table is not None:
            model.rotary_emb = table


@contextmanager
def _modules_watched(model: PreTrainedModel, sites: Sites, heads: Heads, seen: dict[str, Tensor]) -> Iterator[None]:
    # A value that is changed in place later, as by a clip of queries, is seen as it flows on: nothing is copied here.
    def keep_input(name: str) -> Callable[..., None]:
        return lambda module, given, result: seen.__setitem__(name, given[0])

    def keep_output(name: str) -> Callable[..., None]:
        return lambda module, given, result: seen.__setitem__(name, result)

    def keep_parts(names: list[str], split: Split) -> Callable[..., None]:
        return lambda module, given, result: seen.update(zip(names, split(result, heads), strict=True))

    watched: list[tuple[nn.Module, Callable[..., None]]] = [
        (model.get_submodule(sites.embed), keep_output("hook_embed")),
        (model.get_submodule(sites.final_norm), keep_output("hook_final_norm")),
    ]
    if sites.positions is not None:
        watched.append((model.get_submodule(sites.positions), keep_output("hook_pos_embed")))
    for layer, block in enumerate(model.get_submodule(sites.blocks)):
        prefix, module = f"blocks.{layer}.", block.get_submodule
        watched += [(module(path), keep_input(prefix + kind)) for kind, path in sites.inputs.items()]
        watched += [(module(path), keep_output(prefix + kind)) for kind, path in sites.outputs.items()]
        for path, (kinds, split) in sites.fused.items():
            watched.append((module(path), keep_parts([prefix + kind for kind in kinds], split)))
    handles = [module.register_forward_hook(hook) for module, hook in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _attention_watched(model: PreTrainedModel, sites: Sites, seen: dict[str, Tensor]) -> Iterator[None]:
    """Watch the softmax of every layer, in order, and the arguments of the family's function of attention."""
    softmax, calls = nn.functional.softmax, 0

    @functools.wraps(softmax)
    def watched_softmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        pattern = softmax(scores, *args, **kwargs)
        hidden = scores <= 0.5 * torch.finfo(scores.dtype).min  # the mask adds the least number there is
        seen[f"blocks.{calls}.attn.hook_attn_scores"] = scores.masked_fill(hidden, -torch.inf)
        seen[f"blocks.{calls}.attn.hook_pattern"] = pattern
        calls += 1
        return pattern

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.functional, "softmax", watched_softmax))
        if sites.rotary:
            family = sys.modules[type(model).__module__]
            attend = family.eager_attention_forward

            def watched_attention(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
                seen[f"blocks.{module.layer_idx}.attn.hook_rot_q"] = query.transpose(1, 2)
                seen[f"blocks.{module.layer_idx}.attn.hook_rot_k"] = key.transpose(1, 2)
                return attend(module, query, key, *args, **kwargs)

            stack.enter_context(mock.patch.object(family, "eager_attention_forward", watched_attention))
        yield
    assert calls == model.config.num_hidden_layers
