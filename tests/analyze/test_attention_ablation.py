"""Edges cut in one layer or head after another do what cutting them by hand in transformers' model does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import forebay
from forebay.stages.analyze.attention_ablation import knockout_effect, knockout_sweep
from forebay.stages.analyze.intervention_effect import intervention_effect
from forebay.stages.analyze.metrics import Divergence, LogitDifference, LogProbability
from forebay.stages.models.edges import Knockout, KnockoutSpec
from forebay.stages.models.errors import HookError, ModelError
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from ..models.families import AS_IT_IS, build
from ..models.rwkv_models import write_pth

PROMPT = [17, 201, 45, 8, 99, 260, 3, 45, 120]
N = len(PROMPT)
EDGES = [(-1, [1, 2]), (5, 3), (-2, -4)]
PAIRS = [(8, 1), (8, 2), (5, 3), (7, 5)]
"""EDGES, one by one."""


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval()


Cuts = Iterable[tuple[int, int]]


@contextlib.contextmanager
def cut_by_hand(reference: Any, layers: Iterable[int], heads: Iterable[int]) -> Iterator[None]:
    """PAIRS cut in transformers' model: its attention mask made −∞ there, in these layers and heads alone."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"].expand(-1, 4, -1, -1).clone()
        for head in heads:
            for query, key in PAIRS:
                mask[:, head, query, key] = -torch.inf
        return args, {**kwargs, "attention_mask": mask}

    with contextlib.ExitStack() as stack:
        for layer in layers:
            attention = reference.model.layers[layer].self_attn
            stack.enter_context(attention.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def logits_by_hand(reference: Any, layers: Iterable[int] = (), heads: Iterable[int] = (0, 1, 2, 3)) -> Tensor:
    """Logits [position, vocab] in float64."""
    with torch.inference_mode(), cut_by_hand(reference, layers, list(heads)):
        return reference(torch.tensor([PROMPT])).logits[0].double()


def divergence(base: Tensor, changed: Tensor) -> float:
    p, q = base.softmax(-1), changed.softmax(-1)
    return float((p * (p / q).log()).sum())


# ── one knockout ─────────────────────────────────────────────────────────────────────────────────────────────────────

WHERE: list[tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ({}, (0, 1, 2), (0, 1, 2, 3)),
    ({"layers": 1}, (1,), (0, 1, 2, 3)),
    ({"layers": [0, -1], "heads": [3, 1]}, (0, 2), (1, 3)),
]


@pytest.mark.parametrize(("where", "layers", "heads"), WHERE)
@pytest.mark.parametrize("position", [-1, 5])
def test_an_effect_is_that_of_a_mask_edited_by_hand(
    where: dict[str, Any],
    layers: tuple[int, ...],
    heads: tuple[int, ...],
    position: int,
    model: Model,
    reference: Any,
) -> None:
    asked = [45, 7, 260]
    found = knockout_effect(model, PROMPT, KnockoutSpec(edges=EDGES, **where), tokens=asked, position=position, top=6)
    base = logits_by_hand(reference)[position]
    changed = logits_by_hand(reference, layers, heads)[position]
    p, q = base.softmax(-1), changed.softmax(-1)
    expected = divergence(base, changed)
    assert expected > 1e-5
    np.testing.assert_allclose(found["kl_divergence"], expected, rtol=2e-3)
    np.testing.assert_allclose(found["asked_base_probability"], p[asked], rtol=1e-3)
    np.testing.assert_allclose(found["asked_changed_probability"], q[asked], rtol=1e-3)
    np.testing.assert_allclose(found["asked_logit_difference"], (base - changed)[asked], rtol=2e-3, atol=1e-5)
    top = (q - p).abs().topk(6)
    np.testing.assert_array_equal(found["top_token_id"], top.indices)
    np.testing.assert_allclose(found["probability_change"], (q - p)[top.indices], rtol=2e-3)
    np.testing.assert_allclose(found["logit_difference"], (base - changed)[top.indices], rtol=2e-3, atol=1e-5)
    assert found.attrs["metric_position"] == position


def test_effect_and_labels_are_those_of_the_library(model: Model) -> None:
    """Beside `intervention_effect`, whose baseline captures the same patterns."""
    spec = KnockoutSpec(edges=EDGES, layers=[1, 2])
    found = knockout_effect(model, PROMPT, spec, tokens=45)
    baseline = HookSpec().capture("blocks.{1,2}.attn.hook_pattern")
    whole = intervention_effect(model, [PROMPT], spec.hooks(model.spec), baseline=baseline)
    last = whole.isel(sequence=0, position=-1)
    np.testing.assert_allclose(found["kl_divergence"], last["kl_divergence"], rtol=1e-3)
    np.testing.assert_array_equal(found["top_token_id"], last["top_token_id"])
    np.testing.assert_allclose(found["probability_change"], last["probability_change"], rtol=1e-3)
    texts = [model.tokenizer.to_string([one]) for one in found["top_token_id"].values.tolist()]
    assert found["token_text"].values.tolist() == texts
    assert found["vocab_text"].values.tolist() == [model.tokenizer.to_string([45])]
    assert found["vocab"].values.tolist() == [45]
    assert all(found[name].attrs["long_name"] for name in found.data_vars)


def test_an_edge_that_cannot_matter_changes_nothing_at_all(model: Model) -> None:
    """What is cut at an earlier query in the last layer does not reach the last position: exactly, not nearly."""
    for prompt in (PROMPT, [PROMPT], torch.tensor(PROMPT)):
        found = knockout_effect(model, prompt, KnockoutSpec(edges=[(4, 2)], layers=-1))
        assert float(found["kl_divergence"]) == 0
        assert (found["probability_change"] == 0).all()
    assert float(knockout_effect(model, PROMPT, [(4, 2)])["kl_divergence"]) > 1e-6


def test_a_text_and_plain_edges_will_do(model: Model) -> None:
    text = "It is a truth"
    ids = model.tokenizer.to_tokens(text)[0].tolist()
    xr.testing.assert_identical(
        knockout_effect(model, text, [(-1, 0)]), knockout_effect(model, ids, KnockoutSpec(edges=[(-1, 0)]))
    )


# ── sweeps ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_layer_by_layer_the_divergence_is_that_of_cutting_each_layer_by_hand(
    batch_size: int, model: Model, reference: Any
) -> None:
    found = knockout_sweep(model, PROMPT, EDGES, batch_size=batch_size)
    base = logits_by_hand(reference)[-1]
    expected = [divergence(base, logits_by_hand(reference, [layer])[-1]) for layer in range(3)]
    assert found["metric"].dims == ("layer",)
    assert found["metric"].dtype == found["change"].dtype == found["baseline"].dtype == np.float32
    np.testing.assert_allclose(found["metric"], expected, rtol=2e-3)
    np.testing.assert_array_equal(found["change"], found["metric"])
    assert float(found["baseline"]) == 0
    assert (found.attrs["metric"], found.attrs["metric_position"]) == ("Divergence", -1)
    assert found["metric"].attrs["units"] == "KL divergence (nats)"
    assert all(found[name].attrs["long_name"] for name in found.data_vars)


