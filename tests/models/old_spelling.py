"""A saved configuration as transformers 4 wrote it, with the keys that files published then carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .families import WINDOW

Json = dict[str, Any]


def respell(config: Mapping[str, Any]) -> Json:
    """Give the contents of a config.json of transformers 5 in the spelling of transformers 4.

    Raises ValueError where there is none: version 4 knew no scaling of Gemma 3's rotary table of local layers.
    """
    old = {**config, "torch_dtype": config["dtype"], "transformers_version": "4.38.1"}
    del old["dtype"]
    family = config["model_type"]
    if "rope_parameters" in old:
        old |= _ROPE.get(family, _rope)(old.pop("rope_parameters"))
    if family in _FAMILIES:
        _FAMILIES[family](old)
    return old


def _rope(settings: Mapping[str, Any], older: tuple[str, ...] = ("linear", "dynamic", "longrope")) -> Json:
    """`older`: the kinds that files of that time call `type`, not `rope_type`."""
    scaling = dict(settings)
    kind, base = scaling.pop("rope_type"), scaling.pop("rope_theta")
    factor = scaling.pop("partial_rotary_factor", None)
    scaling = {"type" if kind in older else "rope_type": kind, **scaling}
    spelt = {"rope_theta": base, "rope_scaling": None if kind == "default" else scaling}
    return spelt if factor is None else {**spelt, "partial_rotary_factor": factor}


def _rope_of_gpt_neox(settings: Mapping[str, Any]) -> Json:
    spelt = _rope(settings)
    return {
        "rotary_emb_base": spelt["rope_theta"],
        "rotary_pct": spelt["partial_rotary_factor"],
        "rope_scaling": spelt["rope_scaling"],
    }


def _rope_of_gemma3(settings: Mapping[str, Any]) -> Json:
    whole, local = _rope(settings["full_attention"], older=()), _rope(settings["sliding_attention"])
    if local["rope_scaling"] is not None:
        raise ValueError("the rotary table of local layers is scaled")
    return {**whole, "rope_local_base_freq": local["rope_theta"]}


def _rope_of_phi3(settings: Mapping[str, Any]) -> Json:
    spelt = _rope(settings)
    if spelt["rope_scaling"] is not None:
        del spelt["rope_scaling"]["original_max_position_embeddings"]  # it stands beside the table
    return spelt


_ROPE: Mapping[str, Callable[[Mapping[str, Any]], Json]] = {
    "gemma3_text": _rope_of_gemma3,
    "gpt_neox": _rope_of_gpt_neox,
    "phi3": _rope_of_phi3,
}


def _drop_layer_types(old: Json, slides: Callable[[int], bool]) -> bool:
    """Take out the list of layers where the rule gives it; later files of version 4 have it where none does."""
    by_rule = ["sliding_attention" if slides(i) else "full_attention" for i in range(old["num_hidden_layers"])]
    if regular := old["layer_types"] == by_rule:
        del old["layer_types"]
    return regular


def _qwen(old: Json) -> None:
    used = old["use_sliding_window"]
    if not used:
        old["sliding_window"] = WINDOW  # as published: a width that nothing reads
    _drop_layer_types(old, lambda i: used and i >= old["max_window_layers"])


def _gemma(old: Json) -> None:
    if old["hidden_act"] == "gelu_pytorch_tanh":
        old |= {"hidden_act": "gelu", "hidden_activation": None}
    else:
        old["hidden_activation"] = old["hidden_act"]
    del old["use_bidirectional_attention"]


def _gemma2(old: Json) -> None:
    old |= {"hidden_act": old["hidden_activation"], "cache_implementation": "hybrid"}
    old["sliding_window_size"] = old["sliding_window"]
    del old["use_bidirectional_attention"]
    _drop_layer_types(old, lambda i: i % 2 == 0)


def _gemma3(old: Json) -> None:
    old["cache_implementation"] = "hybrid"
    del old["use_bidirectional_attention"]
    pattern = old.pop("_sliding_window_pattern")
    if _drop_layer_types(old, lambda i: (i + 1) % pattern != 0):
        old["sliding_window_pattern"] = pattern


def _mistral(old: Json) -> None:
    if old["head_dim"] == old["hidden_size"] // old["num_attention_heads"]:
        old["head_dim"] = None


def _gpt2(old: Json) -> None:
    old |= {
        "n_ctx": old["n_positions"],
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    }


def _starcoder2(old: Json) -> None:
    old |= {"mlp_type": "default", "norm_type": "layer_norm"}


_FAMILIES: Mapping[str, Callable[[Json], None]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "mistral": _mistral,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "starcoder2": _starcoder2,
}
