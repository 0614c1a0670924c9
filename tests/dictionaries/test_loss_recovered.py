"""The loss recovered is that of forwards with the activation replaced by hand, however tokens are batched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from forebay.stages.analyze import loss_recovered as module
from forebay.stages.analyze.loss_recovered import loss_recovered
from forebay.stages.dictionaries.dictionary import Dictionary
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.models.errors import HookError, ModelError
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec
from forebay.stores.errors import SchemaError

from .feature_edits import transcoder
from .feature_models import dictionary_of, model_of, numbers, sequences_of, set_of

D = 36
POINT = "blocks.1.hook_resid_post"
SEQUENCES = sequences_of(13, 2, 7, 1, 20, 3, 9)


def vector(value: Tensor, head: int | None) -> Tensor:
    """The vectors [position, d] of one sequence, of all heads end to end or of one."""
    return value.flatten(1) if head is None else value[:, head]


def by_hand(model: Model, dictionary: Dictionary, sequences: Sequence[Tensor], skip: int) -> dict[str, Any]:
    """One sequence at a time, the activation from the position `skip` on replaced by a plain function."""
    head_out = dictionary.head if dictionary.hook == dictionary.hook_out else None
    counted = [sequence for sequence in sequences if len(sequence) >= skip + 2]
    clean = [model.forward([s], HookSpec().capture(dictionary.hook, dictionary.hook_out)) for s in counted]
    y = [vector(out[dictionary.hook_out][0], head_out)[skip:-1].double() for out in clean]
    x = [vector(out[dictionary.hook][0], dictionary.head)[skip:-1] for out in clean]
    mean = torch.cat(y).mean(0)
    losses: dict[str, list[Tensor]] = {name: [] for name in ("clean", "spliced", "zero", "mean")}
    divergences: dict[str, list[Tensor]] = {name: [] for name in losses}
    for sequence, out in zip(counted, clean, strict=True):
        whole = vector(out[dictionary.hook][0], dictionary.head)
        put: dict[str, Tensor | None] = {
            "clean": None,
            "spliced": dictionary.reconstruct(whole),
            "zero": torch.zeros(len(whole), dictionary.d_out),
            "mean": mean.expand(len(whole), -1),
        }
        assert out.logits is not None
        log_p = out.logits[0].double().log_softmax(-1)
        for name, new in put.items():
            logits = out.logits if new is None else replaced(model, dictionary, sequence, head_out, new, skip)
            log_q = logits[0].double().log_softmax(-1)
            losses[name].append(F.nll_loss(log_q[skip:-1], sequence[skip + 1 :], reduction="none"))
            kl = F.kl_div(log_q[skip:-1], log_p[skip:-1], reduction="none", log_target=True).sum(-1)
            divergences[name].append(kl)
    true, found = torch.cat(y), dictionary.reconstruct(torch.cat(x)).double()
    return {
        "loss": [float(torch.cat(of_run).mean()) for of_run in losses.values()],
        "kl_divergence": [float(torch.cat(of_run).mean()) for of_run in divergences.values()],
        "fvu": float((true - found).square().sum() / (true - mean).square().sum()),
        "cosine": float(F.cosine_similarity(true, found).mean()),
        "l0": float((dictionary.encode(torch.cat(x)) != 0).sum(-1).double().mean()),
        "n_token": len(true),
    }


def replaced(
    model: Model, dictionary: Dictionary, sequence: Tensor, head: int | None, new: Tensor, skip: int
) -> Tensor:
    def put(value: Tensor, point: object) -> Tensor:
        place = value[0] if head is None else value[0, :, head]
        place[skip:] = new[skip:].reshape(place[skip:].shape).to(value.dtype)
        return value

    logits = model.forward([sequence], HookSpec().intervene(dictionary.hook_out, put)).logits
    assert logits is not None
    return logits


CASES: dict[str, tuple[str, Callable[[], Dictionary]]] = {
    "an autoencoder": ("llama", lambda: dictionary_of(POINT, D, kind="topk")),
    "of normalised activations": ("gemma2", lambda: dictionary_of(POINT, D, input_norm="layer_norm")),
    "of all heads": ("llama", lambda: dictionary_of("blocks.2.attn.hook_z", 90, kind="jumprelu")),
    "of one head": ("llama", lambda: dictionary_of("blocks.2.attn.hook_z", 10, head=3)),
    "a transcoder": ("llama", lambda: transcoder("hook_resid_mid", "mlp.hook_out", D, D, kind="batchtopk")),
    "a skip transcoder": ("gemma2", lambda: transcoder("ln2.hook_normalized", "hook_mlp_out", D, D, skip=True)),
    "a transcoder of one head": ("llama", lambda: transcoder("attn.hook_z", "hook_attn_out", 10, D, head=5)),
}


@pytest.mark.parametrize("skip", [1, 0, 4])
@pytest.mark.parametrize("case", CASES)
def test_every_number_is_that_of_forwards_with_the_activation_replaced_by_hand(case: str, skip: int) -> None:
    family, make = CASES[case]
    model, dictionary = model_of(family), make()
    found = loss_recovered(model, dictionary, SEQUENCES, batch_size=3, skip_positions=skip)
    expected = by_hand(model, dictionary, SEQUENCES, skip)
    assert int(found["n_token"]) == expected["n_token"]
    for name in ("loss", "kl_divergence"):
        np.testing.assert_allclose(found[name].values, expected[name], rtol=0, atol=1e-6)
    for name in ("fvu", "cosine", "l0"):
        np.testing.assert_allclose(float(found[name]), expected[name], rtol=1e-6)  # some norms are in float32
    clean, spliced, *ablated = found["loss"].values
    recovered = [(one - spliced) / (one - clean) for one in ablated]
    np.testing.assert_allclose(found["loss_recovered"].values, recovered, rtol=1e-12)
    assert len({round(value, 4) for value in expected["loss"]}) == 4
    assert min(expected["kl_divergence"][1:]) > 1e-3


def test_the_result_is_labelled() -> None:
    found = loss_recovered(model_of(), dictionary_of(POINT, D), SEQUENCES)
    assert found["run"].values.tolist() == ["clean", "spliced", "zero", "mean"]
    assert found["ablation"].values.tolist() == ["zero", "mean"]
    assert {name: variable.dims for name, variable in found.items()} == {
        "loss": ("run",),
        "kl_divergence": ("run",),
        "loss_recovered": ("ablation",),
        "fvu": (),
        "cosine": (),
        "l0": (),
        "n_token": (),
    }
    assert found["n_token"].dtype == np.int64
    assert float(found["kl_divergence"].sel(run="clean")) == 0


@pytest.mark.parametrize("at_once", [2**21, 101 * 2])
def test_every_token_counts_the_same_however_sequences_are_batched(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dictionary = model_of(), dictionary_of(POINT, D)
    whole = loss_recovered(model, dictionary, SEQUENCES, batch_size=99)
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    for batch_size in (1, 2, 5):
        xr.testing.assert_allclose(
            loss_recovered(model, dictionary, SEQUENCES, batch_size=batch_size), whole, rtol=1e-6
        )
    backwards = loss_recovered(model, dictionary, SEQUENCES[::-1], batch_size=2)
    xr.testing.assert_allclose(backwards, whole, rtol=1e-6)


def test_tokens_come_as_a_rectangle_or_as_lists() -> None:
    model, dictionary = model_of(), dictionary_of(POINT, D)
    rows = sequences_of(9, 9, 9)
    expected = loss_recovered(model, dictionary, rows)
    for given in (torch.stack(rows), [row.tolist() for row in rows]):
        xr.testing.assert_identical(loss_recovered(model, dictionary, given), expected)


def perfect(scale: float = 1.0) -> Dictionary:
    """Reconstructs everything: every feature fires, and the decoder is the encoder's inverse, but for `scale`."""
    W_enc, b_enc = numbers(D, 50, seed=1), torch.full((50,), 1e3, dtype=torch.float64)
    W_dec = torch.linalg.pinv(W_enc) * scale
    return dictionary_of(POINT, D, n_feature=50, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=-b_enc @ W_dec, b_in=None)


