"""Features are ranked by what they write along a direction, as products of single rows rank them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from forebay.stages.analyze import decoder_projection as module
from forebay.stages.analyze.decoder_projection import (
    AttributionEdge,
    AttributionGraph,
    build_attribution_graph,
    build_attribution_graphs,
    score_features_by_decoder_projection,
)
from forebay.stages.dictionaries.dictionary import Dictionary
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.interventions import Inject
from forebay.stages.dictionaries.transcoders import FeatureId, TranscoderSet
from forebay.stages.models.taps import HookSpec

from .feature_models import InMemory, dictionary_of, model_of, numbers, sequences_of, set_of

D_IN, D_OUT = 13, 11
N_FEATURES = (23, 9, 17, 12)
DIRECTIONS = numbers(3, D_OUT, seed=77, scale=4.0)
Scored = dict[tuple[int, int, int], float]


def many(cross_layer: bool) -> TranscoderSet:
    return set_of(D_IN, N_FEATURES, cross_layer=cross_layer, d_out=D_OUT)


def one() -> Dictionary:
    return dictionary_of("blocks.2.hook_resid_mid", D_IN, hook_out="blocks.2.mlp.hook_out", d_out=D_OUT, n_feature=37)


def score(row: Tensor, direction: Tensor, cosine: bool) -> float:
    product = sum(a * b for a, b in zip(row.tolist(), direction.tolist(), strict=True))
    lengths = float(np.linalg.norm(row.numpy()) * np.linalg.norm(direction.numpy()))
    return product / lengths if cosine else product


def scores_of(dictionary: Dictionary | TranscoderSet, direction: Tensor, cosine: bool) -> Scored:
    """Every score by layer, feature and target."""
    if isinstance(dictionary, Dictionary):
        return {(2, n, 2): score(row, direction, cosine) for n, row in enumerate(dictionary.W_dec)}
    assert isinstance(dictionary.reader, InMemory)
    return {
        (layer, n, target): score(row, direction, cosine)
        for (layer, target), rows in dictionary.reader.decoders.items()
        for n, row in enumerate(rows)
    }


def ranked(scores: Scored, target: int | None, k: int) -> list[tuple[int, int, int, float]]:
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for (layer, feature, at), value in sorted(scores.items()):
        if target in (None, at) and value > best.get((layer, feature), (-np.inf, 0))[0]:
            best[layer, feature] = (value, at)
    order = sorted(best, key=lambda name: (-best[name][0], name))[:k]
    return [(*name, best[name][1], best[name][0]) for name in order]


def named(edges: tuple[AttributionEdge, ...], layer: int = 2) -> list[tuple[Any, ...]]:
    return [
        (edge.feature.layer, edge.feature.index, edge.target_layer)
        if isinstance(edge.feature, FeatureId)
        else (layer, edge.feature, edge.target_layer)
        for edge in edges
    ]


CASES: dict[str, tuple[Callable[[], Dictionary | TranscoderSet], int | None]] = {
    "one dictionary": (one, None),
    "one dictionary, its layer named": (one, 2),
    "a cross-layer set": (lambda: many(True), 2),
    "a cross-layer set, its first layer": (lambda: many(True), 0),
    "a cross-layer set, its last layer": (lambda: many(True), 3),
    "a set per layer": (lambda: many(False), 1),
    "a cross-layer set, all targets": (lambda: many(True), None),
    "a set per layer, all layers": (lambda: many(False), None),
}


@pytest.mark.parametrize("at_once", [2**24, 5 * D_OUT, 1], ids=["all rows at once", "five at a time", "one at a time"])
@pytest.mark.parametrize("cosine", [False, True], ids=["products", "cosines"])
@pytest.mark.parametrize("case", CASES)
def test_the_features_ranked_are_those_that_single_products_rank(
    case: str, cosine: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows are read at a time, and whatever the number asked for."""
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    make, target = CASES[case]
    dictionary = make()
    for k in (1, 6, 1000):
        graphs = build_attribution_graphs(dictionary, DIRECTIONS, target, top_k=k, cosine=cosine)
        assert len(graphs) == len(DIRECTIONS)
        for graph, direction in zip(graphs, DIRECTIONS, strict=True):
            expected = ranked(scores_of(dictionary, direction, cosine), target, k)
            assert named(graph.edges) == [names[:3] for names in expected]
            found = [edge.score for edge in graph.edges]
            np.testing.assert_allclose(found, [names[3] for names in expected], rtol=1e-5, atol=1e-6)
            alone = score_features_by_decoder_projection(dictionary, direction, target, top_k=k, cosine=cosine)
            assert named(alone) == named(graph.edges)
            assert graph.target_layer == (2 if isinstance(dictionary, Dictionary) else target)


