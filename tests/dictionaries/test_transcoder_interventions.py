"""A transcoder's features are read at one point of a forward and written at another one of the same forward."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay.stages.dictionaries.interventions import Clamp, FeatureIntervention, Inject, Suppress
from forebay.stages.models.points import HookPoint
from forebay.stages.models.taps import HookSpec

from .feature_edits import EDITS, TOKENS, D, check, transcoder
from .feature_models import model_of, sequences_of

TRANSCODERS: dict[str, tuple[str, tuple[str, str, int, int], dict[str, Any]]] = {
    "of an MLP": ("llama", ("hook_resid_mid", "mlp.hook_out", D, D), {"kind": "topk"}),
    "with a skip connection": ("llama", ("mlp.hook_in", "hook_mlp_out", D, D), {"skip": True}),
    "of a stream before the weight": ("gemma2", ("ln2.hook_normalized", "hook_mlp_out", D, D), {"kind": "jumprelu"}),
    "into the hidden layer": ("gpt2", ("ln2.hook_normalized", "mlp.hook_post", 90, 52), {}),
    "of the stream into heads": ("llama", ("attn.hook_in", "attn.hook_z", D, 90), {}),
    "of one head into the stream": ("llama", ("attn.hook_z", "hook_attn_out", 10, D), {"head": 3}),
    "of normalised inputs": ("llama", ("hook_resid_mid", "mlp.hook_out", D, D), {"input_norm": "layer_norm"}),
    "that undoes the norm": (
        "llama",
        ("hook_resid_mid", "mlp.hook_out", D, D),
        {"input_norm": "constant_norm_rescale", "denormalize": True, "skip": True},
    ),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("case", TRANSCODERS)
def test_a_transcoder_reads_at_one_point_of_a_forward_what_it_writes_at_another(case: str, edit: str) -> None:
    family, points, settings = TRANSCODERS[case]
    check(model_of(family), transcoder(*points, **settings), edit)


def test_features_of_a_transcoder_are_injected_by_hand_where_it_writes() -> None:
    check(
        model_of(),
        one := transcoder("hook_resid_mid", "mlp.hook_out", D, D),
        "Inject",
        lambda intervention: HookSpec().intervene(one.hook_out, intervention),
    )


def test_what_features_write_can_be_added_to_the_stream_instead() -> None:
    model, one = model_of("gemma2"), transcoder("ln2.hook_normalized", "mlp.hook_out", D, D)
    out_of = "blocks.1.hook_resid_post"
    clean = model.forward(TOKENS, HookSpec().capture(one.hook, out_of))
    f = one.encode(clean[one.hook])
    said: dict[str, tuple[FeatureIntervention, Tensor]] = {
        "Inject": (Inject(one, {2: 3.0}), torch.full_like(f[..., :1], 3.0)),
        "Clamp": (Clamp(one, {2: 3.0}), 3.0 - f[..., 2:3]),
        "Suppress": (Suppress(one, [2]), -f[..., 2:3]),
    }
    for intervention, change in said.values():
        out = model.forward(TOKENS, intervention.hooks(where="hook_resid_post").capture(out_of))
        torch.testing.assert_close(out[out_of], clean[out_of] + change * one.W_dec[2], rtol=0, atol=1e-9)


def test_one_spec_serves_many_forwards_whatever_their_sizes() -> None:
    """One after another, at the same time in threads, and one within another."""
    model, one = model_of(), transcoder("hook_resid_mid", "mlp.hook_out", D, D, kind="topk")
    hooks = Clamp(one, {2: 3.0, 5: 1.0}).at(position=-1).hooks()
    batches = [sequences_of(*lengths, seed=40 + n) for n, lengths in enumerate([(4, 9), (7,), (3, 3, 12), (9, 4)])]

    def fresh(batch: Sequence[Tensor]) -> Tensor:
        logits = model.forward(batch, Clamp(one, {2: 3.0, 5: 1.0}).at(position=-1).hooks()).logits
        assert logits is not None
        return logits

    expected = [fresh(batch) for batch in batches]
    for batch, logits in zip(batches, expected, strict=True):
        found = model.forward(batch, hooks).logits
        assert found is not None
        assert torch.equal(found, logits)
    with ThreadPoolExecutor(4) as threads:
        for n, out in enumerate(threads.map(lambda n: model.forward(batches[n % 4], hooks), range(24))):
            assert out.logits is not None
            assert torch.equal(out.logits, expected[n % 4])

    def another_forward(value: Tensor, point: HookPoint) -> Tensor:
        model.forward(batches[2], hooks)
        return value

    between = hooks.intervene("blocks.1.mlp.hook_in", another_forward)
    out = model.forward(batches[0], between)
    assert out.logits is not None
    torch.testing.assert_close(out.logits, expected[0], rtol=1e-12, atol=1e-12)


def test_text_is_generated_with_features_clamped_at_every_step() -> None:
    model, one = model_of(), transcoder("hook_resid_mid", "mlp.hook_out", D, D)
    hooks = Clamp(one, {2: 30.0}).at(position=-1).hooks()
    (found,) = model.generate([TOKENS[0]], hooks=hooks, max_new_tokens=6)
    tokens = TOKENS[0].tolist()
    for _ in range(6):
        logits = model.forward([tokens], hooks).logits
        assert logits is not None
        tokens.append(int(logits[0, -1].argmax()))
    assert found.token_ids.tolist() == tokens[len(TOKENS[0]) :]
    assert found.token_ids.tolist() != model.generate([TOKENS[0]], max_new_tokens=6)[0].token_ids.tolist()