def test_a_dictionary_that_reconstructs_everything_recovers_all_of_the_loss() -> None:
    found = loss_recovered(model_of(), perfect(), SEQUENCES)
    np.testing.assert_allclose(found["loss_recovered"].values, 1, atol=1e-8)
    assert float(found["fvu"]) < 1e-15
    assert float(found["cosine"]) == pytest.approx(1, abs=1e-12)
    assert float(found["l0"]) == 50
    assert float(found["kl_divergence"].sel(run="spliced")) < 1e-10


def test_a_dictionary_that_reconstructs_nothing_or_the_mean_recovers_nothing_of_the_loss() -> None:
    """By the ablation that it equals."""
    model = model_of()
    nothing: dict[str, Any] = {"W_dec": torch.zeros(33, D, dtype=torch.float64)}
    zero = dictionary_of(POINT, D, b_dec=torch.zeros(D, dtype=torch.float64), **nothing)
    found = loss_recovered(model, zero, SEQUENCES)
    assert float(found["loss_recovered"].sel(ablation="zero")) == 0
    assert float(found["loss"].sel(run="spliced")) == float(found["loss"].sel(run="zero"))
    out = [model.forward([s], HookSpec().capture(POINT))[POINT][0, 1:-1] for s in SEQUENCES if len(s) > 2]
    of_mean = loss_recovered(model, dictionary_of(POINT, D, b_dec=torch.cat(out).mean(0), **nothing), SEQUENCES)
    assert float(of_mean["loss_recovered"].sel(ablation="mean")) == pytest.approx(0, abs=1e-9)
    assert float(of_mean["fvu"]) == pytest.approx(1, abs=1e-12)


