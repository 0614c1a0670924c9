"""A compiled model gives what the same model gives uncompiled, up to rounding, and the same bits every time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import forebay
from forebay.stages.models import compiling
from forebay.stages.models.compiling import require_compilable
from forebay.stages.models.errors import ModelError
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec
from forebay.stores.ledger import Ledger

from ..stored import data
from .families import VARIANTS

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own compiler
]

WorstToken = Callable[[Tensor, Tensor], float]
AROUND = ("hook_embed", "blocks.*.hook_resid_pre", "blocks.*.hook_resid_post", "hook_logits")


def captured(model: Model, tokens: Tensor, hooks: HookSpec) -> dict[str, Tensor]:
    return {str(point): value for point, value in model.forward(tokens, hooks).captures.items()}


def assert_equal_but_for_rounding(model: Model, plain: Model, tokens: Tensor, worst_token: WorstToken) -> None:
    hooks = HookSpec().capture(*AROUND)
    ours, reference = captured(model, tokens, hooks), captured(plain, tokens, hooks)
    assert set(ours) == set(reference)
    for name, value in reference.items():
        assert worst_token(ours[name], value) < 1e-5, name
    again = captured(model, tokens, hooks)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.slow
def test_blocks_run_compiled_unless_they_are_read_inside(tmp_path: Path, tiny: Model, worst_token: WorstToken) -> None:
    model = forebay.load_model(tmp_path / "tiny", device="cpu", compile=True)
    tokens = torch.arange(22).reshape(2, 11)
    assert_equal_but_for_rounding(model, tiny, tokens, worst_token)
    # Every block is read inside, so that none is compiled: the very bits of the plain model.
    inside = HookSpec().capture("*.attn.hook_z", *AROUND)
    ours, reference = captured(model, tokens, inside), captured(tiny, tokens, inside)
    assert all(torch.equal(ours[name], value) for name, value in reference.items())
    changed = HookSpec().capture(*AROUND).intervene("blocks.1.hook_resid_pre", lambda value, point: value * 2)
    ours, reference = captured(model, tokens, changed), captured(tiny, tokens, changed)
    for name, value in reference.items():
        assert worst_token(ours[name], value) < 1e-5, name
    with_gradients = model.forward(tokens, HookSpec().capture("hook_embed"), gradients=True)
    (embed,) = with_gradients.captures.values()
    assert with_gradients.logits is not None
    assert torch.autograd.grad(with_gradients.logits.sum(), embed)[0].any()


@pytest.mark.slow
def test_every_family_is_compiled_or_refused(
    variant: str, folder: Path, ours: Model, tokens: Tensor, worst_token: WorstToken
) -> None:
    assert variant in VARIANTS
    ropes = {rope.kind for rope in (ours.spec.rope, ours.spec.sliding_rope) if rope is not None}
    if ours.spec.attn_scale_by_layer or ropes & {"dynamic", "longrope"}:
        with pytest.raises(ModelError, match="compile = true: "):
            forebay.load_model(folder, device="cpu", compile=True)
        return
    model = forebay.load_model(folder, device="cpu", compile=True)
    assert_equal_but_for_rounding(model, ours, tokens, worst_token)


@pytest.mark.slow
def test_more_shapes_than_are_kept_are_refused_in_every_model_by_itself(
    tmp_path: Path, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "GRAPHS", 2)
    for lengths in ((5, 9, 5, 9), (6, 8, 6, 8)):  # the second model is not refused for the forms of the first
        model = forebay.load_model(tmp_path / "tiny", device="cpu", compile=True)
        for length in lengths:
            model.forward(torch.arange(length)[None])
        with pytest.raises(ModelError, match="2 forms of the block are compiled, and a batch of 1 × 7 tokens would"):
            model.forward(torch.arange(7)[None])


def test_what_cannot_be_compiled_is_refused_with_the_reason(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"compile = true: blocks are compiled for CPUs and CUDA, not for mps\. Leave"):
        require_compilable(tiny.spec, "mps")
    require_compilable(tiny.spec, "cpu")
    with pytest.raises(ModelError, match="the scale of its attention depends on the layer"):
        require_compilable(replace(tiny.spec, attn_scale_by_layer=True), "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match=r"there is no C\+\+ compiler"):
        require_compilable(tiny.spec, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{"context": 16, "unit_tokens": 112}, {"context": 64, "layout": "documents", "long_documents": "truncate"}],
)
def test_a_compiled_capture_is_killed_and_goes_on_to_the_same_bytes(
    make_recipe: Callable[..., Path], fork_run: Callable[..., Any], layout: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"hooks": ["blocks.*.hook_resid_post", "blocks.1.attn.hook_z"], "batch": 4, "unit_tokens": 64}
    recipe = make_recipe(tokenize=layout, capture={**settings, "compile": True, "threads": 1})
    whole = fork_run(recipe, tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    killed = fork_run(recipe, tmp_path / "killed")
    while not Ledger(tmp_path / "killed/activations").done() and killed.is_alive():
        killed.join(0.005)
    killed.kill()
    killed.join()
    again = fork_run(recipe, tmp_path / "killed")
    again.join()
    assert again.exitcode == 0
    assert data(tmp_path / "killed") == data(tmp_path / "whole")
    forebay.run(make_recipe(tokenize=layout, capture={**settings, "threads": 1}), tmp_path / "plain", device="cpu")
    for kind in ("hook_resid_post", "attn.hook_z"):
        ours, plain = (
            forebay.open_run(tmp_path / name)[f"activations/{kind}/value"].values for name in ("whole", "plain")
        )
        assert abs(ours - plain).max() < 1e-5 * abs(plain).max()
