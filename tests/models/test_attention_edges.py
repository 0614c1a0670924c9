"""Edges of attention are cut and steered where they are said to be, and rows that are touched still add up to 1."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from forebay.stages.models.edges import Knockout, KnockoutSpec, SteerAttention
from forebay.stages.models.errors import HookError
from forebay.stages.models.interventions import Add, Replace, Zero
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

from .edited import edited_logits

SCORES, PATTERN = "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern"
RAGGED = (20, 13, 7)


@pytest.fixture
def ragged(tokens: Tensor) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(tokens, RAGGED, strict=True)]


def numbers(end: Any, length: int) -> list[int]:
    if end is None:
        return list(range(length))
    found = numpy.arange(length)[list(end) if isinstance(end, tuple) else end]
    return [int(number) for number in found.reshape(-1)]


def cut(edges: Any, length: int, size: int | None = None) -> Tensor:
    """Mark the edges that are meant in a sequence of this length, one by one."""
    marked = torch.zeros(size or length, size or length, dtype=torch.bool)
    for query, key in edges:
        for q, k in itertools.product(numbers(query, length), numbers(key, length)):
            marked[q, k] = k <= q
    return marked


def pattern_of(model: Model, batch: Any, edit: Any, point: str = SCORES) -> Tensor:
    hooks = HookSpec().intervene(point, edit).capture(PATTERN)
    return model.forward(batch, hooks, logits=False)[PATTERN]


def of_kept(pattern: Tensor, marked: Tensor) -> Tensor:
    """What is left of a pattern without some edges, each row divided by its sum; a row of nothing stays nothing."""
    kept = pattern.double().masked_fill(marked, 0.0)
    return (kept / kept.sum(-1, keepdim=True)).nan_to_num(0.0)


EDGES = [
    [(-1, 0)],
    [(5, 2), (6, 6), (-2, -3)],
    [(None, 0)],
    [(6, None)],
    [(None, None)],
    [(slice(2, 6), slice(1, 3))],
    [([1, -1], [0, 1])],
    [(slice(None, None, 2), 1), (3, [0, 3])],
    numpy.array([[4, 1], [6, 0]]),
    torch.tensor([[4, 1], [-1, -1]]),
]


@pytest.mark.parametrize("edges", EDGES, ids=str)
def test_a_knocked_out_edge_has_weight_zero_and_the_others_share_what_it_had(
    edges: Any, tiny: Model, tokens: Tensor, ragged: list[list[int]]
) -> None:
    for batch, lengths in ((tokens, (40,) * 3), (ragged, RAGGED)):
        plain = pattern_of(tiny, batch, lambda value, point: value)
        pattern = pattern_of(tiny, batch, Knockout(edges))
        for row, length in enumerate(lengths):
            marked = cut(edges, length)
            assert marked.any()
            assert (pattern[row, :, :length, :length][:, marked] == 0).all()
            expected = of_kept(plain[row, :, :length, :length], marked)
            assert torch.allclose(pattern[row, :, :length, :length].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_knockout_of_some_heads_and_sequences_leaves_the_others_as_they_are(
    tiny: Model, ragged: list[list[int]]
) -> None:
    plain = pattern_of(tiny, ragged, lambda value, point: value)
    edit = Knockout([(-1, None)]).at(head=[1, -1], sequence=slice(1, None))
    pattern = pattern_of(tiny, ragged, edit)
    touched = (pattern != plain).any(-1)
    assert touched.nonzero().tolist() == [[row, head, RAGGED[row] - 1] for row in (1, 2) for head in (1, 5)]
    assert (pattern[touched] == 0).all()


@pytest.mark.parametrize("edges", [[(-1, 0)], [(None, 0)], [(9, None), (21, [3, 5])]], ids=str)
def test_a_knockout_equals_the_same_edit_of_transformers(
    edges: Any,
    tiny: Model,
    random_llama: Callable[..., LlamaForCausalLM],
    tokens: Tensor,
    worst_token: Callable[[Tensor, Tensor], float],
) -> None:
    marked = torch.zeros(6, 40, 40, dtype=torch.bool)
    marked[2:4] = cut(edges, 40)
    hooks = HookSpec().intervene(SCORES, Knockout(edges).at(head=[2, 3]))
    with torch.no_grad():
        edit = lambda scores: scores.masked_fill(marked, -torch.inf)  # noqa: E731
        expected = edited_logits(random_llama(), tokens, SCORES, edit)
    ours, plain = tiny.forward(tokens, hooks).logits, tiny.forward(tokens).logits
    assert ours is not None
    assert plain is not None
    assert worst_token(ours, expected) < 2e-5
    assert worst_token(ours, plain) > 1e-3


def test_under_a_cap_of_scores_a_knocked_out_edge_has_weight_zero_too(tiny: Model, tokens: Tensor) -> None:
    capped = dataclasses.replace(tiny, spec=dataclasses.replace(tiny.spec, attn_softcap=2.0))
    out = capped.forward(
        tokens, HookSpec().intervene(SCORES, Knockout([(7, 3), (8, None)])).capture(PATTERN, "blocks.1.attn.hook_z")
    )
    assert (out[PATTERN][:, :, 7, 3] == 0).all()
    assert torch.allclose(out[PATTERN][:, :, 7].sum(-1), torch.ones(()))
    assert (out["blocks.1.attn.hook_z"][:, 8] == 0).all()
    assert out.logits is not None
    assert out.logits.isfinite().all()


def test_edges_out_of_the_window_of_a_layer_stay_without_weight(tiny: Model, tokens: Tensor) -> None:
    spec = dataclasses.replace(tiny.spec, window=4, sliding=(False, True, False))
    model = dataclasses.replace(tiny, spec=spec)
    seen = torch.ones(40, 40).tril() * torch.ones(40, 40).triu(-3)
    pattern = pattern_of(model, tokens, Zero())
    assert torch.allclose(pattern, (seen / seen.sum(-1, keepdim=True)).expand_as(pattern))
    plain = pattern_of(model, tokens, lambda value, point: value)
    for edit in (SteerAttention([(None, 3)], weight=0.5), SteerAttention([(slice(3, None), [0, 3])], scale=9.0)):
        steered = pattern_of(model, tokens, edit, PATTERN)
        assert (steered[:, :, seen == 0] == 0).all()
        assert torch.equal(steered[:, :, 7:], plain[:, :, 7:])
        assert not torch.allclose(steered[:, :, 4:6], plain[:, :, 4:6], rtol=1e-3)
        assert torch.allclose(steered.sum(-1), torch.ones(()), atol=1e-5)
    with pytest.raises(HookError, match=r"query 9 to key 3 carries no weight: queries of this layer see 4 positions"):
        pattern_of(model, tokens, SteerAttention([(9, 3)], scale=2.0), PATTERN)
    assert torch.equal(pattern_of(model, tokens, Knockout([(9, 3)])), plain)


# ── steering ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_doubling_one_of_four_equal_weights_gives_a_fifth_to_the_others(tiny: Model, tokens: Tensor) -> None:
    """The reference check of candle-mi's attention steering."""
    hooks = HookSpec().intervene(SCORES, Replace(0.0)).intervene(PATTERN, SteerAttention([(3, 1)], scale=2.0))
    pattern = tiny.forward(tokens, hooks.capture(PATTERN))[PATTERN]
    assert torch.allclose(pattern[:, :, 3, :4], torch.tensor([0.2, 0.4, 0.2, 0.2]).expand(3, 6, 4))
    assert torch.allclose(pattern[:, :, 4, :5], torch.full((3, 6, 5), 0.2))


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("edges", EDGES, ids=str)
def test_scaled_weights_keep_their_proportions_and_rows_their_sum(
    edges: Any, scale: float, tiny: Model, ragged: list[list[int]]
) -> None:
    plain = pattern_of(tiny, ragged, lambda value, point: value)
    steered = pattern_of(tiny, ragged, SteerAttention(edges, scale=scale), PATTERN)
    for row, length in enumerate(RAGGED):
        marked = cut(edges, length)
        before, after = (p[row, :, :length, :length].double() for p in (plain, steered))
        scaled = torch.where(marked, before * scale, before)
        total = scaled.sum(-1, keepdim=True)
        expected = torch.where(marked.any(-1)[:, None], (scaled / total).nan_to_num(0.0), before)
        assert torch.allclose(after, expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(after[:, ~marked.any(-1)], before[:, ~marked.any(-1)])


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.25])
@pytest.mark.parametrize(
    "edges", [[(-1, 0)], [(None, 0)], [(None, [0, 3]), (6, 1)], [(slice(3, 7), slice(1, 4))]], ids=str
)
def test_weights_that_are_set_are_exact_and_the_others_share_the_rest_in_proportion(
    edges: Any, weight: float, tiny: Model, ragged: list[list[int]]
) -> None:
    plain = pattern_of(tiny, ragged, lambda value, point: value)
    steered = pattern_of(tiny, ragged, SteerAttention(edges, weight=weight), PATTERN)
    for row, length in enumerate(RAGGED):
        marked = cut(edges, length)
        before, after = (p[row, :, :length, :length].double() for p in (plain, steered))
        for query in range(length):
            targets, others = marked[query], ~marked[query]
            if not targets.any():
                assert torch.equal(after[:, query], before[:, query])
            elif (before[:, query, others] == 0).all():  # the first query sees one key
                even = torch.full_like(after[:, query, targets], 1 / int(targets.sum()) if weight else 0.0)
                assert torch.allclose(after[:, query, targets], even)
            else:
                assert (after[:, query, targets].float() == torch.tensor(weight)).all()
                rest = before[:, query, others]
                share = rest * (1 - weight * int(targets.sum())) / rest.sum(-1, keepdim=True)
                assert torch.allclose(after[:, query, others], share, rtol=1e-4, atol=1e-7)