def test_a_cosine_does_not_depend_on_the_lengths_and_a_product_does() -> None:
    dictionary = one()
    longer = dictionary_of(
        "blocks.2.hook_resid_mid",
        D_IN,
        hook_out="blocks.2.mlp.hook_out",
        d_out=D_OUT,
        n_feature=37,
        W_dec=dictionary.W_dec * torch.linspace(0.1, 9, 37, dtype=torch.float64)[:, None],
    )
    for cosine in (True, False):
        edges = [
            score_features_by_decoder_projection(which, direction, top_k=37, cosine=cosine)
            for which, direction in ((dictionary, DIRECTIONS[0]), (longer, 1000 * DIRECTIONS[0]))
        ]
        assert (named(edges[0]) == named(edges[1])) == cosine
        if cosine:
            np.testing.assert_allclose([e.score for e in edges[0]], [e.score for e in edges[1]], rtol=1e-6)
            assert all(abs(edge.score) <= 1 + 1e-6 for edge in edges[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_directions_of_any_kind_and_dtype_are_scored_in_float32_at_least(dtype: torch.dtype) -> None:
    dictionary = one().to(dtype=dtype)
    wide = dictionary.to(dtype=torch.float64)
    for direction in (DIRECTIONS[0].float(), DIRECTIONS[0].float().numpy(), DIRECTIONS[0]):
        edges = score_features_by_decoder_projection(dictionary, direction, top_k=37)
        expected = ranked(scores_of(wide, DIRECTIONS[0], False), None, 37)
        np.testing.assert_allclose([edge.score for edge in edges], [names[3] for names in expected], rtol=0, atol=1e-5)


def test_of_equal_scores_the_lower_layer_and_then_the_lower_feature_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 4 * D_OUT)
    of = many(True)
    assert isinstance(of.reader, InMemory)
    for rows in of.reader.decoders.values():
        rows[:] = DIRECTIONS[0] / 2
    of.reader.decoders[1, 3][4] = DIRECTIONS[0]
    edges = score_features_by_decoder_projection(of, DIRECTIONS[0], top_k=30)
    expected = [(1, 4, 3), *((0, n, 0) for n in range(23)), *((1, n, 1) for n in (0, 1, 2, 3, 5, 6))]
    assert named(edges) == expected


def test_scores_that_are_not_finite_are_left_out() -> None:
    """A row of zeros has no direction, and one that overflows no score."""
    W_dec = numbers(37, D_OUT, seed=3)
    W_dec[4] = 0
    settings: dict[str, Any] = {"hook_out": "blocks.2.mlp.hook_out", "d_out": D_OUT, "n_feature": 37}
    dictionary = dictionary_of("blocks.2.hook_resid_mid", D_IN, W_dec=W_dec, **settings)
    features = [
        edge.feature for edge in score_features_by_decoder_projection(dictionary, DIRECTIONS[0], top_k=99, cosine=True)
    ]
    assert sorted(features) == [n for n in range(37) if n != 4]  # type: ignore[type-var]
    W_dec[4] = 0
    assert len(score_features_by_decoder_projection(dictionary, DIRECTIONS[0], top_k=99)) == 37
    W_dec[5], W_dec[6] = 3e38, -3e38
    overflowing = dictionary_of("blocks.2.hook_resid_mid", D_IN, W_dec=W_dec, **settings).to(dtype=torch.float32)
    edges = score_features_by_decoder_projection(overflowing, torch.full((D_OUT,), 3.0), top_k=99)
    assert sorted(edge.feature for edge in edges) == [n for n in range(37) if n not in (5, 6)]  # type: ignore[type-var]


def test_every_decoder_is_read_once_for_all_directions_and_no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 10 * D_OUT)
    for target, pairs in (
        (2, [(layer, 2) for layer in range(3)]),
        (None, [(layer, at) for layer in range(4) for at in range(layer, 4)]),
    ):
        of = many(True)
        assert isinstance(of.reader, InMemory)
        build_attribution_graphs(of, DIRECTIONS, target)
        read: dict[tuple[int, int], int] = {}
        for what, *names in of.reader.asked:
            assert what == "rows"
            layer, at, n = names
            assert n <= 10
            read[layer, at] = read.get((layer, at), 0) + n
        assert read == {(layer, at): N_FEATURES[layer] for layer, at in pairs}


