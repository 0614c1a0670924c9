"""The tensors of RWKV's .pth files in the names and shapes of its other checkpoints, and their config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Json = dict[str, Any]

_HUB = {
    "blocks.0.ln0.": "rwkv.blocks.0.pre_ln.",
    "blocks.": "rwkv.blocks.",
    "emb.": "rwkv.embeddings.",
    "ln_out.": "rwkv.ln_out.",
}


def hub_6(tensors: Tensors) -> Tensors:
    """As the code beside RWKV's models on the hub calls them."""
    renamed = {}
    for name, tensor in tensors.items():
        old = next((start for start in _HUB if name.startswith(start)), "")
        new = _HUB.get(old, "") + name[len(old) :]
        renamed[new.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")] = tensor
    return renamed


def _around(tensors: Tensors) -> Tensors:
    """What both versions have in common in fla."""
    found = {"model.embeddings.weight": tensors["emb.weight"]}
    if "head.weight" in tensors:
        found["lm_head.weight"] = tensors["head.weight"]
    norms = {"blocks.0.ln0": "model.layers.0.pre_norm", "ln_out": "model.norm"}
    for layer in range(layers_of(tensors)):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        norms |= {f"{ours}ln1": f"{theirs}attn_norm", f"{ours}ln2": f"{theirs}ffn_norm"}
        norms[f"{ours}att.ln_x"] = f"{theirs}attn.g_norm"
        found[f"{theirs}attn.o_proj.weight"] = tensors[f"{ours}att.output.weight"]
        found[f"{theirs}ffn.value.weight"] = tensors[f"{ours}ffn.value.weight"]
    for old, new in norms.items():
        found |= {
            f"{new}.{leaf}": tensors[f"{old}.{leaf}"] for leaf in ("weight", "bias") if f"{old}.{leaf}" in tensors
        }
    return found


def layers_of(tensors: Tensors) -> int:
    return sum(name.endswith(".ln1.weight") for name in tensors)


def fla_6(tensors: Tensors) -> Tensors:
    """As fla saves them: of the five inputs, in the authors' order w, k, v, r, g, r comes first."""
    found = _around(tensors)
    order = [3, 0, 1, 2, 4]
    for layer in range(layers_of(tensors)):
        old = {name: tensors[f"blocks.{layer}.att.{name}"] for name in ("time_maa_w1", "time_maa_w2", "time_maa_x")}
        maa = [tensors[f"blocks.{layer}.att.time_maa_{name}"].flatten() for name in "wkvrg"]
        down_nRD = old["time_maa_w1"].T.unflatten(0, (5, -1))[order]
        up_nRD = old["time_maa_w2"][order]
        att = {
            "x_proj.0.mu": old["time_maa_x"].flatten(),
            "x_proj.0.linear.weight": down_nRD.flatten(0, 1),
            "x_proj.2.weight": up_nRD.flatten(0, 1).T,
            "x_bias": torch.stack(maa)[order],
            "bonus": tensors[f"blocks.{layer}.att.time_faaaa"],
            "w_proj.linear.lora.0.weight": tensors[f"blocks.{layer}.att.time_decay_w1"].T,
            "w_proj.linear.lora.2.weight": tensors[f"blocks.{layer}.att.time_decay_w2"].T,
            "w_proj.linear.lora.2.bias": tensors[f"blocks.{layer}.att.time_decay"].flatten(),
        }
        for letter, name in {"r": "receptance", "k": "key", "v": "value", "g": "gate"}.items():
            att[f"{letter}_proj.linear.weight"] = tensors[f"blocks.{layer}.att.{name}.weight"]
        found |= {f"model.layers.{layer}.attn.{name}": tensor for name, tensor in att.items()}
        for name, letter in {"key": "k", "receptance": "r"}.items():
            theirs, ours = f"model.layers.{layer}.ffn.{name}", f"blocks.{layer}.ffn."
            found[f"{theirs}.linear.weight"] = tensors[f"{ours}{name}.weight"]
            found[f"{theirs}.mu"] = tensors[f"{ours}time_maa_{letter}"].flatten()
    return found


def fla_7(tensors: Tensors) -> Tensors:
    """As fla saves them."""
    found = _around(tensors)
    for layer in range(layers_of(tensors)):
        ours, theirs = f"blocks.{layer}.att.", f"model.layers.{layer}.attn."
        found |= {f"{theirs}x_{name}": tensors[f"{ours}x_{name}"] for name in "rwkvag"}
        found |= {f"{theirs}{name}": tensors[f"{ours}{name}"].flatten() for name in ("k_k", "k_a")}
        found[f"{theirs}r_k"] = tensors[f"{ours}r_k"]
        for letter, name in {"r": "receptance", "k": "key", "v": "value"}.items():
            found[f"{theirs}{letter}_proj.weight"] = tensors[f"{ours}{name}.weight"]
        for letter in "wavg":
            if f"{ours}{letter}1" in tensors:
                found[f"{theirs}{letter}_lora.lora.0.weight"] = tensors[f"{ours}{letter}1"].T
                found[f"{theirs}{letter}_lora.lora.2.weight"] = tensors[f"{ours}{letter}2"].T
            if f"{ours}{letter}0" in tensors:
                found[f"{theirs}{letter}_lora.lora.2.bias"] = tensors[f"{ours}{letter}0"].flatten()
        found[f"model.layers.{layer}.ffn.x_k"] = tensors[f"blocks.{layer}.ffn.x_k"].flatten()
        found[f"model.layers.{layer}.ffn.key.weight"] = tensors[f"blocks.{layer}.ffn.key.weight"]
    return found


def fla_7_first(tensors: Tensors) -> Tensors:
    """As fla's first version saved them, the six inputs in one tensor."""
    found = fla_7(tensors)
    for layer in range(layers_of(tensors)):
        inputs = [found.pop(f"model.layers.{layer}.attn.x_{name}").flatten() for name in "rwkvag"]
        found[f"model.layers.{layer}.attn.x_x"] = torch.stack(inputs)
    return found


LAYOUTS: Mapping[str, tuple[int, Callable[[Tensors], Tensors]]] = {
    "hub 6": (6, hub_6),
    "fla 6": (6, fla_6),
    "fla 7": (7, fla_7),
    "fla 7, first": (7, fla_7_first),
}
"""The version, and how its tensors are renamed."""

_HUB_CONFIG: Json = {
    "architectures": ["Rwkv6ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_rwkv6.Rwkv6ForCausalLM"},
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_size_divisor": 8,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-5,
    "model_type": "rwkv6",
    "model_version": "6_0",
    "rescale_every": 6,
    "tie_word_embeddings": False,
    "transformers_version": "4.34.0",
    "use_cache": True,
}
_FLA_CONFIG: Json = {
    "attn": None,
    "attn_mode": "chunk",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "fuse_cross_entropy": True,
    "fuse_norm": False,
    "hidden_act": "sqrelu",
    "initializer_range": 0.006,
    "max_position_embeddings": 7,
    "norm_bias": True,
    "norm_eps": 1e-5,
    "norm_first": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.48.0",
    "use_cache": True,
    "use_l2warp": True,
}


def config_of(layout: str, tensors: Tensors) -> Json:
    """A config.json for tensors in their authors' names, with every setting that such files have."""
    d_vocab, d_model = tensors["emb.weight"].shape
    heads = tensors["blocks.0.att.receptance.weight"].shape[0]
    d_mlp = tensors["blocks.0.ffn.key.weight"].shape[0]
    sizes = {"hidden_size": d_model, "num_hidden_layers": layers_of(tensors), "vocab_size": d_vocab}
    if layout == "hub 6":
        d_head = tensors["blocks.0.att.time_faaaa"].shape[1]
        own = {"attention_hidden_size": heads, "head_size": d_head, "num_attention_heads": d_head}
        return {**_HUB_CONFIG, **sizes, **own, "intermediate_size": d_mlp}
    if layout == "fla 6":
        return {
            **_FLA_CONFIG,
            **sizes,
            "model_type": "rwkv6",
            "expand_k": heads / d_model,
            "expand_v": heads / d_model,
            "gate_low_rank_dim": tensors["blocks.0.att.time_decay_w1"].shape[1],
            "proj_low_rank_dim": tensors["blocks.0.att.time_maa_w2"].shape[1],
            "hidden_ratio": 3.5,
            "intermediate_size": d_mlp,
            "num_heads": tensors["blocks.0.att.time_faaaa"].shape[0],
        }
    n_heads, d_head = tensors["blocks.0.att.r_k"].shape
    return {
        **_FLA_CONFIG,
        **sizes,
        "model_type": "rwkv7",
        "head_dim": d_head,
        "num_heads": n_heads,
        "value_dim": [d_model] * layers_of(tensors),
        "decay_low_rank_dim": tensors["blocks.0.att.w1"].shape[1],
        "a_low_rank_dim": tensors["blocks.0.att.a1"].shape[1],
        "v_low_rank_dim": tensors["blocks.1.att.v1"].shape[1],
        "gate_low_rank_dim": tensors["blocks.0.att.g1"].shape[1],
        "hidden_ratio": 4.0,
        "intermediate_size": d_mlp,
    }


def write_folder(folder: Path, config: Json, tensors: Tensors) -> Path:
    """Write a folder from the settings and tensors of its own layout. A setting `...` is left out."""
    folder.mkdir(exist_ok=True)
    settings = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
