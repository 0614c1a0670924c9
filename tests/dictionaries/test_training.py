"""Training finds the features that made the data, by the losses of the papers, and writes what others read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.load import load_dictionary
from forebay.stages.dictionaries.objective import (
    SELECTIONS,
    Settings,
    first_weights,
    forward,
    geometric_median,
    unit_rows,
    without_parallel,
)
from forebay.stages.dictionaries.selection import top_k
from forebay.stages.dictionaries.training import Metrics, Stopped, _split, evaluate, train
from forebay.stages.dictionaries.training_state import State, advance, begin, load_state, rows_of
from forebay.stages.models.errors import HookError
from forebay.stages.train import Training
from forebay.stores.batches import Batches
from forebay.stores.errors import SchemaError

from .training_stores import CONTEXT, MLP_OUT, RESID, Floats, sparse_coefficients, unit_atoms, write_run

KINDS = ("topk", "batchtopk", "jumprelu")
D, D_OUT, N_ATOM, N_FEATURE, ACTIVE, N_TOKEN = 23, 31, 37, 52, 3, 20_000


@dataclasses.dataclass(frozen=True)
class Known:
    """A run made of known atoms, which are read as `atoms` and predicted as `atoms_out`, and its rows."""

    run: Path
    atoms: Floats
    atoms_out: Floats
    x: Floats
    y: Floats


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    """The first position of every sequence is NaN: whatever looked at one would be NaN, too."""
    random = np.random.default_rng(8)
    atoms, atoms_out = unit_atoms(random, N_ATOM, D), unit_atoms(random, N_ATOM, D_OUT)
    found = sparse_coefficients(random, N_TOKEN, N_ATOM, ACTIVE)
    x = found @ atoms + 2 * random.standard_normal(D) + 0.02 * random.standard_normal((N_TOKEN, D))
    y = found @ atoms_out + random.standard_normal(D_OUT) + 0.02 * random.standard_normal((N_TOKEN, D_OUT))
    x[::CONTEXT], y[::CONTEXT] = np.nan, np.nan
    run = write_run(tmp_path_factory.mktemp("run"), {"hook_resid_post": x, "hook_mlp_out": y})
    return Known(run, atoms, atoms_out, x, y)


def spec(**settings: Any) -> Training:
    """A training of seconds."""
    defaults = {"hook": RESID, "n_feature": N_FEATURE, "k": ACTIVE, "batch": 300, "learning_rate": 1e-2}
    return Training(**{**defaults, "bandwidth": 0.3, "n_batch": 40, "log_every": 10, **settings})


def how(activation: str = "topk", **settings: Any) -> Settings:
    defaults = {"k": 3, "k_aux": 4, "aux_coefficient": 0.3, "sparsity": 0.7, "bandwidth": 0.4, "subtracts": True}
    return Settings(activation=activation, **{**defaults, "dtype": torch.float32, **settings})


def mean_max_cosine(atoms: Floats, rows: Tensor) -> float:
    """How well each atom is met by the row nearest to it."""
    return float((torch.from_numpy(atoms).float() @ rows.T).amax(dim=1).mean())


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 60}, "k = 60 features of n_feature = 52 cannot fire"),
        ({"activation": "jumpreul"}, "activation = 'jumpreul' is not known. Did you mean 'jumprelu'"),
        ({"dtype": "float16"}, "dtype = 'float16' is not known.* Known: float32, bfloat16"),
        ({"epochs": 2}, "epochs and n_batch both say how long to train"),
        ({"batch": 0}, "batch = 0 must be at least 1"),
        ({"sparsity": math.nan}, "sparsity = nan must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0 must be more than 0"),
        ({"warmup": 1.0}, "warmup = 1.0 is a share"),
        ({"validation": -0.1}, "validation = -0.1 is a share"),
        ({"hook_out": RESID}, "leave it out to train an autoencoder"),
    ],
)
def test_settings_that_make_no_training_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DictionaryError, match=message):
        spec(**settings).check()


def test_a_hook_that_does_not_exist_or_was_not_captured_is_refused(known: Known, tmp_path: Path) -> None:
    with pytest.raises(HookError, match=r"Did you mean 'blocks\.3\.hook_resid_post'"):
        train(spec(hook="blocks.3.hook_resid_pots"), known.run, tmp_path / "out")
    with pytest.raises(SchemaError, match=r"no 'blocks\.2\.hook_resid_post'"):
        train(spec(hook="blocks.2.hook_resid_post"), known.run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_training_is_plain_values_and_comes_back_from_json() -> None:
    training = spec(hook_out=MLP_OUT, aux_coefficient=0, validation=0.25)
    text = json.dumps(dataclasses.asdict(training))
    assert TypeAdapter(Training).validate_json(text, strict=True) == training


def test_the_learning_rate_rises_stays_and_falls() -> None:
    training = spec(learning_rate=0.5, warmup=0.1, decay=0.4)
    rates = [training.rate(step, 200) for step in range(200)]
    assert rates[:20] == pytest.approx([0.5 * (n + 1) / 20 for n in range(20)])
    assert set(rates[20:120]) == {0.5}
    assert rates[120:] == pytest.approx([0.5 * (200 - n) / 80 for n in range(120, 200)])


def test_the_length_is_said_in_batches_tokens_or_epochs() -> None:
    assert spec(n_batch=7).steps(50) == 7
    assert spec(n_batch=None, tokens=3000).steps(50) == 10
    assert spec(n_batch=None, epochs=3).steps(50) == 150
    assert spec(n_batch=None).steps(50) == 50


# ── the loss and its gradient ────────────────────────────────────────────────────────────────────────────────────────


def weights_of(settings: Settings, d_in: int = 11, d_out: int = 11, n_feature: int = 40) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(4)
    shapes = {"W_enc": (n_feature, d_in), "b_enc": (n_feature,), "W_dec": (n_feature, d_out), "b_dec": (d_out,)}
    found = {name: torch.randn(*shape, generator=random) for name, shape in shapes.items()}
    if settings.activation == "jumprelu":
        found["log_threshold"] = torch.randn(n_feature, generator=random) * 0.3 + 1
    return {name: value.requires_grad_() for name, value in found.items()}


def rows(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def dense_loss(weights: dict[str, Tensor], x: Tensor, y: Tensor, dead: Tensor, settings: Settings) -> Tensor:
    """The loss of TopK and BatchTopK as the papers write it, by autograd through every feature of every row."""
    h = (x - weights["b_dec"] if settings.subtracts else x) @ weights["W_enc"].T + weights["b_enc"]
    if settings.activation == "topk":
        values, features = h.topk(settings.k, dim=-1)
        fires = torch.zeros_like(h).scatter(-1, features, values.relu())
    else:
        weakest = h.relu().flatten().topk(settings.k * len(h)).values[-1]
        fires = torch.where(h >= weakest, h.relu(), 0)
    error = y - fires @ weights["W_dec"] - weights["b_dec"]
    values, features = h.masked_fill(~dead, -1e9).topk(settings.k_aux, dim=-1)
    spare = torch.zeros_like(h).scatter(-1, features, values.relu()) @ weights["W_dec"]
    return error.square().mean() + settings.aux_coefficient * (spare - error.detach()).square().mean()


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_loss_and_gradients_are_those_of_dense_autograd_in_float64(activation: str, subtracts: bool) -> None:
    settings = how(activation, subtracts=subtracts)
    weights = weights_of(settings, d_out=11 if subtracts else 7)
    x = rows(50, 11, seed=1)
    y = x if subtracts else rows(50, 7, seed=2)
    dead = torch.arange(40) % 5 == 0
    coded = forward(weights, x, y, dead, 0.0, settings)
    coded.loss.backward()
    wide = {name: value.detach().double().requires_grad_() for name, value in weights.items()}
    expected = dense_loss(wide, x.double(), y.double(), dead, settings)
    expected.backward()
    assert float(coded.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(value.grad, wide[name].grad.float(), rtol=1e-4, atol=1e-7)


def test_jumprelu_has_the_gradient_of_its_definition() -> None:
    """Loops over every row and feature in float64: equations 8, 11 and 12 of Rajamanoharan et al. 2024."""
    settings = how("jumprelu", aux_coefficient=0.0, subtracts=False)
    weights, x, y = weights_of(settings, d_out=7), rows(30, 11, seed=1), rows(30, 7, seed=2)
    coded = forward(weights, x, y, torch.zeros(40, dtype=torch.bool), 0.0, settings)
    coded.loss.backward()

    w = {name: value.detach().double().numpy() for name, value in weights.items()}
    h = x.double().numpy() @ w["W_enc"].T + w["b_enc"]
    theta, width = np.exp(w["log_threshold"]), settings.bandwidth
    fires = np.where(h > theta, h, 0)
    error = fires @ w["W_dec"] + w["b_dec"] - y.double().numpy()
    l0 = (h > theta).sum(1).mean()
    loss = (error**2).mean() + settings.sparsity * (l0 / settings.k - 1) ** 2
    to_fires = 2 * error / error.size @ w["W_dec"].T
    to_l0 = settings.sparsity * 2 * (l0 / settings.k - 1) / settings.k
    to_theta, near = np.zeros(40), 0
    for row in range(30):
        for feature in range(40):
            if abs(h[row, feature] - theta[feature]) < width / 2:
                near += 1
                to_theta[feature] += -theta[feature] / width * to_fires[row, feature] - to_l0 / width / 30
    to_h = to_fires * (h > theta)
    assert near > 20
    assert float(coded.loss.detach()) == pytest.approx(loss, rel=1e-5)
    expected = {
        "log_threshold": to_theta * theta,
        "W_enc": to_h.T @ x.double().numpy(),
        "b_enc": to_h.sum(0),
        "W_dec": fires.T @ (2 * error / error.size),
        "b_dec": (2 * error / error.size).sum(0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name].grad.numpy(), value, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(coded.fired.numpy(), (h > theta).sum(0))


def test_without_dead_features_there_is_no_auxiliary_loss() -> None:
    weights, x = weights_of(how()), rows(50, 11, seed=1)
    none, some = torch.zeros(40, dtype=torch.bool), torch.arange(40) < 6
    with torch.no_grad():
        plain = forward(weights, x, x, none, 0.0, how(aux_coefficient=0.0)).loss
        assert forward(weights, x, x, none, 0.0, how()).loss == plain
        assert forward(weights, x, x, some, 0.0, how()).loss > plain


@pytest.mark.parametrize("bound", [0.0, 0.1, 2.0, 100.0])
def test_batchtopk_takes_the_largest_of_the_batch_whatever_bound_it_starts_from(bound: float) -> None:
    h = rows(23, 40, seed=3)
    row, feature = SELECTIONS["batchtopk"](h, how("batchtopk"), bound)
    assert set(zip(row.tolist(), feature.tolist(), strict=True)) == {
        divmod(one, 40) for one in h.flatten().topk(3 * 23).indices.tolist()
    }
    assert row.tolist() == sorted(row.tolist())


def test_batchtopk_takes_no_negative_value_where_there_are_too_few_others() -> None:
    h = rows(5, 40, seed=3) - 2.0
    row, feature = SELECTIONS["batchtopk"](h, how("batchtopk", k=20), 0.0)
    assert 0 < len(row) == int((h > 0).sum())
    assert bool((h[row, feature] > 0).all())


def test_topk_takes_what_the_dictionary_takes_afterwards() -> None:
    h = rows(23, 40, seed=3).round(decimals=1)  # many equal values
    row, feature = SELECTIONS["topk"](h, how(), 0.0)
    assert torch.equal(feature.view(23, 3), top_k(h, 3)[1])
    assert torch.equal(row, torch.arange(23).repeat_interleave(3))


@pytest.mark.parametrize("activation", KINDS)
def test_bfloat16_gives_nearly_the_gradient_of_float32(activation: str) -> None:
    """Rows lie far from the origin, where bfloat16 is coarse: the decoder's bias is taken away before."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        weights = weights_of(how(activation, dtype=dtype))
        away = 300 * torch.sign(rows(1, 11, seed=5))
        weights["b_dec"] = (weights["b_dec"].detach() + away[0]).requires_grad_()
        x = rows(500, 11, seed=1) + away
        coded = forward(weights, x, x, torch.arange(40) < 5, 0.0, how(activation, dtype=dtype))
        coded.loss.backward()
        found[dtype] = float(coded.loss.detach()), {name: value.grad for name, value in weights.items()}
    (loss, gradients), (loss_16, gradients_16) = found[torch.float32], found[torch.bfloat16]
    assert loss_16 == pytest.approx(loss, rel=0.01)
    for name, value in gradients.items():
        other = gradients_16[name]
        assert other.dtype == torch.float32
        assert float(torch.cosine_similarity(value.flatten(), other.flatten(), dim=0)) > 0.98, name
        assert float(other.norm() / value.norm()) == pytest.approx(1, abs=0.1), name


