"""Every cell of a heat map is the run that it says: one site patched by hand in transformers' model gives the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import LlamaForCausalLM

from forebay.stages.analyze.activation_patching import activation_patching
from forebay.stages.analyze.metrics import Divergence, Logit, LogitDifference, LogProbability
from forebay.stages.analyze.patching import (
    divergence_from,
    pairs_of,
    patch,
    recovery,
    run_variants,
    sites_of,
    variant_logits,
)
from forebay.stages.models.errors import HookError
from forebay.stages.models.interventions import Add, Apply, Replace, Scale, Zero
from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.points import HookPoint, dims_of
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from ..models.edited import edited_logits
from ..models.families import SIZES as SIZES_OF
from ..models.families import make
from ..models.rwkv_models import write_pth
from .laziness import forbidden

CLEAN = [[7, 31, 250, 8, 99, 12], [1, 77, 5, 200]]
CORRUPTED = [[7, 30, 251, 8, 98, 12], [2, 77, 6, 200]]
METRIC = LogitDifference(correct=[17, 40], wrong=[230, 41])

BY_POSITION = ["hook_embed", "hook_resid_pre", "hook_attn_out", "attn.hook_out", "hook_resid_mid", "mlp.hook_post"]
BY_POSITION += ["mlp.hook_out", "hook_mlp_out", "hook_resid_post", "ln2.hook_scale", "attn.hook_in"]
BY_HEAD = ["attn.hook_z", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_result"]
WHOLE = ["attn.hook_pattern", "attn.hook_attn_scores"]
SIZES = {"layer": 3, "head": 4, "kv_head": 2}


def seen(eager: LlamaForCausalLM, token_ids: Sequence[int], name: str) -> Tensor:
    """What is at a hook point in a run of transformers' model."""
    found: list[Tensor] = []

    def look(value: Tensor) -> Tensor:
        found.append(value.clone())
        return value

    edited_logits(eager, torch.tensor([token_ids]), name, look)
    return found[0]


def patched_by_hand(
    eager: LlamaForCausalLM, base: Sequence[int], source: Tensor, name: str, where: dict[str, Any]
) -> Tensor:
    """The last logits of a run into which a part of `source` is put, addressed as numpy does it."""
    kind = name.split(".", 2)[-1] if name.startswith("blocks.") else name
    index = (0, *(where.get(dim, slice(None)) for dim in dims_of(kind)[1:]))

    def put(value: Tensor) -> Tensor:
        changed = value.clone()
        changed[index] = source[index]
        return changed

    return edited_logits(eager, torch.tensor([base]), name, put)[0, -1]


def difference(logits: Tensor, pair: int) -> float:
    return float(logits[[17, 40][pair]] - logits[[230, 41][pair]])


def assert_every_cell_is_right(
    result: xr.Dataset, kind: str, eager: LlamaForCausalLM, bases: list[list[int]], sources: list[list[int]]
) -> None:
    value = result[kind]
    in_blocks = "layer" in value.dims
    for pair, (base, source) in enumerate(zip(bases, sources, strict=True)):
        for layer in range(3) if in_blocks else [None]:
            name = kind if layer is None else f"blocks.{layer}.{kind}"
            other = seen(eager, source, name)
            at = {"pair": pair} | ({} if layer is None else {"layer": layer})
            along = [dim for dim in value.dims if dim not in ("pair", "layer")]
            for site in itertools.product(*(range(len(base) if dim == "position" else SIZES[dim]) for dim in along)):
                where = dict(zip(along, site, strict=True))
                expected = difference(patched_by_hand(eager, base, other, name, where), pair)
                assert float(value.sel(at | where)) == pytest.approx(expected, rel=1e-4, abs=2e-4), (name, where)


# ── every cell ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [*BY_POSITION, *BY_HEAD, *WHOLE])
def test_every_cell_is_the_run_with_that_site_patched_by_hand(kind: str, model: Model, eager: LlamaForCausalLM) -> None:
    result = activation_patching(model, CLEAN, CORRUPTED, METRIC, hooks=[kind], batch_size=7)
    assert_every_cell_is_right(result, kind, eager, CORRUPTED, CLEAN)


