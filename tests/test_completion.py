"""The tab key completes the names of hook points wherever something is indexed by them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forebay
from forebay import HookPoint, HookSpec
from forebay.stages.models.errors import HookError
from forebay.stages.models.model import Model

from .test_notebook_display import page_of


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return forebay.load_model(str(tiny_model), device="cpu")


def completed(line: str, **names: Any) -> list[str]:
    """What IPython offers behind a line that ends amid a string."""
    from IPython.core.completer import IPCompleter, provisionalcompleter

    completer = IPCompleter(namespace=names, use_jedi=False)
    with provisionalcompleter():
        found = [f"{line[: one.start]}{one.text}" for one in completer.completions(line, len(line))]
    return sorted(re.split("[\"']", text)[1] for text in found)


def test_what_a_forward_captured_is_completed(model: Model) -> None:
    out = model.forward([[1, 2, 3]], HookSpec().capture("blocks.*.hook_resid_post", "hook_embed"))
    names = ["hook_embed", *(f"blocks.{layer}.hook_resid_post" for layer in range(3))]
    assert out._ipython_key_completions_() == names
    assert completed('out["blocks.', out=out) == sorted(names[1:])


def test_the_hook_points_of_a_model_are_completed(model: Model) -> None:
    names = [str(point) for point in model.spec.points()]
    assert model.hooks._ipython_key_completions_() == list(model.hooks) == names
    assert len(model.hooks) == len(names)
    expected = sorted(name for name in names if name.startswith("blocks.1.attn."))
    assert len(expected) > 5
    assert completed('model.hooks["blocks.1.attn.', model=model) == expected


def test_a_run_completes_its_hook_points_and_arrays(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    hooks = ["blocks.*.hook_resid_post", "blocks.[0-1].attn.hook_z"]
    assert forebay.run(make_recipe(capture={"hooks": hooks}), tmp_path / "run", device="cpu").code == 0
    run = forebay.open_run(tmp_path / "run")
    assert completed('run["activations/', run=run) == ["activations/attn.hook_z", "activations/hook_resid_post"]


def test_a_hook_point_of_a_model_is_given_by_name_and_taken_by_a_hook_spec(model: Model) -> None:
    point = model.hooks["blocks.2.attn.hook_z"]
    assert point == HookPoint("attn.hook_z", 2)
    assert model.hooks["blocks.1.hook_out"] == HookPoint("hook_resid_post", 1)
    out = model.forward([[1, 2]], HookSpec().capture(point), logits=False)
    assert list(out.captures) == [point]
    assert "blocks.2.attn.hook_z" in model.hooks
    assert "blocks.3.attn.hook_z" not in model.hooks


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.2.attn.hook_zz", r"Did you mean 'blocks\.2\.attn\.hook_z'\?"),
        ("blocks.3.attn.hook_z", r"names layer 3, but the layers of this model are 0 to 2"),
        ("blocks.*.attn.hook_z", r"is a pattern; model\.hooks takes one name\. HookSpec\(\)\.capture takes patterns"),
        ("blocks.[0-1].attn.hook_z", r"is a pattern"),
    ],
)
def test_a_name_that_the_model_does_not_have_is_refused(model: Model, name: str, message: str) -> None:
    with pytest.raises(HookError, match=message):
        model.hooks[name]


def test_the_hook_points_of_a_model_are_shown_a_kind_a_row(model: Model) -> None:
    page = page_of(model.hooks._repr_html_())
    assert page.cells[:3] == ["name", "dimensions", "value"]
    named = page.cells[3::3]
    assert "blocks.[0-2].attn.hook_pattern" in named
    assert "hook_embed" in named
    shown = HookSpec().capture(*named)
    captured = model.forward([[1, 2]], shown).captures
    assert [str(point) for point in captured] == list(model.hooks)
    assert repr(model.hooks) == f"ModelPoints({len(model.hooks)} hook points of 3 layers)"
