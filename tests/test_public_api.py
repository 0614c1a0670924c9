"""What users may rely on stays as it is until it is changed on purpose: every public name, with its signature."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Optional

import pytest

import forebay

SCRIPTS = Path(__file__).parents[1] / "scripts"
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def reference() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    yield SimpleNamespace(
        **{name: import_module(f"reference.{name}") for name in ("pages", "promise", "surface", "themes")}
    )
    sys.path.remove(str(SCRIPTS))


def test_the_public_api_is_the_one_that_is_promised(reference: Any) -> None:
    found = reference.promise.difference(reference.promise.promised(), reference.surface.lines())
    assert not found, found


def test_every_name_of_the_front_door_is_promised_once(reference: Any) -> None:
    names = [one.name for theme in reference.themes.THEMES for one in reference.themes.public_names(theme)]
    assert len(set(names)) == len(names)
    assert {f"forebay.{name}" for name in forebay.__all__ if name != "plot"} <= set(names)
    assert {f"forebay.plot.{name}" for name in forebay.plot.__all__} <= set(names)


def test_what_changed_is_named_with_what_to_do(reference: Any) -> None:
    before = ["def forebay.a(x: int) -> None", "def forebay.b()", "def forebay.c()"]
    now = ["def forebay.a(x: int, y: int) -> None", "def forebay.b()", "def forebay.d()"]
    found = reference.promise.difference(before, now)
    lines = found.splitlines()
    assert [line for line in lines if line.startswith("- ")] == ["- def forebay.a(x: int) -> None", "- def forebay.c()"]
    assert [line for line in lines if line.startswith("+ ")] == [
        "+ def forebay.a(x: int, y: int) -> None", "+ def forebay.d()"
    ]  # fmt: skip
    assert "scripts/docs --public-api" in found
    assert "two minor versions" in found
    assert reference.promise.difference(before, list(before)) == ""


def test_a_signature_reads_as_python_with_the_same_parameters(reference: Any) -> None:
    """Every one that is promised, on one line and broken."""
    n_seen = 0
    for theme in reference.themes.THEMES:
        for one in reference.themes.public_names(theme):
            if not callable(one.value) or (isinstance(one.value, type) and issubclass(one.value, BaseException)):
                continue
            expected = [(name, found.kind) for name, found in inspect.signature(one.value).parameters.items()]
            for wide in (True, False):
                text = reference.surface.signature_of(one.value, wide)
                assert parameters_of(text) == expected, one.name
                assert wide or max(map(len, text.splitlines())) < 300
            n_seen += 1
    assert n_seen > 100


def parameters_of(signature: str) -> list[tuple[str, Any]]:
    """By Python's own parser, which knows nothing of `inspect`."""
    [function] = ast.parse(f"def f{signature}: ...").body
    assert isinstance(function, ast.FunctionDef)
    arguments, kinds = function.args, inspect.Parameter
    return [
        *((one.arg, kinds.POSITIONAL_ONLY) for one in arguments.posonlyargs),
        *((one.arg, kinds.POSITIONAL_OR_KEYWORD) for one in arguments.args),
        *((one.arg, kinds.VAR_POSITIONAL) for one in [arguments.vararg] if one),
        *((one.arg, kinds.KEYWORD_ONLY) for one in arguments.kwonlyargs),
        *((one.arg, kinds.VAR_KEYWORD) for one in [arguments.kwarg] if one),
    ]


def many(
    first: int,
    /,
    second: Path | None = None,
    *,
    kind: Literal["a.b", "c"] = "c",
    by: Callable[..., int] = len,
    **rest: Any,
) -> Mapping[str, Sequence[Path]]:
    raise NotImplementedError


AS_TYPES = {
    "first": int,
    "second": Optional["Path"],
    "kind": Literal["a.b", "c"],
    "by": Callable[..., int],
    "rest": Any,
    "return": Mapping[str, Sequence["Path"]],
}