@pytest.mark.parametrize("kind", ["hook_resid_mid", "attn.hook_z", "attn.hook_v", "attn.hook_pattern"])
def test_noising_puts_corrupted_values_into_the_clean_run(kind: str, model: Model, eager: LlamaForCausalLM) -> None:
    result = activation_patching(model, CLEAN, CORRUPTED, METRIC, hooks=[kind], direction="noising", batch_size=11)
    assert_every_cell_is_right(result, kind, eager, CLEAN, CORRUPTED)
    assert result.attrs["direction"] == "noising"


@pytest.mark.parametrize("kind", ["hook_resid_mid", "mlp.hook_post", "attn.hook_q", "attn.hook_k", "attn.hook_z"])
def test_all_positions_are_patched_at_once_where_that_is_asked(
    kind: str, model: Model, eager: LlamaForCausalLM
) -> None:
    result = activation_patching(model, CLEAN, CORRUPTED, METRIC, hooks=[kind], by_position=False, batch_size=5)
    assert "position" not in result.dims
    assert_every_cell_is_right(result, kind, eager, CORRUPTED, CLEAN)


def test_chosen_positions_are_patched_at_once(model: Model, eager: LlamaForCausalLM) -> None:
    found = activation_patching(
        model, CLEAN, CORRUPTED, METRIC, hooks=["attn.hook_v"], positions=[1, -1], by_position=False
    )
    for pair, layer, head in itertools.product(range(2), range(3), range(2)):
        name = f"blocks.{layer}.attn.hook_v"
        where = {"position": torch.tensor([1, len(CLEAN[pair]) - 1]), "kv_head": head}
        last = patched_by_hand(eager, CORRUPTED[pair], seen(eager, CLEAN[pair], name), name, where)
        value = float(found["attn.hook_v"].sel(pair=pair, layer=layer, kv_head=head))
        assert value == pytest.approx(difference(last, pair), rel=1e-4, abs=2e-4)


# ── what follows from what patching is ───────────────────────────────────────────────────────────────────────────────


def test_patching_the_whole_stream_recovers_the_clean_run_and_patching_nothing_new_the_corrupted_one(
    model: Model,
) -> None:
    kinds = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_embed"]
    whole = activation_patching(model, CLEAN, CORRUPTED, METRIC, hooks=kinds, by_position=False)
    for kind in kinds:
        np.testing.assert_allclose(recovery(whole)[kind], 1, atol=1e-6)
        difference = whole[kind] - whole["clean"]
        np.testing.assert_allclose(difference, 0, atol=1e-5)
    nothing = activation_patching(model, CLEAN, CLEAN, METRIC, hooks=kinds)
    for kind in kinds:
        np.testing.assert_allclose((nothing[kind] - nothing["clean"]).isel(pair=0), 0, atol=1e-5)
        assert np.isnan(recovery(nothing)[kind]).all()


def test_a_position_before_the_first_difference_recovers_nothing(model: Model) -> None:
    """Causal attention: what precedes the first token that differs is the same in both runs."""
    found = recovery(activation_patching(model, CLEAN, CORRUPTED, METRIC, hooks=["hook_resid_post", "attn.hook_z"]))
    np.testing.assert_allclose(found["hook_resid_post"].sel(pair=0, position=0), 0, atol=1e-6)
    np.testing.assert_allclose(found["attn.hook_z"].sel(pair=0, position=0), 0, atol=1e-6)
    assert float(abs(found["hook_resid_post"].sel(pair=1, position=0)).max()) > 1e-2


def test_the_last_position_of_the_last_stream_is_the_whole_answer(model: Model) -> None:
    found = activation_patching(
        model, CLEAN, CORRUPTED, METRIC, hooks=["hook_resid_post"], positions=[-1, 0], layers=[2]
    )
    fraction = recovery(found)["hook_resid_post"].sel(layer=2)
    np.testing.assert_allclose(fraction.sel(position=-1), 1, atol=1e-6)
    np.testing.assert_allclose(fraction.sel(position=0), 0, atol=1e-6)


def test_of_a_divergence_recovery_is_one_minus_the_quotient_of_divergences(model: Model) -> None:
    metric = divergence_from(model, CLEAN)
    found = activation_patching(model, CLEAN, CORRUPTED, metric)
    np.testing.assert_allclose(found["clean"], 0, atol=1e-6)
    assert (found["corrupted"] > 1e-2).all()
    expected = 1 - found["hook_resid_pre"] / found["corrupted"]
    np.testing.assert_allclose(recovery(found)["hook_resid_pre"], expected, atol=1e-5)
    logits = [model.forward([ids]).logits for ids in (CLEAN[1], CORRUPTED[1])]
    log_p, log_q = (torch.as_tensor(x)[0, -1].double().log_softmax(-1) for x in logits)
    divergence = float((log_p.exp() * (log_p - log_q)).sum())
    assert float(found["corrupted"][1]) == pytest.approx(divergence, rel=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "phi", "gpt2", "granite", "rwkv6", "rwkv7"])
