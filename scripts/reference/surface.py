"""Names and signatures as text that does not depend on the version of Python: what is promised, line by line."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from typing import ForwardRef, Union, get_args, get_origin

from forebay.pipeline.executors.executor import Executor

from .themes import THEMES, Public, public_names

SPECIAL = ("__call__", "__contains__", "__getitem__", "__iter__", "__len__")
"""Special methods that are part of what a class promises."""

WITHIN = frozenset(
    {
        *("bind", "bind_to_writes", "compute", "plan", "said", "amount", "factor"),  # of interventions
        *("Model.extend", "Model.remember", "RecurrentStates.check", "Sampling.check", "Sampling.choose"),
        *("Sampling.generators", "Recurrence.check", "Recurrence.push", "Recurrence.while_generating"),
        *(f"{name}.{method}" for name in ("DaskWorkers", "Ranks") for method in vars(Executor)),
    }
)
"""Methods by which modules of a forward, or of a run, call each other: no user does, and they are not promised."""

WIDEST = 100
"""Characters of a signature that stand on one line of a page."""


LONGEST_DEFAULT = 120
"""Characters of a default that is written out; a longer one is `...`, as is one that is made anew for every call."""


class _Verbatim(str):
    """Text that is its own repr, so that `inspect` puts it into a signature as it is."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def lines() -> list[str]:
    """Everything public, one line a name, sorted by name."""
    found = {line for theme in THEMES for one in public_names(theme) for line in _lines_of(one)}
    return [line for _, line in sorted(found)]


def _lines_of(one: Public) -> Iterator[tuple[str, str]]:
    yield one.name, described(one)
    if isinstance(one.value, type):
        for member in members(one.value):
            name = f"{one.name}.{member.name}"
            yield name, described(Public(name, member.value))


def described(one: Public) -> str:
    """One thing in a line: what it is, its name and its signature, or its value."""
    value = one.value
    if isinstance(value, type) and issubclass(value, BaseException):
        return f"class {one.name}({', '.join(base.__name__ for base in value.__bases__)})"
    if isinstance(value, type):
        return f"class {one.name}{signature_of(value)}"
    if isinstance(value, property | cached_property):
        given = inspect.signature(getattr(value, "fget", None) or value.func)  # type: ignore[union-attr]
        return f"property {one.name}: {_annotation(given.return_annotation)}"
    if isinstance(value, dataclasses.Field):
        return f"field {one.name}: {_annotation(value.type)}"
    if callable(value):
        return f"def {one.name}{signature_of(value)}"
    return f"{one.name} = {value!r}"


def members(cls: type) -> list[Public]:
    """The public members of a class, those of its bases in this package included, sorted.

    The fields of a dataclass that its signature names are left out: they are attributes of the same name.
    """
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("forebay."):
            continue
        for name, value in vars(base).items():
            if {name, f"{cls.__name__}.{name}"} & WITHIN:
                continue
            if name in SPECIAL or (not name.startswith("_") and _is_member(value)):
                found[name] = getattr(cls, name) if isinstance(value, classmethod | staticmethod) else value
    named = inspect.signature(cls).parameters if dataclasses.is_dataclass(cls) else {}
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    found |= {field.name: field for field in fields if field.name not in named and not field.name.startswith("_")}
    return [Public(name, found[name]) for name in sorted(found)]


def _is_member(value: object) -> bool:
    return inspect.isfunction(value) or isinstance(value, property | cached_property | classmethod | staticmethod)


def signature_of(value: object, wide: bool = True) -> str:
    """A signature with names of types as they are written, without their modules; of a method without `self`.

    Unless `wide`, one that is too long for a line has one parameter a line.
    """
    found = inspect.signature(value)  # type: ignore[arg-type]
    parameters = [
        parameter.replace(
            annotation=_Verbatim(_annotation(parameter.annotation)) if parameter.annotation is not parameter.empty
            else parameter.empty,
            default=_Verbatim(_default(parameter.default)) if parameter.default is not parameter.empty
            else parameter.empty,
        )
        for parameter in found.parameters.values()
        if parameter.name != "self"
    ]  # fmt: skip
    given = "" if isinstance(value, type) or found.return_annotation is found.empty else found.return_annotation
    arrow = f" -> {_annotation(given)}" if given != "" else ""
    text = f"{inspect.Signature(parameters)}{arrow}"
    if wide or len(text) <= WIDEST or not parameters:
        return text
    return _broken(parameters, arrow)


def _broken(parameters: list[inspect.Parameter], arrow: str) -> str:
    """One parameter a line, with the marks of what goes by position or by name only."""
    rows, kinds = [], inspect.Parameter
    for at, one in enumerate(parameters):
        before = parameters[at - 1].kind if at else None
        if before is kinds.POSITIONAL_ONLY and one.kind is not kinds.POSITIONAL_ONLY:
            rows.append("/")
        if one.kind is kinds.KEYWORD_ONLY and before not in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL):
            rows.append("*")
        rows.append(str(one))
    return "(\n" + "".join(f"    {row},\n" for row in rows) + f"){arrow}"


def _annotation(annotation: object) -> str:
    """A type as it reads without its module: `Tensor | None`, whichever way it is written in the source."""
    if annotation is None or annotation is type(None):
        return "None"
    if isinstance(annotation, ForwardRef):
        return _annotation(annotation.__forward_arg__)
    if get_origin(annotation) is Union:
        return " | ".join(map(_annotation, get_args(annotation)))
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    parts = re.split(r"(Literal\[[^]]*\])", re.sub(r"ForwardRef\('([^']*)'\)", r"\1", text))
    return "".join(
        part if part.startswith("Literal[") else _without_modules(part.replace("NoneType", "None")) for part in parts
    )


def _without_modules(text: str) -> str:
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", re.sub(r"['\"]", "", text))


def _default(value: object) -> str:
    if inspect.isfunction(value) or isinstance(value, type):
        return value.__qualname__
    text = repr(value)
    return "..." if text == "<factory>" or len(text) > LONGEST_DEFAULT else text