# ── the first weights and the constraint ─────────────────────────────────────────────────────────────────────────────


def test_the_geometric_median_of_points_that_have_one_in_closed_form() -> None:
    square = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 6.0], [4.0, 6.0]])
    torch.testing.assert_close(geometric_median(square), torch.tensor([2.0, 3.0]))
    line = torch.tensor([[0.0], [1.0], [2.0], [50.0], [1000.0]])
    torch.testing.assert_close(geometric_median(line), torch.tensor([2.0]), rtol=1e-3, atol=1e-3)
    obtuse = torch.tensor([[0.0, 0.0], [10.0, 1.0], [-10.0, 1.0]])  # an angle beyond 120°: the corner itself
    torch.testing.assert_close(geometric_median(obtuse), torch.zeros(2), rtol=0, atol=1e-2)


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    points = rows(200, 5, seed=7) * torch.tensor([1.0, 3.0, 0.2, 5.0, 1.0])
    points[:15] += 4000

    def total(at: Tensor) -> float:
        return float(torch.linalg.vector_norm(points.double() - at.double(), dim=-1).sum())

    median = geometric_median(points)
    assert total(median) < total(points.mean(0))
    pull = (points - median) / torch.linalg.vector_norm(points - median, dim=-1, keepdim=True)
    assert float(pull.sum(0).norm()) < 0.05  # the unit vectors to all points cancel
    for step in 0.05 * rows(20, 5, seed=9):
        assert total(median + step) > total(median)


