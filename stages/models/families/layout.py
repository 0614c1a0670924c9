"""How the weights of a model lie in a checkpoint: under which names, which of them in one tensor, which way round."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from ..errors import ModelError, nearest
from ..spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor


Shape: TypeAlias = tuple[int, ...]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorComparison:
    """How the tensors of a checkpoint differ from those that a model of some architecture has; empty where they do not.

    `missing`: expected and not found, with the shape expected. `misshapen`: found of another shape, which comes first,
    before the one expected. `unread`: found, with the shape, and read by nothing.
    """

    missing: Mapping[str, Shape] = field(default_factory=dict)
    misshapen: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)
    unread: Mapping[str, Shape] = field(default_factory=dict)


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


def match_tensors(spec: ModelSpec, layout: Layout, shapes: Mapping[str, Shape], *, where: str) -> Mapping[str, Part]:
    """Check that a checkpoint's tensors and a model's weights fit one to one; give where each weight lies.

    `shapes` are those of the checkpoint's tensors. Raises ModelError for tensors that are missing, have another shape,
    or that nothing reads, each by name.
    """
    found = compare_tensors(spec, layout, shapes)
    if found.missing:
        names = _some(found.missing)
        hint = nearest(next(iter(found.missing)), shapes)
        raise ModelError(f"{where} lacks {names}, which its configuration asks for.{hint}")
    for name, (shape, expected) in found.misshapen.items():
        raise ModelError(f"{where} holds {name} of shape {shape}, but its configuration makes it {expected}")
    if found.unread:
        raise ModelError(
            f"{where} holds {_some(found.unread)}, which nothing here reads. A forward that ignored a weight could be "
            "silently wrong, so the model is refused"
        )
    return _place(spec, layout, shapes)


def compare_tensors(
    spec: ModelSpec, layout: Layout, shapes: Mapping[str, Shape], *, sized: bool = True
) -> TensorComparison:
    """Compare a checkpoint's tensors, whose `shapes` are given by name, with those of a model. Without `sized` the
    shapes are not compared."""
    expected = _expected(spec, layout)
    if not any(name.startswith(layout.prefix) for name in shapes):
        expected = {name.removeprefix(layout.prefix): shape for name, shape in expected.items()}
    known = re.compile("|".join(layout.buffers) or r"(?!)")
    again = unembedding_again(spec, layout)
    return TensorComparison(
        missing={name: shape for name, shape in expected.items() if name not in shapes},
        misshapen={
            name: (tuple(shapes[name]), shape)
            for name, shape in expected.items()
            if sized and name in shapes and tuple(shapes[name]) != shape
        },
        unread={
            name: tuple(shape)
            for name, shape in sorted(shapes.items())
            if name not in expected and name != again and not known.fullmatch(name.removeprefix(layout.prefix))
        },
    )


def _expected(spec: ModelSpec, layout: Layout) -> dict[str, Shape]:
    """Give the shapes of all tensors of a checkpoint that was saved whole."""
    rows: dict[str, Shape] = {}
    for weight, tensor in name_tensors(spec, layout).items():
        out, *rest = spec.weight_shapes()[weight]
        rows[tensor] = (out + (rows[tensor][0] if tensor in rows else 0), *rest)
    turned = {f"{name}.weight" for name in layout.transposed}
    return {name: shape[::-1] if with_layer(name) in turned else shape for name, shape in rows.items()}


def with_layer(name: str) -> str:
    """Give the name of a tensor with `{layer}` in the place of its layer's number."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.)", "{layer}", name, count=1)


def unembedding_again(spec: ModelSpec, layout: Layout) -> str | None:
    """The tensor in which a tied unembedding may be stored once more, equal to the embedding; None if not tied."""
    return f"{layout.names['unembed']}.weight" if spec.tied and "unembed" in layout.names else None


def _place(spec: ModelSpec, layout: Layout, shapes: Mapping[str, Shape]) -> Mapping[str, Part]:
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


def _some(names: Iterable[str]) -> str:
    known = sorted(names)
    shown = ", ".join(known[:6])
    return shown if len(known) <= 6 else f"{shown} and {len(known) - 6} more"
