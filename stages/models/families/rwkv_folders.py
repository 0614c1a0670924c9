"""RWKV-6 and RWKV-7 as folders with config.json: `model_type` "rwkv6" of Hugging Face's RWKV organisation, "rwkv6" and
"rwkv7" as the library flash-linear-attention (fla) saves them.

Sources of names and defaults: modeling_rwkv6.py of https://huggingface.co/RWKV/v6-Finch-1B6-HF, and the models and
layers rwkv6 and rwkv7 of https://github.com/fla-org/flash-linear-attention.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError
from ..spec import MIXED, ModelSpec, RwkvSpec
from .config import Config
from .family import Family
from .layout import Layout
from .rwkv import CHANNEL, LOW_RANK_7, TIME, finch, rwkv_spec

_HUB_OUTSIDE = {
    "embed": "rwkv.embeddings",
    "embed.ln": "rwkv.blocks.0.pre_ln",
    "ln_final": "rwkv.ln_out",
    "unembed": "head",
}
HUB_6 = finch(_HUB_OUTSIDE, prefix="rwkv.", att="attention", ffn="feed_forward")
"""The tensors of RWKV-6 on the hub: its authors' within other names."""

_LAYER = "model.layers.{layer}."
_ATT, _FFN = f"{_LAYER}attn.", f"{_LAYER}ffn."

_FLA: Mapping[str, str] = {
    "embed": "model.embeddings",
    "embed.ln": "model.layers.0.pre_norm",
    "blocks.{layer}.ln1": f"{_LAYER}attn_norm",
    "blocks.{layer}.ln2": f"{_LAYER}ffn_norm",
    f"{TIME}norm": f"{_ATT}g_norm",
    f"{TIME}out": f"{_ATT}o_proj",
    f"{CHANNEL}down": f"{_FFN}value",
    "ln_final": "model.norm",
    "unembed": "lm_head",
}

FLA_6 = Layout(
    prefix="model.",
    names={
        **_FLA,
        **{f"{TIME}{name}": f"{_ATT}{name}_proj.linear" for name in ("r", "k", "v", "g")},
        f"{CHANNEL}up": f"{_FFN}key.linear",
        f"{CHANNEL}receptance": f"{_FFN}receptance.linear",
    },
    tensors={
        f"{TIME}mix_x": f"{_ATT}x_proj.0.mu",
        **{f"{TIME}mix_{name}": f"{_ATT}x_bias" for name in MIXED[6]},
        **{f"{TIME}mix_{name}_down": f"{_ATT}x_proj.0.linear.weight" for name in MIXED[6]},
        **{f"{TIME}mix_{name}_up": f"{_ATT}x_proj.2.weight" for name in MIXED[6]},
        f"{TIME}decay": f"{_ATT}w_proj.linear.lora.2.bias",
        f"{TIME}decay_down": f"{_ATT}w_proj.linear.lora.0.weight",
        f"{TIME}decay_up": f"{_ATT}w_proj.linear.lora.2.weight",
        f"{TIME}bonus": f"{_ATT}bonus",
        f"{CHANNEL}mix_k": f"{_FFN}key.mu",
        f"{CHANNEL}mix_r": f"{_FFN}receptance.mu",
    },
    transposed=frozenset({f"{_ATT}x_proj.2.weight"}),
    turned=frozenset({f"{_ATT}x_proj.2.weight"}),
)
"""The tensors of RWKV-6 as fla saves it; the five inputs are in the order of `MIXED`."""


def _goose(mix: Mapping[str, str]) -> Layout:
    return Layout(
        prefix="model.",
        names={
            **_FLA,
            **{f"{TIME}{name}": f"{_ATT}{name}_proj" for name in ("r", "k", "v")},
            f"{CHANNEL}up": f"{_FFN}key",
        },
        tensors={
            **{f"{TIME}mix_{name}": f"{_ATT}{tensor}" for name, tensor in mix.items()},
            **{f"{TIME}{name}": f"{_ATT}{by}_lora.lora.2.bias" for name, by in LOW_RANK_7.items() if name != "gate"},
            **{f"{TIME}{name}_down": f"{_ATT}{by}_lora.lora.0.weight" for name, by in LOW_RANK_7.items()},
            **{f"{TIME}{name}_up": f"{_ATT}{by}_lora.lora.2.weight" for name, by in LOW_RANK_7.items()},
            f"{TIME}removal": f"{_ATT}k_k",
            f"{TIME}rate_on_k": f"{_ATT}k_a",
            f"{TIME}bonus": f"{_ATT}r_k",
            f"{CHANNEL}mix_k": f"{_FFN}x_k",
        },
        buffers=(r"layers\.0\.attn\.v_lora\.lora\.(0\.weight|2\.weight|2\.bias)",),
    )


