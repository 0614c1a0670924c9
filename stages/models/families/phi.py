"""Phi 1, 1.5 and 2 (`model_type` "phi"), which run attention and MLP side by side behind one norm, and Phi 3 and 4
("phi3"), which are Llamas with fused projections.

Source of the defaults: transformers' PhiConfig and Phi3Config; of the tensor names: their models.
"""

from dataclasses import replace

from ..spec import ModelSpec
from .common import read_sizes, read_window, windows
from .config import Config
from .family import ACTIVATIONS, Family
from .layout import Layout
from .llama import LAYOUT
from .rotary import Rotary, read_rope, stretched


def _phi(config: Config) -> ModelSpec:
    sizes = read_sizes(config)
    n_ctx = config.count("max_position_embeddings", 2048)
    rope = read_rope(config, Rotary(d_head=sizes["d_head"], n_ctx=n_ctx, fraction=0.5))
    return ModelSpec(
        family="phi",
        n_ctx=stretched(n_ctx, rope),
        rope=rope,
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        parallel=True,
        shared_norm=True,
        qk_norm="head" if config.flag("qk_layernorm", False) else None,
        activation=ACTIVATIONS[config.choice("hidden_act", "gelu_new", ACTIVATIONS)],
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        unembed_bias=True,
        tied=config.flag("tie_word_embeddings", False),
        **sizes,
    )


def _phi3(config: Config) -> ModelSpec:
    sizes = read_sizes(config)
    n_ctx = config.count("max_position_embeddings", 4096)
    original = config.count("original_max_position_embeddings", 4096)
    rotary = Rotary(
        d_head=sizes["d_head"],
        n_ctx=n_ctx,
        fraction=1.0,
        original_context=original,
        legacy={"su": "longrope", "yarn": "longrope"},
    )
    window = read_window(config, None)
    config.take("auto_map", None)  # points to the code from which transformers' own Phi-3 was made; it is never run
    return ModelSpec(
        family="phi3",
        n_ctx=n_ctx,
        rope=read_rope(config, rotary),
        norm_eps=config.number("rms_norm_eps", 1e-5),
        activation=ACTIVATIONS[config.choice("hidden_act", "silu", ACTIVATIONS)],
        tied=config.flag("tie_word_embeddings", False),
        **sizes,
        **windows(window, (window is not None,) * sizes["n_layers"]),
    )


PHI = Family(
    parse=_phi,
    layout=Layout(
        prefix="model.",
        names={
            "embed": "model.embed_tokens",
            "blocks.{layer}.ln1": "model.layers.{layer}.input_layernorm",
            "blocks.{layer}.attn.q": "model.layers.{layer}.self_attn.q_proj",
            "blocks.{layer}.attn.k": "model.layers.{layer}.self_attn.k_proj",
            "blocks.{layer}.attn.v": "model.layers.{layer}.self_attn.v_proj",
            "blocks.{layer}.attn.q_norm": "model.layers.{layer}.self_attn.q_layernorm",
            "blocks.{layer}.attn.k_norm": "model.layers.{layer}.self_attn.k_layernorm",
            "blocks.{layer}.attn.out": "model.layers.{layer}.self_attn.dense",
            "blocks.{layer}.mlp.up": "model.layers.{layer}.mlp.fc1",
            "blocks.{layer}.mlp.down": "model.layers.{layer}.mlp.fc2",
            "ln_final": "model.final_layernorm",
            "unembed": "lm_head",
        },
        buffers=LAYOUT.buffers,
    ),
)
_QKV, _GATE_UP = "model.layers.{layer}.self_attn.qkv_proj", "model.layers.{layer}.mlp.gate_up_proj"
PHI3 = Family(
    parse=_phi3,
    layout=replace(
        LAYOUT,
        names={
            **LAYOUT.names,
            "blocks.{layer}.attn.q": _QKV,
            "blocks.{layer}.attn.k": _QKV,
            "blocks.{layer}.attn.v": _QKV,
            "blocks.{layer}.mlp.gate": _GATE_UP,
            "blocks.{layer}.mlp.up": _GATE_UP,
        },
    ),
)
