"""Interventions on features do what the same edit does, written out with plain functions and torch's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from forebay.stages.dictionaries.activation import Kind
from forebay.stages.dictionaries.dictionary import InputNorm
from forebay.stages.dictionaries.interventions import Clamp, Inject, Splice, Suppress
from forebay.stages.models.taps import HookSpec

from .feature_edits import EDITS, LENGTHS, POINT, SAID, TOKENS, D, check, clamped, logits_differ, transcoder
from .feature_models import dictionary_of, model_of, numbers

# ── autoencoders ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("kind", get_args(Kind))
def test_an_edit_of_an_autoencoders_features_is_the_one_that_is_written_out(kind: str, edit: str) -> None:
    check(model_of(), dictionary_of(POINT, D, kind=kind), edit)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("norm", get_args(InputNorm))
def test_what_features_write_is_multiplied_as_decoding_multiplies_it(norm: Any, edit: str) -> None:
    check(model_of(), dictionary_of(POINT, D, kind="jumprelu", input_norm=norm), edit)


@pytest.mark.parametrize("edit", EDITS)
def test_an_autoencoders_intervention_may_be_registered_by_hand(edit: str) -> None:
    """Under the name of its point, or another one that means the same."""
    for name in (POINT, "blocks.1.hook_out"):
        check(model_of(), dictionary_of(POINT, D), edit, lambda it, name=name: HookSpec().intervene(name, it))  # type: ignore[misc]


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "all heads, laid flat": ("blocks.1.attn.hook_z", {"d_in": 90}),
    "one head": ("blocks.2.attn.hook_z", {"d_in": 10, "head": 4}),
    "the first head": ("blocks.2.attn.hook_z", {"d_in": 10, "head": 0}),
    "one key-value head": ("blocks.1.attn.hook_v", {"d_in": 10, "head": 2}),
    "all key-value heads": ("blocks.0.attn.hook_k", {"d_in": 30}),
    "the hidden layer of an MLP": ("blocks.1.mlp.hook_post", {"d_in": 52}),
    "outside of the blocks": ("hook_embed", {"d_in": 36}),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("case", HEADS)
def test_a_dictionary_of_heads_reads_and_writes_them_flat_or_one_alone(case: str, edit: str) -> None:
    hook, settings = HEADS[case]
    check(model_of(), dictionary_of(hook, **settings), edit)


def test_nothing_of_the_other_heads_is_changed() -> None:
    model, dictionary = model_of(), dictionary_of("blocks.2.attn.hook_z", 10, head=4)
    clean = model.forward(TOKENS, HookSpec().capture(dictionary.hook))
    out = model.forward(TOKENS, Splice(dictionary).hooks().capture(dictionary.hook))
    same = (out[dictionary.hook] == clean[dictionary.hook]).all(-1).all(0).all(0)
    assert same.tolist() == [head != 4 for head in range(9)]


def test_a_feature_that_does_not_fire_loses_nothing_and_one_that_does_all_that_it_wrote() -> None:
    model, dictionary = model_of(), dictionary_of(POINT, D)
    clean = model.forward(TOKENS, HookSpec().capture(POINT))
    f = dictionary.encode(clean[POINT])
    for feature in (0, 5):
        out = model.forward(TOKENS, Suppress(dictionary, [feature]).hooks().capture(POINT))
        silent = f[..., feature] == 0
        assert 0 < int(silent.sum()) < silent.numel()
        assert torch.equal(out[POINT][silent], clean[POINT][silent])
        lost = clean[POINT] - out[POINT]
        torch.testing.assert_close(lost, f[..., feature, None] * dictionary.W_dec[feature], rtol=0, atol=1e-12)


def test_a_strength_below_zero_subtracts_whether_or_not_the_feature_fires() -> None:
    """The suppression of candle-mi, which is not that of `Suppress`."""
    model, dictionary = model_of(), dictionary_of(POINT, D)
    clean = model.forward(TOKENS, HookSpec().capture(POINT))
    out = model.forward(TOKENS, Inject(dictionary, {5: -4.0}).hooks().capture(POINT))
    lost = clean[POINT] - out[POINT]
    torch.testing.assert_close(lost, (4 * dictionary.W_dec[5]).expand_as(lost), rtol=0, atol=1e-12)


def test_clamping_features_to_what_they_are_changes_nothing_but_rounding() -> None:
    model, dictionary = model_of(), dictionary_of(POINT, D, kind="gated", input_norm="layer_norm")
    clean = model.forward(TOKENS, HookSpec().capture(POINT))
    f = dictionary.encode(clean[POINT])
    out = model.forward(TOKENS, Clamp(dictionary, {n: f[..., n] for n in range(33)}).hooks().capture(POINT))
    torch.testing.assert_close(out[POINT], clean[POINT], rtol=0, atol=1e-12)


def test_what_the_dictionary_does_not_explain_is_left_by_a_clamp() -> None:
    """x′ − decode(f′) is what x − decode(f) was, with f′ the features that were asked for."""
    model, dictionary = model_of(), dictionary_of(POINT, D, kind="topk")
    x = model.forward(TOKENS, HookSpec().capture(POINT))[POINT]
    new = model.forward(TOKENS, Clamp(dictionary, SAID).hooks().capture(POINT))[POINT]
    f = dictionary.encode(x)
    error, left = x - dictionary.decode(f), new - dictionary.decode(clamped(f, SAID))
    torch.testing.assert_close(left, error, rtol=0, atol=1e-12)


def test_several_interventions_act_in_their_order_each_on_what_the_one_before_left() -> None:
    model, dictionary = model_of(), dictionary_of(POINT, D)
    x = model.forward(TOKENS, HookSpec().capture(POINT))[POINT]
    both = Inject(dictionary, {3: 2.0}).hooks().extend(Suppress(dictionary, [3]).hooks())
    added = x + 2 * dictionary.W_dec[3]
    expected = added - dictionary.encode(added)[..., 3:4] * dictionary.W_dec[3]
    torch.testing.assert_close(model.forward(TOKENS, both.capture(POINT))[POINT], expected, rtol=0, atol=1e-12)


def test_numbers_may_differ_from_token_to_token() -> None:
    """As a tensor or an array that broadcasts to the tokens addressed, beside numbers that do not."""
    model, dictionary = model_of(), dictionary_of(POINT, D)
    x = model.forward(TOKENS, HookSpec().capture(POINT))[POINT]
    strength = numbers(2, 3, seed=5)
    where = {"sequence": [2, 0], "position": [-1, 2, 0]}
    said = {4: strength, 9: strength[:1].numpy(), 0: 3, 11: strength[:, :1].float()}
    out = model.forward(TOKENS, Inject(dictionary, said).at(**where).hooks().capture(POINT))[POINT]
    for n, sequence in enumerate((2, 0)):
        for p, position in enumerate((LENGTHS[sequence] - 1, 2, 0)):
            expected = (
                x[sequence, position] + strength[n, p] * dictionary.W_dec[4] + strength[0, p] * dictionary.W_dec[9]
            )
            expected = expected + 3 * dictionary.W_dec[0] + strength[n, 0].float().double() * dictionary.W_dec[11]
            torch.testing.assert_close(out[sequence, position], expected, rtol=0, atol=1e-12)
    one = model.forward(
        TOKENS, Inject(dictionary, {np.int64(4): strength[0, 0]}).at(sequence=1, position=3).hooks().capture(POINT)
    )
    torch.testing.assert_close(one[POINT][1, 3], x[1, 3] + strength[0, 0] * dictionary.W_dec[4], rtol=0, atol=1e-12)


# ── splicing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["autoencoder", "of heads", "transcoder", "transcoder of a normalised stream"])
def test_a_splice_with_its_error_and_no_edit_changes_no_bit(case: str, dtype: str) -> None:
    dictionary = {
        "autoencoder": dictionary_of(POINT, D, input_norm="layer_norm", dtype=torch.float32),
        "of heads": dictionary_of("blocks.1.attn.hook_z", 90, kind="topk", dtype=torch.bfloat16),
        "transcoder": transcoder("hook_resid_mid", "mlp.hook_out", D, D),
        "transcoder of a normalised stream": transcoder("ln2.hook_normalized", "mlp.hook_out", D, D, skip=True),
    }[case]
    model = model_of(dtype=dtype)
    clean, out = (model.forward(TOKENS, hooks) for hooks in (None, Splice(dictionary, error=True).hooks()))
    assert clean.logits is not None
    assert out.logits is not None
    assert torch.equal(out.logits, clean.logits)


def test_a_dictionary_that_reconstructs_everything_changes_nothing_but_rounding() -> None:
    """More features than dimensions, all of them firing at every token, and a decoder that is the encoder's inverse."""
    n_feature = 50
    b_enc = torch.full((n_feature,), 1e3, dtype=torch.float64)
    W_enc = numbers(D, n_feature, seed=1)
    W_dec = torch.linalg.pinv(W_enc)
    b_dec = -b_enc @ W_dec
    perfect = dictionary_of(
        POINT, D, n_feature=n_feature, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, b_in=None
    )
    model = model_of()
    assert logits_differ(model.forward(TOKENS, Splice(perfect).hooks()), model.forward(TOKENS)) < 1e-9


def test_a_splice_without_features_leaves_the_bias_of_the_decoder() -> None:
    model, dictionary = model_of(), dictionary_of(POINT, D)
    out = model.forward(TOKENS, Splice(dictionary, edit=torch.zeros_like).hooks().capture(POINT))
    assert torch.equal(out[POINT], dictionary.b_dec.expand_as(out[POINT]))


def test_an_edit_may_be_a_function_that_changes_features_in_place_or_gives_another_dtype() -> None:
    model, dictionary = model_of(), dictionary_of(POINT, D)
    edits: list[Callable[[Tensor], Tensor]] = [lambda f: f.zero_(), lambda f: torch.zeros(f.shape, dtype=torch.float16)]
    expected = model.forward(TOKENS, Suppress(dictionary, range(33)).hooks())
    for edit in edits:
        assert logits_differ(model.forward(TOKENS, Splice(dictionary, error=True, edit=edit).hooks()), expected) < 1e-9
