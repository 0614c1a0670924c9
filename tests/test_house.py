"""The house: who may import whom, what loads what, what is shipped, and how large a room may be."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import forebay
from forebay.stores.schema import Schema, along_token
from forebay.stores.store import Store

ROOT = Path(__file__).parents[1]
FOLDERS = ("stores", "stages", "pipeline")
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MOST_LINES = 420


def module_of(file: Path) -> str:
    """'stores/store.py' → 'forebay.stores.store'; the root package is mapped from pipeline/_root."""
    parts = file.with_suffix("").parts
    parts = parts[2:] if parts[:2] == ("pipeline", "_root") else parts
    return ".".join(["forebay", *parts]).removesuffix(".__init__")


# ── who imports whom ─────────────────────────────────────────────────────────────────────────────────────────────────


class Import(NamedTuple):
    """An imported module by its full name. `late` where it happens in a function, or for type checkers only."""

    name: str
    late: bool
    line: int


def imports_of(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a source, however it is spelt; `from a import b` counts as `a.b`, which covers both readings."""
    package = module if is_package else module.rpartition(".")[0]

    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        match node:
            case ast.Import():
                yield from (Import(alias.name, late, node.lineno) for alias in node.names)
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*parents, *([base] if base else [])])
                yield from (Import(f"{base}.{alias.name}", late, node.lineno) for alias in node.names)
            case ast.Call(func=ast.Name("__import__" | "import_module") | ast.Attribute(attr="import_module")):
                said = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else "anything at all"
                yield Import(str(said), late, node.lineno)
        for child in ast.iter_child_nodes(node):
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and child in node.body
            yield from walk(child, late or inside or typing)

    yield from walk(ast.parse(source), False)


def imports_in(file: Path) -> list[Import]:
    return list(imports_of((ROOT / file).read_text(), module_of(file), file.name == "__init__.py"))


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def inside(*folders: str) -> list[Path]:
    found = [file for file in FILES if within(".".join(file.parent.parts), *folders)]
    assert found, folders
    return found


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import forebay.pipeline.run", ["forebay.pipeline.run"]),
        ("from forebay.pipeline import run as r", ["forebay.pipeline.run"]),
        ("from ..pipeline.run import run", ["forebay.pipeline.run.run"]),
        ("from .. import pipeline", ["forebay.pipeline"]),
        ("from ... import x", [".x"]),
        ("from . import grid", ["forebay.stores.grid"]),
        ("import stages.capture, torch", ["stages.capture", "torch"]),
        (
            "def f():\n    try:\n        from ..stages import stage\n    except ImportError: ...",
            ["forebay.stages.stage"],
        ),
        ("x = importlib.import_module('forebay.stages')", ["forebay.stages"]),
        ("x = __import__(name)", ["anything at all"]),
    ],
)
def test_no_spelling_of_an_import_escapes(source: str, names: list[str]) -> None:
    assert [found.name for found in imports_of(source, "forebay.stores.store", is_package=False)] == names


def test_imports_that_run_are_told_from_those_that_do_not() -> None:
    source = (
        "import a\nif TYPE_CHECKING:\n    import b\nelse:\n    import c\n"
        "class K:\n    import d\n    def f(self):\n        import e\n"
        "try:\n    import f\nexcept ImportError:\n    import g\n"
    )
    found = imports_of(source, "forebay.x", is_package=False)
    assert {one.name: one.late for one in found} == {
        "a": False, "b": True, "c": False, "d": False, "e": True, "f": False, "g": False
    }  # fmt: skip


MAY_IMPORT = [
    ("stores", ["forebay.stores"]),
    ("stages", ["forebay.stores", "forebay.stages"]),
    ("stages.models", ["forebay.stages.models"]),
    ("pipeline", ["forebay.stores", "forebay.stages", "forebay.pipeline"]),
]


@pytest.mark.parametrize(("folder", "allowed"), MAY_IMPORT)
def test_the_arrow_points_one_way(folder: str, allowed: list[str]) -> None:
    """stores ← stages ← pipeline, and models know nothing else of forebay but how an old name warns. Types count: to
    name one is to know it.
    """
    ours = ["forebay", *FOLDERS]
    wrong = [
        f"{file}:{line} imports {name}"
        for file in inside(folder)
        if "_root" not in file.parts  # the front door, which hands out names of all three
        for name, _, line in imports_in(file)
        if within(name, *ours) and not within(name, *allowed)
    ]
    assert wrong == []


