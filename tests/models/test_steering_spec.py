"""A SteeringSpec steers the edges that it names in its layers and heads, and says whether new text is steered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from forebay.stages.models.edges import SteerAttention, SteeringSpec
from forebay.stages.models.errors import HookError
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

from .families import SIZES, WINDOW, make

PATTERNS = HookSpec().capture("blocks.*.attn.hook_pattern")


def patterns(model: Model, tokens: Tensor, hooks: HookSpec) -> Tensor:
    """Of the first sequence, [layer, head, query, key]."""
    out = model.forward(tokens[:1], hooks.extend(PATTERNS), logits=False)
    return torch.stack([out[f"blocks.{layer}.attn.hook_pattern"][0] for layer in range(model.spec.n_layers)])


@pytest.mark.parametrize("amount", [{"scale": 2.5}, {"scale": 0.0}, {"weight": 0.3}], ids=str)
def test_hooks_are_the_steering_registered_by_hand_in_each_layer(
    tiny: Model, tokens: Tensor, amount: dict[str, float]
) -> None:
    edges = [(-1, 0), (5, 2)]
    by_hand = HookSpec()
    for layer in (0, 2):
        steer = SteerAttention(edges, **amount).at(head=[1, 4])
        by_hand = by_hand.intervene(f"blocks.{layer}.attn.hook_pattern", steer)
    spec = SteeringSpec(edges=edges, layers=[0, -1], heads=[1, 4], **amount)
    expected = patterns(tiny, tokens, by_hand)
    assert torch.equal(patterns(tiny, tokens, spec.hooks(tiny.spec)), expected)
    assert not torch.allclose(expected, patterns(tiny, tokens, HookSpec()), atol=1e-3)


def test_a_weight_is_reached_at_the_edges_of_the_mask_and_nowhere_else(tiny: Model, tokens: Tensor) -> None:
    edges = [(slice(3, 9), 1), (-2, [4, 7])]
    spec = SteeringSpec(edges=edges, layers=1, heads=slice(1, 6, 2), weight=0.25)
    found, plain = patterns(tiny, tokens, spec.hooks(tiny.spec)), patterns(tiny, tokens, HookSpec())
    mask = spec.mask(tiny.spec, tokens.shape[1])
    assert mask.sum() == 3 * 8
    assert (found[mask] == 0.25).all()
    rows = mask[1].any(-1)
    assert torch.equal(found[1][~rows], plain[1][~rows])
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-5)


def test_what_lies_outside_the_window_of_a_layer_is_not_in_its_mask(tmp_path: Path) -> None:
    make("gemma2", {**SIZES["gemma2"], "sliding_window": WINDOW}).save_pretrained(tmp_path / "gemma2")
    model = load_model(tmp_path / "gemma2", device="cpu")
    marked = SteeringSpec(edges=[(None, 0)], scale=2.0).mask(model.spec, WINDOW + 5)
    seen = marked[:, 0, :, 0].sum(-1).tolist()
    assert seen == [WINDOW, WINDOW + 5, WINDOW, WINDOW + 5]


@pytest.mark.parametrize(
    ("edges", "stays"),
    [
        ([(4, 0)], True),
        ([(5, 0)], False),
        ([(-1, 0)], False),
        ([(None, 0)], False),
        ([(4, None), (2, -1)], True),
        ([(4, 0), (None, 0)], False),
        ([([0, 4], 0)], True),
        ([([0, 5], 0)], False),
        ([(torch.tensor([1, 3]), 0)], True),
        (numpy.array([[4, 1], [2, 0]]), True),
        (torch.tensor([[5, 1]]), False),
        ([(range(5), 0)], True),
        ([(slice(None), 0)], False),
        ([(slice(5), 0)], True),
        ([(slice(2, 6), 0)], False),
        ([(slice(0, -1), 0)], False),
        ([(slice(-3, 5), 0)], False),
    ],
    ids=str,
)
def test_steering_is_of_the_prompt_only_where_no_query_can_move_beyond_it(edges: Any, stays: bool) -> None:
    assert SteeringSpec(edges=edges, scale=2.0).is_prompt_only(5) is stays


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give scale=… or weight=…"),
        ({"scale": 1.0, "weight": 0.5}, "one of the two"),
        ({"scale": -1.0}, "the scale must be at least 0"),
        ({"weight": float("nan")}, "must be finite"),
        ({"scale": 1.0, "layers": 3}, "layer=3 is out of range"),
        ({"scale": 1.0, "heads": [0, 6]}, "head=6 is out of range"),
        ({"scale": 1.0, "edges": []}, "it names no edge"),
        ({"scale": 1.0, "edges": iter([(1, 0)])}, "can be read once only"),
        ({"scale": 1.0, "edges": [3]}, "must be .query, key. pairs"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_steered_is_refused_when_it_meets_the_model(
    tiny: Model, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(HookError, match=message):
        SteeringSpec(**{"edges": [(-1, 0)], **given}).hooks(tiny.spec)


def test_weights_that_exceed_a_row_are_refused_by_the_forward(tiny: Model, tokens: Tensor) -> None:
    hooks = SteeringSpec(edges=[(6, [0, 1, 2])], weight=0.4).hooks(tiny.spec)
    with pytest.raises(HookError, match="some query has 3 targets"):
        tiny.forward(tokens, hooks)
