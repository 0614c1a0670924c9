"""The effect of an intervention is what comparing two forwards by hand gives, and lies where causality allows it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray

import forebay
from forebay.stages.analyze import intervention_effect as module
from forebay.stages.analyze.effective_attention import normalize_effective_attention
from forebay.stages.analyze.intervention_effect import compare_logits, intervention_effect, logit_change
from forebay.stages.models.edges import Knockout
from forebay.stages.models.errors import HookError
from forebay.stages.models.interventions import Add, Replace
from forebay.stages.models.model import Model
from forebay.stages.models.state_taps import StateKnockout, StateSteering
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from ..models.rwkv_models import SIZES, write_pth

STATE = "blocks.*.rwkv.hook_state"
LENGTHS = (13, 4, 9)


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def of_probabilities(*rows: list[float]) -> torch.Tensor:
    """Logits [1, position, vocab] whose softmax is given, moved by a constant that softmax does not see."""
    return (torch.tensor([rows], dtype=torch.float64).log() + 5).float()


# ── comparing logits ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_divergence_of_known_distributions_is_that_of_the_formula() -> None:
    p, q = [0.5, 0.25, 0.25], [0.2, 0.2, 0.6]
    found = compare_logits(of_probabilities(p, q), of_probabilities(q, p), [2], top=1)["kl_divergence"]
    forwards = 0.5 * math.log(2.5) + 0.25 * math.log(1.25) + 0.25 * math.log(0.25 / 0.6)
    backwards = 0.2 * math.log(0.4) + 0.2 * math.log(0.8) + 0.6 * math.log(2.4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.values, [[forwards, backwards]], rtol=1e-6)


def test_equal_logits_diverge_by_nothing_at_all() -> None:
    """Exactly 0, also for distributions with impossible tokens and for those that rounding would make of themselves."""
    logits = random_logits(2, 50, 300, scale=20.0)
    logits[0, :, ::7] = -torch.inf
    effect = compare_logits(logits, logits.clone(), [50, 50], top=3)
    assert (effect["kl_divergence"] == 0).all()
    assert (effect["probability_change"] == 0).all()
    assert (effect["top_token_id"] == [0, 1, 2]).all()


def test_a_constant_added_to_all_logits_changes_no_probability_but_every_logit() -> None:
    logits = random_logits(1, 6, 40)
    effect = compare_logits(logits, logits + 2, [6], top=4)
    assert (effect["kl_divergence"] < 1e-11).all()
    assert (abs(effect["probability_change"]) < 1e-6).all()
    np.testing.assert_allclose(effect["logit_difference"], -2, rtol=1e-5)


def test_a_token_that_became_impossible_is_infinitely_far_and_one_that_always_was_is_not() -> None:
    possible, impossible = random_logits(1, 1, 9), random_logits(1, 1, 9)
    impossible[0, 0, 4] = -torch.inf
    assert compare_logits(possible, impossible, [1], top=1)["kl_divergence"].item() == math.inf
    backwards = compare_logits(impossible, possible, [1], top=9)
    p = possible.double().softmax(-1)[0, 0, 4]
    assert backwards["kl_divergence"].item() == pytest.approx(-math.log1p(-p), rel=1e-5)
    gone = backwards.isel(sequence=0, position=0).where(backwards["top_token_id"][0, 0] == 4, drop=True)
    assert gone["base_probability"].item() == 0
    assert gone["changed_probability"].item() == pytest.approx(float(p), rel=1e-5)


def by_hand(base: torch.Tensor, changed: torch.Tensor, top: int) -> dict[str, NDArray[Any]]:
    """The oracle, one token and one row at a time, in Python's own numbers."""
    n_sequences, n_positions, _ = base.shape
    found: dict[str, NDArray[Any]] = {"kl": np.empty((n_sequences, n_positions))}
    names = ("id", "p", "q", "change", "logits")
    found |= {name: np.empty((n_sequences, n_positions, top)) for name in names}
    for b in range(n_sequences):
        for t in range(n_positions):
            one, other = base[b, t].tolist(), changed[b, t].tolist()
            p, q = ([math.exp(x - max(row)) for x in row] for row in (one, other))
            p, q = ([x / math.fsum(row) for x in row] for row in (p, q))
            found["kl"][b, t] = math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
            order = sorted(range(len(p)), key=lambda i: (-abs(q[i] - p[i]), i))[:top]
            rows = [(i, p[i], q[i], q[i] - p[i], one[i] - other[i]) for i in order]
            for name, column in zip(names, zip(*rows, strict=True), strict=True):
                found[name][b, t] = column
    return found


