"""RWKV-6 and RWKV-7 as their authors publish them, in .pth files; and what their other layouts share with those.

Source of the tensor names: the package `rwkv` and https://github.com/BlinkDL/RWKV-LM.
"""

import re
from collections.abc import Mapping

from ..errors import ModelError
from ..spec import MIXED, ModelSpec, RwkvSpec
from .layout import Layout, Shape

TIME, CHANNEL = "blocks.{layer}.rwkv.", "blocks.{layer}.mlp."
"""Before the names of a block's weights, forebay's, of time mixing and of channel mixing."""

# In the order in which the checkpoint's tensors hold the five inputs of RWKV-6.
_MIXED_6 = ("w", "k", "v", "r", "g")


def _names(block: str, att: str, ffn: str, outside: Mapping[str, str]) -> dict[str, str]:
    """Names of matrices and norms that both versions have; the arguments are where blocks, time mixing and channel
    mixing lie, and what stands outside of blocks."""
    return {
        **outside,
        "blocks.{layer}.ln1": f"{block}ln1",
        "blocks.{layer}.ln2": f"{block}ln2",
        f"{TIME}r": f"{att}receptance",
        f"{TIME}k": f"{att}key",
        f"{TIME}v": f"{att}value",
        f"{TIME}norm": f"{att}ln_x",
        f"{TIME}out": f"{att}output",
        f"{CHANNEL}up": f"{ffn}key",
        f"{CHANNEL}down": f"{ffn}value",
    }


def finch(outside: Mapping[str, str], *, prefix: str = "", att: str = "att", ffn: str = "ffn") -> Layout:
    """Give the layout of RWKV-6 in its authors' names, which Hugging Face's kept within other ones. `outside` names
    what stands outside of blocks, `prefix` stands before all names but the unembedding's."""
    block = f"{prefix}blocks.{{layer}}."
    att, ffn = f"{block}{att}.", f"{block}{ffn}."
    return Layout(
        prefix=prefix,
        names={
            **_names(block, att, ffn, outside),
            f"{TIME}g": f"{att}gate",
            f"{CHANNEL}receptance": f"{ffn}receptance",
        },
        tensors={
            f"{TIME}mix_x": f"{att}time_maa_x",
            **{f"{TIME}mix_{name}": f"{att}time_maa_{name}" for name in _MIXED_6},
            **{f"{TIME}mix_{name}_down": f"{att}time_maa_w1" for name in _MIXED_6},
            **{f"{TIME}mix_{name}_up": f"{att}time_maa_w2" for name in _MIXED_6},
            f"{TIME}decay": f"{att}time_decay",
            f"{TIME}decay_down": f"{att}time_decay_w1",
            f"{TIME}decay_up": f"{att}time_decay_w2",
            f"{TIME}bonus": f"{att}time_faaaa",
            f"{CHANNEL}mix_k": f"{ffn}time_maa_k",
            f"{CHANNEL}mix_r": f"{ffn}time_maa_r",
        },
        transposed=frozenset({f"{att}time_maa_w1", f"{att}time_decay_w1", f"{att}time_decay_w2"}),
        turned=frozenset({f"{att}time_maa_w2"}),
    )


_OUTSIDE = {"embed": "emb", "embed.ln": "blocks.0.ln0", "ln_final": "ln_out", "unembed": "head"}

PUBLISHED_6 = finch(_OUTSIDE)
"""The tensors of RWKV-6's .pth files."""

LOW_RANK_7: Mapping[str, str] = {"decay": "w", "rate": "a", "value": "v", "gate": "g"}
"""What RWKV-7 makes of two matrices of low rank → the letter by which its checkpoints call it."""

_ATT, _FFN = "blocks.{layer}.att.", "blocks.{layer}.ffn."

PUBLISHED_7 = Layout(
    names=_names("blocks.{layer}.", _ATT, _FFN, _OUTSIDE),
    tensors={
        **{f"{TIME}mix_{name}": f"{_ATT}x_{name}" for name in MIXED[7]},
        **{f"{TIME}{name}": f"{_ATT}{letter}0" for name, letter in LOW_RANK_7.items() if name != "gate"},
        **{f"{TIME}{name}_down": f"{_ATT}{letter}1" for name, letter in LOW_RANK_7.items()},
        **{f"{TIME}{name}_up": f"{_ATT}{letter}2" for name, letter in LOW_RANK_7.items()},
        f"{TIME}removal": f"{_ATT}k_k",
        f"{TIME}rate_on_k": f"{_ATT}k_a",
        f"{TIME}bonus": f"{_ATT}r_k",
        f"{CHANNEL}mix_k": f"{_FFN}x_k",
    },
    transposed=frozenset(f"{_ATT}{letter}{n}" for letter in LOW_RANK_7.values() for n in (1, 2)),
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
            for name, letter in LOW_RANK_7.items()
        }
    )
    return rwkv_spec(
        version,
        n_layers=len(layers),
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_head,
        d_mlp=shapes["blocks.0.ffn.key.weight"][0],
        d_vocab=d_vocab,
        norm_eps=_LAYER_NORM_EPS,
        norm_bias=True,
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
        activation="relu_squared",
        gated=False,
        **fields,  # type: ignore[arg-type]
    )
