"""A small finished run with everything that a report shows: residual streams, attention patterns, features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import forebay

WINDOWS = pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (400, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.slow),
        pytest.param(400, "light", marks=pytest.mark.slow),
    ],
)
"""In which a page is looked at."""
TABS = ("overview", "norms", "lens", "attention", "features")
"""The parts of a page."""
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
"""A text that would be markup if it could."""

HOOK = "blocks.1.hook_resid_post"
RECIPE = """
[corpus]
files = ["corpus.jsonl"]
[model]
source = {model}
[tokenize]
context = 19
[capture]
hooks = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_z", "blocks.{{0,2}}.attn.hook_pattern"]
store_dtype = "bfloat16"
unit_tokens = 57
[train.sae]
hook = "{hook}"
n_feature = {n_feature}
k = 4
batch = 32
n_batch = {n_batch}
[encode.sae]
"""


def write_run(model: Path, texts: Sequence[str], folder: Path, *, n_feature: int = 45, n_batch: int = 20) -> Path:
    """The run, in `folder`, which is there."""
    lines = (json.dumps({"id": f"doc-{i}", "text": text}) + "\n" for i, text in enumerate(texts))
    (folder / "corpus.jsonl").write_text("".join(lines))
    filled = RECIPE.format(model=json.dumps(str(model)), hook=HOOK, n_feature=n_feature, n_batch=n_batch)
    (folder / "recipe.toml").write_text(filled)
    outcome = forebay.run(folder / "recipe.toml", folder / "run", device="cpu")
    assert outcome.code == 0
    return outcome.folder