def test_a_reconstruction_of_the_right_direction_and_another_length_is_told_apart() -> None:
    found = loss_recovered(model_of(), perfect(0.5), SEQUENCES)
    assert float(found["cosine"]) == pytest.approx(1, abs=1e-9)
    assert 0.2 < float(found["fvu"]) < 0.6


def test_positions_that_are_skipped_keep_their_activation_in_every_run() -> None:
    """A dictionary that is far off at the first positions alone loses nothing, unless those are replaced too."""
    model = model_of()
    first = [model.forward([s], HookSpec().capture(POINT))[POINT][0, 0] for s in SEQUENCES]
    spoilt = spoiling(perfect(), first)
    kept, replaced_too = (loss_recovered(model, spoilt, SEQUENCES, skip_positions=skip) for skip in (1, 0))
    assert float(kept["fvu"]) < 1e-12
    assert float(kept["kl_divergence"].sel(run="spliced")) < 1e-9
    assert float(replaced_too["fvu"]) > 1e-3
    assert float(replaced_too["kl_divergence"].sel(run="spliced")) > 1e-3


def spoiling(dictionary: Dictionary, vectors: Sequence[Tensor]) -> Dictionary:
    """The same with a feature for each vector that fires at it alone, and writes what is nowhere else."""
    unit = torch.stack([v / v.norm() for v in vectors], 1)
    bias = torch.stack([-v.norm() * (1 - 1e-9) for v in vectors])
    parts = {name: getattr(dictionary, name) for name in Dictionary.__dataclass_fields__}
    parts["W_enc"] = torch.cat([dictionary.W_enc, 1e6 * unit], 1)
    parts["b_enc"] = torch.cat([dictionary.b_enc, 1e6 * bias])
    parts["W_dec"] = torch.cat([dictionary.W_dec, 1e6 * numbers(len(vectors), D, seed=1)])
    return Dictionary(**parts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_and_a_dictionary_may_have_other_dtypes(dtype: str) -> None:
    model, dictionary = model_of(dtype=dtype), dictionary_of(POINT, D, dtype=torch.float32)
    found = loss_recovered(model, dictionary, SEQUENCES, batch_size=99)
    expected = by_hand(model, dictionary, SEQUENCES, 1)
    tolerance = 1e-5 if dtype == "float32" else 0.1
    np.testing.assert_allclose(found["loss"].values, expected["loss"], rtol=tolerance)
    assert all(variable.dtype in (np.float64, np.int64) for variable in found.values())


def test_where_ablation_changes_nothing_there_is_nothing_to_recover() -> None:
    """Of an MLP that writes nothing."""
    model = model_of()
    *blocks, last = model.weights.blocks
    silent = dataclasses.replace(last, down=torch.zeros_like(last.down))
    weights = dataclasses.replace(model.weights, blocks=(*blocks, silent))
    muted = Model(model.spec, weights, model.device, model.dtype)
    found = loss_recovered(muted, dictionary_of("blocks.3.mlp.hook_out", D), SEQUENCES)
    assert np.isnan(found["loss_recovered"].values).all()
    assert np.isnan(float(found["fvu"]))
    assert float(found["loss"].sel(run="zero")) == float(found["loss"].sel(run="clean"))


REFUSED: dict[str, tuple[Callable[[], object], type[ValueError], str]] = {
    "a set": (
        lambda: loss_recovered(model_of(), set_of(D, (5, 6), cross_layer=False), SEQUENCES),  # type: ignore[arg-type]
        DictionaryError,
        r"give one layer of a set, set\.layer",
    ),
    "sequences that are too short": (
        lambda: loss_recovered(model_of(), dictionary_of(POINT, D), sequences_of(2, 1)),
        SchemaError,
        "no sequence has more than 2 tokens",
    ),
    "no sequences": (lambda: loss_recovered(model_of(), dictionary_of(POINT, D), []), ModelError, "the batch is empty"),
    "another width": (
        lambda: loss_recovered(model_of(), dictionary_of(POINT, 35), SEQUENCES),
        HookError,
        "is 35 wide here",
    ),
    "a batch of none": (
        lambda: loss_recovered(model_of(), dictionary_of(POINT, D), SEQUENCES, batch_size=0),
        SchemaError,
        "batch_size = 0",
    ),
    "positions below 0": (
        lambda: loss_recovered(model_of(), dictionary_of(POINT, D), SEQUENCES, skip_positions=-1),
        SchemaError,
        "skip_positions = -1",
    ),
    "a token out of the vocabulary in the last sequence": (
        lambda: loss_recovered(model_of(), dictionary_of(POINT, D), [*SEQUENCES, torch.tensor([1, 2, 999])]),
        ModelError,
        "has the token id 999",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_before_a_forward(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, kind, message = REFUSED[case]
    model_of()

    def computed(*given: object, **settings: object) -> None:
        raise AssertionError("a forward was run")

    monkeypatch.setattr(Model, "forward", computed)
    with pytest.raises(kind, match=message):
        call()
