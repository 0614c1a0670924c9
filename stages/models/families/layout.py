"""How the weights of a model lie in a checkpoint: under which names, which of them in one tensor, which way round."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ModelError, nearest
from ..spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The tensors of a checkpoint.

    `names` maps the stem of forebay's weight names to that of the checkpoint's (`{layer}` stands for the number in
    both; `.weight` and `.bias` follow). Several weights under one name lie in one tensor, below each other in the order
    of the table; head by head, where the name is in `by_head`. Matrices of names in `transposed` are [in, out].
    `prefix` begins the names of all tensors but the unembedding, and is left out where a base model was saved alone.
    `buffers` are regular expressions, without the prefix, of tensors that may be stored and are not weights.
    """

    names: Mapping[str, str]
    prefix: str = ""
    by_head: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One weight as a part of a stored tensor: the `index`-th of those whose rows are counted in `rows`."""

    tensor: str
    index: int
    rows: tuple[int, ...]
    n_heads: int | None = None
    transposed: bool = False

    def take(self, stored: "Tensor") -> "Tensor":
        """Give the weight out of the stored tensor; a view of it wherever the layout allows."""
        whole = stored.T if self.transposed and stored.dim() == 2 else stored
        if len(self.rows) == 1:
            return whole
        if self.n_heads is None:
            first = sum(self.rows[: self.index])
            return whole[first : first + self.rows[self.index]]
        per_head = [rows // self.n_heads for rows in self.rows]
        heads = whole.view(self.n_heads, sum(per_head), *whole.shape[1:])
        first = sum(per_head[: self.index])
        return heads[:, first : first + per_head[self.index]].flatten(0, 1)


def name_tensors(spec: ModelSpec, layout: Layout) -> Mapping[str, str]:
    """Give forebay's name of every weight of a model → the name of the tensor that holds it."""
    return {weight: f"{_stem(weight, layout)[1]}.{weight.rpartition('.')[2]}" for weight in spec.weight_shapes()}


def _stem(weight: str, layout: Layout) -> tuple[str, str]:
    """Give the stem of a weight's tensor, as in the table and with its layer filled in."""
    stem = weight.rpartition(".")[0]
    layer = re.match(r"blocks\.(\d+)\.", stem)
    if layer is None:
        return layout.names[stem], layout.names[stem]
    pattern = layout.names["blocks.{layer}." + stem[layer.end() :]]
    return pattern, pattern.format(layer=layer[1])


def match_tensors(
    spec: ModelSpec, layout: Layout, shapes: Mapping[str, tuple[int, ...]], *, where: str
) -> Mapping[str, Part]:
    """Check that a checkpoint's tensors and a model's weights fit one to one; give where each weight lies.

    `shapes` are those of the checkpoint's tensors. Raises ModelError for tensors that are missing, have another shape,
    or that nothing reads, each by name.
    """
    parts = _place(spec, layout, shapes)
    missing = [part.tensor for part in parts.values() if part.tensor not in shapes]
    if missing:
        raise ModelError(
            f"{where} lacks {_some(missing)}, which its configuration asks for.{nearest(missing[0], shapes)}"
        )
    for weight, part in parts.items():
        shape = (sum(part.rows), *spec.weight_shapes()[weight][1:])
        expected = shape[::-1] if part.transposed else shape
        if tuple(shapes[part.tensor]) != expected:
            raise ModelError(
                f"{where} holds {part.tensor} of shape {tuple(shapes[part.tensor])}, but its configuration makes it "
                f"{expected}"
            )
    known = re.compile("|".join(layout.buffers) or r"(?!)")
    unread = shapes.keys() - {part.tensor for part in parts.values()} - {unembedding_again(spec, layout)}
    rest = [name for name in unread if not known.fullmatch(name.removeprefix(layout.prefix))]
    if rest:
        raise ModelError(
            f"{where} holds {_some(rest)}, which nothing here reads. A forward that ignored a weight could be silently "
            "wrong, so the model is refused"
        )
    return parts


def unembedding_again(spec: ModelSpec, layout: Layout) -> str | None:
    """The tensor in which a tied unembedding may be stored once more, equal to the embedding; None if not tied."""
    return f"{layout.names['unembed']}.weight" if spec.tied and "unembed" in layout.names else None


def _place(spec: ModelSpec, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Part]:
    tensors = name_tensors(spec, layout)
    order = {name: i for i, name in enumerate(layout.names)}
    together: dict[str, list[str]] = {}
    for weight, tensor in sorted(tensors.items(), key=lambda item: _rank(item[0], order)):
        together.setdefault(tensor, []).append(weight)
    alone = not any(name.startswith(layout.prefix) for name in shapes)
    parts = {}
    for weight, tensor in tensors.items():
        pattern = _stem(weight, layout)[0]
        parts[weight] = Part(
            tensor=tensor.removeprefix(layout.prefix) if alone else tensor,
            index=together[tensor].index(weight),
            rows=tuple(spec.weight_shapes()[shared][0] for shared in together[tensor]),
            n_heads=spec.n_heads if pattern in layout.by_head else None,
            transposed=pattern in layout.transposed and weight.endswith(".weight"),
        )
    return parts


def _rank(weight: str, order: Mapping[str, int]) -> int:
    return order[re.sub(r"^blocks\.\d+\.", "blocks.{layer}.", weight.rpartition(".")[0])]


def _some(names: list[str]) -> str:
    shown = ", ".join(sorted(set(names))[:6])
    return shown if len(set(names)) <= 6 else f"{shown} and {len(set(names)) - 6} more"
