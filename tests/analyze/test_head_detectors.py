"""Heads are scored by how much they attend where a rule says, counted edge by edge; stripes on random repeats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray

import forebay
from forebay.stages.analyze.head_detectors import (
    KINDS,
    detect_heads,
    detection_patterns,
    head_detectors,
    random_repeats,
)
from forebay.stages.analyze.tokens import as_run
from forebay.stages.models.errors import ModelError
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from ..models.rwkv_models import write_pth
from .laziness import forbidden

PATTERN = "activations/attn.hook_pattern"
IDS = [[7, 3, 3, 9, 7, 3, 9, 9, 7, 5, 3], [4, 4, 4, 2, 4], [1], [6, 8, 6, 8, 6, 8, 11]]


@pytest.fixture(scope="module")
def captured(model: Model) -> xr.DataTree:
    hooks = HookSpec().capture("blocks.*.attn.hook_pattern")
    return as_run(model.forward(IDS, hooks, logits=False))


def edges_of(ids: list[int], kind: str, exclude_bos: bool, exclude_current_token: bool) -> list[tuple[int, int]]:
    """The oracle: which edges a rule names, one by one."""
    found = []
    for q in range(len(ids)):
        for k in range(q + 1):
            named = {
                "previous_token": k == q - 1,
                "duplicate_token": k < q and ids[k] == ids[q],
                "induction": k >= 1 and k - 1 < q and ids[k - 1] == ids[q],
            }[kind]
            if named and not (exclude_bos and k == 0) and not (exclude_current_token and k == q):
                found.append((q, k))
    return found


def scored(weight: NDArray[Any], ids: list[int], measure: str, edges: list[tuple[int, int]], **out: bool) -> float:
    """The oracle: one head's score on one sequence, edge by edge."""
    n = len(ids)
    kept = [
        (q, k)
        for q in range(n)
        for k in range(q + 1)
        if not (out["exclude_bos"] and k == 0) and not (out["exclude_current_token"] and k == q)
    ]
    if measure == "mass":
        queries = {q for q, _ in edges}
        return sum(float(weight[e]) for e in edges) / len(queries) if queries else math.nan
    if measure == "mul":
        total = sum(float(weight[e]) for e in kept)
        return sum(float(weight[e]) for e in edges) / total if total else math.nan
    return 1 - sum(abs(float(weight[e]) - (e in edges)) for e in kept) / n


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ids", IDS, ids=str)
def test_rules_name_the_edges_that_they_are_defined_by(ids: list[int]) -> None:
    found = detection_patterns(np.array([*ids, -1, -1]))
    for kind, pattern in zip(KINDS, found, strict=True):
        assert sorted(zip(*map(np.ndarray.tolist, np.nonzero(pattern)), strict=True)) == edges_of(
            ids, kind, False, False
        )


def test_a_token_twice_running_is_its_own_induction_target_and_can_be_left_out() -> None:
    assert edges_of([4, 4], "induction", False, False) == [(1, 1)]
    assert detection_patterns(np.array([4, 4]))[2].tolist() == [[False, False], [False, True]]


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("measure", ["mass", "mul", "abs"])
@pytest.mark.parametrize("exclude_bos", [False, True])
@pytest.mark.parametrize("exclude_current_token", [False, True])
def test_scores_are_what_counting_edge_by_edge_gives(
    measure: str, exclude_bos: bool, exclude_current_token: bool, captured: xr.DataTree
) -> None:
    out = {"exclude_bos": exclude_bos, "exclude_current_token": exclude_current_token}
    found = head_detectors(captured[PATTERN], captured["tokens"], measure=measure, by_sequence=True, **out)
    pooled = head_detectors(captured[PATTERN], captured["tokens"], measure=measure, **out)
    assert found["score"].dims == ("kind", "sequence", "layer", "head")
    assert found["score"].dtype == np.float32
    assert found["kind"].values.tolist() == list(KINDS)
    for kind in KINDS:
        edges = [edges_of(ids, kind, **out) for ids in IDS]
        n_query = [len({q for q, _ in own}) for own in edges]
        assert found["n_query"].sel(kind=kind).values.tolist() == n_query
        assert int(pooled["n_query"].sel(kind=kind)) == sum(n_query)
        for layer, head in np.ndindex(3, 4):
            weights = captured[PATTERN]["value"].isel(layer=layer, head=head).values
            expected = [scored(weights[s], ids, measure, edges[s], **out) for s, ids in enumerate(IDS)]
            here = {"kind": kind, "layer": layer}
            np.testing.assert_allclose(found["score"].sel(here).isel(head=head), expected, rtol=1e-5, atol=1e-6)
            share = n_query if measure == "mass" else [1] * len(IDS)
            counted = [(e, w) for e, w in zip(expected, share, strict=True) if not math.isnan(e)]
            mean = sum(e * w for e, w in counted) / sum(w for _, w in counted)
            np.testing.assert_allclose(pooled["score"].sel(here).isel(head=head), mean, rtol=1e-5, atol=1e-6)