THIRD_PARTY = [
    # folder, at import, and what a function may ask for besides
    ("stages.models", {"torch", "safetensors"}, {"gguf", "tokenizers", "huggingface_hub", "jinja2", "numpy", "xarray"}),
    (
        "stores",
        {"numpy", "xarray", "zarr", "zstandard", "numcodecs", "blake3", "crc32c"},
        {"pandas", "pyarrow", "_typeshed", "obstore"},
    ),
]


@pytest.mark.parametrize(("folder", "at_import", "late"), THIRD_PARTY)
def test_a_folder_asks_for_its_own_libraries_only(folder: str, at_import: set[str], late: set[str]) -> None:
    wrong = [
        f"{file}:{found.line} imports {found.name}"
        for file in inside(folder)
        for found in imports_in(file)
        if (top := found.name.partition(".")[0]) not in {"forebay", *sys.stdlib_module_names, *at_import}
        and not (found.late and top in late)
    ]
    assert wrong == []


STATE = ("grid", "ledger", "fingerprint", "errors", "places", "object_paths", "deprecation")


@pytest.mark.parametrize("name", STATE)
def test_the_state_of_a_run_needs_the_standard_library_only(name: str) -> None:
    """And obstore, where it lies in an object store."""
    tops = {
        found.name.partition(".")[0]
        for found in imports_in(Path("stores", f"{name}.py"))
        if not (found.late and within(found.name, "obstore"))
    }
    assert tops - {"forebay"} <= sys.stdlib_module_names
    mates = {found.name.split(".")[2] for found in imports_in(Path("stores", f"{name}.py")) if "forebay." in found.name}
    assert mates <= set(STATE)


def test_one_file_knows_zarr() -> None:
    knowing = {str(file) for file in FILES for found in imports_in(file) if within(found.name, "zarr")}
    assert knowing == {"stores/hierarchy.py"}


# ── what loads what ──────────────────────────────────────────────────────────────────────────────────────────────────


def loaded_by(*arguments: str | Path) -> tuple[set[str], str]:
    """The top-level modules that a fresh Python imports, and what it prints."""
    command = [sys.executable, "-X", "importtime", *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in found.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 10
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}, found.stdout


def test_importing_forebay_loads_nothing_heavy() -> None:
    loaded, _ = loaded_by("-c", "import forebay")
    assert "forebay" in loaded
    assert not loaded & {"torch", "xarray", "zarr", "dask", "numpy", "pandas", "pydantic", "click", "rich", "obstore"}


def test_stores_and_plans_load_no_torch() -> None:
    """What computes does: the models, the analyses, and the report that runs one."""
    modules = [module_of(file) for file in inside("stores", "pipeline")]
    modules += ["forebay.stages.stage", "forebay.stages.tokenize", "forebay.stages.capture"]
    modules = [module for module in modules if module != "forebay.__main__"]
    loaded, _ = loaded_by("-c", f"import {', '.join(modules)}")
    assert {"zarr", "xarray"} <= loaded
    assert not loaded & {"torch", "safetensors", "tokenizers", "transformers", "gguf", "huggingface_hub"}


def test_the_status_of_a_run_loads_no_torch(tmp_path: Path) -> None:
    schema = Schema(
        kind="tokens",
        n_token=6,
        unit_tokens=4,
        arrays={"token_id": along_token(("token",), {"token": 6}, "uint32", 4)},
        labels={"sequences/start": (("sequence",), np.array([0, 4]))},
    )
    store = Store.create(tmp_path / "tokens", schema, "f" * 64, {"determines": {}})
    rows = {"token": [0, 4], "sequence": [0, 1]}
    store.ledger.complete(0, {"rows": rows, "seconds": {"compute": 0.5}, "fingerprint": "f" * 64})
    loaded, said = loaded_by("-m", "forebay", "status", tmp_path)
    assert re.search(r"tokens\b.*\b1\b.*\b2\b", said)
    assert "click" in loaded
    assert not loaded & {"torch", "zarr", "xarray", "dask", "obstore"}


