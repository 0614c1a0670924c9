"""What enters or leaves transformers' modules, "model.layers.12.mlp.input", and the hook point of the same tensor."""

import re

from .modules import hook_of_module

ALL_LAYERS = "{all}"
"""What Gemma Scope 2 writes for the number of the layer where a dictionary is of all layers."""

_NORM = re.compile(r"(?:\w+\.)*layers\.(?P<layer>\d+)\.(?P<norm>\w+)")

NORMS = {
    "input_layernorm": {"input": "hook_resid_pre", "output": "attn.hook_in"},
    "pre_feedforward_layernorm": {"input": "hook_resid_mid", "output": "mlp.hook_in"},
    "post_feedforward_layernorm": {"input": "mlp.hook_out", "output": "hook_mlp_out"},
}
"""Norms that stand at one place in every family that has them. `post_attention_layernorm` does not: in Llama it is
before the MLP, in Gemma behind the attention."""


def hook_of(place: str, layer: int | None = None) -> str | None:
    """The hook point of a place such as "model.layers.12.output", or None where no point is that tensor.

    `layer` stands in for the layer of a place that names all of them, "model.layers.{all}.mlp.input".
    """
    module, _, end = place.replace(ALL_LAYERS, ALL_LAYERS if layer is None else str(layer)).rpartition(".")
    if end not in ("input", "output"):
        return None
    norm = _NORM.fullmatch(module)
    if norm is not None and norm["norm"] in NORMS:
        return f"blocks.{norm['layer']}.{NORMS[norm['norm']][end]}"
    return hook_of_module(module, "in" if end == "input" else "out")
