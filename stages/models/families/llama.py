"""Llama 1, 2 and 3 and everything published in their shape (SmolLM, TinyLlama, Yi, …): `model_type` "llama"; and
Mistral and Granite, which differ from it in a window and in multipliers.

Source of the defaults: transformers' LlamaConfig, MistralConfig, GraniteConfig. Source of the tensor names: their
models.
"""

from typing import Any

from ..spec import ModelSpec
from .common import read_sizes, read_window, windows
from .config import Config
from .family import ACTIVATIONS, Family
from .layout import Layout
from .rotary import Rotary, read_rope, stretched

LAYOUT = Layout(
    prefix="model.",
    names={
        "embed": "model.embed_tokens",
        "blocks.{layer}.ln1": "model.layers.{layer}.input_layernorm",
        "blocks.{layer}.attn.q": "model.layers.{layer}.self_attn.q_proj",
        "blocks.{layer}.attn.k": "model.layers.{layer}.self_attn.k_proj",
        "blocks.{layer}.attn.v": "model.layers.{layer}.self_attn.v_proj",
        "blocks.{layer}.attn.q_norm": "model.layers.{layer}.self_attn.q_norm",
        "blocks.{layer}.attn.k_norm": "model.layers.{layer}.self_attn.k_norm",
        "blocks.{layer}.attn.out": "model.layers.{layer}.self_attn.o_proj",
        "blocks.{layer}.ln2": "model.layers.{layer}.post_attention_layernorm",
        "blocks.{layer}.mlp.gate": "model.layers.{layer}.mlp.gate_proj",
        "blocks.{layer}.mlp.up": "model.layers.{layer}.mlp.up_proj",
        "blocks.{layer}.mlp.down": "model.layers.{layer}.mlp.down_proj",
        "ln_final": "model.norm",
        "unembed": "lm_head",
    },
    buffers=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"rotary_emb\.inv_freq"),
)
"""The tensors of Llama, and of the many families that kept its names."""


def read_llama_like(
    config: Config, *, n_ctx: int, d_head: int | None = None, norm_eps: float = 1e-6, activation: str = "silu"
) -> dict[str, Any]:
    """Give the fields of `ModelSpec` that families of Llama's shape spell as it does; the arguments are a family's
    defaults."""
    sizes = read_sizes(config, d_head=d_head)
    n_ctx = config.count("max_position_embeddings", n_ctx)
    rope = read_rope(config, Rotary(d_head=sizes["d_head"], n_ctx=n_ctx))
    return sizes | {
        "n_ctx": stretched(n_ctx, rope),
        "rope": rope,
        "norm_eps": config.number("rms_norm_eps", norm_eps),
        "activation": ACTIVATIONS[config.choice("hidden_act", activation, ACTIVATIONS)],
        "tied": config.flag("tie_word_embeddings", False),
    }


def read_biases(config: Config) -> dict[str, Any]:
    """Give the biases of attention where one setting stands for those of all four projections."""
    biased = config.flag("attention_bias", False)
    return {"qkv_bias": biased, "out_bias": biased}


def _llama(config: Config) -> ModelSpec:
    fields = read_llama_like(config, n_ctx=2048) | read_biases(config)
    return ModelSpec(family="llama", mlp_bias=config.flag("mlp_bias", False), **fields)


def _mistral(config: Config) -> ModelSpec:
    fields = read_llama_like(config, n_ctx=4096 * 32)
    window = read_window(config, 4096)
    return ModelSpec(family="mistral", **fields, **windows(window, (window is not None,) * fields["n_layers"]))


def _granite(config: Config) -> ModelSpec:
    fields = read_llama_like(config, n_ctx=2048) | read_biases(config)
    return ModelSpec(
        family="granite",
        mlp_bias=config.flag("mlp_bias", False),
        embed_scale=config.number("embedding_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        attn_scale=config.number("attention_multiplier", 1.0),
        logit_scale=1 / config.number("logits_scaling", 1.0),
        **fields,
    )


LLAMA = Family(parse=_llama, layout=LAYOUT)
MISTRAL = Family(parse=_mistral, layout=LAYOUT)
GRANITE = Family(parse=_granite, layout=LAYOUT)