def test_an_autoencoder_begins_with_its_decoder_as_its_encoder_at_the_median() -> None:
    x = rows(900, 11, seed=1) + 5
    weights = first_weights(40, x, x, how(), seed=3)
    assert torch.equal(weights["W_enc"], weights["W_dec"])
    torch.testing.assert_close(torch.linalg.vector_norm(weights["W_dec"], dim=-1), torch.ones(40))
    torch.testing.assert_close(weights["b_dec"], geometric_median(x))
    assert not bool(weights["b_enc"].any())
    assert not torch.equal(first_weights(40, x, x, how(), seed=4)["W_dec"], weights["W_dec"])


@pytest.mark.parametrize("subtracts", [True, False])
def test_jumprelu_begins_at_the_sparsity_that_it_is_to_have(subtracts: bool) -> None:
    settings = how("jumprelu", subtracts=subtracts)
    x = rows(1024, 11, seed=1) * 2 + 5
    y = x if subtracts else rows(1024, 7, seed=2)
    weights = first_weights(40, x, y, settings, seed=3)
    fired = forward(weights, x, y, torch.zeros(40, dtype=torch.bool), 0.0, settings).fired
    assert float(fired.sum()) / len(x) == pytest.approx(3, rel=0.01)


def test_what_is_left_of_a_gradient_is_orthogonal_to_the_decoder() -> None:
    W_dec, gradient = rows(40, 11, seed=1), rows(40, 11, seed=2)
    unit_rows(W_dec)
    left = gradient.clone()
    without_parallel(left, W_dec)
    torch.testing.assert_close((left * W_dec).sum(-1), torch.zeros(40), rtol=0, atol=1e-5)
    taken = gradient - left
    torch.testing.assert_close(torch.cosine_similarity(taken, W_dec).abs(), torch.ones(40))


