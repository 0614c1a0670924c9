"""A run that is complete: made once, and copied for the tests that damage it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

import forebay

RECIPE = """
[corpus]
files = ["corpus.jsonl"]
[model]
source = {model}
[tokenize]
context = 60
layout = "documents"
long_documents = "split"
unit_tokens = 128
[capture]
hooks = ["blocks.*.hook_resid_post", "blocks.1.attn.hook_pattern"]
store_dtype = "bfloat16"
unit_tokens = 64
batch = 2
"""


@pytest.fixture(scope="session")
def whole_recipe(tiny_model: Path, texts: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two steps whose sequences straddle their units' edges, with its corpus beside it."""
    folder = tmp_path_factory.mktemp("recipe")
    lines = (json.dumps({"id": f"doc-{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    (folder / "corpus.jsonl").write_text("".join(lines))
    (folder / "recipe.toml").write_text(RECIPE.format(model=json.dumps(str(tiny_model))))
    return folder / "recipe.toml"


@pytest.fixture(scope="session")
def whole_run(whole_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run of `whole_recipe`, to be looked at and never changed."""
    outcome = forebay.run(whole_recipe, tmp_path_factory.mktemp("runs") / "whole", device="cpu")
    assert outcome.code == 0
    return outcome.folder


@pytest.fixture
def own_run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))
