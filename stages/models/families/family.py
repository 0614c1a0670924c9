"""What one model family is: how its config.json reads and how its tensors lie."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..spec import ModelSpec
from .config import Config
from .layout import Layout

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "gelu_sigmoid",
    "relu": "relu",
}
"""Activation names of config.json → forebay's (`parts.ACTIVATIONS`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table of families."""

    parse: Callable[[Config], ModelSpec]
    layout: Layout