def test_streams_and_heads_of_other_families_recover_all_of_it_when_patched_whole(family: str, tmp_path: Path) -> None:
    """Soft-caps, parallel blocks, learned positions, multipliers, recurrence. RWKV-7 mixes values of its first layer
    into all later ones, past the stream, so that there only the last stream is the whole answer."""
    other = load_model(saved(family, tmp_path), device="cpu")
    clean, corrupted = [[7, 31, 50, 8, 61, 12]], [[7, 31, 52, 8, 61, 12]]
    metric = LogitDifference(correct=17, wrong=23)
    heads = "rwkv.hook_z" if family.startswith("rwkv") else "attn.hook_z"
    kinds = ["hook_resid_pre", "hook_resid_post", heads, "hook_mlp_out"]
    whole = recovery(activation_patching(other, clean, corrupted, metric, hooks=kinds, by_position=False, batch_size=3))
    alone = slice(-1, None) if family == "rwkv7" else slice(None)
    np.testing.assert_allclose(whole["hook_resid_post"].isel(layer=alone), 1, atol=1e-4)
    one = recovery(activation_patching(other, clean, corrupted, metric, hooks=kinds, batch_size=3))
    np.testing.assert_allclose(one["hook_resid_post"].isel(layer=-1, position=-1), 1, atol=1e-4)
    assert (abs(one["hook_resid_pre"].sel(layer=0, position=2) - 1) < 1e-4).all()
    for kind in kinds:
        np.testing.assert_allclose(one[kind].sel(position=[0, 1]), 0, atol=1e-4)
        assert float(abs(whole[kind]).max()) > 1e-3
    assert one[heads].sizes["head"] == other.spec.n_heads


def saved(family: str, folder: Path) -> Path:
    if family.startswith("rwkv"):
        return write_pth(folder / f"x{family[-1]}.pth", int(family[-1]))
    make(family, SIZES_OF[family]).save_pretrained(folder)
    return folder


def test_a_model_in_bfloat16_is_patched_in_it(tiny_model: Path) -> None:
    small = load_model(tiny_model, device="cpu", dtype="bfloat16")
    result = activation_patching(small, CLEAN, CORRUPTED, METRIC, by_position=False)
    assert result["hook_resid_pre"].dtype == np.float32
    np.testing.assert_allclose(recovery(result)["hook_resid_pre"], 1, atol=0.03)


# ── batches, labels, refusals ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("batch_size", "n_forwards"), [(5, 5), (24, 1), (7, 4)])
def test_a_pair_takes_a_forward_for_its_patches_two_for_its_metrics_and_one_for_a_batch_of_sites(
    batch_size: int, n_forwards: int, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = Model.forward

    def counted(self: Model, token_ids: Any, *arguments: Any, **settings: Any) -> Any:
        rows.append(len(token_ids))
        return forward(self, token_ids, *arguments, **settings)

    monkeypatch.setattr(Model, "forward", counted)
    activation_patching(model, CLEAN[:1], CORRUPTED[:1], Logit(token=3), hooks=["hook_embed", "hook_resid_mid"])
    assert rows == [1, 1, 1, 24]  # 6 embeddings, and 3 layers of 6 positions
    rows.clear()
    kinds = ["hook_embed", "hook_resid_mid"]
    activation_patching(model, CLEAN[:1], CORRUPTED[:1], Logit(token=3), hooks=kinds, batch_size=batch_size)
    assert len(rows) == 3 + n_forwards
    assert sum(rows) == 3 + 24


def test_recovery_is_lazy_where_the_result_is(model: Model) -> None:
    result = activation_patching(model, CLEAN, CORRUPTED, METRIC, hooks=["hook_resid_pre", "attn.hook_z"])
    with dask.config.set(scheduler=forbidden):
        lazy = recovery(result.chunk({"position": 4, "pair": 1}))
    xr.testing.assert_allclose(lazy.compute(), recovery(result))
    corrupted, clean = result["corrupted"].values[1], result["clean"].values[1]
    expected = (result["attn.hook_z"].values[1] - corrupted) / (clean - corrupted)
    np.testing.assert_allclose(lazy["attn.hook_z"].sel(pair=1), expected, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 19, 1000])