def begun(activation: str, n_feature: int = 40) -> tuple[State, Tensor, Settings]:
    settings, x = how(activation), rows(600, 11, seed=1) + 2
    return begin(x, x, n_feature, True, settings, 0), x, settings


@pytest.mark.parametrize("activation", KINDS)
def test_decoder_rows_have_length_1_after_every_step(activation: str) -> None:
    state, x, settings = begun(activation)
    for _ in range(5):
        before = state.weights["W_dec"].detach().clone()
        advance(state, x * state.scales[0], x * state.scales[1], 0.1, 10_000, settings)
        norms = torch.linalg.vector_norm(state.weights["W_dec"].detach(), dim=-1)
        torch.testing.assert_close(norms, torch.ones(40))
        assert not torch.equal(before, state.weights["W_dec"].detach())
    assert state.step == 5


def test_activations_are_scaled_to_a_mean_norm_of_the_root_of_their_width() -> None:
    state, x, _ = begun("topk")
    assert state.scales[0] == state.scales[1]
    assert float(torch.linalg.vector_norm(x * state.scales[0], dim=-1).mean()) == pytest.approx(math.sqrt(11))


def test_the_threshold_of_batchtopk_is_the_running_mean_of_the_weakest_that_fired() -> None:
    state, x, settings = begun("batchtopk")
    weakest = []
    for n in range(30):
        part = x[n * 20 : (n + 1) * 20] * state.scales[0]
        weakest.append(float(advance(state, part, part, 1e-2, 10_000, settings).smallest))
    shares = 0.9 ** np.arange(29, -1, -1)
    assert state.threshold == pytest.approx(float(shares @ weakest / shares.sum()), rel=1e-6)
    assert len(set(weakest)) == 30


