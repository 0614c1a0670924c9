"""What forebay calls while it works: a whole run, and all that is asked of one afterwards, watched; and its source."""

from __future__ import annotations

import ast
import os
import pickle
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import forebay
from forebay.pipeline.cli import main

from .watching import MARK, Watch, contents, watched

ROOT = Path(__file__).parents[2]
FILES = sorted(path for folder in ("stores", "stages", "pipeline") for path in (ROOT / folder).rglob("*.py"))

# ── what is called ───────────────────────────────────────────────────────────────────────────────────────────────────


def seen(work: Callable[[], object], *allowed: Path) -> list[str]:
    """What a watch objects to."""
    watch: list[Watch] = []
    try:
        with watched(*allowed) as one:
            watch.append(one)
            work()
    except AssertionError:
        assert watch[0].wrong
    return watch[0].wrong


def connect() -> None:
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", 9))


@pytest.mark.parametrize(
    "work",
    [
        lambda folder: os.system("true"),
        lambda folder: subprocess.run(["true"], check=True),
        lambda folder: pickle.loads(pickle.dumps(os.getcwd)),  # noqa: S301
        lambda folder: connect(),
        lambda folder: socket.getaddrinfo("localhost", 80),
        lambda folder: eval(f"'{MARK}'"),  # noqa: S307
        lambda folder: (folder.parent / "x").write_text("x"),
        lambda folder: (folder.parent / "x").open("a").close(),
        lambda folder: os.close(os.open(folder.parent / "x", os.O_RDWR | os.O_CREAT)),
        lambda folder: (folder / "link" / "x").write_text("x"),
        lambda folder: (folder.parent / "d").mkdir(),
        lambda folder: os.replace(folder / "own", folder.parent / "own"),
        lambda folder: (folder.parent / "mine").unlink(),
    ],
    ids=range(13),
)
def test_the_watch_sees_what_it_is_for(work: Callable[[Path], object], tmp_path: Path) -> None:
    folder = tmp_path / "allowed"
    folder.mkdir()
    (folder / "own").touch()
    (folder / "link").symlink_to(tmp_path)
    (tmp_path / "mine").touch()
    assert len(seen(lambda: work(folder), folder)) >= 1


def test_the_watch_lets_pass_what_is_allowed(tmp_path: Path) -> None:
    def work() -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "x").write_text("x")
        (tmp_path / "d" / "x").rename(tmp_path / "y")
        Path(__file__).read_text()
        eval("1 + 1")  # noqa: S307

    assert seen(work, tmp_path) == []


@pytest.mark.slow
def test_a_whole_run_and_all_that_is_asked_of_it_stay_in_the_runs_folder(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Tokens, activations, a trained dictionary, features and their index; status, lens, features, verify, repair."""
    hook = "blocks.1.hook_resid_post"
    recipe = make_recipe(
        capture={"hooks": [hook]},
        train={"sae": {"hook": hook, "n_feature": 36, "k": 5, "batch": 32, "n_batch": 4}},
        encode={"sae": {}},
    )
    folder, beside = tmp_path / "run", contents(tmp_path)
    with watched(folder):
        assert forebay.run(recipe, folder, device="cpu").code == 0
    with watched(folder):
        run = forebay.open_run(folder)
        assert run["activations/hook_resid_post/value"].mean().compute() != 0
        assert run.features("sae").top_contexts([0, 1], n=2).sizes["feature"] == 2
        assert len(run.to_str_tokens([5, 6])) == 2
        commands: list[list[Any]] = [
            ["status", folder],
            ["lens", folder],
            ["features", folder],
            ["verify", folder],
            ["verify", "--recompute", "1", "--device", "cpu", folder],
            ["repair", folder],
            ["index", folder],
            ["plan", recipe, "--to", folder, "--device", "cpu"],
            ["run", recipe, "--to", folder, "--device", "cpu"],
        ]
        for command in commands:
            found = CliRunner().invoke(main, [str(one) for one in command])
            assert found.exit_code == 0, (command, found.output)
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith("run/")} == beside


# ── what is written ──────────────────────────────────────────────────────────────────────────────────────────────────

BANNED_CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
    ),
    *(
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "marshal.loads",
        "marshal.load",
        "shelve.open",
        "runpy.run_path",
    ),
    *("dill.load", "dill.loads", "joblib.load", "cloudpickle.load", "cloudpickle.loads", "torch.hub.load", "pty.spawn"),
    *("os.execv", "os.execve", "os.execvp", "os.spawnv", "tempfile.mktemp", "zipfile.extractall", "tarfile.extractall"),
}
BANNED_WORDS = {"trust_remote_code": None, "allow_pickle": False, "shell": False, "weights_only": True}
"""Arguments that may be given with this value only; None: not at all."""
NEEDED = {"torch.load": "weights_only", "numpy.load": "allow_pickle", "np.load": "allow_pickle"}
"""Calls that must say one of these."""
LOADERS = {"stages/models/pickles.py"}
"""The one file that reads what torch has pickled."""


def faults(source: str, file: str) -> Iterator[str]:
    """What a source calls that nothing here may."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield from _call_faults(node, file)
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [module] if module else [alias.name for alias in node.names]
            taken = {alias.name for alias in node.names}
            if {"marshal", "shelve", "dill", "joblib", "cloudpickle"} & {name.split(".")[0] for name in names}:
                yield f"{file}:{node.lineno} imports {names}"
            if module == "pickle" and taken - {"UnpicklingError"}:
                yield f"{file}:{node.lineno} takes {taken} from pickle"
            if module in ("os", "torch", "yaml") and taken & {"system", "popen", "load", "unsafe_load"}:
                yield f"{file}:{node.lineno} takes {taken} from {module}"


def _call_faults(node: ast.Call, file: str) -> Iterator[str]:
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    if name in BANNED_CALLS or (last == "extractall"):
        yield f"{file}:{node.lineno} calls {name}"
    said = {word.arg: word.value for word in node.keywords}
    for word, due in BANNED_WORDS.items():
        if word in said and not (isinstance(said[word], ast.Constant) and said[word].value is due and due is not None):
            yield f"{file}:{node.lineno} gives {word} to {name}"
    if name in NEEDED and NEEDED[name] not in said:
        yield f"{file}:{node.lineno} calls {name} without {NEEDED[name]}"
    if name == "torch.load" and file not in LOADERS:
        yield f"{file}:{node.lineno} calls {name}, which only {', '.join(LOADERS)} does"
    if None in said and name in NEEDED:
        yield f"{file}:{node.lineno} calls {name} with what is not seen here"


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec(text, {})",
        "compile(text, '', 'exec')",
        "pickle.loads(data)",
        "pickle.Unpickler(file).load()",
        "from pickle import loads",
        "import joblib",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, **options)",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "os.system('x')",
        "archive.extractall(folder)",
        "__import__(name)",
    ],
)
def test_no_spelling_escapes(source: str) -> None:
    assert list(faults(source, "stores/x.py"))


@pytest.mark.parametrize(
    "source", ["model.eval()", "re.compile(text)", "ast.literal_eval(text)", "np.load(path, allow_pickle=False)"]
)
def test_what_is_meant_is_allowed(source: str) -> None:
    assert list(faults(source, "stores/x.py")) == []


def test_nothing_in_the_package_runs_text_or_unpickles() -> None:
    found = [line for path in FILES for line in faults(path.read_text(), str(path.relative_to(ROOT)))]
    assert found == []


def test_the_one_place_that_loads_pickles_is_there() -> None:
    [name] = LOADERS
    assert "weights_only=True" in (ROOT / name).read_text()
