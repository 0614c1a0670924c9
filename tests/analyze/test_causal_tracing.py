"""Causal tracing is what the paper describes: noise on the subject, clean states put back, one site a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor
from transformers import LlamaForCausalLM

from forebay.stages.analyze.causal_tracing import TOKEN_TYPES, causal_tracing, embedding_std, indirect_effect
from forebay.stages.analyze.metrics import Logit, LogitDifference, Probability
from forebay.stages.analyze.patching import recovery
from forebay.stages.models.errors import HookError, ModelError
from forebay.stages.models.model import Model
from forebay.stores.errors import SchemaError

from . import patched_llama
from .laziness import forbidden

IDS = [7, 31, 250, 8, 99, 12]
SUBJECT = [1, 2]
METRIC = LogitDifference(correct=17, wrong=230)
KINDS = ("hook_resid_post", "hook_attn_out", "hook_mlp_out")


def noise_of(eager: LlamaForCausalLM, factor: float, n_samples: int, n_subject: int, seed: int) -> Tensor:
    sigma = eager.model.embed_tokens.weight.double().std(correction=0)
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(n_samples, n_subject, 28, generator=chance) * float(factor * sigma)


def corrupting(noise: Tensor, subject: list[int]) -> Callable[[Tensor], None]:
    def edit(value: Tensor) -> None:
        for position, vector in zip(subject, noise, strict=True):
            value[position] += vector

    return edit


def difference(logits: Tensor) -> float:
    return float(logits[17] - logits[230])


@pytest.mark.parametrize(("window", "around"), [(1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (10, (5, 4))])
def test_every_cell_is_the_corrupted_run_with_clean_states_put_back_by_hand(
    window: int, around: tuple[int, int], model: Model, eager: LlamaForCausalLM
) -> None:
    result = causal_tracing(
        model, IDS, SUBJECT, METRIC, hooks=KINDS, window=window, n_samples=2, noise=2.0, seed=4, batch_size=7
    )
    noise = noise_of(eager, 2.0, 2, 2, seed=4)
    clean = {(kind, layer): patched_llama.seen(eager, IDS, (kind, layer)) for kind in KINDS for layer in range(3)}
    assert float(result["clean"]) == pytest.approx(difference(patched_llama.run(eager, IDS, {})), abs=1e-4)
    for sample in range(2):
        corrupt = {("hook_embed", 0): corrupting(noise[sample], SUBJECT)}
        expected = difference(patched_llama.run(eager, IDS, corrupt))
        assert float(result["corrupted"][sample]) == pytest.approx(expected, abs=2e-4)
        for kind in KINDS:
            before, after = (0, 0) if kind == "hook_resid_post" else around
            for layer in range(3):
                near = [other for other in range(3) if layer - before <= other <= layer + after]
                for position in range(6):
                    put = {(kind, at): patched_llama.put(clean[kind, at][position], position) for at in near}
                    expected = difference(patched_llama.run(eager, IDS, {**corrupt, **put}))
                    found = float(result[kind].sel(layer=layer, position=position, sample=sample))
                    assert found == pytest.approx(expected, abs=2e-4), (kind, layer, position)


def test_states_after_the_last_layer_at_the_last_token_are_the_whole_answer(model: Model) -> None:
    result = causal_tracing(model, IDS, SUBJECT, METRIC, n_samples=3)
    whole = recovery(result)["hook_resid_post"]
    np.testing.assert_allclose(whole.sel(layer=2, position=5), 1, atol=1e-5)
    np.testing.assert_allclose(whole.sel(position=0), 0, atol=1e-5)
    effect = indirect_effect(result)
    np.testing.assert_allclose(effect["hook_resid_post"].sel(layer=2, position=5), effect["total_effect"], atol=1e-4)
    np.testing.assert_allclose(effect["hook_mlp_out"].sel(position=0), 0, atol=1e-4)


def test_effects_are_means_over_samples_against_the_corrupted_run(model: Model) -> None:
    result = causal_tracing(model, IDS, SUBJECT, METRIC, n_samples=4, layers=[2, 0], positions=[-1, 1])
    assert result["hook_attn_out"].dims == ("layer", "position", "sample")
    effect = indirect_effect(result)
    corrupted = result["corrupted"].values
    for kind in KINDS:
        expected = (result[kind].values - corrupted).mean(-1)
        np.testing.assert_allclose(effect[kind].transpose("layer", "position"), expected, rtol=1e-5, atol=1e-6)
        assert effect[kind].attrs["units"] == "logit difference"
    assert float(effect["total_effect"]) == pytest.approx(float(result["clean"]) - corrupted.mean(), rel=1e-5)
    assert set(effect.data_vars) == {*KINDS, "total_effect"}


def test_without_noise_nothing_is_corrupted(model: Model) -> None:
    result = causal_tracing(model, IDS, SUBJECT, METRIC, noise=0.0, n_samples=2)
    for name in (*KINDS, "corrupted"):
        np.testing.assert_allclose(result[name], float(result["clean"]), atol=2e-5)


def test_the_seed_is_the_noise(model: Model) -> None:
    def corrupted(**settings: Any) -> Any:
        asked = {"hooks": ["hook_mlp_out"], "layers": [1], "positions": [2], "n_samples": 3, **settings}
        return causal_tracing(model, IDS, SUBJECT, METRIC, **asked)["corrupted"].values

    np.testing.assert_array_equal(corrupted(seed=1), corrupted(seed=1))
    assert (corrupted(seed=1) != corrupted(seed=2)).all()
    assert (corrupted(seed=1) != corrupted(seed=1, sigma=0.1)).all()
    sigma = embedding_std(model)
    np.testing.assert_allclose(corrupted(noise=3.0), corrupted(noise=1.5, sigma=2 * sigma), atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_results_do_not_depend_on_how_many_runs_share_a_forward(batch_size: int, model: Model) -> None:
    one, other = (
        causal_tracing(model, IDS, SUBJECT, METRIC, n_samples=3, window=2, layers=[1, 2], batch_size=size)
        for size in (32, batch_size)
    )
    xr.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def test_the_deviation_is_that_of_all_embeddings_together(
    model: Model, eager: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = eager.model.embed_tokens.weight
    expected = float(weight.double().std(correction=0))
    assert embedding_std(model) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr("forebay.stages.analyze.causal_tracing._AT_ONCE", 7)
    assert embedding_std(model) == pytest.approx(expected, rel=1e-6)
    texts = ["Mr. Bennet", "fortune"]
    ids = [one for text in texts for one in model.tokenizer.to_tokens(text, prepend_bos=False)[0].tolist()]
    assert embedding_std(model, texts) == pytest.approx(float(weight[ids].double().std(correction=0)), rel=1e-6)


def test_a_subject_of_a_text_is_found_in_it(model: Model) -> None:
    text = "I know Mr. Bennet of Netherfield"
    encoding = model.tokenizer.encode(text)
    places = list(encoding.label_spans({"subject": "Mr. Bennet"})["subject"])
    result, other = (
        causal_tracing(model, text, subject, Probability(token=9), hooks=["hook_mlp_out"], layers=[1], n_samples=2)
        for subject in ("Mr. Bennet", places)
    )
    assert result.attrs["subject"] == places
    xr.testing.assert_identical(result, other)
    assert result["token_text"].values.tolist() == list(encoding.tokens)
    assert result["token_id"].values.tolist() == list(encoding.token_ids)


def types(model: Model, subject: list[int], **settings: Any) -> list[str]:
    asked = {"hooks": ["hook_mlp_out"], "layers": [0], "n_samples": 1, **settings}
    found: list[str] = causal_tracing(model, IDS, subject, METRIC, **asked)["token_type"].values.tolist()
    return found


def test_positions_are_told_apart_as_in_the_papers_figures(model: Model) -> None:
    before, first, middle, last, subsequent, further, end = TOKEN_TYPES
    assert types(model, [1, 2]) == [before, first, last, subsequent, further, end]
    assert types(model, [0, 1, 2]) == [first, middle, last, subsequent, further, end]
    assert types(model, [3]) == [before, before, before, last, subsequent, end]
    assert types(model, [-1]) == [before] * 5 + [last]
    assert types(model, [4, -2]) == [before] * 4 + [last, end]
    assert types(model, [1, 2], positions=[-1, 2]) == [end, last]
    effect = indirect_effect(causal_tracing(model, IDS, [3], METRIC, n_samples=1))
    means = effect["hook_resid_post"].groupby("token_type").mean()
    expected = effect["hook_resid_post"].isel(position=slice(0, 3)).mean("position")
    np.testing.assert_allclose(means.sel(token_type=before), expected, atol=1e-6)


def test_what_was_done_is_recorded(model: Model) -> None:
    result = causal_tracing(model, IDS, (2, 1), Probability(token=9), n_samples=2, noise=2.5, seed=6, window=4)
    said = {name: result.attrs[name] for name in ("noise", "seed", "n_samples", "window", "subject", "metric", "units")}
    assert said == {
        "noise": 2.5,
        "seed": 6,
        "n_samples": 2,
        "window": 4,
        "subject": [1, 2],
        "metric": "Probability",
        "units": "probability",
    }
    assert result.attrs["sigma"] == pytest.approx(embedding_std(model))
    assert {result[name].dtype for name in result.data_vars} == {np.dtype(np.float32)}
    assert {result[name].attrs["units"] for name in result.data_vars} == {"probability"}


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"subject": "Bennet"}, SchemaError, "the subject is a text and the prompt token ids"),
    ({"prompt": "fortune", "subject": "Bennet"}, ModelError, "'Bennet' does not occur"),
    ({"subject": [6]}, SchemaError, "no position 6 in the prompt, of 6 tokens"),
    ({"subject": []}, SchemaError, "the subject has no position"),
    ({"prompt": [IDS, IDS]}, SchemaError, "one prompt is expected"),
    ({"hooks": ["attn.hook_z"]}, HookError, "attn.hook_z is not one vector a position in every layer"),
    ({"hooks": ["hook_embed"]}, HookError, "hook_embed is not one vector"),
    ({"hooks": ["ln1.hook_scale"]}, HookError, "ln1.hook_scale is not one vector"),
    ({"hooks": ["hook_resid"]}, HookError, "no kind of hook point 'hook_resid'"),
    ({"layers": [3]}, HookError, "layer 3"),
    ({"positions": [7]}, SchemaError, "no position 7"),
    ({"window": 0}, SchemaError, "window = 0"),
    ({"n_samples": 0}, SchemaError, "n_samples = 0"),
    ({"noise": -1.0}, SchemaError, "noise = -1"),
    ({"batch_size": 0}, SchemaError, "batch_size = 0"),
    ({"metric": Logit(token=1000)}, SchemaError, "no token 1000"),
    ({"metric": Logit(token=1, position=6)}, SchemaError, "position 6 is measured"),
]


@pytest.mark.parametrize(("changed", "error", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    changed: dict[str, Any], error: type[Exception], said: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "forward", forbidden)
    with pytest.raises(error, match=said):
        causal_tracing(model, **{"prompt": IDS, "subject": SUBJECT, "metric": METRIC, **changed})


def test_a_text_is_one_text_and_not_its_letters(model: Model) -> None:
    assert embedding_std(model, "truth is so well") == embedding_std(model, ["truth is so well"])


def test_a_gap_in_the_subject_is_no_part_of_it(model: Model) -> None:
    found = causal_tracing(model, [5, 9, 17, 3, 8], [1, 3], Logit(token=2), n_samples=1, layers=[0])
    assert found["token_type"].values.tolist() == [
        "before the subject",
        "first subject token",
        "further tokens",
        "last subject token",
        "last token",
    ]
