"""Where dictionaries read and write, in the words of other libraries: names of Hugging Face's modules, kinds of hook
points for every layer of a set.
"""

import re
from collections.abc import Mapping
from typing import Literal, TypeAlias

from ...models.errors import HookError
from ...models.points import HookPoint
from ..errors import DictionaryError

Side: TypeAlias = Literal["in", "out"]
"""What enters a module, or what leaves it."""

_MODULE = re.compile(
    r"(?:(?:model|language_model|transformer|gpt_neox|backbone|base_model)\.)*"
    r"(?:layers|h|blocks)\.(?P<layer>\d+)(?P<inside>(?:\.[a-z_]\w*)*)"
)
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "attn.attention")
_ATTENTION_OUT = (
    "self_attn.o_proj",
    "self_attn.out_proj",
    "self_attn.dense",
    "attn.c_proj",
    "attn.out_proj",
    "attn.attention.out_proj",
    "attention.dense",
    "self_attention.dense",
)
_MLP_OUT = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "mlp.fc_out")

# Kinds of points inside a block: what enters the module, what leaves it. Norms are not here: what the one before the
# MLP is called in one family is the one after attention in another.
_INSIDE: Mapping[str, tuple[str, str]] = {
    "": ("hook_resid_pre", "hook_resid_post"),
    "mlp": ("mlp.hook_in", "mlp.hook_out"),
    **dict.fromkeys(_ATTENTION, ("attn.hook_in", "attn.hook_out")),
    **dict.fromkeys(_ATTENTION_OUT, ("attn.hook_z", "attn.hook_out")),
    **dict.fromkeys(_MLP_OUT, ("mlp.hook_post", "mlp.hook_out")),
}


def hook_of_module(path: str, side: Side) -> str | None:
    """The hook point that is the input or the output of a module of Hugging Face's models, `model.layers.3.mlp`, also
    from the base model on, `layers.3.mlp`. None where there is no point that is the same in every family of models.
    """
    found = _MODULE.fullmatch(path)
    kinds = _INSIDE.get(found["inside"].lstrip(".")) if found else None
    return None if found is None or kinds is None else f"blocks.{found['layer']}.{kinds[side == 'out']}"


def at_every_layer(pattern: str, n_layers: int) -> tuple[str, ...]:
    """The hook points of the layers of a set, of a kind ("mlp.hook_in") or of a name with a star in place of the layer
    ("blocks.*.mlp.hook_in"). DictionaryError for a kind that does not lie in every block.
    """
    kind = re.sub(r"^blocks\.(\*|\{\w*\})\.", "", pattern)
    try:
        point = HookPoint.parse(f"blocks.0.{kind}")
    except HookError as error:
        raise DictionaryError(
            f"{pattern!r} is no hook point of every layer of a set, as 'blocks.*.mlp.hook_in' is: {error}"
        ) from error
    return tuple(str(HookPoint(point.kind, layer)) for layer in range(n_layers))
