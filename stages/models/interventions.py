"""Interventions by name: what they do to the value at a hook point, and to which part of it.

Each is a frozen value that says what is meant; a forward binds it to a hook point and to the sizes of its batch, and
refuses there, before anything is computed, what does not fit (`NamedIntervention.bind`).

Attention edges that the mask hides stay hidden: scores keep −∞ there and weights 0, a recurrence's effective attention
among them, so that no named intervention lets a query see what comes after it, a key outside its window or padding. A
plain function may do so.

A recurrent state is given to an intervention one position at a time: [sequence, head, d_key, d_value] of the sequences
that have the position, values along the positions addressed being dealt out to them. `Apply` calls its function for
each.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self, TypeAlias

import torch
from torch import Tensor

from .addressing import Index, Part, Site, address, labelled
from .errors import HookError
from .points import EFFECTIVE_ATTN, HookPoint

if TYPE_CHECKING:
    import numpy

Intervention: TypeAlias = Callable[[Tensor, HookPoint], Tensor]
"""From the value at a point, and the point, to the value that flows on: same shape, dtype and device. It is given a
copy of its own, which it may change in place."""

Value: TypeAlias = "Tensor | numpy.ndarray | float"
"""What is put in: it must broadcast to the part addressed, and is cast to dtype and device of the activation."""

SCORES, PATTERN = "attn.hook_attn_scores", "attn.hook_pattern"
DECAY = "rwkv.hook_decay"
_HIDDEN: Mapping[str, float] = {SCORES: -torch.inf, PATTERN: 0.0, EFFECTIVE_ATTN: 0.0}


@dataclass(frozen=True, slots=True, eq=False)
class NamedIntervention(ABC):
    """An intervention that can be checked against a point before a forward, on a part of the value there.

    `where` holds indices by dimension of the point; `at` adds to them.
    """

    where: Mapping[str, Index] = field(default_factory=dict, kw_only=True)

    def at(self, **indices: Index) -> Self:
        """Give the same for a part of the value, addressed by the names of the point's dimensions: `sequence`,
        `position`, `head`, `kv_head`, `query`, `key`, `d_model`, `d_head`, `d_mlp`, `vocab`, `d_key`, `d_value`.

        An index is a whole number (counted from the end where negative; the dimension is dropped), a slice, or a list,
        tensor or array of whole numbers; several lists address every combination, as in xarray. `position`, `query`
        and `key` are counted in each sequence's own terms: −1 is the last token of each, whatever its length. Called
        again it adds dimensions, and replaces the index of one that it was given before.
        """
        return replace(self, where={**self.where, **indices})

    @abstractmethod
    def bind(self, site: Site) -> Intervention:
        """Give the function that a forward calls at this site. Raises HookError where it cannot act there."""


class _OnAPart(NamedIntervention):
    """One that computes a new value for the part it addresses."""

    __slots__ = ()

    @abstractmethod
    def compute(self, site: Site, part: Part) -> Callable[[Tensor], Tensor | float]:
        """Give the function from the whole value to what is put in the part's place. Raises HookError."""

    def bind(self, site: Site) -> Intervention:
        part = address(site, self.where)
        new = self.compute(site, part)
        hidden = _HIDDEN.get(site.point.kind)

        def apply(value: Tensor, point: HookPoint) -> Tensor:
            part.write(value, new(value))
            return value if hidden is None else value.masked_fill_(site.hidden(value.device), hidden)

        return apply


@dataclass(frozen=True, slots=True, eq=False)
class Replace(_OnAPart):
    """Puts `value` in place of the activation."""

    value: Value

    def compute(self, site: Site, part: Part) -> Callable[[Tensor], Tensor | float]:
        given = fitting(self.value, part, "value")
        _check_range(site, given, "value")
        return lambda value: _cast(given, value)


@dataclass(frozen=True, slots=True, eq=False)
class Add(_OnAPart):
    """Adds `scale` · `value`, multiplied in the dtype of `value` and then cast: a steering vector, for example."""

    value: Value
    scale: Value = 1.0

    def compute(self, site: Site, part: Part) -> Callable[[Tensor], Tensor | float]:
        given = fitting(self.value, part, "value")
        scale = finite(fitting(self.scale, part, "scale"), "scale")

        def new(value: Tensor) -> Tensor:
            return part.read(value) + _cast(_on(given, value.device) * _on(scale, value.device), value)

        return new


