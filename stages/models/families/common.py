"""What most config.json files spell alike: sizes, heads, and which layers look at a window only."""

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError
from .config import Config


def read_sizes(config: Config, *, d_head: int | None = None) -> dict[str, Any]:
    """Give the sizes of a model by the names of `ModelSpec`'s fields. `d_head` is the family's own default; without
    one it is d_model / n_heads.

    Raises ModelError for sizes that are missing or do not divide.
    """
    d_model, n_heads = config.count("hidden_size"), config.count("num_attention_heads")
    n_kv_heads = config.count("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise ModelError(f"{n_heads} attention heads cannot share {n_kv_heads} key-value heads evenly")
    return {
        "n_layers": config.count("num_hidden_layers"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": config.count("head_dim", d_head or d_model // n_heads),
        "d_mlp": config.count("intermediate_size"),
        "d_vocab": config.count("vocab_size"),
    }


def read_layer_types(config: Config, default: tuple[bool, ...]) -> tuple[bool, ...]:
    """Give which layers slide, from `layer_types` or, where it is absent, by the family's own rule.

    Raises ModelError for a list of another length than there are layers, and for other kinds of layers.
    """
    kinds: Mapping[str, bool] = {"full_attention": False, "sliding_attention": True}
    types = config.take("layer_types", None)
    if types is None:
        return default
    if not isinstance(types, list) or len(types) != len(default) or not set(types) <= kinds.keys():
        raise config.refusal("layer_types", types, f"a list of {len(default)} of {' and '.join(kinds)}")
    return tuple(kinds[kind] for kind in types)


def read_window(config: Config, default: int | None) -> int | None:
    """Give the number of positions that a sliding layer sees; None where nothing slides."""
    window = config.bound("sliding_window", default)
    return None if window is None else config.count("sliding_window", default)


def windows(window: int | None, sliding: tuple[bool, ...]) -> dict[str, Any]:
    """Give the fields of `ModelSpec` for layers that slide; none where no layer does.

    Raises ModelError for layers that slide over a window of unknown length.
    """
    if not any(sliding):
        return {}
    if window is None:
        raise ModelError("layer_types has layers with sliding attention, but there is no sliding_window")
    return {"window": window, "sliding": sliding}
