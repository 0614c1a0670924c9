"""A run that is complete, made once, and copied for the tests that damage it; and a recipe that fails at a document."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


@pytest.fixture
def poisoned(
    make_recipe: Callable[..., Path], altered_model: Callable[..., Path], texts: list[str]
) -> Callable[..., Path]:
    """Writes a recipe over `documents`, of which those with "~" fail: the embedding of that token, and of no other, is
    far beyond the float16 in which it is kept. Keywords are those of [capture].
    """
    from tokenizers import Tokenizer

    token = 0

    def louder(weights: dict[str, Any]) -> None:
        weights["model.embed_tokens.weight"][token] *= 1e7

    plain = altered_model(lambda weights: None)
    token = Tokenizer.from_file(str(plain / "tokenizer.json")).token_to_id("~")
    shutil.rmtree(plain)
    model = altered_model(louder)

    def make(documents: Sequence[str] = (*texts[:9], "This is ~ too loud.", *texts[9:]), **capture: Any) -> Path:
        keys = {"hooks": ["hook_embed"], "store_dtype": "float16", **capture}
        return make_recipe(texts=documents, model=model, capture=keys)

    return make