def test_the_features_of_a_graph_move_the_model_the_way_they_were_ranked_for() -> None:
    """Features whose rows lie most along a token's unembedding raise its logit when they are injected after the last
    block, and those that lie least along it lower it."""
    model = model_of()
    dictionary = dictionary_of("blocks.3.hook_resid_post", 36, n_feature=60)
    tokens = sequences_of(9)
    token = 17
    for direction, sign in ((model.unembedding.weight[token], 1), (-model.unembedding.weight[token], -1)):
        graph = build_attribution_graph(dictionary, direction, top_k=3, cosine=True)
        hooks = Inject(dictionary, dict.fromkeys(graph.features(), 50.0)).hooks()
        share = []
        for spec in (HookSpec(), hooks):
            logits = model.forward(tokens, spec).logits
            assert logits is not None
            share.append(logits[0, -1].log_softmax(-1)[token])
        assert float((share[1] - share[0]) * sign) > 0.1


# ── graphs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def graph() -> AttributionGraph:
    edges = [(FeatureId(1, 5), 3.0), (FeatureId(0, 0), 0.5), (FeatureId(1, 2), -0.25), (FeatureId(0, 7), -2.0)]
    return AttributionGraph(2, tuple(AttributionEdge(feature, score, 2) for feature, score in edges))


def test_a_graph_is_cut_to_its_first_edges_or_to_those_that_are_strong_in_either_direction() -> None:
    whole = graph()
    assert len(whole) == 4
    assert whole.top_k(2).features() == (FeatureId(1, 5), FeatureId(0, 0))
    assert [len(whole.top_k(k)) for k in (-1, 0, 3, 99)] == [0, 0, 3, 4]
    assert whole.threshold(0.5).features() == (FeatureId(1, 5), FeatureId(0, 0), FeatureId(0, 7))
    assert whole.threshold(2.5).features() == (FeatureId(1, 5),)
    assert whole.threshold(0).edges == whole.edges
    assert whole.threshold(4).target_layer == whole.top_k(1).target_layer == 2
    assert str(whole.features()[0]) == "L1:5"


def test_a_graph_as_labelled_data() -> None:
    data = graph().to_dataset()
    assert dict(data.sizes) == {"rank": 4}
    assert data["score"].values.tolist() == [3.0, 0.5, -0.25, -2.0]
    assert data["layer"].values.tolist() == [1, 0, 1, 0]
    assert data["feature"].values.tolist() == [5, 0, 2, 7]
    assert data["target_layer"].values.tolist() == [2, 2, 2, 2]
    assert {name: str(variable.dtype) for name, variable in data.items()} == {
        "score": "float32",
        "feature": "int64",
        "layer": "int64",
        "target_layer": "int64",
    }
    ours = build_attribution_graph(one(), DIRECTIONS[0], top_k=3).to_dataset()
    assert (ours["layer"] == 2).all()
    outside = dictionary_of("hook_embed", D_OUT)
    assert build_attribution_graph(outside, DIRECTIONS[0]).target_layer is None
    assert (build_attribution_graph(outside, DIRECTIONS[0]).to_dataset()["target_layer"] == -1).all()
    assert dict(AttributionGraph(None, ()).to_dataset().sizes) == {"rank": 0}


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a layer beyond the last": (
        lambda: build_attribution_graph(many(True), DIRECTIONS[0], 4),
        "has layers 0 to 3; 4 was asked",
    ),
    "a layer below 0": (
        lambda: build_attribution_graph(many(False), DIRECTIONS[0], -1),
        "has layers 0 to 3; -1 was asked",
    ),
    "another layer than it writes in": (
        lambda: build_attribution_graph(one(), DIRECTIONS[0], 1),
        "writes at blocks.2.mlp.hook_out; layer 1 was asked for",
    ),
    "a width": (
        lambda: build_attribution_graph(one(), DIRECTIONS[0, :9]),
        r"directions of shape \(1, 9\): a random dictionary writes 11",
    ),
    "no directions": (lambda: build_attribution_graphs(one(), DIRECTIONS[:0]), r"directions of shape \(0, 11\)"),
    "several where one is asked": (
        lambda: build_attribution_graph(one(), DIRECTIONS),
        r"directions of shape \(1, 3, 11\)",
    ),
    "NaN": (
        lambda: build_attribution_graph(one(), DIRECTIONS[0] * float("nan")),
        "a direction has values that are NaN",
    ),
    "infinity": (lambda: build_attribution_graphs(many(True), DIRECTIONS / 0.0), "NaN, infinite or too large"),
    "a cosine with nothing": (
        lambda: build_attribution_graph(one(), torch.zeros(D_OUT), cosine=True),
        "a direction of zeros makes no angle",
    ),
    "no features": (lambda: build_attribution_graph(one(), DIRECTIONS[0], top_k=0), "top_k = 0 features are asked for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_ranked_is_refused(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(DictionaryError, match=message):
        call()
