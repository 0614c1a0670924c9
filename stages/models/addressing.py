"""Addressing a part of the value at a hook point by the names of its dimensions.

An index is a whole number (negative ones count from the end; its dimension is dropped), a slice, or a list, tuple,
range, tensor or array of whole numbers. Several lists address orthogonally, as in xarray: every one of the first with
every one of the second. `position`, `query` and `key` are counted in each sequence's own terms, however it is padded.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from .errors import HookError, nearest
from .masks import causal_mask
from .points import HookPoint
from .spec import ModelSpec

if TYPE_CHECKING:
    import numpy

Index: TypeAlias = "int | slice | Sequence[int] | Tensor | numpy.ndarray"
"""Where along one dimension."""

Places: TypeAlias = int | slice | list[int]
"""An index that is checked and counted from the start: no number below 0, slices with bounds and a step above 0."""

PER_TOKEN = ("position", "query", "key")
"""Dimensions along which each sequence has a length of its own."""

_MEANT = {"head": "kv_head", "kv_head": "head", "position": "query", "query": "position", "key": "position"}


@dataclass(frozen=True, slots=True)
class Site:
    """A hook point in one forward: the sizes of its dimensions by name, the lengths of the sequences (shorter ones are
    padded to the longest), and how many positions its layer's attention sees (None: the whole past).

    `shared` is the number of query heads that one key-value head serves. `passed` is one for all sites of a forward:
    in it an intervention at one point leaves, under a key of its own, what another one needs at a later point.
    """

    point: HookPoint
    sizes: Mapping[str, int]
    lengths: tuple[int, ...]
    window: int | None
    shared: int
    passed: dict[object, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, point: HookPoint, spec: ModelSpec, lengths: tuple[int, ...], passed: dict[object, Tensor]) -> "Site":
        """Give the site of a point for sequences of these lengths, in the forward that `passed` belongs to."""
        known = {**spec.sizes, "sequence": len(lengths), **dict.fromkeys(PER_TOKEN, max(lengths))}
        slides = point.layer is not None and spec.slides(point.layer)
        # A state is captured after some positions, and can be addressed after any.
        dims = ("position" if dim == "state_position" else dim for dim in point.dims)
        return cls(
            point=point,
            sizes={dim: known[dim] for dim in dims},
            lengths=lengths,
            window=spec.window if slides else None,
            shared=spec.n_heads // spec.n_kv_heads,
            passed=passed,
        )

    def hidden(self, device: torch.device) -> Tensor:
        """Give the edges that the mask hides, boolean [query, key]: keys after the query or out of its window."""
        return ~causal_mask(max(self.lengths), self.window, device=device)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """An addressed part: its dimensions by name with their sizes, and how to read and write it in a value.

    `first` picks numbers and slices; `then`, of what that gives, lists: one tensor of indices for each of its leading
    dimensions up to the last one that is listed.
    """

    sizes: Mapping[str, int]
    first: tuple[int | slice, ...]
    then: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions in their order."""
        return tuple(self.sizes.values())

    def read(self, value: Tensor) -> Tensor:
        """Give a copy of the part."""
        return value[self.first][self.then] if self.then else value[self.first].clone()

    def write(self, value: Tensor, new: Tensor | float) -> None:
        """Put something that broadcasts to the part in its place, in `value` itself."""
        value[self.first][self.then] = new


def labelled(sizes: Mapping[str, int]) -> str:
    """Give sizes as messages show them: `[sequence=3, d_model=36]`."""
    return f"[{', '.join(f'{dim}={size}' for dim, size in sizes.items())}]"


def address(site: Site, where: Mapping[str, Index]) -> Part:
    """Give the part of the value at a site that `where` names by dimension; what it does not name is meant whole.

    Raises HookError for a dimension that the point does not have, and for an index that is none, that is out of range
    (naming the sequence where its length decides), that names a place twice or that names nothing.
    """
    _check_names(site, where)
    fixed = {
        dim: counted(where[dim], dim, size) for dim, size in site.sizes.items() if dim in where and dim not in PER_TOKEN
    }
    rows = listed(fixed.get("sequence", slice(None)), len(site.lengths))
    places: dict[str, Places | Tensor] = {**fixed}
    for dim in PER_TOKEN:
        if dim in where:
            places[dim] = _of_each(per_length(where[dim], dim, site.lengths, rows), site.lengths, rows)
    first = tuple(_plain(places.get(dim, slice(None))) for dim in site.sizes)
    sizes = _sizes_of(places, site)
    return Part(sizes=sizes, first=first, then=_then(places, sizes, site))


def counted(index: Index, dim: str, size: int, whose: str = "") -> Places:
    """Check an index against the size of its dimension and count it from the start. `whose` is put in messages.

    Raises HookError.
    """
    parsed = _parse(index, dim)
    if isinstance(parsed, slice):
        places = range(*parsed.indices(size))
        if not places:
            raise HookError(f"{_shown(index, dim)} names nothing{whose}: the size of {dim} is {size}")
        return slice(places.start, places.stop, places.step) if places.step > 0 else list(places)
    for number in [parsed] if isinstance(parsed, int) else parsed:
        if not -size <= number < size:
            raise HookError(
                f"{dim}={number} is out of range{whose}: the size of {dim} is {size}, so 0 to {size - 1} or, from the "
                f"end, -{size} to -1"
            )
    if isinstance(parsed, int):
        return parsed % size
    found = [number % size for number in parsed]
    if len(set(found)) < len(found):
        twice = next(place for place in found if found.count(place) > 1)
        raise HookError(f"{_shown(index, dim)} names {dim} {twice} twice{whose}")
    if not found:
        raise HookError(f"{_shown(index, dim)} names nothing")
    return found


