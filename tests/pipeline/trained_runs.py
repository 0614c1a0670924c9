"""A complete run with a trained dictionary, its features and their index."""

from __future__ import annotations

from pathlib import Path

import forebay

RECIPE = """
[corpus]
files = ["corpus.jsonl"]
[model]
source = "{model}"
[tokenize]
context = 16
[capture]
hooks = ["blocks.[0-1].hook_resid_post"]
unit_tokens = {unit_tokens}
[train.sae]
hook = "blocks.1.hook_resid_post"
n_feature = 30
k = 4
batch = 64
n_batch = 5
[encode.sae]
"""


def train_run(folder: Path, model: Path, *, unit_tokens: int) -> Path:
    """Runs such a recipe over the corpus.jsonl in a folder, in which the recipe and the run then lie."""
    (folder / "recipe.toml").write_text(RECIPE.format(model=model, unit_tokens=unit_tokens))
    assert forebay.run(folder / "recipe.toml", folder / "run", device="cpu").code == 0
    return folder / "run"
