"""Old spellings of public names and arguments work for two minor versions, warn, and then go."""

from __future__ import annotations

import importlib
import inspect
import linecache
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import forebay
from forebay.stores import deprecation
from forebay.stores.deprecation import ForebayDeprecationWarning, Renamed, renamed_argument

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own() -> Iterator[None]:
    """What a test makes is not taken for the package's."""
    before = list(deprecation.known)
    yield
    deprecation.known[:] = before


def test_no_old_spelling_outlives_its_version() -> None:
    """Those of every module, and those of the front door."""
    for folder in ("stores", "stages", "pipeline"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "_root" not in file.parts:
                module = ".".join(["forebay", *file.relative_to(ROOT).with_suffix("").parts])
                importlib.import_module(module.removesuffix(".__init__"))
    spelt = [*deprecation.known, *forebay._RENAMED.values()]
    assert [old.what for old in spelt if old.outlives(forebay.__version__)] == []


@pytest.mark.parametrize(
    ("version", "outlived"),
    [
        ("0.3.0", False),
        ("0.4.9", False),
        ("0.5.0.dev1", True),
        ("0.5.0", True),
        ("0.12.0", True),
        ("1.0.0", True),
    ],
)
def test_an_old_spelling_works_for_two_minor_versions(version: str, outlived: bool) -> None:
    old = Renamed("forebay.old", "forebay.new", since="0.3")
    assert old.gone == "0.5"
    assert old.outlives(version) is outlived


def test_minor_versions_are_numbers_not_decimals() -> None:
    assert Renamed("a", "b", since="1.9").gone == "1.11"
    assert not Renamed("a", "b", since="1.9").outlives("1.10.3")


@pytest.mark.parametrize("since", ["", "1", "0.3.0", "v0.3", "next"])
def test_a_version_that_does_not_read_as_one_is_refused(since: str) -> None:
    with pytest.raises(ValueError, match=r"is deprecated since .*: a version as '0\.3' is expected"):
        Renamed("forebay.old", "forebay.new", since=since)


def test_an_argument_by_its_old_name_warns_and_is_taken() -> None:
    @renamed_argument("n", "count", since="0.3")
    def repeat(word: str, *, count: int = 1) -> str:
        """Says a word several times."""
        return word * count

    with pytest.warns(ForebayDeprecationWarning) as warned:
        assert repeat("ab", n=3) == "ababab"  # type: ignore[call-arg]
    [one] = warned
    name = f"{__name__}.{repeat.__qualname__}"
    assert str(one.message) == (
        f"the argument 'n' of {name} is deprecated since forebay 0.3 and goes in 0.5: write 'count'"
    )
    assert 'assert repeat("ab", n=3)' in linecache.getline(one.filename, one.lineno)
    assert issubclass(one.category, FutureWarning)


def test_an_argument_by_its_new_name_or_place_does_not_warn() -> None:
    @renamed_argument("n", "count", since="0.3")
    def repeat(word: str, count: int = 1) -> str:
        """Says a word several times."""
        return word * count

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (repeat("a"), repeat("a", 2), repeat("a", count=3)) == ("a", "aa", "aaa")
    assert str(inspect.signature(repeat)) == "(word: 'str', count: 'int' = 1) -> 'str'"
    assert repeat.__doc__ == "Says a word several times."
    with pytest.raises(TypeError, match=r"repeat was given 'count' and, by its old name 'n', the same again"):
        repeat("a", count=1, n=1)  # type: ignore[call-arg]


def test_a_method_takes_an_old_name_as_well() -> None:
    class Word:
        @renamed_argument("n", "count", since="0.3")
        def times(self, count: int) -> str:
            return "a" * count

    with pytest.warns(ForebayDeprecationWarning, match=r"the argument 'n' of .*Word\.times is deprecated"):
        assert Word().times(n=2) == "aa"  # type: ignore[call-arg]


def test_a_renamed_argument_is_known_to_the_package() -> None:
    @renamed_argument("n", "count", since="0.1")
    def repeat(count: int) -> int:
        return count

    assert [old.since for old in deprecation.known if "repeat" in old.what] == ["0.1"]


def test_a_name_of_the_front_door_by_its_old_spelling_warns_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forebay._RENAMED, "open_folder", Renamed("forebay.open_folder", "forebay.open_run", "0.3"))
    with pytest.warns(ForebayDeprecationWarning) as warned:
        found = forebay.open_folder
    assert found is forebay.open_run
    [one] = warned
    assert str(one.message) == (
        "forebay.open_folder is deprecated since forebay 0.3 and goes in 0.5: write forebay.open_run"
    )
    assert "found = forebay.open_folder" in linecache.getline(one.filename, one.lineno)
    assert "open_folder" not in dir(forebay)


def test_users_see_the_warning_without_asking_for_it() -> None:
    """In a module of their own, where Python hides a DeprecationWarning."""
    program = (
        "import types\n"
        "from forebay.stores.deprecation import Renamed\n"
        "code = compile('Renamed(\"forebay.old\", \"forebay.new\", \"0.3\").warn(stacklevel=1)', 'theirs.py', 'exec')\n"
        "exec(code, {'Renamed': Renamed, '__name__': 'theirs'})\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    assert "ForebayDeprecationWarning: forebay.old is deprecated since forebay 0.3" in said
