"""The names of a checkpoint's tensors, put together from those that the known families use."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .layout import Layout, Shape, with_layer

_LN1, _LN2 = "blocks.{layer}.ln1", "blocks.{layer}.ln2"
_LN1_POST, _LN2_POST = "blocks.{layer}.ln1_post", "blocks.{layer}.ln2_post"
_ARRANGEMENTS: Mapping[tuple[str, ...], Mapping[str, bool]] = {
    (_LN1, _LN2): {"pre_norms": True, "post_norms": False, "shared_norm": False},
    (_LN1_POST, _LN2_POST): {"pre_norms": False, "post_norms": True, "shared_norm": False},
    (_LN1, _LN1_POST, _LN2, _LN2_POST): {"pre_norms": True, "post_norms": True, "shared_norm": False},
    (_LN1,): {"pre_norms": True, "post_norms": False, "shared_norm": True},
}
"""The norms that a block can have → the fields of `ModelSpec` that say so. The name of a tensor does not tell which of
its norms it is (`post_attention_layernorm` is Llama's second and Gemma 2's norm of what attention gives); all together
do."""
_NORMS = (_LN1, _LN1_POST, _LN2, _LN2_POST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """What the names and shapes of a checkpoint's tensors say.

    `base` is the layout of the family whose names most of the tensors have, `layout` the one put together for this
    checkpoint, `norms` the fields of `ModelSpec` that say which norms a block has. `shapes`: of every tensor of the
    first layer that has it, and of those outside of layers, by their names in a whole model, with `{layer}` for the
    number.
    """

    base: Layout
    layout: Layout
    norms: Mapping[str, bool]
    shapes: Mapping[str, Shape]
    n_layers: int

    def has(self, stem: str, leaf: str = "weight") -> bool:
        """Whether the checkpoint has a tensor for forebay's weight or bias of this stem, in some layer."""
        return f"{self.layout.names.get(stem)}.{leaf}" in self.shapes

    def rows(self, stem: str) -> int | None:
        """Give the number of outputs of the tensor in which a matrix lies, alone or with others."""
        name = self.layout.names.get(stem)
        shape = self.shapes.get(f"{name}.weight")
        return None if not shape else shape[-1 if name in self.layout.transposed else 0]

    def mates(self, stem: str) -> int:
        """How many matrices lie in the tensor in which this one does, itself included."""
        return list(self.layout.names.values()).count(self.layout.names.get(stem, ""))


def fit_names(shapes: Mapping[str, Shape], layouts: Sequence[Layout], *, parallel: bool) -> Naming:
    """Find the layout that fits a checkpoint's tensors, part by part: the one that fits best as a whole names every
    part that it can, others with its prefix name the rest. Of layouts that fit alike, the first counts.

    `parallel` says that attention and MLP are known to run side by side: only then, or where a layout never has
    another, can one norm stand before both.
    """

    def fit(layout: Layout) -> tuple[int, int]:
        named = set(layout.names.values())
        held = named & _stems(_in_whole(shapes, layout.prefix, named))
        return len(held), -len(named - held)

    base = max(layouts, key=fit)
    relatives = sorted((layout for layout in layouts if layout.prefix == base.prefix), key=fit, reverse=True)
    whole = _in_whole(shapes, base.prefix, {name for layout in relatives for name in layout.names.values()})
    held = _stems(whole)
    names = _parts(layouts[0], relatives, held)
    norm_names, norms = _norms(relatives, held, parallel=parallel)
    used = {**names, **norm_names}.values()
    layout = replace(
        base,
        names={**names, **norm_names},
        by_head=frozenset(name for name in used if name in _owner(name, relatives).by_head),
        transposed=frozenset(name for name in used if name in _owner(name, relatives).transposed),
    )
    return Naming(base=base, layout=layout, norms=norms, shapes=whole, n_layers=_count_layers(shapes))


def _in_whole(shapes: Mapping[str, Shape], prefix: str, named: Iterable[str]) -> dict[str, Shape]:
    """Give the tensors by their names in a whole model, of which a base model alone lacks the prefix; one layer's."""
    alone = not any(name.startswith(prefix) for name in shapes)
    known, found = set(named), dict[str, Shape]()
    for name, shape in shapes.items():
        pattern = with_layer(name)
        prefixed = prefix + pattern
        found.setdefault(prefixed if alone and prefixed.rpartition(".")[0] in known else pattern, tuple(shape))
    return found


def _stems(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def _owner(name: str, relatives: Sequence[Layout]) -> Layout:
    return next(layout for layout in relatives if name in layout.names.values())


def _parts(usual: Layout, relatives: Sequence[Layout], held: set[str]) -> dict[str, str]:
    """Give the names of everything but the norms of a block. Those that share a tensor stay in their order in it."""
    names: dict[str, str] = {}
    for stem in dict.fromkeys(stem for layout in (usual, *relatives) for stem in layout.names):
        owners = [layout for layout in relatives if stem in layout.names]
        if stem in names or stem in _NORMS or not owners:
            continue
        owner = next((layout for layout in owners if layout.names[stem] in held), owners[0])
        names |= {mate: name for mate, name in owner.names.items() if name == owner.names[stem]}
    return names


def _norms(relatives: Sequence[Layout], held: set[str], *, parallel: bool) -> tuple[dict[str, str], Mapping[str, bool]]:
    """Give the names of the norms of a block in the arrangement that comes nearest to those that are there."""
    there = {layout.names[stem] for layout in relatives for stem in _NORMS if stem in layout.names} & held
    found: list[tuple[int, dict[str, str], Mapping[str, bool]]] = []
    for layout in relatives:
        for stems, fields in _ARRANGEMENTS.items():
            names = {stem: layout.names[stem] for stem in stems if stem in layout.names}
            possible = parallel or _LN2 not in relatives[0].names if fields["shared_norm"] else True
            if possible and len(set(names.values())) == len(stems):
                found.append((len(set(names.values()) ^ there), names, fields))
    _, names, fields = min(found, key=lambda arrangement: arrangement[0])
    return names, fields


def _count_layers(shapes: Iterable[str]) -> int:
    numbers = (re.search(r"(^|\.)(\d+)\.", name) for name in shapes)
    return max((int(number[2]) + 1 for number in numbers if number), default=1)
