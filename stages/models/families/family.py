"""What one model family is: how its config.json reads and how its tensors lie."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..spec import ModelSpec
from .config import Config
from .layout import Layout, Shape, count_known

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
    """One row of the table of families. `others` are the same family as other programs write it, with tensors under
    other names and perhaps other settings."""

    parse: Callable[[Config], ModelSpec]
    layout: Layout
    others: tuple["Family", ...] = ()

    def as_stored(self, shapes: Mapping[str, Shape]) -> "Family":
        """Of this family and its `others`, give the one of whose tensors a checkpoint has the most, this one where
        several have as many. `shapes` are the checkpoint's, by name."""
        return max((self, *self.others), key=lambda family: count_known(family.layout, shapes))
