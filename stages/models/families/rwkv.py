"""RWKV-6 and RWKV-7, as their authors publish them.

Source of the tensor names: the package `rwkv` and https://github.com/BlinkDL/RWKV-LM.
"""

import re
from collections.abc import Mapping

from ..errors import ModelError
from ..spec import MIXED, ModelSpec, RwkvSpec
from .layout import Layout, Shape

_ATT, _FFN = "blocks.{layer}.att.", "blocks.{layer}.ffn."
_TIME, _CHANNEL = "blocks.{layer}.rwkv.", "blocks.{layer}.mlp."

_PUBLISHED: Mapping[str, str] = {
    "embed": "emb",
    "embed.ln": "blocks.0.ln0",
    "blocks.{layer}.ln1": "blocks.{layer}.ln1",
    "blocks.{layer}.ln2": "blocks.{layer}.ln2",
    f"{_TIME}r": f"{_ATT}receptance",
    f"{_TIME}k": f"{_ATT}key",
    f"{_TIME}v": f"{_ATT}value",
    f"{_TIME}norm": f"{_ATT}ln_x",
    f"{_TIME}out": f"{_ATT}output",
    f"{_CHANNEL}up": f"{_FFN}key",
    f"{_CHANNEL}down": f"{_FFN}value",
    "ln_final": "ln_out",
    "unembed": "head",
}

# In the order in which the checkpoint's tensors hold the five inputs of RWKV-6.
_MIXED_6 = ("w", "k", "v", "r", "g")

PUBLISHED_6 = Layout(
    names={**_PUBLISHED, f"{_TIME}g": f"{_ATT}gate", f"{_CHANNEL}receptance": f"{_FFN}receptance"},
    tensors={
        f"{_TIME}mix_x": f"{_ATT}time_maa_x",
        **{f"{_TIME}mix_{name}": f"{_ATT}time_maa_{name}" for name in _MIXED_6},
        **{f"{_TIME}mix_{name}_down": f"{_ATT}time_maa_w1" for name in _MIXED_6},
        **{f"{_TIME}mix_{name}_up": f"{_ATT}time_maa_w2" for name in _MIXED_6},
        f"{_TIME}decay": f"{_ATT}time_decay",
        f"{_TIME}decay_down": f"{_ATT}time_decay_w1",
        f"{_TIME}decay_up": f"{_ATT}time_decay_w2",
        f"{_TIME}bonus": f"{_ATT}time_faaaa",
        f"{_CHANNEL}mix_k": f"{_FFN}time_maa_k",
        f"{_CHANNEL}mix_r": f"{_FFN}time_maa_r",
    },
    transposed=frozenset({f"{_ATT}time_maa_w1", f"{_ATT}time_decay_w1", f"{_ATT}time_decay_w2"}),
    turned=frozenset({f"{_ATT}time_maa_w2"}),
)
"""The tensors of RWKV-6's .pth files."""

_LOW_RANK_7: Mapping[str, str] = {"decay": "w", "rate": "a", "value": "v", "gate": "g"}

PUBLISHED_7 = Layout(
    names=_PUBLISHED,
    tensors={
        **{f"{_TIME}mix_{name}": f"{_ATT}x_{name}" for name in MIXED[7]},
        **{f"{_TIME}{name}": f"{_ATT}{letter}0" for name, letter in _LOW_RANK_7.items() if name != "gate"},
        **{f"{_TIME}{name}_down": f"{_ATT}{letter}1" for name, letter in _LOW_RANK_7.items()},
        **{f"{_TIME}{name}_up": f"{_ATT}{letter}2" for name, letter in _LOW_RANK_7.items()},
        f"{_TIME}removal": f"{_ATT}k_k",
        f"{_TIME}rate_on_k": f"{_ATT}k_a",
        f"{_TIME}bonus": f"{_ATT}r_k",
        f"{_CHANNEL}mix_k": f"{_FFN}x_k",
    },
    transposed=frozenset(f"{_ATT}{letter}{n}" for letter in _LOW_RANK_7.values() for n in (1, 2)),
    buffers=(r"blocks\.0\.att\.v[012]",),
)
"""The tensors of RWKV-7's .pth files. Layer 0 may hold a value residual, which nothing uses."""

_GROUP_NORM_EPS = 64e-5
_LAYER_NORM_EPS = 1e-5


def published(shapes: Mapping[str, Shape], where: str) -> tuple[ModelSpec, Layout]:
    """Read the architecture of a .pth file, which has no configuration, from the names and shapes of its tensors.

    Raises ModelError for versions other than 6 and 7, and for what is no checkpoint of RWKV.
    """
    if "blocks.0.att.r_k" in shapes:
        version, layout = 7, PUBLISHED_7
    elif "blocks.0.att.time_maa_w2" in shapes:
        version, layout = 6, PUBLISHED_6
    else:
        old = any(re.fullmatch(r"blocks\.0\.att\.time_mix_[kvrg]", name) for name in shapes)
        what = "is of version 4 or 5" if old else "has none of their tensors"
        raise ModelError(f"{where} {what}: RWKV-6 and RWKV-7 can be read")
    try:
        return _published_spec(version, shapes), layout
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"{where} lacks tensors that give its sizes, or they have other shapes: {error}") from error


def _published_spec(version: int, shapes: Mapping[str, Shape]) -> ModelSpec:
    d_vocab, d_model = shapes["emb.weight"]
    n_heads, d_head = shapes["blocks.0.att.r_k" if version == 7 else "blocks.0.att.time_faaaa"]
    layers = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    ranks = (
        {"mix_rank": shapes["blocks.0.att.time_maa_w2"][1], "decay_rank": shapes["blocks.0.att.time_decay_w1"][1]}
        if version == 6
        else {
            f"{name}_rank": shapes.get(f"blocks.1.att.{letter}1", (0, 0))[1]
            if name == "value"
            else shapes[f"blocks.0.att.{letter}1"][1]
            for name, letter in _LOW_RANK_7.items()
        }
    )
    return rwkv_spec(
        version,
        n_layers=max(layers) + 1,
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_head,
        d_mlp=shapes["blocks.0.ffn.key.weight"][0],
        d_vocab=d_vocab,
        norm_eps=_LAYER_NORM_EPS,
        rwkv=RwkvSpec(version=version, group_norm_eps=_GROUP_NORM_EPS, **ranks),
    )


def rwkv_spec(version: int, *, n_heads: int, **fields: object) -> ModelSpec:
    """Give the spec of a model of RWKV from what differs between them."""
    return ModelSpec(
        family=f"rwkv{version}",
        n_heads=n_heads,
        n_kv_heads=n_heads,
        n_ctx=None,
        rope=None,
        norm="layer",
        norm_bias=True,
        activation="relu_squared",
        gated=False,
        **fields,  # type: ignore[arg-type]
    )
