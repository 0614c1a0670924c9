"""StarCoder 2: `model_type` "starcoder2". Source of defaults and names: transformers' Starcoder2Config and model."""

from dataclasses import replace

from ..spec import ModelSpec
from .common import read_sizes, read_window, windows
from .config import Config
from .family import ACTIVATIONS, Family
from .llama import LAYOUT
from .rotary import Rotary, read_rope, stretched


def _parse(config: Config) -> ModelSpec:
    sizes = read_sizes(config)
    n_ctx = config.count("max_position_embeddings", 4096)
    rope = read_rope(config, Rotary(d_head=sizes["d_head"], n_ctx=n_ctx))
    biased = config.flag("use_bias", True)
    window = read_window(config, None)
    config.only("norm_type", "layer_norm")
    config.only("mlp_type", "default")
    config.only("scale_attn_weights", True)
    for key in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):
        config.only(key, True)
    config.take("activation_function", None)  # of the training code; the model goes by hidden_act
    return ModelSpec(
        family="starcoder2",
        n_ctx=stretched(n_ctx, rope),
        rope=rope,
        norm="layer",
        norm_bias=True,
        norm_eps=config.number("norm_epsilon", 1e-5),
        activation=ACTIVATIONS[config.choice("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS)],
        gated=False,
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=biased,
        tied=config.flag("tie_word_embeddings", True),
        **sizes,
        **windows(window, (window is not None,) * sizes["n_layers"]),
    )


STARCODER2 = Family(
    parse=_parse,
    layout=replace(
        LAYOUT,
        names={
            **LAYOUT.names,
            "blocks.{layer}.mlp.up": "model.layers.{layer}.mlp.c_fc",
            "blocks.{layer}.mlp.down": "model.layers.{layer}.mlp.c_proj",
        },
    ),
)
