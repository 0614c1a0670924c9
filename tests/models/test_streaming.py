"""A sink gets every capture as it happens, the same bits that would have been collected."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from forebay.stages.models.model import Model
from forebay.stages.models.points import HookPoint
from forebay.stages.models.taps import HookSpec


def test_streamed_and_collected_are_the_same_bits(tiny: Model, tokens: Tensor) -> None:
    hooks = (
        HookSpec()
        .capture("*", "blocks.*.attn.hook_result")
        .intervene("blocks.1.hook_resid_pre", lambda value, point: value * 2)
    )
    collected = tiny.forward(tokens, hooks)
    streamed: dict[HookPoint, Tensor] = {}
    out = tiny.forward(tokens, hooks, sink=streamed.__setitem__)
    assert out.captures == {}
    assert list(streamed) == list(collected.captures)
    for point, value in streamed.items():
        assert torch.equal(value, collected[point]), point


def test_a_capture_reaches_the_sink_before_the_next_block_runs(tiny: Model, tokens: Tensor) -> None:
    events: list[str] = []

    def note(value: Tensor, point: HookPoint) -> Tensor:
        events.append(f"enters {point.layer}")
        return value

    hooks = HookSpec().capture("blocks.*.hook_resid_post").intervene("blocks.*.hook_resid_pre", note)
    tiny.forward(tokens, hooks, logits=False, sink=lambda point, tensor: events.append(f"captured {point.layer}"))
    assert events == [f"{event} {layer}" for layer in range(3) for event in ("enters", "captured")]


def test_nothing_that_was_streamed_is_held(tiny: Model, tokens: Tensor) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def sink(point: HookPoint, tensor: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(tensor))
        most = max(most, sum(reference() is not None for reference in alive))

    tiny.forward(tokens, HookSpec().capture("blocks.*.mlp.hook_post"), logits=False, sink=sink)
    gc.collect()
    assert len(alive) == 3
    assert most == 1