def test_heads_made_by_hand_to_follow_one_rule_score_one_on_it_and_what_overlaps_on_the_others() -> None:
    """Three heads of one layer that put everything on their rule's key, and on position 0 where it names none."""
    ids = random_repeats(50, n_sequences=2, length=6, seed=1, bos=0)
    back = {"previous_token": 1, "duplicate_token": 6, "induction": 5}
    pattern = np.zeros((1, 2, 3, 13, 13))
    for head, (kind, step) in enumerate(back.items()):
        for q in range(13):
            named = q >= 1 if kind == "previous_token" else q >= 7
            pattern[0, :, head, q, q - step if named else 0] = 1
    value = xr.DataArray(pattern, dims=("layer", "sequence", "head", "query", "key"))
    found = head_detectors(value, ids)
    assert found["n_query"].values.tolist() == [24, 12, 12]
    # Of the twelve queries after the first, the one at position 1 has its previous token at position 0.
    np.testing.assert_allclose(found["score"].values[:, 0], [[1, 1 / 12, 1 / 12], [0, 1, 0], [0, 0, 1]], atol=1e-7)
    mul = head_detectors(value, ids, measure="mul")["score"].values[:, 0]
    np.testing.assert_allclose(mul.diagonal(), [12 / 13, 6 / 13, 6 / 13], rtol=1e-6)
    absolute = head_detectors(value, ids, measure="abs", exclude_bos=True)["score"].values[:, 0]
    np.testing.assert_allclose(absolute.diagonal(), 1, rtol=1e-6)


def test_tokens_are_taken_as_a_node_as_lists_and_as_what_a_forward_read(captured: xr.DataTree, model: Model) -> None:
    padded = model.to_batch(IDS).token_ids  # whose padding is the id 0
    node = head_detectors(captured[PATTERN], captured["tokens"])
    for tokens in (IDS, padded, padded.numpy(), captured["tokens"].to_dataset()):
        xr.testing.assert_identical(head_detectors(captured[PATTERN], tokens), node)


def test_one_pattern_and_one_sequence_will_do(captured: xr.DataTree) -> None:
    whole = head_detectors(captured[PATTERN], captured["tokens"], by_sequence=True)["score"]
    one = captured[PATTERN]["value"].sel(sequence=3, layer=1)
    for tokens in (captured["tokens"], IDS[3], [IDS[3]]):
        found = head_detectors(one, tokens)["score"]
        assert found.dims == ("kind", "head")
        np.testing.assert_allclose(found, whole.sel(sequence=3, layer=1), rtol=1e-6)