def test_results_do_not_depend_on_how_many_runs_share_a_forward(batch_size: int, model: Model) -> None:
    kinds = ["hook_resid_pre", "attn.hook_z", "attn.hook_pattern", "hook_embed"]
    one = activation_patching(model, CLEAN, CORRUPTED, METRIC, hooks=kinds)
    other = activation_patching(model, CLEAN, CORRUPTED, METRIC, hooks=kinds, batch_size=batch_size)
    xr.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def test_what_stands_in_a_result_is_labelled(model: Model) -> None:
    kinds = ["attn.hook_k", "hook_resid_pre", "attn.hook_z", "hook_embed"]
    result = activation_patching(model, CLEAN, CORRUPTED, METRIC, hooks=kinds, layers=[2, 0])
    assert result["attn.hook_k"].dims == ("pair", "layer", "kv_head", "position")
    assert result["attn.hook_z"].dims == ("pair", "layer", "head", "position")
    assert result["hook_resid_pre"].dims == ("pair", "layer", "position")
    assert result["hook_embed"].dims == ("pair", "position")
    assert dict(result.sizes) == {"pair": 2, "layer": 2, "kv_head": 2, "position": 6, "head": 4}
    assert result["layer"].values.tolist() == [2, 0]
    assert result["token_id"].values.tolist() == [CLEAN[0], [*CLEAN[1], -1, -1]]
    assert result["corrupted_token_id"].values.tolist() == [CORRUPTED[0], [*CORRUPTED[1], -1, -1]]
    texts = model.tokenizer.to_str_tokens(CLEAN[1])
    assert result["token_text"][1].values.tolist() == [*texts, "", ""]
    assert np.isnan(result["hook_resid_pre"].sel(pair=1, position=[4, 5])).all()
    assert not np.isnan(result["hook_resid_pre"].sel(pair=1, position=slice(0, 3))).any()
    assert {result[name].dtype for name in result.data_vars} == {np.dtype(np.float32)}
    assert {result[name].attrs["units"] for name in result.data_vars} == {"logit difference"}
    assert result.attrs == {
        "metric": "LogitDifference",
        "units": "logit difference",
        "metric_position": -1,
        "direction": "denoising",
    }
    again = activation_patching(model, CLEAN, CORRUPTED, METRIC, layers=[0])
    xr.testing.assert_allclose(again["hook_resid_pre"], result["hook_resid_pre"].sel(layer=[0]), atol=2e-5)
    fraction = recovery(result)
    assert "clean" not in fraction
    assert fraction["attn.hook_z"].dims == result["attn.hook_z"].dims
    assert fraction["hook_resid_pre"].attrs["units"] == "fraction"


def test_positions_are_those_that_were_asked_for_with_their_tokens(model: Model) -> None:
    result = activation_patching(model, CLEAN, CORRUPTED, METRIC, positions=[-1, 1])
    every = activation_patching(model, CLEAN, CORRUPTED, METRIC)["hook_resid_pre"]
    assert result["position"].values.tolist() == [-1, 1]
    assert result["token_id"].values.tolist() == [[12, 31], [200, 77]]
    for pair, last in ((0, 5), (1, 3)):
        expected = every.sel(pair=pair, position=[last, 1])
        np.testing.assert_allclose(result["hook_resid_pre"].sel(pair=pair), expected, atol=2e-5)


def test_a_metric_is_measured_where_it_says(model: Model) -> None:
    metric = LogProbability(token=55, position=2)
    result = activation_patching(model, CLEAN, CORRUPTED, metric, layers=[1])
    for pair, ids in enumerate(CORRUPTED):
        logits = torch.as_tensor(model.forward([ids]).logits)
        expected = float(logits[0, 2].log_softmax(-1)[55])
        assert float(result["corrupted"][pair]) == pytest.approx(expected, rel=1e-5)
    later = result["hook_resid_pre"].sel(pair=0, position=[3, 4, 5])
    np.testing.assert_allclose(later, float(result["corrupted"][0]), atol=1e-5)