def test_a_feature_that_has_not_fired_for_long_is_trained_on_what_is_left_over() -> None:
    state, x, settings = begun("topk")
    with torch.no_grad():
        state.weights["W_enc"][7] *= 1e-3  # too weak to be among the k strongest
    x = x * state.scales[0]
    for n in range(3):
        before = state.weights["W_enc"][7].detach().clone()
        advance(state, x, x, 1e-3, 1500, settings)
        assert int(state.idle[7]) == 600 * (n + 1)
        assert torch.equal(before, state.weights["W_enc"][7].detach())
    before = state.weights["W_enc"][7].detach().clone()
    advance(state, x, x, 1e-3, 1500, settings)
    assert not torch.equal(before, state.weights["W_enc"][7].detach())
    assert int(state.idle[int(state.idle.argmin())]) == 0


# ── what comes of it ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("activation", KINDS)
def test_the_features_that_made_the_data_are_found(activation: str, known: Known, tmp_path: Path) -> None:
    training = spec(activation=activation, n_batch=400, dead_after=20_000, validation=0.1)
    dictionary = train(training, known.run, tmp_path / "out", device="cpu")
    assert mean_max_cosine(known.atoms, dictionary.W_dec) > 0.9
    held_out = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert held_out["fvu"] < 0.2
    assert held_out["l0"] == pytest.approx(ACTIVE, rel=0.1)


def test_a_transcoder_finds_the_features_in_what_it_predicts(known: Known, tmp_path: Path) -> None:
    training = spec(hook_out=MLP_OUT, activation="batchtopk", n_batch=400, dead_after=20_000, validation=0.1)
    dictionary = train(training, known.run, tmp_path / "out", device="cpu")
    assert (dictionary.d_in, dictionary.d_out, dictionary.b_in) == (D, D_OUT, None)
    assert (dictionary.hook, dictionary.hook_out) == (RESID, MLP_OUT)
    assert mean_max_cosine(known.atoms_out, dictionary.W_dec) > 0.9
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["fvu"] < 0.3