FLA_7 = _goose({name: f"x_{name}" for name in MIXED[7]})
"""The tensors of RWKV-7 as fla saves it. Layer 0 may hold a value residual, which nothing uses."""

FLA_7_FIRST = _goose(dict.fromkeys(MIXED[7], "x_x"))
"""The same as fla's first version saved it, whose six inputs lie in one tensor, in the order of `MIXED`."""

_EPS = 1e-5

# How kernels are chosen and how a model is trained; and a length that bounds no recurrent model.
_WITHOUT_EFFECT = """
    attn_mode fuse_norm fuse_cross_entropy fuse_linear_cross_entropy use_l2warp auto_map
    max_position_embeddings context_length
"""


def _sizes(config: Config) -> dict[str, Any]:
    """What all of them spell alike."""
    for key in _WITHOUT_EFFECT.split():
        config.take(key, None)
    return {
        "n_layers": config.count("num_hidden_layers"),
        "d_model": config.count("hidden_size"),
        "d_vocab": config.count("vocab_size"),
        "tied": config.flag("tie_word_embeddings", False),
    }


def _of_layer(entry: str, layer: int = 0) -> str:
    return entry.format(layer=layer)


def _parse_hub_6(config: Config) -> ModelSpec:
    sizes = _sizes(config)
    d_model = sizes["d_model"]
    att, ffn = "rwkv.blocks.0.attention.", "rwkv.blocks.0.feed_forward."
    d_head = config.size("head_size", config.count_if("head_size"), f"{att}time_faaaa", 1, 64)
    wide = config.count_if("attention_hidden_size")
    wide = config.size("attention_hidden_size", wide, f"{att}receptance.weight", 0, d_model)
    n_heads = _divided(wide, d_head, "heads of {}")
    # What the published files call the number of heads is the size of one.
    config.only("num_attention_heads", None, d_head, n_heads)
    config.only("model_version", "6_0")
    # The code of these models takes the epsilon of its blocks from here, but has 1e-5 in the final and the group norm.
    config.only("layer_norm_epsilon", _EPS)
    # Every so many layers it halves the residual stream in float16 and bfloat16, which the final norm undoes.
    config.whole("rescale_every", 6)
    rank = 64 if d_model == 4096 else 32
    return rwkv_spec(
        6,
        n_heads=n_heads,
        d_head=d_head,
        d_mlp=config.size(
            "intermediate_size",
            config.count_if("intermediate_size"),
            f"{ffn}key.weight",
            0,
            int(d_model * 3.5) // 32 * 32,
        ),
        norm_eps=_EPS,
        norm_bias=True,
        rwkv=RwkvSpec(
            version=6,
            group_norm_eps=_EPS * config.number("head_size_divisor", 8) ** 2,
            decay_rank=config.size("time_decay_w1", None, f"{att}time_decay_w1", 1, 2 * rank),
            mix_rank=config.size("time_maa_w2", None, f"{att}time_maa_w2", 1, rank),
        ),
        **sizes,
    )


