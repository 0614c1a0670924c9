"""What tests of analyses start from: the tiny model, runs that are captured once, and families beside transformers'."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr
from transformers import LlamaForCausalLM, PreTrainedModel

import forebay
from forebay.stages.analyze.tokens import as_run
from forebay.stages.models.forward import Forward
from forebay.stages.models.model import Model

from ..models.rwkv_edits import Rwkv
from .decomposed_families import CHOSEN, HOOKS, ROWS, ByHand, by_hand, load_both


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> Model:
    return forebay.load_model(tiny_model, device="cpu")


@pytest.fixture(scope="session")
def model(tiny: Model) -> Model:
    """The model that most files ask; a file that asks others has a fixture of this name of its own."""
    return tiny


@pytest.fixture(scope="session")
def eager(tiny_model: Path) -> LlamaForCausalLM:
    """transformers' model of the same weights, whose attention is computed step by step, so that it can be watched."""
    loaded = LlamaForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    return loaded.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run_once(runs: Path, make_recipe: Callable[..., Path]) -> Callable[..., Path]:
    """Runs the recipe that `make_recipe` makes of what is given, the first time, and gives the run's folder.

    The folder is shared by all tests that give the same: none of them may write into it.
    """

    def run(**tables: object) -> Path:
        recipe = make_recipe(**tables)
        files = recipe.read_bytes() + recipe.with_suffix(".jsonl").read_bytes()
        folder = runs / hashlib.sha256(files).hexdigest()[:16]
        if not folder.exists():
            assert forebay.run(recipe, folder).code == 0
        return folder

    return run


@pytest.fixture
def patterns_run(run_once: Callable[..., Path]) -> Path:
    """Documents of one to 24 tokens in units of 250, two layers' patterns."""
    return run_once(
        tokenize={"context": 24, "layout": "documents", "long_documents": "split"},
        capture={"hooks": ["blocks.{0,2}.attn.hook_pattern"], "unit_tokens": 250},
    )


# ── families ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=CHOSEN)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Model]:
    """A family as transformers makes it, and as forebay reads it."""
    return load_both(request.param, tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def forward(both: tuple[PreTrainedModel, Model]) -> Forward:
    return both[1].forward(ROWS, HOOKS)


@pytest.fixture(scope="module")
def captures(forward: Forward) -> xr.DataTree:
    return as_run(forward)


@pytest.fixture(scope="module")
def expected(both: tuple[PreTrainedModel, Model]) -> ByHand:
    return by_hand(both[0])


@pytest.fixture(scope="module", params=[6, 7], ids=["RWKV-6", "RWKV-7"])
def rwkv(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rwkv:
    """A random recurrent model, of each version in turn."""
    return Rwkv.make(request.param, tmp_path_factory.mktemp("rwkv"))