@pytest.mark.parametrize("batch_size", [5, 32])
def test_head_by_head_a_metric_is_that_of_cutting_each_head_by_hand(
    batch_size: int, model: Model, reference: Any
) -> None:
    metric = LogitDifference(correct=45, wrong=120, position=5)
    found = knockout_sweep(model, PROMPT, EDGES, metric=metric, by=("layer", "head"), batch_size=batch_size)
    assert found["change"].dims == ("layer", "head")
    before = logits_by_hand(reference)[5]
    np.testing.assert_allclose(found["baseline"], before[45] - before[120], rtol=1e-4)
    for layer, head in np.ndindex(3, 4):
        after = logits_by_hand(reference, [layer], [head])[5]
        here = found.sel(layer=layer, head=head)
        np.testing.assert_allclose(here["metric"], after[45] - after[120], rtol=1e-4)
        change = float((after[45] - after[120]) - (before[45] - before[120]))
        np.testing.assert_allclose(here["change"], change, atol=2e-5)
    assert found.attrs["metric_position"] == 5
    assert abs(found["change"]).max() > 1e-2


WINDOWS = {
    1: [[0], [1], [2]],
    2: [[0], [0, 1], [1, 2]],
    3: [[0, 1], [0, 1, 2], [1, 2]],
    5: [[0, 1, 2], [0, 1, 2], [0, 1, 2]],
}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_is_cut_around_each_layer_and_clipped_to_the_model(window: int, model: Model, reference: Any) -> None:
    found = knockout_sweep(model, PROMPT, EDGES, window=window)
    base = logits_by_hand(reference)[-1]
    expected = [divergence(base, logits_by_hand(reference, around)[-1]) for around in WINDOWS[window]]
    np.testing.assert_allclose(found["metric"], expected, rtol=2e-3)
    assert found.attrs["window"] == window


def test_a_sweep_of_some_layers_and_heads_is_that_part_of_the_whole(model: Model) -> None:
    whole = knockout_sweep(model, PROMPT, EDGES, by=("layer", "head"))
    some = knockout_sweep(model, PROMPT, EDGES, by=("layer", "head"), layers=[2, 0], heads=slice(1, 3))
    assert some["layer"].values.tolist() == [2, 0]
    assert some["head"].values.tolist() == [1, 2]
    np.testing.assert_allclose(some["metric"], whole["metric"].sel(layer=[2, 0], head=[1, 2]), rtol=1e-3)
    in_two = knockout_sweep(model, PROMPT, EDGES, heads=[1, 2])
    for layer in range(3):
        spec = KnockoutSpec(edges=EDGES, layers=layer, heads=[1, 2])
        one = knockout_effect(model, PROMPT, spec)["kl_divergence"]
        np.testing.assert_allclose(in_two["metric"].sel(layer=layer), one, rtol=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "gpt2"])