def test_a_row_that_attends_to_nothing(tiny: Model, tokens: Tensor) -> None:
    """It stays nothing when scaled; when weights are set, its targets share it evenly."""
    nothing = HookSpec().intervene(SCORES, Knockout([(8, None)])).capture(PATTERN)
    scaled = tiny.forward(tokens, nothing.intervene(PATTERN, SteerAttention([(8, 2)], scale=3.0)))[PATTERN]
    assert (scaled[:, :, 8] == 0).all()
    put = tiny.forward(tokens, nothing.intervene(PATTERN, SteerAttention([(8, [2, 3])], weight=0.1)))[PATTERN]
    assert (put[:, :, 8, 2:4] == 0.5).all()
    assert (put[:, :, 8].sum(-1) == 1).all()


def test_steering_some_heads_leaves_the_others_as_they_are(tiny: Model, ragged: list[list[int]]) -> None:
    plain = pattern_of(tiny, ragged, lambda value, point: value)
    edit = SteerAttention([(-1, 0), (-1, 0)], scale=4.0).at(head=2, sequence=-1)
    steered = pattern_of(tiny, ragged, edit, PATTERN)
    assert (steered != plain).any(-1).nonzero().tolist() == [[2, 2, 6]]
    once = SteerAttention([(-1, 0)], scale=4.0).at(head=2, sequence=-1)
    assert torch.equal(steered, pattern_of(tiny, ragged, once, PATTERN))


