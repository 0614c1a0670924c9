"""The documentation says what the code does: generated tables are up to date, and what it shows can be run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import forebay

from .hub_server import ask, serving
from .models.rwkv_models import write_pth

DOCS = Path(__file__).parents[1] / "docs"


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "scripts/docs", "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_generated_tables_are_those_of_the_code() -> None:
    found = check(DOCS.parent)
    assert found.returncode == 0, found.stderr


def test_a_table_that_has_drifted_is_noticed(tmp_path: Path) -> None:
    for folder in ("docs", "scripts"):
        shutil.copytree(DOCS.parent / folder, tmp_path / folder)
    path = tmp_path / "docs/hooks.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("| `hook_embed` | sequence", "| `hook_embed` | position"), encoding="utf-8")
    found = check(tmp_path)
    assert found.returncode == 1
    assert "docs/hooks.md is out of date: run scripts/docs" in found.stderr


@pytest.mark.parametrize("name", ["hooks.md", "models.md", "rwkv.md"])
def test_examples_run(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pth(tmp_path / "RWKV-x070-World-0.1B.pth", 7, d_vocab=2**16, n_layers=4)
    monkeypatch.chdir(tmp_path)
    run_blocks(name, capsys)


def test_examples_with_dictionaries_run(
    tiny_model: Path,
    make_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a run like the demo's, of a random model with as many layers as it takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model, num_hidden_layers=16)).save_pretrained(tmp_path / "model")
    hook = "blocks.15.hook_resid_post"
    train = {"hook": hook, "n_feature": 40, "k": 8, "batch": 64, "n_batch": 20}
    tables = {"capture": {"hooks": [hook], "unit_tokens": 256}, "train": {"sae": train}, "encode": {"sae": {}}}
    recipe = make_recipe("smollm2", model=tmp_path / "model", **tables)
    assert forebay.run(recipe, tmp_path / "runs/smollm2").code == 0
    monkeypatch.chdir(tmp_path)
    run_blocks("dictionaries.md", capsys)


def test_examples_of_notebooks_run(
    tiny_model: Path,
    make_recipe: Callable[..., Path],
    texts: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe("novels", capture={"unit_tokens": 256})
    assert forebay.run(recipe, tmp_path / "runs/novels").code == 0
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        for block in blocks_of("notebooks.md"):
            exec(compile(block, "notebooks.md", "exec"), {})  # noqa: S102 - our own text
    assert texts[2] in capsys.readouterr().out


def test_examples_of_analyses_run(
    tiny_model: Path,
    make_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One after the other, for what one block makes the next one reads; on a run with what the page says it keeps."""
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    hooks = re.findall(r"^hooks = (\[.*\])$", (DOCS / "analyses.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    recipe = make_recipe("laboratory", capture={"hooks": json.loads(hooks), "unit_tokens": 256})
    assert forebay.run(recipe, tmp_path / "runs/laboratory").code == 0
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    together: dict[str, object] = {}
    for block in blocks_of("analyses.md"):
        exec(compile(block, "analyses.md", "exec"), together)  # noqa: S102 - our own text
        pyplot.close("all")
    assert capsys.readouterr().out == ""


def test_examples_of_sharing_run(
    make_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a hub on loopback."""
    recipe = make_recipe("novels", capture={"unit_tokens": 256})
    assert forebay.run(recipe, tmp_path / "runs/novels").code == 0
    monkeypatch.chdir(tmp_path)
    with serving() as hub, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
        ask(hub, monkeypatch)
        for block in blocks_of("sharing.md"):
            exec(compile(block, "sharing.md", "exec"), {"forebay": forebay})  # noqa: S102 - our own text
    assert "files were sent" in capsys.readouterr().out


def test_what_is_set_beside_other_libraries_runs(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first block stands before each of the others."""
    shutil.copytree(tiny_model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    first, *others = blocks_of("coming-from.md")
    for block in others:
        exec(compile(first + block, "coming-from.md", "exec"), {})  # noqa: S102 - our own text
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_names_that_pages_speak_of_are_there(name: str) -> None:
    """`forebay.NAME` of any page is a name of the package, or a module of it."""
    text = (DOCS / name).read_text(encoding="utf-8")
    spoken = set(re.findall(r"(?<![\w./-])forebay\.([A-Za-z_]\w*)", text))
    modules = {"stages", "stores", "pipeline"}
    assert spoken - modules - {*forebay.__all__} == set()


def blocks_of(name: str) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert found
    return found


def run_blocks(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block of Python alone; together they print something."""
    for block in blocks_of(name):
        exec(compile(block, name, "exec"), {})  # noqa: S102 - our own text
    assert capsys.readouterr().out.strip()