# ── stores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("measure", ["mass", "mul"])
def test_a_store_is_read_when_it_is_asked_and_any_chunks_give_the_same(
    measure: str, patterns_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = forebay.open_run(patterns_run)
    with dask.config.set(scheduler=forbidden), monkeypatch.context() as reading:
        reading.setattr("forebay.stores.tree.KeptArray._read", forbidden)
        lazy = head_detectors(tree[PATTERN], tree["tokens"], measure=measure)
        with pytest.raises(AssertionError, match="something was computed"):
            lazy.compute()
    starts, n_token = (tree[f"sequences/{name}"].values for name in ("start", "n_token"))
    ids = [tree["tokens/token_id"].values[a : a + n].tolist() for a, n in zip(starts, n_token, strict=True)]
    whole = head_detectors(tree[PATTERN].to_dataset().compute(), ids, measure=measure)
    xr.testing.assert_allclose(lazy.compute(), whole, rtol=1e-5)
    for chunks in ({"sequence": 20, "head": 3, "query": 13}, {"sequence": -1, "layer": 2}):
        split = tree[PATTERN].to_dataset().chunk(chunks)
        xr.testing.assert_allclose(head_detectors(split, ids, measure=measure).compute(), whole, rtol=1e-5)
    some = tree[PATTERN].to_dataset().isel(sequence=[7, 2, 30])
    expected = head_detectors(some.compute(), [ids[7], ids[2], ids[30]], measure=measure)
    xr.testing.assert_allclose(head_detectors(some, tree["tokens"], measure=measure).compute(), expected, rtol=1e-5)


def test_sequences_that_are_not_recorded_do_not_count(captured: xr.DataTree) -> None:
    gone = captured[PATTERN]["value"].where(captured[PATTERN]["sequence"] != 3)
    rest = captured[PATTERN]["value"].isel(sequence=slice(0, 3))
    found, expected = head_detectors(gone, captured["tokens"]), head_detectors(rest, captured["tokens"])
    xr.testing.assert_allclose(found, expected)


# ── the standard test ────────────────────────────────────────────────────────────────────────────────────────────────


def test_random_repeats_are_two_equal_halves_of_different_tokens(model: Model) -> None:
    ids = random_repeats(model, n_sequences=5, length=23, seed=4)
    assert ids.dtype == torch.int64
    assert ids.shape == (5, 47)
    assert (ids[:, 0] == 0).all()
    assert torch.equal(ids[:, 1:24], ids[:, 24:])
    for row in ids.tolist():
        assert len(set(row)) == 24
    assert len({tuple(row) for row in ids.tolist()}) == 5
    assert torch.equal(ids, random_repeats(model, n_sequences=5, length=23, seed=4))
    assert not torch.equal(ids, random_repeats(model, n_sequences=5, length=23, seed=5))
    assert random_repeats(model, n_sequences=5, length=23, bos=None).shape == (5, 46)
    assert set(random_repeats(9, n_sequences=3, length=8, bos=4).flatten().tolist()) == set(range(9))


def test_heads_score_on_random_repeats_what_transformers_stripes_hold(model: Model, tiny_model: Path) -> None:
    """transformers' own weights of the same tokens, read off the stripes q − 1, q − n and q − (n − 1)."""
    from transformers import LlamaForCausalLM

    n, n_sequences = 17, 5
    found = detect_heads(model, n_sequences=n_sequences, length=n, seed=2, batch_size=2)
    assert found["score"].dims == ("kind", "layer", "head")
    assert found["score"].dtype == np.float32
    ids = random_repeats(model, n_sequences=n_sequences, length=n, seed=2)
    reference = LlamaForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval()
    with torch.inference_mode():
        attentions = reference(ids, output_attentions=True).attentions
    for layer, weight in enumerate(attentions):
        previous = weight.diagonal(-1, dim1=-2, dim2=-1).mean((0, -1))
        duplicate = weight.diagonal(-n, dim1=-2, dim2=-1)[..., 1:].mean((0, -1))
        induction = weight.diagonal(-(n - 1), dim1=-2, dim2=-1)[..., 2:].mean((0, -1))
        for kind, expected in zip(KINDS, (previous, duplicate, induction), strict=True):
            np.testing.assert_allclose(found["score"].sel(kind=kind, layer=layer), expected, rtol=1e-3)
    assert found["n_query"].values.tolist() == [n_sequences * 2 * n, n_sequences * n, n_sequences * n]


def test_one_at_a_time_is_the_same_as_all_at_once(model: Model) -> None:
    for measure in ("mass", "mul", "abs"):
        one, all_of_them = (
            detect_heads(model, n_sequences=3, length=9, measure=measure, exclude_bos=True, batch_size=size)
            for size in (1, 7)
        )
        xr.testing.assert_allclose(one, all_of_them, rtol=1e-4)


def test_a_recurrent_models_effective_attention_is_scored(tmp_path: Path) -> None:
    rwkv = forebay.load_model(write_pth(tmp_path / "rwkv.pth", 7), device="cpu")
    found = detect_heads(rwkv, n_sequences=2, length=8, seed=3, bos=None)
    ids = random_repeats(rwkv, n_sequences=2, length=8, seed=3, bos=None)
    out = rwkv.forward(ids, HookSpec().capture("blocks.*.rwkv.hook_effective_attn"))
    alpha = out["blocks.1.rwkv.hook_effective_attn"].clamp_min(0).double()
    stripe = (alpha / (alpha.sum(-1, keepdim=True) + 1e-10)).diagonal(-7, dim1=-2, dim2=-1)[..., 1:]
    np.testing.assert_allclose(found["score"].sel(kind="induction", layer=1), stripe.mean((0, -1)), rtol=1e-4)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_scored_is_refused(captured: xr.DataTree, model: Model) -> None:
    pattern = captured[PATTERN]
    with pytest.raises(SchemaError, match=r"no measure 'mul_', only 'mass', 'mul', 'abs'\. Did you mean 'mul'"):
        head_detectors(pattern, IDS, measure="mul_")
    with pytest.raises(SchemaError, match="tokens of 3 sequences, and patterns of 4"):
        head_detectors(pattern, IDS[:3])
    with pytest.raises(SchemaError, match="tokens of sequence 0 have the shape"):
        head_detectors(pattern, [[1] * 12, *IDS[1:]])
    with pytest.raises(SchemaError, match="tokens are token_id"):
        head_detectors(pattern, pattern)
    with pytest.raises(SchemaError, match="patterns of sequence 3, and no tokens"):
        head_detectors(pattern, captured["tokens"].to_dataset().sel(sequence=slice(0, 2)))
    with pytest.raises(SchemaError, match="no measure"):
        detect_heads(model, measure="mean")
    with pytest.raises(SchemaError, match="batch_size = 0"):
        detect_heads(model, batch_size=0)
    with pytest.raises(SchemaError, match="of 300 different tokens, twice, are asked for"):
        random_repeats(model, length=300)
    with pytest.raises(ModelError, match="context of this model is 64 long"):
        detect_heads(model, length=40)


def test_no_special_token_is_among_random_ones(tiny_model: Path) -> None:
    """Those that a text can be rid of, beside the beginning and the end of a sequence."""
    model = forebay.load_model(tiny_model, device="cpu")
    inner: Any = model.tokenizer.tokenizer
    inner.add_special_tokens([inner.id_to_token(one) for one in (262, 270, 281)])
    drawn = random_repeats(model, n_sequences=20, length=250, bos=None).numpy()
    assert not np.isin(drawn, [0, 262, 270, 281]).any()
    assert np.isin([261, 263, 271, 282], drawn).all()
