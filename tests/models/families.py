"""Tiny random models of every family, with every odd setting that its configuration has switched on at least once."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

WINDOW = 7
ORIGINAL_CONTEXT = 16

_ALL = {"vocab_size": 101, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_SIZES = {
    **_ALL,
    "hidden_size": 90,
    "intermediate_size": 52,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}
_UNGROUPED = {key: size for key, size in _SIZES.items() if key != "num_key_value_heads"}
_FREE_HEADS = {**_SIZES, "hidden_size": 36, "head_dim": 10}  # the heads together are wider than the residual stream

SIZES: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_FREE_HEADS, "rms_norm_eps": 1e-4},
    "qwen2": {**_SIZES, "rms_norm_eps": 1e-4},
    "qwen3": {**_FREE_HEADS, "rms_norm_eps": 1e-4},
    "mistral": {**_SIZES, "rms_norm_eps": 1e-4, "sliding_window": None},
    "gemma": {**_FREE_HEADS, "rms_norm_eps": 1e-4, "tie_word_embeddings": True},
    "gemma2": {**_FREE_HEADS, "rms_norm_eps": 1e-4, "tie_word_embeddings": True, "query_pre_attn_scalar": 11},
    "gemma3_text": {**_FREE_HEADS, "rms_norm_eps": 1e-4, "tie_word_embeddings": True, "query_pre_attn_scalar": 11},
    "phi3": {**_SIZES, "rms_norm_eps": 1e-4},
    "phi": {**_SIZES, "layer_norm_eps": 1e-3, "hidden_size": 108},
    "starcoder2": {**_SIZES, "norm_epsilon": 1e-3, "tie_word_embeddings": True},
    "gpt2": {
        **_ALL,
        "n_embd": 90,
        "n_inner": 52,
        "n_layer": 4,
        "n_head": 9,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-3,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {**_UNGROUPED, "layer_norm_eps": 1e-3},
    "olmo": _SIZES,
    "olmo2": {**_SIZES, "rms_norm_eps": 1e-4},
    "granite": {**_SIZES, "rms_norm_eps": 1e-4, "attention_multiplier": 0.2},
}
"""A family's configuration as it is, but for sizes no two of which are equal."""


def _rope(kind: str, base: float = 1e4, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **settings}}


def _yarn(**settings: Any) -> dict[str, Any]:
    return _rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL_CONTEXT, **settings)


def _longrope(n_pairs: int, **settings: Any) -> dict[str, Any]:
    short, long = [1.0 + 0.3 * i for i in range(n_pairs)], [1.5 + 2.0 * i for i in range(n_pairs)]
    return _rope("longrope", short_factor=short, long_factor=long, **settings)


# The ramp's ends fall between channels here, and on whole ones if truncated.
_RAMP = {"base": 50.0, "beta_fast": 2.0, "beta_slow": 0.05}
_LLAMA3 = _rope(
    "llama3",
    500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=ORIGINAL_CONTEXT,
)
_DYNAMIC = {"max_position_embeddings": ORIGINAL_CONTEXT, **_rope("dynamic", factor=4.0)}
_ORIGINAL = {"original_max_position_embeddings": ORIGINAL_CONTEXT}
_SLIDES, _SEES = "sliding_attention", "full_attention"
_WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}


def _two_tables(whole: dict[str, Any], local: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {_SEES: whole["rope_parameters"], _SLIDES: local["rope_parameters"]}}


