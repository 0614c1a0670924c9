"""How the weights of a model lie in a checkpoint: under which names, which of them in one tensor, which way round."""

import math
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
    `tensors` does the same for whole names, without a suffix: such tensors are read as matrices, their leading axes
    together being the rows, a vector being one row; those in `transposed` are turned as they stand, those in `turned`
    part by part, after they are cut.
    `prefix` begins the names of all tensors but the unembedding, and is left out where a base model was saved alone.
    `buffers` are regular expressions, without the prefix, of tensors that may be stored and are not weights.
    """

    names: Mapping[str, str]
    tensors: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    by_head: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()
    turned: frozenset[str] = frozenset()
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One weight as a part of a stored tensor: the `index`-th of those whose rows are counted in `rows`. `shape` is
    that of the weight where the tensor is to be read as a matrix."""

    tensor: str
    index: int
    rows: tuple[int, ...]
    n_heads: int | None = None
    transposed: bool = False
    turned: bool = False
    shape: Shape | None = None

    def take(self, stored: "Tensor") -> "Tensor":
        """Give the weight out of the stored tensor; a view of it wherever the layout allows."""
        if self.shape is not None:
            part = self._rows_of(stored.reshape(-1, stored.shape[-1]))
            return (part.T if self.turned else part).reshape(self.shape)
        return self._rows_of(stored)

    def _rows_of(self, stored: "Tensor") -> "Tensor":
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
    return {weight: _tensor_of(weight, layout)[1] for weight in spec.weight_shapes()}


def _tensor_of(weight: str, layout: Layout) -> tuple[str, str]:
    """Give the entry of the table in which a weight's tensor stands, and the tensor's name."""
    layer = re.match(r"blocks\.(\d+)\.", weight)
    general = weight if layer is None else "blocks.{layer}." + weight[layer.end() :]
    number = "" if layer is None else layer[1]
    if general in layout.tensors:
        entry = layout.tensors[general]
        return entry, entry.format(layer=number)
    stem, _, suffix = general.rpartition(".")
    entry = layout.names[stem]
    return entry, f"{entry.format(layer=number)}.{suffix}"


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
            if sized and name in shapes and _as_expected(shapes[name], name, layout) != shape
        },
        unread={
            name: tuple(shape)
            for name, shape in sorted(shapes.items())
            if name not in expected and name != again and not known.fullmatch(name.removeprefix(layout.prefix))
        },
    )


def _expected(spec: ModelSpec, layout: Layout) -> dict[str, Shape]:
    """Give the shapes of all tensors of a checkpoint that was saved whole, those in `layout.tensors` as matrices."""
    found: dict[str, Shape] = {}
    for weight, tensor in name_tensors(spec, layout).items():
        out, *rest = _stored_shape(weight, spec, layout)
        found[tensor] = (out + (found[tensor][0] if tensor in found else 0), *rest)
    turned = {f"{name}.weight" for name in layout.transposed} | layout.transposed
    return {name: shape[::-1] if with_layer(name) in turned else shape for name, shape in found.items()}


def _stored_shape(weight: str, spec: ModelSpec, layout: Layout) -> Shape:
    """The shape in which a weight lies in its tensor, before the tensor is turned."""
    shape, entry = spec.weight_shapes()[weight], _tensor_of(weight, layout)[0]
    if entry not in layout.tensors.values():
        return shape
    matrix = (1, *shape) if len(shape) == 1 else shape
    return matrix[::-1] if entry in layout.turned else matrix


def _as_expected(shape: Shape, tensor: str, layout: Layout) -> Shape:
    """The shape of a tensor in a checkpoint as `_expected` has it."""
    if not {with_layer(tensor), with_layer(layout.prefix + tensor)} & set(layout.tensors.values()):
        return tuple(shape)
    return (math.prod(shape[:-1]), shape[-1])


def with_layer(name: str) -> str:
    """Give the name of a tensor with `{layer}` in the place of its layer's number."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.)", "{layer}", name, count=1)


def count_known(layout: Layout, names: Iterable[str]) -> int:
    """Give how many kinds of tensors that a layout has are among some names, layers not being told apart."""
    stems = set(layout.names.values())
    whole = set(layout.tensors.values())
    found = {layout.prefix + name.removeprefix(layout.prefix) for name in names} | set(names)
    general = {with_layer(name) for name in found}
    return sum(name in whole or name.rpartition(".")[0] in stems for name in general)


def unembedding_again(spec: ModelSpec, layout: Layout) -> str | None:
    """The tensor in which a tied unembedding may be stored once more, equal to the embedding; None if not tied."""
    return f"{layout.names['unembed']}.weight" if spec.tied and "unembed" in layout.names else None


def _place(spec: ModelSpec, layout: Layout, shapes: Mapping[str, Shape]) -> Mapping[str, Part]:
    tensors = name_tensors(spec, layout)
    order = {name: i for i, name in enumerate((*layout.names, *layout.tensors))}
    together: dict[str, list[str]] = {}
    for weight, tensor in sorted(tensors.items(), key=lambda item: _rank(item[0], order)):
        together.setdefault(tensor, []).append(weight)
    alone = not any(name.startswith(layout.prefix) for name in shapes)
    parts = {}
    for weight, tensor in tensors.items():
        entry = _tensor_of(weight, layout)[0]
        whole_name = entry in layout.tensors.values()
        parts[weight] = Part(
            tensor=tensor.removeprefix(layout.prefix) if alone else tensor,
            index=together[tensor].index(weight),
            rows=tuple(_stored_shape(shared, spec, layout)[0] for shared in together[tensor]),
            n_heads=spec.n_heads if entry in layout.by_head else None,
            transposed=entry in layout.transposed and (whole_name or weight.endswith(".weight")),
            turned=entry in layout.turned,
            shape=spec.weight_shapes()[weight] if whole_name else None,
        )
    return parts


def _rank(weight: str, order: Mapping[str, int]) -> int:
    general = re.sub(r"^blocks\.\d+\.", "blocks.{layer}.", weight)
    return order[general] if general in order else order[general.rpartition(".")[0]]


def _some(names: Iterable[str]) -> str:
    known = sorted(names)
    shown = ", ".join(known[:6])
    return shown if len(known) <= 6 else f"{shown} and {len(known) - 6} more"
