"""What nobody asked for is not computed, and what is not hooked is not called."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from types import FrameType

import pytest
import torch
from torch import Tensor

from forebay.stages.models import parts
from forebay.stages.models.errors import HookError
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec, Tap


def calls(model: Model, tokens: Tensor, hooks: HookSpec | None) -> Counter[str]:
    """Count the Python functions of the model's own code that a forward calls."""
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and "models" in frame.f_code.co_filename:
            counted[frame.f_code.co_qualname] += 1

    model.forward(tokens, hooks)  # what is cached is cached now
    sys.setprofile(count)
    try:
        model.forward(tokens, hooks)
    finally:
        sys.setprofile(None)
    return counted


def test_an_empty_spec_calls_nothing(tiny: Model, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiny.forward(tokens).logits
    monkeypatch.setattr(Tap, "__init__", None)
    monkeypatch.setattr(Tap, "__call__", None)
    assert torch.equal(tiny.forward(tokens, HookSpec()).logits, expected)  # type: ignore[arg-type]


def test_a_hook_costs_the_blocks_without_it_nothing(tiny: Model, tokens: Tensor) -> None:
    bare, hooked = calls(tiny, tokens, None), calls(tiny, tokens, HookSpec().capture("blocks.1.hook_resid_mid"))
    in_the_forward = {"block", "attention", "norm", "normalize", "mlp", "rotate", "_attend", "_merge_heads"}
    assert all(bare[name] for name in in_the_forward)
    assert {name: hooked[name] for name in in_the_forward} == {name: bare[name] for name in in_the_forward}
    assert not any(name.startswith("Tap.") for name in bare)
    assert hooked["Tap.__call__"] == 1


def blank_above(model: Model, layer: int, **within: object) -> Model:
    """A model whose weights above a block, and those named in it, are not there: computing with them would fail."""
    blocks = list(model.weights.blocks)
    blocks[layer + 1 :] = [None] * (len(blocks) - layer - 1)  # type: ignore[list-item]
    blocks[layer] = dataclasses.replace(blocks[layer], **within)  # type: ignore[arg-type]
    weights = dataclasses.replace(model.weights, blocks=tuple(blocks), ln_final=None, unembed=None)  # type: ignore[arg-type]
    return dataclasses.replace(model, weights=weights)


@pytest.mark.parametrize(
    ("point", "absent"),
    [
        ("blocks.1.hook_resid_post", ()),
        ("blocks.1.hook_resid_mid", ("ln2", "gate_up", "down")),
        ("blocks.1.attn.hook_z", ("out", "ln2", "gate_up", "down")),
        ("blocks.1.mlp.hook_post", ("down",)),
        ("blocks.1.hook_resid_pre", ("ln1", "qkv", "out", "ln2", "gate_up", "down")),
    ],
)
def test_the_forward_ends_at_the_last_point(tiny: Model, tokens: Tensor, point: str, absent: tuple[str, ...]) -> None:
    hooks = HookSpec().capture("hook_embed", point)
    whole = tiny.forward(tokens, hooks)
    cut = blank_above(tiny, 1, **dict.fromkeys(absent)).forward(tokens, hooks, logits=False)
    assert cut.logits is None
    assert torch.equal(cut[point], whole[point])
    with pytest.raises((AttributeError, TypeError)):
        blank_above(tiny, 1).forward(tokens, hooks)


def test_the_final_norm_needs_no_unembedding(tiny: Model, tokens: Tensor) -> None:
    weights = dataclasses.replace(tiny.weights, unembed=None)  # type: ignore[arg-type]
    headless = dataclasses.replace(tiny, weights=weights)
    out = headless.forward(tokens, HookSpec().capture("hook_final_norm"), logits=False)
    assert out["hook_final_norm"].shape == (*tokens.shape, tiny.spec.d_model)


def test_captured_logits_are_computed_when_asked_for_as_a_point(tiny: Model, tokens: Tensor) -> None:
    out = tiny.forward(tokens, HookSpec().capture("hook_logits"), logits=False)
    assert out.logits is None
    assert torch.equal(out["hook_logits"], tiny.forward(tokens).logits)  # type: ignore[arg-type]


def test_a_forward_without_a_question_is_refused(tiny: Model, tokens: Tensor) -> None:
    with pytest.raises(HookError, match="nothing is asked of this forward"):
        tiny.forward(tokens, logits=False)


def test_attention_is_fused_unless_scores_or_pattern_are_asked_for(
    tiny: Model, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = parts.F.scaled_dot_product_attention
    count = Counter[str]()

    def counting(*given: Tensor, **settings: object) -> Tensor:
        count["fused"] += 1
        return fused(*given, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(parts.F, "scaled_dot_product_attention", counting)
    everything_else = [
        str(p) for p in tiny.spec.points() if p.kind not in ("attn.hook_attn_scores", "attn.hook_pattern")
    ]
    for hooks, expected in [
        (HookSpec(), 3),
        (HookSpec().capture(*everything_else), 3),
        (HookSpec().capture("blocks.1.attn.hook_pattern"), 2),
        (HookSpec().intervene("blocks.{0,2}.attn.hook_attn_scores", lambda value, point: value), 1),
    ]:
        count.clear()
        tiny.forward(tokens, hooks)
        assert count["fused"] == expected


def test_capturing_changes_no_bit(tiny: Model, tokens: Tensor) -> None:
    everything_else = [
        str(p) for p in tiny.spec.points() if p.kind not in ("attn.hook_attn_scores", "attn.hook_pattern")
    ]
    bare, tapped = tiny.forward(tokens).logits, tiny.forward(tokens, HookSpec().capture(*everything_else)).logits
    assert torch.equal(bare, tapped)  # type: ignore[arg-type]


def test_a_captured_head_does_not_keep_the_fused_projection_alive(tiny: Model, tokens: Tensor) -> None:
    keys = tiny.forward(tokens, HookSpec().capture("blocks.0.attn.hook_k"))["blocks.0.attn.hook_k"]
    assert keys.untyped_storage().nbytes() == keys.numel() * keys.element_size()