def test_models_of_other_families_are_cut_one_by_one_alike(family: str, tmp_path: Path) -> None:
    """Soft caps, norms after blocks and parallel blocks: against one forward a knockout, by the named intervention."""
    build(f"{family}: {AS_IT_IS}").save_pretrained(tmp_path)
    model = forebay.load_model(tmp_path, device="cpu")
    ids = np.random.default_rng(1).integers(1, model.spec.d_vocab, 11).tolist()
    metric = LogProbability(token=ids[3])
    found = knockout_sweep(model, ids, [(-1, None), (6, 2)], metric=metric, by=("layer", "head"), batch_size=7)
    for layer, head in np.ndindex(model.spec.n_layers, model.spec.n_heads):
        knockout = Knockout([(-1, None), (6, 2)]).at(head=head)
        hooks = HookSpec().intervene(f"blocks.{layer}.attn.hook_attn_scores", knockout)
        logits = model.forward([ids], hooks).logits
        assert logits is not None
        expected = metric(logits, [11])
        np.testing.assert_allclose(found["metric"].sel(layer=layer, head=head), expected[0], rtol=1e-4)
    assert abs(found["change"]).max() > 1e-3


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def forbidden(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("the model was run")


REFUSED: dict[str, tuple[Callable[[Model], object], type[Exception], str]] = {
    "layer": (
        lambda m: knockout_effect(m, PROMPT, KnockoutSpec(edges=EDGES, layers=3)),
        HookError,
        "layer=3 is out of range",
    ),
    "head": (lambda m: knockout_sweep(m, PROMPT, EDGES, heads=4), HookError, "head=4 is out of range"),
    "no edge": (lambda m: knockout_sweep(m, PROMPT, []), HookError, "names no edge"),
    "edge beyond": (lambda m: knockout_sweep(m, PROMPT, [(9, 0)]), HookError, "query=9 is out of range"),
    "edge to the future": (lambda m: knockout_sweep(m, PROMPT, [(2, 5)]), HookError, "carries no weight"),
    "by": (
        lambda m: knockout_sweep(m, PROMPT, EDGES, by=("head",)),
        SchemaError,
        r"by = \('head',\): a sweep goes over \('layer',\) or",
    ),
    "window": (lambda m: knockout_sweep(m, PROMPT, EDGES, window=0), SchemaError, "window = 0"),
    "batch": (lambda m: knockout_sweep(m, PROMPT, EDGES, batch_size=0), SchemaError, "batch_size = 0"),
    "position": (
        lambda m: knockout_effect(m, PROMPT, EDGES, position=9),
        SchemaError,
        "position 9 is measured, and the prompt has 9 tokens",
    ),
    "metric's position": (
        lambda m: knockout_sweep(m, PROMPT, EDGES, metric=LogProbability(token=1, position=-10)),
        SchemaError,
        "position -10 is measured",
    ),
    "metric's token": (
        lambda m: knockout_sweep(m, PROMPT, EDGES, metric=LogProbability(token=300)),
        SchemaError,
        "there is no token 300",
    ),
    "token": (lambda m: knockout_effect(m, PROMPT, EDGES, tokens=[1, -1]), SchemaError, "there is no token -1"),
    "top": (lambda m: knockout_effect(m, PROMPT, EDGES, top=301), SchemaError, "top = 301"),
    "two prompts": (lambda m: knockout_effect(m, torch.ones(2, 4).long(), EDGES), SchemaError, "one prompt"),
    "vocabulary": (lambda m: knockout_sweep(m, [1, 300], EDGES), ModelError, "token id 300"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused_before_the_model_is_run(
    what: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, error, message = REFUSED[what]
    monkeypatch.setattr(Model, "_run", forbidden)
    with pytest.raises(error, match=message):
        call(model)


def test_a_recurrent_model_has_no_edges_to_cut(tmp_path: Path) -> None:
    rwkv = forebay.load_model(write_pth(tmp_path / "rwkv.pth", 6), device="cpu")
    for function in (knockout_effect, knockout_sweep):
        with pytest.raises(HookError, match="has no attention whose edges could be cut"):
            function(rwkv, [1, 2, 3], [(-1, 0)])


def test_a_divergence_from_other_logits_is_a_metric_like_any_other(model: Model, reference: Any) -> None:
    other = torch.randn(1, 300, generator=torch.Generator().manual_seed(6))
    found = knockout_sweep(model, PROMPT, EDGES, metric=Divergence(reference=other))
    base = logits_by_hand(reference)[-1]
    np.testing.assert_allclose(found["baseline"], divergence(other[0].double(), base), rtol=1e-4)
    after = logits_by_hand(reference, [1])[-1]
    np.testing.assert_allclose(found["metric"][1], divergence(other[0].double(), after), rtol=1e-4)
