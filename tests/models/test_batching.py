"""Padding and the composition of a batch change no value beyond floating-point reordering."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from forebay.stages.models.errors import ModelError
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

LENGTHS = [40, 7, 23, 1]
KINDS = "blocks.*.{hook_resid_post,attn.hook_z,mlp.hook_post}"


@pytest.fixture
def ragged() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, 101, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("scores_too", [False, True], ids=["fused attention", "explicit attention"])
def test_a_sequence_alone_and_in_a_batch(
    tiny: Model, ragged: list[list[int]], worst_token: Callable[[Tensor, Tensor], float], scores_too: bool
) -> None:
    hooks = HookSpec().capture(KINDS, *(["blocks.*.attn.hook_pattern"] if scores_too else []))
    together = tiny.forward(ragged, hooks)
    assert together.lengths == tuple(LENGTHS)
    assert together.logits is not None
    for row, ids in enumerate(ragged):
        alone = tiny.forward([ids], hooks)
        assert alone.logits is not None
        assert worst_token(together.logits[row, : len(ids)], alone.logits[0]) < 1e-5
        for point, value in alone.captures.items():
            batched = together[point][row]
            if "query" in point.dims:
                assert worst_token(batched[:, : len(ids), : len(ids)], value[0]) < 1e-5
            else:
                assert worst_token(batched[: len(ids)], value[0]) < 1e-5


def test_later_tokens_change_no_earlier_value(tiny: Model, tokens: Tensor) -> None:
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 101
    first, second = (tiny.forward(ids).logits for ids in (tokens, changed))
    assert first is not None
    assert second is not None
    assert torch.allclose(first[:, :20], second[:, :20], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first[:, 20:], second[:, 20:], rtol=1e-2)


def test_a_real_model_in_a_ragged_batch(
    smollm2: Model, english: Tensor, worst_token: Callable[[Tensor, Tensor], float]
) -> None:
    hooks = HookSpec().capture("blocks.[0,14,29].hook_resid_post")
    together = smollm2.forward([english[0], english[1, :20]], hooks, logits=False)
    alone = smollm2.forward(english[1:2, :20], hooks, logits=False)
    for point, value in alone.captures.items():
        assert worst_token(together[point][1, :20], value[0]) < 1e-5


def test_lists_tensors_and_lists_of_tensors_are_the_same_batch(tiny: Model, tokens: Tensor) -> None:
    given = [tokens, tokens.int(), tokens.tolist(), list(tokens), [row.numpy() for row in tokens]]
    results = [tiny.forward(ids).logits for ids in given]
    for result in results[1:]:
        assert torch.equal(result, results[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "the batch is empty"),
        (torch.zeros(0, 5, dtype=torch.int64), "the batch is empty"),
        ([[1, 2], []], "sequence 1 of the batch is empty"),
        (torch.zeros(2, 0, dtype=torch.int64), "the batch is empty: every sequence needs"),
        ([[5, 101]], "sequence 0 of the batch has the token id 101; ids go from 0 to 100"),
        (torch.tensor([[3, -1]]), "the batch has the token id -1"),
        ([[1], [2] * 65], "sequence 1 of the batch has 65 tokens; the context of this model is 64 long"),
        ([1, 2, 3], r"for one sequence of ids, write \[ids\]"),
        (torch.tensor([1, 2, 3]), r"for one sequence of ids, write \[ids\]"),
        (torch.rand(2, 3), "dtype torch.float32; integers are expected"),
        ([[1.5, 2.0]], "sequence 0 of the batch has token ids of dtype torch.float32"),
        ([["a"]], "sequence 0 of the batch is no list of token ids"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_computed(
    tiny: Model, ids: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(ModelError, match=message):
        tiny.forward(ids)  # type: ignore[arg-type]