def test_the_strength_of_steering_can_be_differentiated(tiny: Model, tokens: Tensor) -> None:
    """Against a central difference of the pattern, which the strength changes smoothly."""
    for name in ("scale", "weight"):
        strength = torch.tensor(0.3, requires_grad=True)

        def steered(amount: Any, gradients: bool, name: str = name) -> Tensor:
            edit = SteerAttention([(None, [0, 2])], **{name: amount})
            hooks = HookSpec().intervene(PATTERN, edit).capture(PATTERN)
            pattern = tiny.forward(tokens, hooks, logits=False, gradients=gradients)[PATTERN]
            return (pattern.double() * torch.linspace(-1, 1, 40)).square().sum()

        (slope,) = torch.autograd.grad(steered(strength, True), strength)
        with torch.no_grad():
            expected = (steered(0.302, False) - steered(0.298, False)) / 0.004
        assert torch.allclose(slope.double(), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("edges", "names"),
    [
        ([(9, 3), (-1, 0)], ["blocks.0.attn.hook_k", SCORES, PATTERN]),
        ([(9, None), (-1, 0)], ["blocks.0.attn.hook_k", SCORES, PATTERN]),  # 9 attends to nothing
    ],
)
def test_knockouts_and_steering_leave_gradients_finite(
    edges: Any, names: list[str], tiny: Model, tokens: Tensor
) -> None:
    hooks = HookSpec().intervene(SCORES, Knockout(edges)).intervene(PATTERN, SteerAttention([(9, 3)], scale=2.0))
    out = tiny.forward(tokens, hooks.capture(*names), gradients=True)
    assert out.logits is not None
    for gradient in torch.autograd.grad(out.logits.logsumexp(-1).sum(), [out[name] for name in names]):
        assert gradient.isfinite().all()
        assert gradient.norm() > 0