@pytest.mark.parametrize(
    ("activation", "hook_out"), [*((kind, None) for kind in KINDS), ("batchtopk", MLP_OUT), ("jumprelu", MLP_OUT)]
)
def test_the_scale_is_folded_in_and_changes_nothing(
    activation: str, hook_out: str | None, known: Known, tmp_path: Path
) -> None:
    """The dictionary on activations as they are, and the trained weights on scaled ones."""
    training = spec(activation=activation, hook_out=hook_out)
    dictionary = train(training, known.run, tmp_path / "out", device="cpu")
    state = load_state(tmp_path / "out/checkpoint.safetensors", torch.device("cpu"))
    assert abs(state.scales[0] - 1) > 0.01
    x = torch.from_numpy(known.x[1:CONTEXT]).float()
    weights = {name: value.detach() for name, value in state.weights.items()}
    scaled = x * state.scales[0] - (weights["b_dec"] if hook_out is None else 0)
    h = scaled @ weights["W_enc"].T + weights["b_enc"]
    if activation == "topk":
        values, features = h.topk(ACTIVE, dim=-1)
        fires = torch.zeros_like(h).scatter(-1, features, values.relu())
    else:
        least = weights["log_threshold"].exp() if activation == "jumprelu" else state.threshold
        fires = torch.where(h > least, h, 0)
    expected = (fires @ weights["W_dec"] + weights["b_dec"]) / state.scales[1]
    torch.testing.assert_close(dictionary.reconstruct(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dictionary.decoder_norms, torch.ones(N_FEATURE))


@pytest.mark.parametrize("activation", KINDS)
def test_the_folder_is_read_as_any_dictionary(activation: str, known: Known, tmp_path: Path) -> None:
    dictionary = train(spec(activation=activation), known.run, tmp_path / "out", device="cpu")
    loaded = load_dictionary(tmp_path / "out")
    x = torch.from_numpy(known.x[1:CONTEXT]).float()
    assert loaded.hook == loaded.hook_out == RESID
    assert torch.equal(loaded.encode(x), dictionary.encode(x))
    assert torch.equal(loaded.reconstruct(x), dictionary.reconstruct(x))


def test_a_topk_transcoder_is_written_where_its_widths_are_equal_and_refused_else(known: Known, tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match="TopK transcoder from 23 to 31 values is in no format"):
        train(spec(hook_out=MLP_OUT), known.run, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    run = write_run(tmp_path / "run", {"hook_resid_post": known.x, "hook_mlp_out": known.x[:, ::-1]})
    dictionary = train(spec(hook_out=MLP_OUT), run, tmp_path / "out", device="cpu")
    loaded = load_dictionary(tmp_path / "out")
    x = torch.from_numpy(known.x[1:CONTEXT]).float()
    assert (loaded.hook, loaded.hook_out) == (RESID, MLP_OUT)
    torch.testing.assert_close(loaded.reconstruct(x), dictionary.reconstruct(x))


def test_the_evaluation_is_that_of_all_rows_at_once(known: Known, tmp_path: Path) -> None:
    dictionary = train(spec(activation="batchtopk"), known.run, tmp_path / "out", device="cpu")
    found = evaluate(dictionary, Batches(run=known.run, hooks=RESID, batch=333, documents=slice(0, 7)))
    x = known.x[: 7 * 4 * CONTEXT]
    x = x[np.arange(len(x)) % CONTEXT >= 1].astype(np.float32)
    fires = dictionary.encode(torch.from_numpy(x))
    left = (dictionary.decode(fires).numpy() - x).astype(np.float64)
    wide = x.astype(np.float64)
    assert found.n_token == len(x)
    assert found.fvu == pytest.approx((left**2).sum() / ((wide - wide.mean(0)) ** 2).sum(), rel=1e-5)
    assert found.l0 == pytest.approx(float((fires > 0).sum()) / len(x))
    assert found.dead == pytest.approx(float((fires == 0).all(0).double().mean()))
    with pytest.raises(DictionaryError, match=f"the batches are of {RESID}, {MLP_OUT}"):
        evaluate(dictionary, Batches(run=known.run, hooks=(RESID, MLP_OUT)))


def test_documents_that_are_held_out_are_not_trained_on(known: Known) -> None:
    batches = Batches(run=known.run, hooks=(RESID,), batch=300, documents=slice(10, 60))
    kept, held = _split(batches, spec(validation=0.2))
    assert held is not None
    assert (len(kept.documents or ()), len(held.documents or ())) == (40, 10)
    assert sorted([*kept.documents, *held.documents]) == list(range(10, 60))
    assert held.documents != _split(batches, spec(validation=0.2, seed=1))[1].documents
    with pytest.raises(DictionaryError, match="leaves none to train on"):
        _split(dataclasses.replace(batches, documents=[4]), spec(validation=0.2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_come_as_they_were_stored(dtype: str, known: Known, tmp_path: Path) -> None:
    run = write_run(tmp_path, {"hook_resid_post": known.x[:2000]}, dtype)
    settings: dict[str, Any] = {"run": run, "hooks": RESID, "shuffle": False}
    [stored], [decoded] = Batches(**settings, dtype="stored"), Batches(**settings)
    x, y = rows_of(stored, torch.device("cpu"))
    assert x.dtype == torch.float32
    assert torch.equal(x, torch.from_numpy(decoded))
    assert torch.equal(x, y)


def test_the_first_positions_are_never_looked_at(known: Known, tmp_path: Path) -> None:
    """They are NaN, in every sequence."""
    assert np.isnan(known.x[::CONTEXT]).all()
    heard: list[Metrics] = []
    train(spec(validation=0.1), known.run, tmp_path / "out", device="cpu", progress=heard.append)
    assert all(math.isfinite(one.loss) and math.isfinite(one.fvu) for one in heard)
    with pytest.raises(DictionaryError, match="the loss is nan at step 1,"):
        train(spec(skip_positions=0), known.run, tmp_path / "other", device="cpu")


def test_a_loss_that_is_not_finite_ends_it_and_says_where(known: Known, tmp_path: Path) -> None:
    training = spec(learning_rate=1e25, warmup=0.0, decay=0.0, checkpoint_every=1, log_every=1)
    heard: list[Metrics] = []
    with pytest.raises(DictionaryError, match=r"the loss is (nan|inf) at step \d+, at learning rate 1e\+25\. Lower"):
        train(training, known.run, tmp_path / "out", device="cpu", progress=heard.append)
    state = load_state(tmp_path / "out/checkpoint.safetensors", torch.device("cpu"))
    assert state.step == heard[-1].step >= 1
    assert all(math.isfinite(one.loss) for one in heard)


def test_what_failed_before_a_checkpoint_may_be_trained_anew_in_the_same_folder(known: Known, tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match="train anew"):
        train(spec(learning_rate=1e25, log_every=1), known.run, tmp_path / "out", device="cpu")
    train(spec(), known.run, tmp_path / "out", device="cpu")
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30, 40]


# ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(folder: Path) -> dict[str, Any]:
    """What a training has left: bytes of files, and metrics without their times."""
    names = ("checkpoint.safetensors", "sae_weights.safetensors", "cfg.json", "evaluation.json")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.pop("tokens_per_second") > 0
    return {"metrics": lines} | {name: (folder / name).read_bytes() for name in names}


def after(n: int) -> Callable[[], bool]:
    """Says stop when it has been asked `n` times."""
    asked = iter(range(n + 1))
    return lambda: next(asked) == n


@pytest.mark.parametrize("activation", KINDS)
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    activation: str, known: Known, tmp_path: Path
) -> None:
    training = spec(activation=activation, dead_after=3000, validation=0.1, log_every=3, checkpoint_every=7)
    whole = train(training, known.run, tmp_path / "whole", device="cpu")
    for n in (0, 11, 17):
        with pytest.raises(Stopped, match=f"{tmp_path}/parts has a checkpoint"):
            train(training, known.run, tmp_path / "parts", device="cpu", stop=after(n))
        assert not (tmp_path / "parts/cfg.json").exists()
    parts = train(training, known.run, tmp_path / "parts", device="cpu")
    assert read(tmp_path / "parts") == read(tmp_path / "whole")
    assert torch.equal(parts.W_enc, whole.W_enc)
    steps = [line["step"] for line in read(tmp_path / "parts")["metrics"]]
    assert steps == [*range(3, 40, 3), 40]


def test_progress_hears_what_is_recorded(known: Known, tmp_path: Path) -> None:
    heard: list[Metrics] = []
    train(spec(n_batch=25), known.run, tmp_path / "out", device="cpu", progress=heard.append)
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dataclasses.asdict(one) for one in heard]
    assert [one.step for one in heard] == [10, 20, 25]
    assert heard[-1].tokens == 25 * 300
    assert heard[-1].n_step == 25


def test_a_training_that_is_done_is_not_done_again(known: Known, tmp_path: Path) -> None:
    first = train(spec(validation=0.1), known.run, tmp_path / "out", device="cpu")
    before = read(tmp_path / "out")
    heard: list[Metrics] = []
    second = train(spec(validation=0.1), known.run, tmp_path / "out", device="cpu", progress=heard.append)
    assert heard == []
    assert torch.equal(first.W_dec, second.W_dec)
    assert read(tmp_path / "out") == before


def test_a_folder_of_another_training_is_refused_with_what_differs(known: Known, tmp_path: Path) -> None:
    train(spec(), known.run, tmp_path / "out", device="cpu")
    with pytest.raises(DictionaryError, match=r"other settings: training\.learning_rate: 0\.02 here, 0\.01 "):
        train(spec(learning_rate=0.02), known.run, tmp_path / "out", device="cpu")
    other = write_run(tmp_path / "run", {"hook_resid_post": known.x[:9000]})
    with pytest.raises(DictionaryError, match=r"source\.documents"):
        train(spec(), other, tmp_path / "out", device="cpu")
    train(spec(log_every=3, checkpoint_every=5), known.run, tmp_path / "out", device="cpu")  # decide no value
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(DictionaryError, match="is there already, and holds no training"):
        train(spec(), known.run, tmp_path / "mine", device="cpu")


def test_a_damaged_checkpoint_is_named(known: Known, tmp_path: Path) -> None:
    train(spec(), known.run, tmp_path / "out", device="cpu")
    path = tmp_path / "out/checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DictionaryError, match=r"checkpoint\.safetensors is no safetensors file, or it is damaged"):
        train(spec(), known.run, tmp_path / "out", device="cpu")


def test_batches_are_read_as_they_are(known: Known, tmp_path: Path) -> None:
    batches = Batches(run=known.run, hooks=RESID, batch=300, documents=slice(0, 30), seed=9)
    dictionary = train(spec(), batches, tmp_path / "out", device="cpu")
    assert dictionary.provenance.details["documents"] == batches.about()["documents"]
    assert dictionary.provenance.model == "a-model"
    with pytest.raises(DictionaryError, match=r"the batches' batch are 100, the training's 300"):
        train(spec(), dataclasses.replace(batches, batch=100), tmp_path / "other")
    with pytest.raises(DictionaryError, match="the batches' names are"):
        train(spec(), dataclasses.replace(batches, hooks=MLP_OUT), tmp_path / "other")


def test_another_seed_makes_another_dictionary_and_the_same_seed_the_same(known: Known, tmp_path: Path) -> None:
    made = [train(spec(seed=seed), known.run, tmp_path / f"{n}", device="cpu") for n, seed in enumerate((0, 0, 1))]
    assert torch.equal(made[0].W_enc, made[1].W_enc)
    assert not torch.equal(made[0].W_enc, made[2].W_enc)
