"""A dictionary encodes and decodes as its formulas say, in every dtype, and is refused where its parts do not fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from forebay.stages.dictionaries.activation import Activation, Kind, Sparse
from forebay.stages.dictionaries.dictionary import Dictionary, InputNorm
from forebay.stages.dictionaries.errors import DictionaryError

from .feature_models import dictionary_of, numbers

D_IN, N_FEATURE, D_OUT = 13, 33, 7
HOOK, HOOK_OUT = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
KINDS = get_args(Kind)
NORMS = get_args(InputNorm)
SHAPES: tuple[tuple[int, ...], ...] = ((), (5,), (2, 3, 4), (0,))


def autoencoder(**settings: Any) -> Dictionary:
    return dictionary_of(HOOK, D_IN, **settings)


def transcoder(**settings: Any) -> Dictionary:
    return dictionary_of(HOOK, D_IN, hook_out=HOOK_OUT, d_out=D_OUT, **settings)


def normalized(x: NDArray[np.float64], norm: str) -> tuple[NDArray[np.float64], Any, Any]:
    """The input as the weights see it, with what leads back: its scale and its shift."""
    if norm == "none":
        return x, 1.0, 0.0
    if norm == "constant_norm_rescale":
        scale = np.sqrt((x**2).sum(-1, keepdims=True) / x.shape[-1])
        return x / scale, scale, 0.0
    shift = x.mean(-1, keepdims=True)
    scale = np.sqrt(((x - shift) ** 2).sum(-1, keepdims=True) / (x.shape[-1] - 1))
    return (x - shift) / (scale + 1e-5), scale, shift


def preactivations(dictionary: Dictionary, x: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = normalized(x, dictionary.input_norm)[0] - (0.0 if dictionary.b_in is None else dictionary.b_in.numpy())
    h: NDArray[np.float64] = np.einsum("...d,df->...f", centred, dictionary.W_enc.numpy()) + dictionary.b_enc.numpy()
    return h


def decoded(dictionary: Dictionary, f: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    out: NDArray[np.float64] = np.einsum("...f,fd->...d", f, dictionary.W_dec.numpy()) + dictionary.b_dec.numpy()
    seen, scale, shift = normalized(x, dictionary.input_norm)
    if dictionary.W_skip is not None:
        out = out + np.einsum("...i,io->...o", seen, dictionary.W_skip.numpy())
    return out * scale + shift if dictionary.denormalize else out


# ── the formulas ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("subtracts", [False, True], ids=["b_in", "no b_in"])
def test_preactivations_are_those_of_the_formula(norm: Any, subtracts: bool, shape: tuple[int, ...]) -> None:
    settings = {} if subtracts else {"b_in": None}
    dictionary = autoencoder(input_norm=norm, **settings)
    x = numbers(*shape, D_IN, seed=9, scale=3.0) + 0.7
    h = preactivations(dictionary, x.numpy())
    np.testing.assert_allclose(dictionary.preactivations(x).numpy(), h, rtol=1e-12, atol=1e-12)
    assert dictionary.encode(x).shape == (*shape, N_FEATURE)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_activation_of_the_preactivations_row_by_row(kind: str) -> None:
    """However many dimensions there are before the last: the function itself is tested on rows."""
    dictionary = autoencoder(kind=kind, input_norm="layer_norm")
    x = numbers(2, 3, 4, D_IN, seed=9)
    h = torch.from_numpy(preactivations(dictionary, x.numpy()))
    expected = torch.stack([dictionary.activation(row[None], dictionary.b_enc)[0] for row in h.view(-1, N_FEATURE)])
    torch.testing.assert_close(dictionary.encode(x).view(-1, N_FEATURE), expected, rtol=1e-10, atol=1e-10)
    assert 0.02 < float((expected != 0).double().mean()) < 0.98


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("skip", [False, True], ids=["no skip", "skip"])
@pytest.mark.parametrize("undone", [False, True], ids=["norm kept", "norm undone"])
@pytest.mark.parametrize("norm", NORMS)
def test_reconstructions_are_those_of_the_formula(norm: Any, undone: bool, skip: bool, shape: tuple[int, ...]) -> None:
    dictionary = transcoder(input_norm=norm, denormalize=undone, skip=skip)
    x = numbers(*shape, D_IN, seed=9, scale=3.0) + 0.7
    f = dictionary.encode(x)
    expected = decoded(dictionary, f.numpy(), x.numpy())
    assert expected.shape == (*shape, D_OUT)
    np.testing.assert_allclose(dictionary.decode(f, x).numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(dictionary.reconstruct(x).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_where_a_norm_is_undone_a_multiple_of_the_input_is_reconstructed_by_that_multiple() -> None:
    x = numbers(6, D_IN, seed=9)
    for norm, shift in (("constant_norm_rescale", 0.0), ("layer_norm", 4.0)):
        dictionary = autoencoder(input_norm=norm)
        found, expected = dictionary.reconstruct(100 * x + shift), 100 * dictionary.reconstruct(x) + shift
        relative = float((found - expected).norm() / expected.norm())
        assert relative < (1e-12 if norm == "constant_norm_rescale" else 1e-4)  # for its epsilon


@pytest.mark.parametrize("norm", NORMS)
def test_the_scale_of_the_output_is_what_a_change_of_features_is_multiplied_by(norm: Any) -> None:
    x, change = numbers(5, D_IN, seed=1), numbers(5, N_FEATURE, seed=2)
    for dictionary in (autoencoder(input_norm=norm), transcoder(input_norm=norm, skip=True)):
        f = dictionary.encode(x)
        expected = dictionary.decode(f + change, x) - dictionary.decode(f, x)
        torch.testing.assert_close(change @ dictionary.W_dec * dictionary.output_scale(x), expected, rtol=0, atol=1e-12)


def test_no_features_at_all_decode_to_the_bias() -> None:
    nothing = torch.zeros(4, N_FEATURE, dtype=torch.float64)
    dictionary = transcoder()
    assert torch.equal(dictionary.decode(nothing), dictionary.b_dec.expand(4, D_OUT))
    assert torch.equal(dictionary.decode_sparse(Sparse.from_dense(nothing)), dictionary.b_dec.expand(4, D_OUT))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("skip", [False, True], ids=["no skip", "skip"])
@pytest.mark.parametrize("kind", ["relu", "abstopk"])
def test_sparse_features_decode_to_what_dense_ones_do(kind: str, skip: bool, norm: Any) -> None:
    for undone in (False, True):
        dictionary = transcoder(kind=kind, skip=skip, input_norm=norm, denormalize=undone)
        x = numbers(9, D_IN, seed=3)
        f = dictionary.encode(x)
        f[[0, 4, 8]] = 0  # rows of which nothing fires, the last one among them
        f[5, 0] = -2.5
        found = dictionary.decode_sparse(Sparse.from_dense(f), x)
        torch.testing.assert_close(found, dictionary.decode(f, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_features_decode_in_every_dtype(dtype: torch.dtype) -> None:
    dictionary = transcoder(dtype=dtype)
    sparse = dictionary.encode_sparse(numbers(9, D_IN, seed=3))
    found = dictionary.decode_sparse(sparse)
    expected = dictionary.to(dtype=torch.float64).decode(sparse.to_dense())
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * float(expected.max())
    )


def test_nothing_is_decoded_of_no_rows() -> None:
    dictionary = transcoder()
    nothing = Sparse.from_dense(torch.zeros(0, N_FEATURE, dtype=torch.float64))
    assert dictionary.decode_sparse(nothing).shape == (0, D_OUT)


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_fire_are_those_of_the_dense_form(kind: str) -> None:
    dictionary, x = autoencoder(kind=kind), numbers(8, D_IN, seed=4)
    assert torch.equal(dictionary.encode_sparse(x).to_dense(), dictionary.encode(x))


@pytest.mark.parametrize("kind", ["topk", "abstopk", "groupmax"])
def test_ranked_features_are_those_of_the_dense_form(kind: str) -> None:
    dictionary, x = autoencoder(kind=kind), numbers(8, D_IN, seed=4)
    values, features = dictionary.encode_ranked(x)
    dense = torch.zeros(8, N_FEATURE + 1, dtype=torch.float64).scatter_(1, features % (N_FEATURE + 1), values)
    assert torch.equal(dense[:, :-1], dictionary.encode(x))  # −1 falls into the place beyond the last feature


def test_lengths_of_decoder_rows() -> None:
    dictionary = transcoder(dtype=torch.bfloat16)
    assert dictionary.decoder_norms.dtype == torch.float32
    expected = np.sqrt((dictionary.W_dec.double().numpy() ** 2).sum(-1))
    np.testing.assert_allclose(dictionary.decoder_norms.numpy(), expected, rtol=1e-6)


def test_gradients_flow_through_encoder_and_decoder() -> None:
    dictionary = autoencoder(kind="jumprelu", input_norm="layer_norm")
    x = numbers(3, D_IN, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(dictionary.reconstruct, (x,))


# ── dtypes and devices ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dictionary_in_another_dtype_keeps_its_thresholds_float32() -> None:
    for kind, names in (("jumprelu", ["threshold"]), ("batchtopk", ["threshold"]), ("gated", ["r_mag", "b_mag"])):
        dictionary = autoencoder(kind=kind, dtype=torch.float32)
        narrow = dictionary.to(dtype=torch.bfloat16)
        assert narrow.dtype == narrow.W_dec.dtype == narrow.b_enc.dtype == torch.bfloat16
        for name in names:
            assert torch.equal(getattr(narrow.activation, name), getattr(dictionary.activation, name))
            assert getattr(narrow.activation, name).dtype == torch.float32


def test_a_threshold_that_bfloat16_would_round_decides_as_it_is_written() -> None:
    """0.999 is 1 in bfloat16: rounded, feature 0 would be silent at a preactivation of exactly 1."""
    dictionary = autoencoder(
        n_feature=2,
        W_enc=torch.zeros(D_IN, 2),
        b_enc=torch.ones(2),
        b_in=None,
        b_dec=torch.zeros(D_IN),
        W_dec=torch.ones(2, D_IN),
        activation=Activation(kind="jumprelu", threshold=torch.tensor([0.999, 1.0])),
        dtype=torch.bfloat16,
    )
    assert dictionary.encode(torch.zeros(D_IN)).tolist() == [1.0, 0.0]


def test_activations_are_cast_to_the_dtype_of_the_dictionary() -> None:
    dictionary, x = transcoder(dtype=torch.float32, skip=True), numbers(5, D_IN, seed=1)
    for given in (x, x.half(), x.bfloat16()):
        expected = dictionary.reconstruct(given.float())
        assert expected.dtype == torch.float32
        assert torch.equal(dictionary.reconstruct(given), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dictionary_can_be_pickled(kind: str) -> None:
    dictionary, x = autoencoder(kind=kind), numbers(4, D_IN, seed=1)
    again = pickle.loads(pickle.dumps(dictionary))  # noqa: S301 - it is our own
    assert torch.equal(again.reconstruct(x), dictionary.reconstruct(x))
    assert again.provenance == dictionary.provenance


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "W_enc is a vector": ({"W_enc": torch.ones(9)}, r"W_enc has shape \(9,\); a matrix was expected"),
    "W_dec is a vector": ({"W_dec": torch.ones(9)}, r"W_dec has shape \(9,\); a matrix was expected"),
    "b_enc": ({"b_enc": torch.ones(32)}, r"b_enc has shape \(32,\); \(33,\) was expected, for W_enc has \(13, 33\)"),
    "b_in": ({"b_in": torch.ones(33)}, r"b_in has shape \(33,\); \(13,\) was expected"),
    "W_dec": ({"W_dec": torch.ones(7, 33)}, r"W_dec has shape \(7, 33\); \(33, 33\) was expected"),
    "b_dec": ({"b_dec": torch.ones(13)}, r"b_dec has shape \(13,\); \(7,\) was expected"),
    "W_skip": ({"W_skip": torch.ones(7, 13)}, r"W_skip has shape \(7, 13\); \(13, 7\) was expected"),
    "threshold": (
        {"activation": Activation(kind="jumprelu", threshold=torch.ones(1))},
        r"threshold has shape \(1,\); \(33,\) was expected",
    ),
    "k": ({"activation": Activation(kind="topk", k=34)}, "k = 34 of 33 features"),
    "groups": ({"activation": Activation(kind="groupmax", k=4)}, "33 features do not make 4 equal groups"),
}


@pytest.mark.parametrize("case", SHAPES_REFUSED)
def test_parts_that_do_not_fit_are_refused(case: str) -> None:
    wrong, message = SHAPES_REFUSED[case]
    parts = {name: getattr(transcoder(), name) for name in Dictionary.__dataclass_fields__}
    wrong = {name: value.double() if isinstance(value, Tensor) else value for name, value in wrong.items()}
    with pytest.raises(DictionaryError, match=f"a random dictionary: {message}"):
        Dictionary(**{**parts, **wrong})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "b_in", "W_dec", "b_dec", "W_skip", "threshold"])
def test_a_number_that_is_not_finite_is_refused_by_the_name_of_what_it_is_in(name: str, value: float) -> None:
    parts = {name: getattr(transcoder(kind="jumprelu", skip=True), name) for name in Dictionary.__dataclass_fields__}
    if name == "threshold":
        threshold = parts["activation"].threshold.clone()
        threshold[3] = value
        parts["activation"] = Activation(kind="jumprelu", threshold=threshold)
    else:
        parts[name] = parts[name].clone()
        parts[name].view(-1)[3] = value
    with pytest.raises(DictionaryError, match=f"{name} has 1 values that are NaN or infinite"):
        Dictionary(**parts)


def test_infinities_that_cancel_are_refused_and_large_numbers_whose_sum_overflows_are_not() -> None:
    parts = {name: getattr(transcoder(dtype=torch.float32), name) for name in Dictionary.__dataclass_fields__}
    parts["b_enc"] = torch.full((N_FEATURE,), 3e38)
    assert Dictionary(**parts).n_feature == N_FEATURE
    parts["b_enc"] = torch.zeros(N_FEATURE)
    parts["b_enc"][0], parts["b_enc"][1] = torch.inf, -torch.inf
    with pytest.raises(DictionaryError, match="b_enc has 2 values that are NaN or infinite"):
        Dictionary(**parts)


def test_weights_that_a_narrower_dtype_cannot_hold_are_refused_when_they_are_cast() -> None:
    with pytest.raises(DictionaryError, match="b_dec has 7 values that are NaN or infinite"):
        transcoder(b_dec=torch.full((D_OUT,), 1e5, dtype=torch.float64)).to(dtype=torch.float16)


def test_parts_of_different_dtypes_are_refused() -> None:
    parts = {name: getattr(transcoder(), name) for name in Dictionary.__dataclass_fields__}
    with pytest.raises(DictionaryError, match=r"W_dec is torch\.float32, W_enc torch\.float64"):
        Dictionary(**{**parts, "W_dec": parts["W_dec"].float()})


CALLS: dict[str, tuple[Callable[[Dictionary], object], str]] = {
    "encode": (lambda d: d.encode(torch.ones(3, D_OUT)), rf"reads {HOOK} of width 13; it was given 7 wide"),
    "encode_sparse": (lambda d: d.encode_sparse(torch.ones(3, 14)), "of width 13; it was given 14 wide"),
    "decode": (lambda d: d.decode(torch.ones(2, 32), torch.ones(2, 13)), "has 33 features; it was given 32 to decode"),
    "decode_sparse": (
        lambda d: d.decode_sparse(Sparse.from_dense(torch.ones(2, 34)), torch.ones(2, 13)),
        "has 33 features; it was given 34 to decode",
    ),
    "decode without x": (lambda d: d.decode(torch.ones(2, 33)), r"has a skip connection: decode takes the activations"),
    "x of another width": (lambda d: d.decode(torch.ones(2, 33), torch.ones(2, 7)), "of width 13; it was given 7 wide"),
    "ranks": (lambda d: d.encode_ranked(torch.ones(2, 13)), "relu has no most features a token"),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_does_not_fit_the_dictionary_is_refused(call: str) -> None:
    function, message = CALLS[call]
    with pytest.raises(DictionaryError, match=message):
        function(transcoder(skip=True))


def test_decoding_that_undoes_a_norm_takes_the_activations_too() -> None:
    dictionary = autoencoder(input_norm="layer_norm")
    assert dictionary.needs_input
    with pytest.raises(DictionaryError, match=r"undoes the input's layer_norm: decode takes the activations too"):
        dictionary.decode(torch.ones(2, N_FEATURE))
    assert not transcoder(input_norm="layer_norm").needs_input