def _fla_fields(config: Config, sizes: Mapping[str, Any], *, key: str, ratio: float) -> dict[str, Any]:
    """What both versions spell alike in fla. `key` is the matrix that enters the hidden channels, which are `ratio`
    times as many as those of the residual stream where nothing else is said."""
    config.only("attn", None)
    config.only("norm_first", True)
    config.only("hidden_act", "sqrelu")
    d_mlp, said = config.count_if("intermediate_size"), config.take("hidden_ratio", None) is not None
    wide = -(-int(sizes["d_model"] * config.number("hidden_ratio", ratio)) // 32) * 32
    if d_mlp is None and said:
        d_mlp = config.size("hidden_ratio", wide, key, 0)
    return {
        "d_mlp": config.size("intermediate_size", d_mlp, key, 0, wide),
        "norm_eps": config.number("norm_eps", _EPS),
        "norm_bias": config.flag("norm_bias", True),
        **sizes,
    }


def _parse_fla_6(config: Config) -> ModelSpec:
    att = _of_layer(_ATT)
    fields = _fla_fields(config, _sizes(config), key=f"{_of_layer(_FFN)}key.linear.weight", ratio=3.5)
    d_model = fields["d_model"]
    keys, values = (
        config.size(name, _expanded(config, name, d_model), f"{att}{letter}_proj.linear.weight", 0, d_model)
        for name, letter in (("expand_k", "k"), ("expand_v", "v"))
    )
    if keys != values:
        raise ModelError(
            f"expand_k makes {keys} channels of keys and expand_v {values} of values: forebay reads RWKV-6 where there "
            "are as many of both"
        )
    n_heads = config.size("num_heads", config.count_if("num_heads"), f"{att}bonus", 0, 4)
    decay_rank, mix_rank = config.count_if("gate_low_rank_dim"), config.count_if("proj_low_rank_dim")
    mixed = None if mix_rank is None else mix_rank * len(MIXED[6])
    mixed = config.size("proj_low_rank_dim", mixed, f"{att}x_proj.0.linear.weight", 0, 32 * len(MIXED[6]))
    return rwkv_spec(
        6,
        n_heads=n_heads,
        d_head=_divided(keys, n_heads, "{} heads"),
        rwkv=RwkvSpec(
            version=6,
            group_norm_eps=fields["norm_eps"],
            decay_rank=config.size("gate_low_rank_dim", decay_rank, f"{att}w_proj.linear.lora.0.weight", 0, 64),
            mix_rank=mixed // len(MIXED[6]),
        ),
        **fields,
    )


def _expanded(config: Config, key: str, d_model: int) -> int | None:
    """Give the number of channels that a factor of the residual stream's comes to, None where there is no factor."""
    if config.take(key, None) is None:
        return None
    factor = config.number(key)
    channels = round(d_model * factor)
    if abs(channels - d_model * factor) > 1e-6 * channels:
        raise config.refusal(key, factor, f"a number that makes {d_model} times it whole")
    return channels


_RANKS_7: Mapping[str, tuple[str, int]] = {
    "decay": ("decay_low_rank_dim", 64),
    "rate": ("a_low_rank_dim", 64),
    "value": ("v_low_rank_dim", 16),
    "gate": ("gate_low_rank_dim", 128),
}
"""What is made of two matrices of low rank → the setting for that rank, and its default."""


def _parse_fla_7(config: Config) -> ModelSpec:
    sizes = _sizes(config)
    d_model, n_layers, att = sizes["d_model"], sizes["n_layers"], _of_layer(_ATT)
    fields = _fla_fields(config, sizes, key=f"{_of_layer(_FFN)}key.weight", ratio=4)
    n_heads, d_head = _heads_7(config, d_model, f"{att}r_k")
    config.only("value_dim", None, d_model, [d_model] * n_layers)
    ranks = {}
    for name, (key, default) in _RANKS_7.items():
        by, layer = LOW_RANK_7[name], 1 if name == "value" else 0
        tensor = f"{_of_layer(_ATT, layer)}{by}_lora.lora.0.weight"
        if layer < n_layers:
            ranks[f"{name}_rank"] = config.size(key, config.count_if(key), tensor, 0, default)
        config.take(key, None)
    return rwkv_spec(
        7,
        n_heads=n_heads,
        d_head=d_head,
        rwkv=RwkvSpec(version=7, group_norm_eps=d_head * fields["norm_eps"], **ranks),
        **fields,
    )


def _heads_7(config: Config, d_model: int, bonus: str) -> tuple[int, int]:
    """Give the number of heads and the size of one. Where the size is given, fla never looks at the number, and some
    published files have a wrong one."""
    d_head, n_heads = config.count_if("head_dim"), config.count_if("num_heads")
    if d_head is None and n_heads is not None:
        n_heads = config.size("num_heads", n_heads, bonus, 0)
        return n_heads, _divided(d_model, n_heads, "{} heads")
    d_head = config.size("head_dim", d_head, bonus, 1, 64)
    return _divided(d_model, d_head, "heads of {}"), d_head


def _divided(channels: int, by: int, what: str) -> int:
    if channels % by:
        raise ModelError(f"{channels} channels of time mixing cannot be divided evenly into {what.format(by)}")
    return channels // by


RWKV6 = Family(
    parse=_parse_hub_6,
    layout=HUB_6,
    others=(Family(parse=_parse_fla_6, layout=FLA_6),),
)
RWKV7 = Family(
    parse=_parse_fla_7,
    layout=FLA_7,
    others=(Family(parse=_parse_fla_7, layout=FLA_7_FIRST),),
)