def test_texts_are_prompts_too(model: Model) -> None:
    one, other = "Mr. Bennet", "Mr. Benxet"
    ids = [model.tokenizer.to_tokens(text) for text in (one, other)]
    if ids[0].shape == ids[1].shape:
        result = activation_patching(model, one, other, Logit(token=3))
        assert result["token_id"].values.tolist() == ids[0].tolist()
    else:
        with pytest.raises(SchemaError, match="must have equally many tokens"):
            activation_patching(model, one, other, Logit(token=3))


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hooks": "hook_resid_prr"}, HookError, "no kind of hook point 'hook_resid_prr'.*'hook_resid_pre'"),
    ({"hooks": ["blocks.1.attn.hook_z"]}, HookError, r"Give the kind alone, 'attn\.hook_z', and layers="),
    ({"hooks": ["hook_logits"]}, HookError, "hook_logits cannot be patched"),
    ({"hooks": ["rwkv.hook_v"]}, HookError, "no kind of hook point 'rwkv.hook_v'"),
    ({"hooks": ["hook_embed", "hook_embed"]}, SchemaError, "one of them twice"),
    ({"hooks": []}, SchemaError, r"hooks = \[\] names none"),
    ({"layers": [3]}, HookError, "layer 3 is to be patched; the layers of this model are 0 to 2"),
    ({"layers": [1, 1]}, SchemaError, r"layers = \[1, 1\]"),
    ({"positions": [4]}, SchemaError, "no position 4 in pair 1, of 4 tokens"),
    ({"positions": [0, -4]}, SchemaError, "one of pair 1 twice"),
    ({"positions": []}, SchemaError, r"positions = \[\] names none"),
    ({"direction": "denoise"}, SchemaError, "direction = 'denoise'.*denoising"),
    ({"batch_size": 0}, SchemaError, "batch_size = 0"),
    ({"metric": Logit(token=3, position=5)}, SchemaError, "position 5 is measured, and the prompt has 4 tokens"),
    ({"metric": Logit(token=300)}, SchemaError, "there is no token 300"),
    ({"metric": Logit(token=[4])}, SchemaError, "1 tokens, and there are more prompts"),
    ({"corrupted": CORRUPTED[:1]}, SchemaError, "2 clean prompts and 1 corrupted"),
    ({"corrupted": [CORRUPTED[0], CORRUPTED[1][:3]]}, SchemaError, "pair 1 must have equally many.*has 4.*one 3, "),
]


@pytest.mark.parametrize(("changed", "error", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    changed: dict[str, Any], error: type[Exception], said: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "forward", forbidden)
    asked = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC, **changed}
    with pytest.raises(error, match=said):
        activation_patching(model, **asked)


def test_recovery_needs_both_runs() -> None:
    with pytest.raises(SchemaError, match=r"\['corrupted'\] is not in what was given"):
        recovery(xr.Dataset({"clean": ("pair", [1.0])}))


# ── the engine ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_variants_of_any_kind_share_a_forward_and_each_is_what_it_is_alone(model: Model) -> None:
    ids = torch.tensor(CLEAN[0])
    stream, z, pattern = HookPoint("hook_resid_mid", 1), HookPoint("attn.hook_z", 0), HookPoint("attn.hook_pattern", 2)
    vector = torch.linspace(-1, 1, 28)
    variants = [
        [(stream, Add(vector).at(position=2))],
        [],
        [(stream, Scale(3.0)), (z, Zero().at(head=[1, 3]))],
        [(stream, Replace(vector).at(position=-1)), (stream, Add(vector).at(position=-1))],
        [(pattern, Replace(0.25).at(head=2))],
        [(z, Apply(lambda value: value.flip(-1)).at(head=0))],
    ]
    everywhere = HookSpec().intervene("hook_embed", Scale(1.5)).capture("blocks.0.hook_resid_pre")
    for hooks, batch_size in ((None, 32), (everywhere, 4)):
        found = run_variants(model, ids, iter(variants), METRIC, prompt=1, hooks=hooks, batch_size=batch_size)
        for variant, value in zip(variants, found, strict=True):
            spec = hooks or HookSpec()
            for point, intervention in variant:
                spec = spec.intervene(point, intervention)
            logits = torch.as_tensor(model.forward(ids[None], spec).logits)[0, -1]
            assert float(value) == pytest.approx(difference(logits, 1), rel=1e-5, abs=2e-5)
    assert len(set(found.tolist())) == len(variants)


