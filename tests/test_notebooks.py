"""The notebooks of the documentation run from their first cell to their last, on a small store and random models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import forebay

from .models.rwkv_models import write_pth

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs/notebooks").glob("*.ipynb"))


@pytest.fixture
def kept(make_recipe: Callable[..., Path], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with all that the notebooks read: residual streams, attention, and the features of a dictionary."""
    train = {"hook": "blocks.1.hook_resid_post", "n_feature": 40, "k": 8, "batch": 64, "n_batch": 20}
    hooks = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern"]
    recipe = make_recipe(
        "small", capture={"hooks": hooks, "unit_tokens": 256}, train={"sae": train}, encode={"sae": {}}
    )
    folder = tmp_path / "run"
    assert forebay.run(recipe, folder).code == 0
    write_pth(tmp_path / "RWKV-x070-World-0.1B.pth", 7, d_vocab=2**16, n_layers=4)
    monkeypatch.setenv("FOREBAY_RUN", str(folder))
    monkeypatch.setenv("FOREBAY_MODEL", str(tiny_model))
    monkeypatch.setenv("FOREBAY_RWKV", str(tmp_path / "RWKV-x070-World-0.1B.pth"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    return folder


@pytest.mark.filterwarnings("default")  # of the machinery of notebooks, in this process
def test_every_notebook_runs(kept: Path, tmp_path: Path) -> None:
    """In one kernel, which imports everything once, and forgets all names before each of them."""
    notebooks: list[Any] = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    whole: Any = nbformat.v4.new_notebook()
    for notebook in notebooks:
        whole.cells += [nbformat.v4.new_code_cell("%reset -f"), *notebook.cells]
    client = NotebookClient(whole, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    asyncio.run(client.async_execute())
    for path, notebook in zip(NOTEBOOKS, notebooks, strict=True):
        assert [output for cell in notebook.cells for output in cell.get("outputs", ())], path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook: Any = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_the_notebooks_are_those_that_the_documentation_names() -> None:
    text = (Path(__file__).parents[1] / "docs/analyses.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"notebooks/{path.name}" in text