ODD: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "llama": {
        "linear": _rope("linear", factor=4.0),
        "dynamic": _DYNAMIC,
        "llama3, biases": {**_LLAMA3, "attention_bias": True, "mlp_bias": True},
        "yarn": _yarn(),
        "yarn, its ramp": _yarn(**_RAMP),
        "yarn, its ramp not truncated": _yarn(**_RAMP, truncate=False),
        "yarn, attention factor": _yarn(attention_factor=1.3),
        "yarn, mscale": _yarn(mscale=1.3, mscale_all_dim=0.6),
        "yarn, mscale without its partner": _yarn(mscale=1.3),
        "longrope": _longrope(5, factor=4.0, **_ORIGINAL),
        "longrope, attention factor": _longrope(5, factor=4.0, attention_factor=1.4, **_ORIGINAL),
    },
    "qwen2": {
        "windows in the upper layers": {**_WINDOWS, "max_window_layers": 2},
        "windows by layer": {**_WINDOWS, "layer_types": [_SLIDES, _SEES, _SEES, _SLIDES]},
        "a window that is not used": {"sliding_window": WINDOW, "max_window_layers": 1},
        "yarn, tied": {**_yarn(), **_TIED},
        "dynamic": _DYNAMIC,
    },
    "qwen3": {
        "biases, one key-value head": {"attention_bias": True, "num_key_value_heads": 1},
        "windows in the upper layers, tied": {**_WINDOWS, **_TIED, "max_window_layers": 3},
        "llama3": _LLAMA3,
        "yarn": _yarn(**_RAMP),
    },
    "mistral": {
        "window": {"sliding_window": WINDOW},
        "window, heads wider than the stream": {"sliding_window": WINDOW, "head_dim": 12},
        "a window beyond the context": {"sliding_window": 4096},
        "relu, another rotary base, tied": {"hidden_act": "relu", **_rope("default", 300.0), **_TIED},
    },
    "gemma": {
        "untied, one key-value head": {**_UNTIED, "num_key_value_heads": 1},
        "gelu, which means its approximation": {"hidden_act": "gelu"},
        "silu, biases": {"hidden_act": "silu", "attention_bias": True},
    },
    "gemma2": {
        "tight soft-caps": {"attn_logit_softcapping": 0.9, "final_logit_softcapping": 1.7},
        "no soft-caps, window": {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": WINDOW,
        },
        "soft-caps and window": {"attn_logit_softcapping": 1.3, "sliding_window": WINDOW},
        "another scale, biases": {"query_pre_attn_scalar": 3, "attention_bias": True},
        "windows by layer": {"sliding_window": WINDOW, "layer_types": [_SEES, _SLIDES, _SLIDES, _SLIDES]},
        "exact gelu, untied": {"hidden_activation": "gelu", **_UNTIED},
    },
    "gemma3_text": {
        "window, every third layer without": {"sliding_window": WINDOW, "sliding_window_pattern": 3},
        "windows by layer": {"sliding_window": WINDOW, "layer_types": [_SEES, _SLIDES, _SLIDES, _SEES]},
        "two rotary tables": {
            "sliding_window_pattern": 2,
            **_two_tables(_rope("linear", 700.0, factor=8.0), _rope("default", 30.0)),
        },
        "both tables scaled": {
            "sliding_window_pattern": 2,
            **_two_tables(_LLAMA3, _rope("linear", 30.0, factor=2.0)),
        },
        "soft-cap of the logits, another scale": {"final_logit_softcapping": 1.7, "query_pre_attn_scalar": 3},
        "biases, silu, untied": {"attention_bias": True, "hidden_activation": "silu", **_UNTIED},
    },
    "phi3": {
        "window": {"sliding_window": WINDOW},
        "as many key-value heads as heads, tied": {"num_key_value_heads": None, **_TIED},
        "longrope": {**_longrope(5), **_ORIGINAL},
        "longrope of four channels in ten, window": {
            **_longrope(2, partial_rotary_factor=0.4),
            **_ORIGINAL,
            "sliding_window": WINDOW + ORIGINAL_CONTEXT,
        },
        "longrope, attention factor": {**_longrope(5, attention_factor=1.4), **_ORIGINAL},
        "six channels in ten turn": _rope("default", partial_rotary_factor=0.6),
    },
    "phi": {
        "norms of queries and keys": {"qk_layernorm": True},
        "four channels in ten turn": _rope("default", 200.0, partial_rotary_factor=0.4),
        "all channels turn, linear": _rope("linear", factor=4.0, partial_rotary_factor=1.0),
        "dynamic": {**_DYNAMIC, **_rope("dynamic", factor=4.0, partial_rotary_factor=0.7)},
        "as many key-value heads as heads, tied": {"num_key_value_heads": None, **_TIED},
        "relu": {"hidden_act": "relu"},
    },
    "starcoder2": {
        "no biases, untied": {"use_bias": False, **_UNTIED},
        "window": {"sliding_window": WINDOW},
        "exact gelu, another rotary base": {"hidden_act": "gelu", **_rope("default", 300.0)},
    },
    "gpt2": {
        "four times the stream in the MLP": {"n_inner": None},
        "scaled by the layer": {"scale_attn_by_inverse_layer_idx": True},
        "not scaled": {"scale_attn_weights": False},
        "scaled by the layer alone": {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
        "another order of the same": {"reorder_and_upcast_attn": True},
        "relu, untied": {"activation_function": "relu", **_UNTIED},
        "exact gelu": {"activation_function": "gelu"},
        "silu": {"activation_function": "silu"},
    },
    "gpt_neox": {
        "one after another": {"use_parallel_residual": False},
        "all channels turn": _rope("default", partial_rotary_factor=1.0),
        "six channels in ten turn, another base": _rope("default", 300.0, partial_rotary_factor=0.6),
        "no biases in attention, tied": {"attention_bias": False, **_TIED},
        "tanh gelu, linear": {"hidden_act": "gelu_new", **_rope("linear", factor=4.0, partial_rotary_factor=0.4)},
    },
    "olmo": {
        "clipped": {"clip_qkv": 0.7},
        "clipped, biases, as many key-value heads as heads": {
            "clip_qkv": 1.1,
            "attention_bias": True,
            "num_key_value_heads": None,
        },
        "tied, another rotary base": {**_TIED, **_rope("default", 300.0)},
    },
    "olmo2": {
        "biases, one key-value head": {"attention_bias": True, "num_key_value_heads": 1},
        "as many key-value heads as heads, tied": {"num_key_value_heads": None, **_TIED},
        "linear": _rope("linear", factor=4.0),
    },
    "granite": {
        "embedding multiplier": {"embedding_multiplier": 12.0},
        "small attention multiplier": {"attention_multiplier": 0.05},
        "no attention multiplier": {"attention_multiplier": 1.0},
        "residual multiplier": {"residual_multiplier": 0.22},
        "scaled logits": {"logits_scaling": 8.0},
        "everything at once": {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.05,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "attention_bias": True,
            "mlp_bias": True,
            **_TIED,
            **_LLAMA3,
        },
    },
}
"""By family, what is changed in its configuration."""