def test_logits_exist_at_one_position_only(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor(CLEAN[0])
    whole = torch.as_tensor(model.forward(ids[None]).logits)
    seen: list[tuple[int, ...]] = []
    project = type(model.unembedding).project

    def counted(self: Any, normalized: Tensor, **settings: Any) -> Tensor:
        seen.append(tuple(normalized.shape))
        return project(self, normalized, **settings)

    monkeypatch.setattr(type(model.unembedding), "project", counted)
    parts = list(variant_logits(model, ids, [[], [], []], 3, batch_size=2))
    assert seen == [(2, 28), (1, 28)]
    for part in parts:
        torch.testing.assert_close(part, whole[:, 3].expand(len(part), -1))


def test_no_variants_give_no_values(model: Model) -> None:
    assert run_variants(model, torch.tensor(CLEAN[0]), [], METRIC).shape == (0,)


def test_what_would_act_on_every_variant_is_refused(model: Model) -> None:
    ids, point = torch.tensor(CLEAN[0]), HookPoint("hook_resid_mid", 1)
    plain: Any = lambda value, point: value * 2  # noqa: E731
    with pytest.raises(HookError, match="wrap a function in Apply"):
        run_variants(model, ids, [[(point, plain)]], METRIC)
    with pytest.raises(HookError, match="logits are read at one position"):
        run_variants(model, ids, [[(HookPoint("hook_logits"), Scale(2.0))]], METRIC)


def test_a_patch_is_the_part_of_its_source_that_it_names(model: Model) -> None:
    point = HookPoint("attn.hook_z", 1)
    source = model.forward(CLEAN[:1], HookSpec().capture(point))[point]
    for where, part in (
        ({"head": 2, "position": 3}, source[0, 3, 2]),
        ({"position": 4}, source[0, 4]),
        ({"head": 1}, source[0, :, 1]),
        ({"head": 3, "position": [5, 0]}, source[0, [5, 0], 3]),
        ({}, source[0]),
    ):
        _, intervention = patch(point, source, **where)
        assert isinstance(intervention, Replace)
        assert torch.equal(torch.as_tensor(intervention.value), part)
        assert intervention.where == where


def test_sites_know_their_dimensions(model: Model) -> None:
    pairs = pairs_of(model, CLEAN, CORRUPTED)
    assert len(pairs) == 2
    assert [(a.tolist(), b.tolist()) for a, b in pairs] == list(zip(CLEAN, CORRUPTED, strict=True))
    sites = sites_of(model, pairs, ["attn.hook_k", "hook_embed"], layers=[1])
    assert sites.places("attn.hook_k", model, 3) == {"layer": (1,), "kv_head": (0, 1), "position": (0, 1, 2)}
    assert sites.blank("attn.hook_k", model, pairs).shape == (2, 1, 2, 6)
    assert sites.points() == (HookPoint("attn.hook_k", 1), HookPoint("hook_embed"))


def test_a_divergence_can_be_made_by_hand(model: Model) -> None:
    logits = torch.stack([torch.as_tensor(model.forward([ids]).logits)[0, -2] for ids in CLEAN])
    ours = divergence_from(model, CLEAN, position=-2)
    assert ours.position == -2
    torch.testing.assert_close(ours.reference, logits)
    eager = Divergence(reference=logits, position=-2)
    found = [activation_patching(model, CLEAN, CORRUPTED, metric, layers=[1]) for metric in (ours, eager)]
    xr.testing.assert_allclose(*found, atol=1e-6)


@pytest.mark.parametrize("pattern", ["hook_logits", "unembed.hook_out", "hook_log*"])
def test_logits_cannot_be_intervened_on_under_any_name(model: Model, pattern: str) -> None:
    hooks = HookSpec().intervene(pattern, Scale(0.0))
    with pytest.raises(HookError, match="logits are read at one position only"):
        run_variants(model, torch.tensor([3, 4, 5]), [()], Logit(token=1), hooks=hooks)


def test_positions_of_what_has_none_are_refused(model: Model) -> None:
    settings: dict[str, Any] = {"hooks": ["hook_resid_pre", "attn.hook_pattern"], "positions": [0]}
    with pytest.raises(
        SchemaError, match=r"attn.hook_pattern is laid out by .* and patched whole: leave out positions"
    ):
        activation_patching(model, [[3, 4, 5]], [[3, 7, 5]], Logit(token=1), **settings)