def per_length(index: Index, dim: str, lengths: Sequence[int], rows: Sequence[int]) -> dict[int, Places]:
    """Count an index along positions in the terms of the sequences `rows`: the places for each length among them.

    Raises HookError as `counted` does, naming the sequence, and for a slice that counts from the end of sequences of
    different lengths, which would give a part that is no rectangle.
    """
    first_of: dict[int, int] = {}
    for row in rows:
        first_of.setdefault(lengths[row], row)
    if len(first_of) > 1 and isinstance(index, slice):
        _check_counts_from_start(index, dim)
    found = {
        length: counted(index, dim, length, f" in sequence {row}, of {length} tokens")
        for length, row in first_of.items()
    }
    if len(first_of) > 1 and isinstance(index, slice):
        return dict.fromkeys(found, counted(index, dim, max(lengths)))
    return found


def listed(places: Places, size: int) -> Sequence[int]:
    """Give the places themselves, one by one."""
    if isinstance(places, slice):
        return range(*places.indices(size))
    return [places] if isinstance(places, int) else places


def _check_counts_from_start(index: slice, dim: str) -> None:
    bounds = (index.start, index.stop, index.step)
    if any(bound is not None and bound < 0 for bound in bounds):
        raise HookError(
            f"{_shown(index, dim)} counts from the end, where the sequences of this batch have different lengths: give "
            f"a number or a list, such as {dim}=[-2, -1], or run one sequence at a time"
        )


def _check_names(site: Site, where: Mapping[str, Index]) -> None:
    for dim in where:
        if dim not in site.sizes:
            meant = _MEANT.get(dim, "")
            hint = f" Did you mean {meant!r}?" if meant in site.sizes else nearest(dim, site.sizes)
            if dim == "head" and meant in site.sizes:
                hint += f" Query head h reads kv_head h // {site.shared}."
            raise HookError(f"there is no dimension {dim!r} here, only {labelled(site.sizes)}.{hint}")


def _parse(index: Index, dim: str) -> int | slice | list[int]:
    try:
        if isinstance(index, slice):
            index.indices(1)  # raises what is no slice of whole numbers
            return index
        if isinstance(index, Iterator | Set | Mapping | str):
            raise TypeError
        try:
            return _whole(index)
        except TypeError:
            return [_whole(number) for number in (index.tolist() if isinstance(index, Tensor) else index)]  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise HookError(
            f"{_shown(index, dim)} is no index: a whole number, a slice or a flat list of whole numbers is expected"
        ) from error


def _whole(number: object) -> int:
    if isinstance(number, bool) or (isinstance(number, Tensor) and (number.dtype == torch.bool or number.dim())):
        raise TypeError
    return operator.index(number)  # type: ignore[arg-type]


def _shown(index: object, dim: str) -> str:
    text = f"{dim}={index}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _of_each(found: Mapping[int, Places], lengths: Sequence[int], rows: Sequence[int]) -> Places | Tensor:
    """Give the places where they are the same in all sequences, and otherwise those of each: [row] or [row, place]."""
    some = next(iter(found.values()))
    if all(places == some for places in found.values()):
        return some
    return torch.tensor([found[lengths[row]] for row in rows])


def _plain(places: Places | Tensor) -> int | slice:
    return places if isinstance(places, int | slice) else slice(None)


def _sizes_of(places: Mapping[str, Places | Tensor], site: Site) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for dim, size in site.sizes.items():
        here = places.get(dim, slice(None))
        if isinstance(here, Tensor) and here.dim() == 2:
            sizes[dim] = here.shape[1]
        elif isinstance(here, slice | list):
            sizes[dim] = len(listed(here, size))
    return sizes


def _then(places: Mapping[str, Places | Tensor], sizes: Mapping[str, int], site: Site) -> tuple[Tensor, ...]:
    """Tensors of indices for the leading dimensions, up to the last that is listed, of what `first` leaves.

    They stand together and at the front, so that their common shape is that of the part: each has its numbers along
    its own axis, those of single sequences along the first axis as well.
    """
    kept = [dim for dim in site.sizes if not isinstance(places.get(dim), int)]
    beyond = max((i + 1 for i, dim in enumerate(kept) if isinstance(places.get(dim), list | Tensor)), default=0)
    left = [dim for dim in kept[:beyond] if dim in sizes]
    tensors: list[Tensor] = []
    for dim in kept[:beyond]:
        here, shape = places.get(dim, slice(None)), [1] * len(left)
        if isinstance(here, slice):
            numbers = torch.arange(sizes[dim])
        else:
            numbers = here if isinstance(here, Tensor) else torch.tensor(here)
        if isinstance(here, Tensor):
            shape[0] = len(here)
        if dim in left:
            shape[left.index(dim)] = numbers.shape[-1]
        tensors.append(numbers.reshape(shape))
    return tuple(tensors)
