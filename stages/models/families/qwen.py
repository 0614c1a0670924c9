"""Qwen 2, 2.5 and 3 (dense): `model_type` "qwen2" and "qwen3".

Source of the defaults: transformers' Qwen2Config and Qwen3Config; of the tensor names: their models.
"""

from typing import Any

from ..spec import ModelSpec
from .common import read_layer_types, read_window, windows
from .config import Config
from .family import Family
from .llama import LAYOUT, read_biases, read_llama_like


def _windows(config: Config, n_layers: int) -> dict[str, Any]:
    slides = config.flag("use_sliding_window", False)
    first = config.whole("max_window_layers", 28)
    window = read_window(config, 4096) if slides else None
    if not slides:
        config.take("sliding_window", None)  # stands in every config.json, for when it is switched on
    return windows(window, read_layer_types(config, tuple(slides and i >= first for i in range(n_layers))))


def _qwen2(config: Config) -> ModelSpec:
    fields = read_llama_like(config, n_ctx=32_768)
    config.only("attention_bias", True)  # not a setting: the model has biases on queries, keys and values
    return ModelSpec(family="qwen2", qkv_bias=True, **fields, **_windows(config, fields["n_layers"]))


def _qwen3(config: Config) -> ModelSpec:
    fields = read_llama_like(config, n_ctx=32_768, d_head=128) | read_biases(config)
    return ModelSpec(family="qwen3", qk_norm="head", **fields, **_windows(config, fields["n_layers"]))


QWEN2 = Family(parse=_qwen2, layout=LAYOUT)
QWEN3 = Family(parse=_qwen3, layout=LAYOUT)
