"""OLMo, whose norms have no weights, and OLMo 2, whose norms stand after attention and MLP: `model_type` "olmo" and
"olmo2". Source of the defaults: transformers' OlmoConfig and Olmo2Config; of the tensor names: their models.
"""

from dataclasses import replace

from ..spec import ModelSpec
from .config import Config
from .family import Family
from .llama import LAYOUT, read_biases, read_llama_like


def _olmo(config: Config) -> ModelSpec:
    fields = read_llama_like(config, n_ctx=2048) | read_biases(config)
    fields["norm_eps"] = 1e-5  # fixed in the model
    clip = config.bound("clip_qkv")
    return ModelSpec(family="olmo", norm="layer", norm_weight=False, clip_qkv=clip, **fields)


def _olmo2(config: Config) -> ModelSpec:
    fields = read_llama_like(config, n_ctx=2048, norm_eps=1e-5) | read_biases(config)
    return ModelSpec(family="olmo2", pre_norms=False, post_norms=True, norm_float32=True, qk_norm="full", **fields)


OLMO = Family(parse=_olmo, layout=LAYOUT)
OLMO2 = Family(
    parse=_olmo2,
    layout=replace(
        LAYOUT,
        names={
            **LAYOUT.names,
            "blocks.{layer}.ln1_post": "model.layers.{layer}.post_attention_layernorm",
            "blocks.{layer}.ln2_post": "model.layers.{layer}.post_feedforward_layernorm",
        },
    ),
)