@dataclass(frozen=True, slots=True, eq=False)
class Scale(_OnAPart):
    """Multiplies by `factor`, which must be finite. Scores of −∞ stay so, whatever the factor."""

    factor: Value

    def compute(self, site: Site, part: Part) -> Callable[[Tensor], Tensor | float]:
        factor = finite(fitting(self.factor, part, "factor"), "factor")
        _check_range(site, factor, "factor")
        if site.point.kind != SCORES:
            return lambda value: part.read(value) * _cast(factor, value)

        def new(scores: Tensor) -> Tensor:
            old = part.read(scores)
            cut = old == -torch.inf
            return (old.masked_fill(cut, 0.0) * _cast(factor, scores)).masked_fill(cut, -torch.inf)

        return new


@dataclass(frozen=True, slots=True, eq=False)
class Zero(_OnAPart):
    """Puts 0 in place of the activation: ablates what is addressed."""

    def compute(self, site: Site, part: Part) -> Callable[[Tensor], Tensor | float]:
        _check_range(site, 0.0, "value")
        return lambda value: 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Apply(_OnAPart):
    """Puts `function(part)` in place of the part addressed, which it may change in place: same shape, dtype, device.

    The forward raises HookError for a result that is no such tensor.
    """

    function: Callable[[Tensor], Tensor]

    def compute(self, site: Site, part: Part) -> Callable[[Tensor], Tensor | float]:
        if not callable(self.function):
            raise HookError(f"a function of the part addressed is expected, not {type(self.function).__name__}")

        def new(value: Tensor) -> Tensor:
            result = self.function(part.read(value))
            expected = (part.shape, value.dtype, value.device)
            if not isinstance(result, Tensor) or (tuple(result.shape), result.dtype, result.device) != expected:
                raise HookError(
                    f"the function of Apply at {site.point} gave {_described(result)}; the part it was given, "
                    f"{labelled(part.sizes)}, is a tensor of dtype {value.dtype} on {value.device}"
                )
            return result

        return new


def fitting(value: Value, part: Part, name: str) -> Tensor | float:
    """Check that a value is a number, or real numbers that broadcast to a part, and give it as a number or tensor.

    Raises HookError.
    """
    number = real(value, name)
    shape = tuple(number.shape) if isinstance(number, Tensor) else ()
    try:
        fits = tuple(torch.broadcast_shapes(shape, part.shape)) == part.shape
    except RuntimeError:
        fits = False
    if not fits:
        names = (*("?" for _ in shape[len(part.shape) :]), *tuple(part.sizes)[-len(shape) :])
        shown = ", ".join(f"{dim}={size}" for dim, size in zip(names, shape, strict=True))
        raise HookError(
            f"the {name} has shape [{shown}], which does not broadcast to the part addressed, {labelled(part.sizes)}"
        )
    return number


def real(value: Value, name: str) -> Tensor | float:
    """Check that a value is made of real numbers, and give it as a Python number or a tensor. Raises HookError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    tensor = value if isinstance(value, Tensor) else _from_array(value, name)
    if tensor.dtype == torch.bool or tensor.is_complex():
        raise HookError(f"the {name} has dtype {tensor.dtype}; integers or floating-point numbers are expected")
    return tensor


def finite(number: Tensor | float, name: str) -> Tensor | float:
    """Check that every number is finite. Raises HookError."""
    if not bool(torch.as_tensor(number).isfinite().all()):
        raise HookError(f"the {name} must be finite, but there is NaN or infinity in it: {number}")
    return number


def _check_range(site: Site, number: Tensor | float, name: str) -> None:
    if site.point.kind.endswith(".hook_scale") and bool((torch.as_tensor(number) == 0).any()):
        raise HookError(f"a norm divides by its scale, so the {name} cannot be 0 here")
    if site.point.kind == DECAY and bool((torch.as_tensor(number) < 0).any()):
        raise HookError(f"a state decays by factors from 0 on, so the {name} cannot be below 0 here")


def _from_array(value: object, name: str) -> Tensor:
    import numpy

    try:
        array = numpy.asarray(value)
        if array.dtype.kind in "iuf":
            # torch shares the memory of an array, which must be writable for that; arrays of stores often are not.
            return torch.from_numpy(numpy.require(array, requirements=["C", "W"]))
        what = f"dtype {array.dtype}"
    except (TypeError, ValueError) as error:
        what = str(error)
    raise HookError(
        f"the {name} is a {type(value).__name__} that cannot be put in ({what}): a real number, or a tensor or numpy "
        f"array of real numbers is expected"
    )


def _on(number: Tensor | float, device: torch.device) -> Tensor | float:
    return number.to(device) if isinstance(number, Tensor) else number


def _cast(number: Tensor | float, like: Tensor) -> Tensor | float:
    return number.to(like) if isinstance(number, Tensor) else number


def _described(result: object) -> str:
    if not isinstance(result, Tensor):
        return type(result).__name__
    return f"a tensor of shape {tuple(result.shape)} and dtype {result.dtype} on {result.device}"
