"""What one model family is: how its config.json reads and what its tensors are called."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ..errors import ModelError, nearest
from ..spec import ModelSpec
from .config import Config

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""Activation names of config.json → forebay's (`parts.ACTIVATIONS`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the table of families.

    `names` maps the stem of forebay's weight names to that of the checkpoint's (`{layer}` stands for the number in
    both; `.weight` and `.bias` follow). `buffers` are regular expressions of tensors that may be stored and are not
    weights.
    """

    parse: Callable[[Config], ModelSpec]
    names: Mapping[str, str]
    buffers: tuple[str, ...] = ()


def name_tensors(spec: ModelSpec, names: Mapping[str, str]) -> Mapping[str, str]:
    """Give forebay's name of every weight of a model → the checkpoint's, by a table of stems such as `Family.names`."""
    return {weight: _tensor_name(weight, names) for weight in spec.weight_shapes()}


def _tensor_name(weight: str, names: Mapping[str, str]) -> str:
    stem, _, last = weight.rpartition(".")
    layer = re.match(r"blocks\.(\d+)\.", stem)
    if layer is None:
        return f"{names[stem]}.{last}"
    return f"{names['blocks.{layer}.' + stem[layer.end() :]].format(layer=layer[1])}.{last}"


def match_tensors(
    spec: ModelSpec,
    wanted: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    buffers: Iterable[str],
    where: str,
) -> None:
    """Check that a checkpoint's tensors and a model's weights fit one to one.

    `wanted` maps forebay's names to the checkpoint's, `shapes` are the checkpoint's tensors, `buffers` regular
    expressions of those that may be there unread. Raises ModelError for tensors that are missing, have another shape,
    or that nothing reads, each by name.
    """
    missing = [tensor for tensor in wanted.values() if tensor not in shapes]
    if missing:
        raise ModelError(
            f"{where} lacks {_some(missing)}, which its configuration asks for.{nearest(missing[0], shapes)}"
        )
    for weight, shape in spec.weight_shapes().items():
        stored = tuple(shapes[wanted[weight]])
        if stored != shape:
            raise ModelError(
                f"{where} holds {wanted[weight]} of shape {stored}, but its configuration makes it {shape}"
            )
    known = re.compile("|".join(buffers) or r"(?!)")
    rest = [name for name in shapes.keys() - set(wanted.values()) if not known.fullmatch(name)]
    if rest:
        raise ModelError(
            f"{where} holds {_some(rest)}, which nothing here reads. A forward that ignored a weight could be silently "
            "wrong, so the model is refused"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