@pytest.mark.parametrize("at_once", [2**21, 3 * 60, 1], ids=["all", "three", "one"])
def test_divergence_and_largest_changes_are_those_of_a_comparison_by_hand(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """However many positions are compared at a time."""
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    base, changed = random_logits(3, 8, 60), random_logits(3, 8, 60, seed=1)
    effect, expected = compare_logits(base, changed, [8, 8, 8], top=5), by_hand(base, changed, 5)
    np.testing.assert_array_equal(effect["top_token_id"], expected["id"])
    np.testing.assert_allclose(effect["kl_divergence"], expected["kl"], rtol=1e-6)
    for name, column in (
        ("base_probability", "p"),
        ("changed_probability", "q"),
        ("probability_change", "change"),
        ("logit_difference", "logits"),
    ):
        np.testing.assert_allclose(effect[name], expected[column], rtol=1e-5, atol=1e-9, err_msg=name)
    assert (np.diff(abs(effect["probability_change"])) <= 0).all()


def test_all_of_the_vocabulary_can_be_told_and_its_changes_add_up_to_nothing() -> None:
    base, changed = random_logits(1, 5, 33), random_logits(1, 5, 33, seed=1)
    effect = compare_logits(base, changed, [5], top=33)
    assert (np.sort(effect["top_token_id"]) == np.arange(33)).all()
    np.testing.assert_allclose(effect["base_probability"].sum("rank"), 1, rtol=1e-6)
    np.testing.assert_allclose(effect["probability_change"].sum("rank"), 0, atol=1e-7)


def test_equal_changes_stand_in_the_order_of_their_ids() -> None:
    base = of_probabilities([0.125] * 8)
    changed = base.clone()
    changed[0, 0, 6] -= 30  # its probability goes, in equal parts, to the other seven
    effect = compare_logits(base, changed, [1], top=4)
    assert effect["top_token_id"].values.tolist() == [[[6, 0, 1, 2]]]


def test_nothing_is_said_beyond_a_sequences_end_nor_where_a_logit_is_missing() -> None:
    base, changed = random_logits(2, 6, 20), random_logits(2, 6, 20, seed=1)
    base[1, 4:], changed[0, 1, 3] = 1e30, torch.nan
    effect = compare_logits(base, changed, [6, 4], top=2)
    silent = np.zeros((2, 6), dtype=bool)
    silent[1, 4:] = silent[0, 1] = True
    for name in effect.data_vars:
        value = effect[name].values.reshape(2, 6, -1)
        if name == "top_token_id":
            assert (value[silent] == -1).all()
            assert (value[~silent] >= 0).all()
        else:
            assert np.isnan(value[silent]).all(), name
            assert np.isfinite(value[~silent]).all(), name


def test_low_precision_logits_are_compared_as_the_numbers_they_are() -> None:
    base, changed = random_logits(1, 4, 30).bfloat16(), random_logits(1, 4, 30, seed=1).bfloat16()
    xr.testing.assert_identical(compare_logits(base, changed, [4]), compare_logits(base.float(), changed.float(), [4]))


def test_the_change_of_a_logit_is_base_minus_changed() -> None:
    base, changed = random_logits(2, 5, 11), random_logits(2, 5, 11, seed=1)
    one = logit_change(base, changed, [5, 3], 7)
    assert one.dims == ("sequence", "position")
    np.testing.assert_allclose(one[0], (base - changed)[0, :, 7], rtol=1e-6)
    assert np.isnan(one[1, 3:]).all()
    several = logit_change(base, changed, [5, 3], [9, 7])
    assert several.dims == ("sequence", "position", "vocab")
    xr.testing.assert_equal(several.sel(vocab=7, drop=True), one)


@pytest.mark.parametrize(
    ("changed", "lengths", "top", "said"),
    [
        ((2, 5, 12), [5, 5], 3, r"base is \(2, 5, 11\), changed \(2, 5, 12\)"),
        ((2, 5, 11), [5], 3, r"lengths are \[5\]: one a sequence is expected, 2 from 0 to 5"),
        ((2, 5, 11), [5, 6], 3, r"lengths are \[5, 6\]"),
        ((2, 5, 11), [5, 5], 12, r"top = 12 tokens .* from 1 to 11"),
        ((2, 5, 11), [5, 5], 0, r"top = 0 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(changed: tuple[int, ...], lengths: list[int], top: int, said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        compare_logits(random_logits(2, 5, 11), random_logits(*changed), lengths, top=top)


@pytest.mark.parametrize("token", [-1, 11])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(SchemaError, match=f"there is no token {token}: the vocabulary has 11"):
        logit_change(random_logits(1, 2, 11), random_logits(1, 2, 11), [2], [3, token])


# ── interventions ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=[6, 7], ids=["rwkv6", "rwkv7"])
def rwkv(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = write_pth(tmp_path_factory.mktemp("models") / f"x{request.param}.pth", request.param)
    return forebay.load_model(path, device="cpu")


@pytest.fixture(scope="module")
def llama(tiny_model: Path) -> Model:
    return forebay.load_model(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def batch() -> list[list[int]]:
    chance = np.random.default_rng(5)
    return [chance.integers(0, SIZES["d_vocab"], n).tolist() for n in LENGTHS]


def assert_is_the_comparison(effect: xr.Dataset, base: torch.Tensor, changed: torch.Tensor) -> None:
    """Against log-probabilities of the two forwards' logits, in float64."""
    for row, length in enumerate(LENGTHS):
        log_p, log_q = (x[row, :length].double().log_softmax(-1) for x in (base, changed))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        np.testing.assert_allclose(effect["kl_divergence"][row, :length], kl, rtol=1e-5, atol=1e-12)
        change = (log_q.exp() - log_p.exp()).abs().topk(effect.sizes["rank"])
        np.testing.assert_allclose(abs(effect["probability_change"][row, :length]), change.values, rtol=1e-4, atol=1e-9)


HOOKS: dict[str, Callable[[Model], HookSpec]] = {
    "knockout": lambda model: HookSpec().intervene(STATE, StateKnockout().at(position=3)),
    "steering": lambda model: HookSpec().intervene(STATE, StateSteering(4.0).at(position=3, head=[0, 2])),
    "replaced": lambda model: HookSpec().intervene("blocks.1.rwkv.hook_state", Replace(0.5).at(position=3)),
}


@pytest.mark.parametrize("hooks", HOOKS.values(), ids=list(HOOKS))
def test_a_changed_state_shows_from_where_it_is_read(
    rwkv: Model, batch: list[list[int]], hooks: Callable[[Model], HookSpec]
) -> None:
    """Token 3 is the last of the second sequence. Version 7 reads what it has just written, 6 only what was there; a
    state that is put in is read by the tokens that follow."""
    spec = hooks(rwkv)
    effect = intervention_effect(rwkv, batch, spec, top=6)
    base, changed = rwkv.forward(batch).logits, rwkv.forward(batch, spec).logits
    assert base is not None
    assert changed is not None
    assert_is_the_comparison(effect, base, changed)
    writes = not isinstance(spec.changes[0].function, Replace)
    assert rwkv.spec.rwkv is not None
    first = 3 if writes and rwkv.spec.rwkv.version == 7 else 4
    kl = effect["kl_divergence"]
    for row, length in enumerate(LENGTHS):
        assert (kl[row, :first] < 1e-9).all()
        assert (kl[row, first:length] > 1e-7).all()
        assert np.isnan(kl[row, length:]).all()


def test_steering_by_one_changes_nothing_and_by_zero_is_a_knockout(rwkv: Model, batch: list[list[int]]) -> None:
    def steered(scale: float) -> HookSpec:
        return HookSpec().intervene(STATE, StateSteering(scale).at(position=2))

    knocked_out = HookSpec().intervene(STATE, StateKnockout().at(position=2))
    same = intervention_effect(rwkv, batch, steered(1.0))["kl_divergence"]
    assert float(same.max()) == 0
    again = intervention_effect(rwkv, batch, steered(0.0), baseline=knocked_out)["kl_divergence"]
    assert float(again.max()) == 0
    assert float(intervention_effect(rwkv, batch, knocked_out)["kl_divergence"].max()) > 1e-3


def test_an_attention_edge_that_is_cut_shows_from_its_query_on(llama: Model, batch: list[list[int]]) -> None:
    scores = "blocks.*.attn.hook_attn_scores"
    hooks = HookSpec().intervene(scores, Knockout([(3, 1)]))
    effect = intervention_effect(llama, batch, hooks, baseline=HookSpec().capture(scores))
    base, changed = llama.forward(batch, HookSpec().capture(scores)).logits, llama.forward(batch, hooks).logits
    assert base is not None
    assert changed is not None
    assert_is_the_comparison(effect, base, changed)
    kl = effect["kl_divergence"]
    for row, length in enumerate(LENGTHS):
        assert (kl[row, :3] == 0).all()
        assert float(kl[row, 3]) > 1e-6
        assert np.isnan(kl[row, length:]).all()


def test_the_tokens_that_were_read_are_labels(rwkv: Model, batch: list[list[int]]) -> None:
    hooks = HookSpec().intervene(STATE, StateKnockout().at(position=0)).capture("blocks.*.hook_resid_post")
    effect = intervention_effect(rwkv, batch, hooks, top=3)
    for row, ids in enumerate(batch):
        assert effect["token_id"][row].values.tolist() == ids + [-1] * (13 - len(ids))
    assert dict(effect.sizes) == {"sequence": 3, "position": 13, "rank": 3}
    assert effect["sequence"].values.tolist() == [0, 1, 2]
    assert effect["position"].values.tolist() == list(range(13))
    assert effect["top_token_id"].dtype == np.int32


def test_the_logit_of_the_token_that_was_pushed_is_told_with_its_sign(llama: Model, batch: list[list[int]]) -> None:
    """A vector added to what enters the unembedding moves every logit by its product with the unembedding's row."""
    row = llama.unembedding.weight[42]
    hooks = HookSpec().intervene("hook_final_norm", Add(row * 30).at(position=-1))
    effect = intervention_effect(llama, batch, hooks, top=1)
    for sequence, length in enumerate(LENGTHS):
        last = effect.sel(sequence=sequence, position=length - 1).isel(rank=0)
        moved = 30 * float(llama.unembedding.weight[int(last["top_token_id"])] @ row)
        assert float(last["logit_difference"]) == pytest.approx(-moved, rel=1e-4)
        assert int(last["top_token_id"]) == 42
        assert float(last["probability_change"]) > 0


def test_what_the_model_or_the_vocabulary_does_not_have_is_refused_before_anything_is_computed(
    rwkv: Model, batch: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = HookSpec().intervene(STATE, StateKnockout().at(position=3))
    with pytest.raises(HookError, match="position=13 is out of range"):
        intervention_effect(rwkv, batch[:1], HookSpec().intervene(STATE, StateKnockout().at(position=13)))
    monkeypatch.setattr(Model, "forward", forbidden)
    with pytest.raises(SchemaError, match="top = 71"):
        intervention_effect(rwkv, batch, hooks, top=71)


# ── effective attention ──────────────────────────────────────────────────────────────────────────────────────────────


def forbidden(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("something was computed")


def test_rows_of_effective_attention_add_up_to_one_where_anything_is_positive() -> None:
    alpha = xr.DataArray(
        np.array([[[3.0, -5.0, 1.0], [-1.0, 0.0, -2.0], [0.0, 2e-10, np.nan]]]), dims=("head", "query", "key")
    )
    found = normalize_effective_attention(alpha)
    np.testing.assert_allclose(found[0, 0], [0.75, 0, 0.25], rtol=1e-9)
    np.testing.assert_array_equal(found[0, 1], [0, 0, 0])
    np.testing.assert_allclose(found[0, 2, :2], [0, 2 / 3], rtol=1e-9)
    assert np.isnan(found[0, 2, 2])


def test_effective_attention_of_a_forward_becomes_weights(rwkv: Model, batch: list[list[int]]) -> None:
    out = rwkv.forward(batch, HookSpec().capture("blocks.*.rwkv.hook_effective_attn"))
    alpha = out.to_dataset()["rwkv.hook_effective_attn"]
    assert (alpha < 0).any()
    weights = normalize_effective_attention(alpha)
    assert weights.dims == alpha.dims
    assert weights.dtype == np.float32
    assert weights["layer"].values.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(np.isnan(weights), np.isnan(alpha))
    for row, length in enumerate(LENGTHS):
        own = alpha.isel(sequence=row, query=slice(length), key=slice(length)).values.astype(np.float64)
        positive = np.maximum(own, 0)
        expected = positive / (positive.sum(-1, keepdims=True) + 1e-10)
        found = weights.isel(sequence=row, query=slice(length), key=slice(length)).values
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
        sums, has_any = found.sum(-1), (own > 1e-6).any(-1)
        np.testing.assert_allclose(sums[has_any], 1, rtol=1e-3)
        assert has_any.mean() > 0.8


def test_effective_attention_stays_lazy_and_keeps_its_labels_but_not_its_stores_attributes() -> None:
    values = np.random.default_rng(0).normal(size=(4, 3, 6, 6)).astype(np.float32)
    values[2, :, 4:], values[2, :, :, 4:] = np.nan, np.nan
    dims = ("sequence", "head", "query", "key")
    given = xr.DataArray(
        values, dims=dims, coords={"document": ("sequence", [0, 0, 1, 1])}, attrs={"dtype": "bfloat16"}
    )
    lazy = given.copy(data=da.from_array(values, chunks=(1, 3, 6, 6)))
    with dask.config.set(scheduler=forbidden):
        found = normalize_effective_attention(lazy)
        assert found.chunks == lazy.chunks
    xr.testing.assert_identical(found.compute(), normalize_effective_attention(given))
    assert found.attrs == {}
    assert found["document"].values.tolist() == [0, 0, 1, 1]
    shuffled = normalize_effective_attention(given.transpose("key", "sequence", "query", "head"))
    xr.testing.assert_allclose(shuffled.transpose(*dims), found.compute())


def test_what_is_no_attention_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"query and key; what was given is \[token, d_model\]"):
        normalize_effective_attention(xr.DataArray(np.zeros((2, 3)), dims=("token", "d_model")))