@pytest.mark.parametrize("annotations", [many.__annotations__, AS_TYPES], ids=["text", "types"])
def test_types_read_without_their_modules_and_literals_as_they_are(
    reference: Any, monkeypatch: pytest.MonkeyPatch, annotations: Mapping[str, Any]
) -> None:
    monkeypatch.setattr(many, "__annotations__", annotations)
    said = (
        "(first: int, /, second: Path | None = None, *, kind: Literal['a.b', 'c'] = 'c', "
        "by: Callable[..., int] = <built-in function len>, **rest: Any) -> Mapping[str, Sequence[Path]]"
    )
    assert reference.surface.signature_of(many) == said
    assert reference.surface.signature_of(many, wide=False).splitlines() == [
        "(",
        "    first: int,",
        "    /,",
        "    second: Path | None = None,",
        "    *,",
        "    kind: Literal['a.b', 'c'] = 'c',",
        "    by: Callable[..., int] = <built-in function len>,",
        "    **rest: Any,",
        ") -> Mapping[str, Sequence[Path]]",
    ]


@dataclass(frozen=True)
class Base:
    width: int
    names: tuple[str, ...] = field(default_factory=tuple)
    found: float = field(init=False, default=0.5)
    _own: int = field(init=False, default=0)

    def method(self, x: float) -> float:
        return x

    @property
    def size(self) -> int:
        return self.width

    def _private(self) -> None: ...

    def __len__(self) -> int:
        return self.width


class Derived(Base):
    @classmethod
    def of(cls, text: str) -> Derived:
        return cls(len(text))

    @cached_property
    def kept(self) -> list[int]:
        return []

    def bind(self) -> None: ...


def test_a_class_promises_its_public_methods_properties_and_fields(
    reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cls in (Base, Derived):
        monkeypatch.setattr(cls, "__module__", "forebay.made_up")
    found = [
        reference.surface.described(reference.themes.Public(f"Derived.{one.name}", one.value))
        for one in reference.surface.members(Derived)
    ]
    assert found == [
        "def Derived.__len__() -> int",
        "field Derived.found: float",
        "property Derived.kept: list[int]",
        "def Derived.method(x: float) -> float",
        "def Derived.of(text: str) -> Derived",
        "property Derived.size: int",
    ]
    assert reference.surface.signature_of(Derived) == "(width: int, names: tuple[str, ...] = ...)"


# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_reference_says_what_signatures_and_docstrings_say_now(reference: Any) -> None:
    written = reference.pages.pages()
    there = {path.relative_to(DOCS).as_posix() for path in (DOCS / "api").iterdir()}
    assert there == set(written)
    for name, text in written.items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, f"docs/{name} is out of date: run scripts/docs"


def test_every_public_name_says_what_it_is(reference: Any) -> None:
    """In words of its own: what `dataclass` writes where there is no docstring is a signature."""
    found = [one for theme in reference.themes.THEMES for one in reference.themes.public_names(theme)]
    explained = [one for one in found if callable(one.value)]
    assert len(explained) > 100
    lacking = [
        one.name
        for one in explained
        if not one.value.__doc__ or one.value.__doc__.startswith(f"{one.name.rpartition('.')[2]}(")
    ]
    assert lacking == []


def test_a_page_has_the_signature_and_the_docstring_of_every_name_and_links_to_it(reference: Any) -> None:
    for theme in reference.themes.THEMES:
        text = reference.pages.pages()[f"api/{theme.page}.md"]
        headings = [line.removeprefix("## ").strip("`") for line in text.splitlines() if line.startswith("## ")]
        names = [one.name for one in reference.themes.public_names(theme)]
        assert headings == names
        # GitHub's rule for a heading's anchor: lower case, without the dots and the marks of code
        anchors = [name.lower().replace(".", "") for name in names]
        assert re.findall(r"\]\(#([^)]*)\)", text) == anchors
        for one in reference.themes.public_names(theme):
            if callable(one.value):
                assert inspect.cleandoc(one.value.__doc__) in text


def test_a_method_without_a_docstring_has_that_of_the_method_it_stands_for(reference: Any) -> None:
    assert forebay.Logit.at_position.__doc__ is None
    page = reference.pages.pages()["api/analyses.md"]
    entry = page.partition("### `Logit.at_position`")[2].partition("##")[0]
    assert inspect.cleandoc(forebay.Metric.at_position.__doc__ or "") in entry