AS_IT_IS = "as it is"
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    f"{family}: {name}": (family, {**SIZES[family], **odd})
    for family in SIZES
    for name, odd in {AS_IT_IS: {}, **ODD[family]}.items()
}
"""By a name, a family and a configuration of it."""

_OF_ROTATIONS = {"rope_parameters", "max_position_embeddings", "original_max_position_embeddings"}
STRUCTURES = tuple(
    f"{family}: {name}"
    for family in SIZES
    for name, odd in {AS_IT_IS: {}, **ODD[family]}.items()
    if not odd or odd.keys() - _OF_ROTATIONS - {"tie_word_embeddings"}
)
"""Variants that differ from their family in more than how queries and keys are turned."""

WITHOUT_EFFECT = frozenset(
    {
        "qwen2: a window that is not used",
        "mistral: a window beyond the context",
        "gemma: gelu, which means its approximation",
        "gpt2: another order of the same",
        *(f"{family}: {AS_IT_IS}" for family in SIZES),
    }
)
"""Variants that compute what the family computes as it is. All others compute something else."""


def build(variant: str) -> PreTrainedModel:
    """Make the model of a variant."""
    return make(*VARIANTS[variant])


def make(family: str, settings: Mapping[str, Any]) -> PreTrainedModel:
    """Make a model with eager attention. Every weight and bias is random and matters, and is the same in all models of
    a family that have it."""
    with torch.random.fork_rng():
        torch.manual_seed(20_240_229)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    model.set_attn_implementation("eager")
    centre = 0.0 if family.startswith("gemma") else 1.0  # Gemma's norms add one to their weight
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            is_norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
            if is_norm:
                weight.copy_(centre + 0.3 * noise)
            else:
                weight.copy_((1.3 * min(weight.shape) ** -0.5 if weight.dim() == 2 else 0.3) * noise)
    return model