# ── layers and heads by number ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("layers", "heads", "in_layers", "in_heads"),
    [
        (None, None, [0, 1, 2], [0, 1, 2, 3, 4, 5]),
        (-1, [0, -2], [2], [0, 4]),
        ([2, 0], None, [0, 2], [0, 1, 2, 3, 4, 5]),
        (range(1, 3), range(2), [1, 2], [0, 1]),
        (slice(None, 2), 3, [0, 1], [3]),
    ],
)
def test_a_knockout_spec_cuts_the_edges_of_its_mask_and_no_others(
    layers: Any, heads: Any, in_layers: list[int], in_heads: list[int], tiny: Model, tokens: Tensor
) -> None:
    edges = [(-1, 0), (slice(5, 8), [2, 6]), (3, None)]
    spec = KnockoutSpec(edges=edges, layers=layers, heads=heads)
    mask = spec.mask(tiny.spec, 40)
    assert mask.shape == (3, 6, 40, 40)
    assert mask.dtype == torch.bool
    expected = torch.zeros_like(mask)
    expected[numpy.ix_(in_layers, in_heads)] = cut(edges, 40)
    assert torch.equal(mask, expected)
    out = tiny.forward(tokens, spec.hooks(tiny.spec).capture("blocks.*.attn.hook_pattern"))
    pattern = torch.stack([out[f"blocks.{layer}.attn.hook_pattern"] for layer in range(3)])
    future = ~torch.ones(40, 40, dtype=torch.bool).tril()
    assert torch.equal(pattern.transpose(0, 1) == 0, (mask | future).expand(3, *mask.shape))