# ── the front door ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*forebay.__all__, "__version__"])
def test_every_name_of_the_front_door_is_there(name: str) -> None:
    assert getattr(forebay, name) is not None
    assert name in dir(forebay)


def test_a_misspelt_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(AttributeError) as refused:
        forebay.open_runs  # noqa: B018 - asking is what raises
    message = str(refused.value)
    assert message.startswith("module 'forebay' has no attribute 'open_runs'; it has ")
    assert all(name in message for name in forebay.__all__)
    with pytest.raises(ImportError, match="cannot import name 'open_runs'"):
        from forebay import open_runs  # noqa: F401


def test_the_version_is_the_distributions() -> None:
    assert forebay.__version__ == metadata.version("forebay") == PROJECT["project"]["version"]


# ── what is shipped ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_folder_of_modules_is_a_package_that_is_shipped() -> None:
    folders = {module_of(file.parent / "__init__.py") for file in FILES}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])
    assert all((ROOT / file).parent.joinpath("__init__.py").is_file() for file in FILES)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build in the tree would leave its own copy of the code in build/."""
    setuptools = {found.version for found in metadata.distributions(name="setuptools")}
    if not any(int(version.partition(".")[0]) >= 77 for version in setuptools):
        pytest.skip("building needs setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*FOLDERS, "tests", "scripts"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    for name in ("pyproject.toml", *{PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}):
        shutil.copy(ROOT / name, folder / "tree")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "tree"]
    found = subprocess.run(build, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    [made] = folder.glob("*.whl")
    return made


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {module_of(file.parent / "__init__.py").replace(".", "/") + f"/{file.name}" for file in FILES}
    assets = {f"forebay/{path.relative_to(ROOT)}" for path in (ROOT / "pipeline/page/assets").iterdir()}
    assert names == {*expected, *assets, "forebay/py.typed"}


def test_the_wheel_runs_where_there_is_no_source(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which finds the libraries that are installed here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    paths = {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}
    own = Path(sysconfig.get_path("purelib", vars=paths))
    python = Path(sysconfig.get_path("scripts", vars=paths)) / "python"
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    install = ["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    where = [python, "-c", "import forebay.stores.store as m; print(m.__file__)"]
    assert subprocess.check_output(where, text=True, cwd=tmp_path).strip() == str(own / "forebay/stores/store.py")
    for command in ([python, "-m", "forebay"], [python.with_name("forebay")]):
        said = subprocess.check_output([*command, "--version"], text=True, cwd=tmp_path)
        assert said == f"forebay, version {forebay.__version__}\n"


@pytest.mark.slow
def test_the_source_distribution_holds_the_tests_and_the_documentation_and_makes_the_same_wheel(
    wheel: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    kept = (*FOLDERS, "tests", "scripts", "docs")
    for name in kept:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    expected = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, tree]  # the wheel from the archive
    found = subprocess.run(build, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    [archive], [made] = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert expected - held == set()
    assert sorted(zipfile.ZipFile(made).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_the_command_that_is_installed_here_runs(tmp_path: Path) -> None:
    command = Path(sysconfig.get_path("scripts")) / "forebay"
    said = subprocess.check_output([command, "--version"], text=True, cwd=tmp_path)
    assert said == f"forebay, version {PROJECT['project']['version']}\n"


def test_the_tests_run_on_this_tree() -> None:
    """Not on a wheel of yesterday that happens to be installed."""
    for file in FILES:
        installed = Path(forebay.__file__).parents[1].joinpath(*module_of(file.parent / "__init__.py").split("."))
        link = installed / file.name
        assert link.exists(), f"{file} is new: run scripts/setup"
        assert os.path.samefile(link, ROOT / file), f"{link} is not {file}: run scripts/setup"
    assert not (ROOT / "build" / "lib").exists(), "a plain build left its copy of the code in build/lib: delete it"


# ── rooms ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_holds_one_idea_and_leaves_nothing_for_later(file: Path) -> None:
    source = (ROOT / file).read_text()
    assert len(source.splitlines()) <= MOST_LINES
    assert re.findall(r"\b(TODO|FIXME|XXX)\b", source) == []
    named = [file.stem, *(node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))]
    assert [name for name in named if re.search(r"manager|helper|utils?($|_)", name, re.IGNORECASE)] == []
