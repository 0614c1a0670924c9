"""Gemma, Gemma 2 and Gemma 3 (text): `model_type` "gemma", "gemma2" and "gemma3_text".

Their norms have a weight of 1 + w, applied before the cast back; the embedding is multiplied by √d_model. Source of the
defaults: transformers' GemmaConfig, Gemma2Config and Gemma3TextConfig; of the tensor names: their models.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..spec import ModelSpec, RopeSpec
from .common import read_layer_types, read_sizes, read_window, windows
from .config import Config
from .family import ACTIVATIONS, Family
from .llama import LAYOUT, read_biases
from .rotary import Rotary, read_rope, read_table, stretched

_SANDWICH = replace(
    LAYOUT,
    names={
        **LAYOUT.names,
        "blocks.{layer}.ln1_post": "model.layers.{layer}.post_attention_layernorm",
        "blocks.{layer}.ln2": "model.layers.{layer}.pre_feedforward_layernorm",
        "blocks.{layer}.ln2_post": "model.layers.{layer}.post_feedforward_layernorm",
    },
)


def _read(config: Config, *, n_ctx: int) -> dict[str, Any]:
    sizes = read_sizes(config, d_head=256)
    return (
        sizes
        | read_biases(config)
        | {
            "n_ctx": config.count("max_position_embeddings", n_ctx),
            "norm_eps": config.number("rms_norm_eps", 1e-6),
            "norm_offset": 1.0,
            "norm_float32": True,
            "activation": _activation(config),
            "embed_scale": sizes["d_model"] ** 0.5,
            "tied": config.flag("tie_word_embeddings", True),
        }
    )


def _activation(config: Config) -> str:
    """Old files say `hidden_activation`, and mean the tanh form where it is null or absent, whatever `hidden_act` says;
    in those of transformers 5, Gemma's `hidden_act` counts."""
    old = config.take("rope_parameters", None) is None
    act = config.choice("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS)
    return ACTIVATIONS[config.choice("hidden_activation", "gelu_pytorch_tanh" if old else act, ACTIVATIONS)]


def _one_rotation(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    rope = read_rope(config, Rotary(d_head=fields["d_head"], n_ctx=fields["n_ctx"]))
    return {"rope": rope, "n_ctx": stretched(fields["n_ctx"], rope)}


def _two_rotations(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Layers that see everything turn by one table, layers that slide by another."""
    far = Rotary(d_head=fields["d_head"], n_ctx=fields["n_ctx"], base=1_000_000.0)
    near = replace(far, base=10_000.0)
    tables = config.table("rope_parameters")
    if tables is None:
        local = RopeSpec(base=config.number("rope_local_base_freq", near.base))
        both = {"rope": read_rope(config, far), "sliding_rope": local}
    else:
        both = {"rope": RopeSpec(base=far.base), "sliding_rope": RopeSpec(base=near.base)}
        for name, key, start in (("rope", "full_attention", far), ("sliding_rope", "sliding_attention", near)):
            if (table := tables.table(key)) is not None:
                both[name] = read_table(table, start)
        tables.refuse_the_rest()
    return {**both, "n_ctx": stretched(fields["n_ctx"], both["rope"])}


def _scales(config: Config, final: float | None) -> dict[str, Any]:
    return {
        "attn_scale": config.number("query_pre_attn_scalar", 256) ** -0.5,
        "logit_softcap": config.bound("final_logit_softcapping", final),
    }


def _gemma(config: Config) -> ModelSpec:
    fields = _read(config, n_ctx=8192)
    return ModelSpec(family="gemma", **fields | _one_rotation(config, fields))


def _gemma2(config: Config) -> ModelSpec:
    fields = _read(config, n_ctx=8192) | _scales(config, 30.0)
    window = read_window(config, 4096)
    config.only("sliding_window_size", window)  # the same once more, in the first files
    sliding = read_layer_types(config, tuple(i % 2 == 0 for i in range(fields["n_layers"])))
    return ModelSpec(
        family="gemma2",
        post_norms=True,
        attn_softcap=config.bound("attn_logit_softcapping", 50.0),
        **fields | _one_rotation(config, fields),
        **windows(window, sliding),
    )


def _gemma3(config: Config) -> ModelSpec:
    fields = _read(config, n_ctx=131_072) | _scales(config, None)
    config.only("attn_logit_softcapping", None)  # the reference stores it and its attention does not read it
    every = config.count("sliding_window_pattern", config.take("_sliding_window_pattern", 6))
    sliding = read_layer_types(config, tuple((i + 1) % every != 0 for i in range(fields["n_layers"])))
    return ModelSpec(
        family="gemma3",
        post_norms=True,
        qk_norm="head",
        **fields | _two_rotations(config, fields),
        **windows(read_window(config, 4096), sliding),
    )


GEMMA = Family(parse=_gemma, layout=LAYOUT)
GEMMA2 = Family(parse=_gemma2, layout=_SANDWICH)
GEMMA3 = Family(parse=_gemma3, layout=_SANDWICH)