def test_a_knockout_spec_is_a_plain_value() -> None:
    assert KnockoutSpec(edges=[(5, 1)], layers=3) == KnockoutSpec(edges=[(5, 1)], layers=3)
    assert KnockoutSpec(edges=[(5, 1)]) != KnockoutSpec(edges=[(5, 2)])
    KnockoutSpec(edges="nonsense", layers=-99)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 3}, r"layer=3 is out of range: the size of layer is 3, so 0 to 2"),
        ({"layers": [0, 0]}, r"names layer 0 twice"),
        ({"layers": []}, r"names nothing"),
        ({"heads": [5, 6]}, r"head=6 is out of range"),
        ({"heads": "1"}, r"is no index"),
        ({"edges": []}, r"names no edge"),
        ({"edges": [(1, 2, 3)]}, r"must be \(query, key\) pairs"),
        ({"edges": [(8, 0), (9, 10)]}, r"from query 9 to key 10"),
        ({"edges": [(40, 0)]}, r"query=40 is out of range in sequence 0, of 40 tokens"),
    ],
)
def test_a_knockout_spec_refuses_what_is_not_there(settings: dict[str, Any], message: str, tiny: Model) -> None:
    spec = KnockoutSpec(**{"edges": [(1, 0)], **settings})
    with pytest.raises(HookError, match=message):
        spec.mask(tiny.spec, 40)
    if "from query" not in message and "40 tokens" not in message:  # positions are known in a forward only
        with pytest.raises(HookError, match=message):
            spec.hooks(tiny.spec)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("point", "edit", "message"),
    [
        (PATTERN, Knockout([(1, 0)]), r"Knockout at blocks\.1\.attn\.hook_pattern: it acts on attn\.hook_attn_scores "
         r"alone: register it at 'blocks\.1\.attn\.hook_attn_scores'"),
        ("hook_embed", Knockout([(1, 0)]), r"register it at 'blocks\.0\.attn\.hook_attn_scores'"),
        (SCORES, SteerAttention([(1, 0)], scale=1.0), r"register it at 'blocks\.1\.attn\.hook_pattern'"),
        (SCORES, Knockout([(3, 5)]), r"from query 3 to key 5 \(in a sequence of 20 tokens\) carries no weight"),
        (SCORES, Knockout([(-5, 2), (-5, 4)]), r"from query 2 to key 4 \(in a sequence of 7 tokens\)"),
        (SCORES, Knockout([([1, 2], slice(3, 5))]), r"no edge leads from query 1 to 2 to key 3 to 4"),
        (SCORES, Knockout([(13, 0)]), r"query=13 is out of range in sequence 1, of 13 tokens"),
        (SCORES, Knockout([(-1, -8)]), r"key=-8 is out of range in sequence 2, of 7 tokens"),
        (SCORES, Knockout([(slice(-2, None), 0)]), r"counts from the end"),
        (SCORES, Knockout((-1, 0)), r"must be \(query, key\) pairs, such as \[\(-1, 0\)\], not \(-1, 0\)"),
        (SCORES, Knockout(3), r"must be \(query, key\) pairs"),
        (SCORES, Knockout([]), r"names no edge"),
        (SCORES, Knockout(zip([1], [0], strict=True)), r"come from an iterator, which can be read once only"),
        (SCORES, Knockout([(1.0, 0)]), r"query=1\.0 is no index"),
        (SCORES, Knockout([(1, 0)]).at(query=1), r"edges say which query is meant: \.at\(\) takes sequence and head"),
        (SCORES, Knockout([(1, 0)]).at(head=6), r"head=6 is out of range"),
        (SCORES, Knockout([(1, 0)]).at(kv_head=0), r"no dimension 'kv_head' here.*Did you mean 'head'"),
        (PATTERN, SteerAttention([(1, 0)]), r"give scale=… or weight=…, one of the two"),
        (PATTERN, SteerAttention([(1, 0)], scale=1.0, weight=0.1), r"one of the two"),
        (PATTERN, SteerAttention([(1, 0)], scale=-0.1), r"the scale must be at least 0, not -0\.1"),
        (PATTERN, SteerAttention([(1, 0)], scale=float("nan")), r"the scale must be finite"),
        (PATTERN, SteerAttention([(1, 0)], scale=torch.ones(2)), r"the scale must be one number"),
        (PATTERN, SteerAttention([(1, 0)], weight=-1), r"the weight must be at least 0"),
        (PATTERN, SteerAttention([(1, 0)], weight=1.1), r"some query has 1 targets.*give at most 1$"),
        (PATTERN, SteerAttention([(None, [0, 1, 2])], weight=0.4), r"has 3 targets, and a weight of 0\.4 for each "
         r"makes 1\.2, .* give at most 0\.333333"),
        (PATTERN, SteerAttention([(2, 3)], scale=2.0), r"from query 2 to key 3"),
        (SCORES, Add(1.0).at(position=3), r"no dimension 'position' here.*Did you mean 'query'"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_or_steered_is_refused_before_anything_is_computed(
    point: str, edit: Any, message: str, tiny: Model, ragged: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.stages.models.model.F.embedding", None)
    with pytest.raises(HookError, match=message):
        tiny.forward(ragged, HookSpec().intervene(point, edit))


def test_a_weight_that_fills_the_row_is_taken(tiny: Model, tokens: Tensor) -> None:
    edit = SteerAttention([(6, [0, 1, 5])], weight=1 / 3)
    pattern = pattern_of(tiny, tokens, edit, PATTERN)
    expected = torch.zeros(40)
    expected[[0, 1, 5]] = 1 / 3
    assert torch.allclose(pattern[:, :, 6], expected.expand(3, 6, 40), atol=1e-6)
