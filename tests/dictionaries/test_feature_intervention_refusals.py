"""What cannot be done with features is refused before the forward computes anything, with the offender's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay.stages.dictionaries.interventions import Clamp, FeatureIntervention, Inject, Splice, Suppress
from forebay.stages.dictionaries.transcoders import FeatureId
from forebay.stages.models.errors import HookError
from forebay.stages.models.points import HookPoint
from forebay.stages.models.taps import HookSpec

from .feature_edits import POINT, TOKENS, D, transcoder
from .feature_models import dictionary_of, model_of, set_of

SAE = dictionary_of(POINT, D)
ONE = transcoder("hook_resid_mid", "mlp.hook_out", D, D)
SET = set_of(D, (5, 7, 6, 9), cross_layer=True)
LATE = transcoder("mlp.hook_out", "hook_resid_mid", D, D)


def at(point: str, intervention: FeatureIntervention) -> Callable[[], HookSpec]:
    return lambda: HookSpec().intervene(point, intervention)


def of(hook: str, d_in: int = D, **settings: Any) -> Callable[[], HookSpec]:
    return Suppress(dictionary_of(hook, d_in, **settings), [0]).hooks


REFUSED: dict[str, tuple[Callable[[], HookSpec], str]] = {
    # ── where ──
    "another point": (
        at("blocks.2.hook_resid_post", Clamp(SAE, {0: 1.0})),
        "Clamp at blocks.2.hook_resid_post: a random dictionary belongs at blocks.1.hook_resid_post",
    ),
    "another point for a splice": (at("blocks.1.hook_resid_mid", Splice(SAE)), "belongs at blocks.1.hook_resid_post"),
    "an injection elsewhere": (
        at("blocks.1.hook_resid_post", Inject(ONE, {0: 1.0})),
        "belongs at blocks.1.mlp.hook_out",
    ),
    "a transcoder at one point": (
        at("blocks.1.mlp.hook_out", Clamp(ONE, {0: 1.0})),
        r"it reads at blocks\.1\.hook_resid_mid what it writes at blocks\.1\.mlp\.hook_out: take its hooks\(\)",
    ),
    "a set at one point": (at("blocks.1.mlp.hook_out", Suppress(SET, [FeatureId(1, 0)])), r"take its hooks\(\)"),
    "a point read too late": (
        Clamp(LATE, {0: 1.0}).hooks,
        "what is read at blocks.1.mlp.hook_out comes too late for blocks.1.hook_resid_mid",
    ),
    "a point of an unknown name": (
        of("blocks.1.hook_mlp_input"),
        "names 'blocks.1.hook_mlp_input'; load it with hook=",
    ),
    "a kind of point that is none": (
        lambda: Inject(ONE, {0: 1.0}).hooks(where="resid_post"),
        "no kind of hook point is called 'resid_post'",
    ),
    "a layer beyond the last": (
        of("blocks.4.hook_resid_post"),
        "names layer 4, but the layers of this model are 0 to 3",
    ),
    "a point that the model lacks": (of("blocks.1.rwkv.hook_out"), "has no hook point 'blocks.1.rwkv.hook_out'"),
    "another model's width": (of(POINT, 35), r"is 35 wide here, and this model is \[d_model=36\]"),
    "another model's width beyond the point read": (
        Suppress(transcoder("hook_resid_mid", "mlp.hook_out", D, 35), [0]).hooks,
        "is 35 wide here",
    ),
    "another model's heads": (
        of("blocks.1.attn.hook_z", 80),
        r"is 80 wide here, and this model is \[head=9, d_head=10\]",
    ),
    "a head that is not there": (of("blocks.1.attn.hook_z", 10, head=9), "is that of head 9; there are 9 here"),
    "a head counted from the end": (of("blocks.1.attn.hook_z", 10, head=-1), "is that of head -1; there are 9 here"),
    "a head where there are none": (of(POINT, 36, head=0), "is that of head 0; there are 0 here"),
    "attention weights": (of("blocks.1.attn.hook_pattern", 9), "a token's vector, and there is none here"),
    "a norm's scale": (of("blocks.1.ln1.hook_scale", 1), "a token's vector, and there is none here"),
    # ── which tokens ──
    "a position beyond a sequence": (
        Clamp(SAE, {0: 1.0}).at(position=5).hooks,
        "position=5 is out of range in sequence 1, of 5",
    ),
    "a sequence that is not there": (Splice(ONE).at(sequence=3).hooks, "sequence=3 is out of range"),
    "a channel": (Inject(SAE, {0: 1.0}).at(d_model=3).hooks, r"\.at\(\) takes position and sequence, not d_model"),
    "a head of a flattened point": (Splice(dictionary_of("blocks.1.attn.hook_z", 90)).at(head=3).hooks, "not head"),
    # ── which features ──
    "a feature beyond the last": (Inject(SAE, {33: 1.0}).hooks, "a random dictionary has features 0 to 32, and no 33"),
    "a feature below 0": (Suppress(SAE, [-1]).hooks, "has features 0 to 32, and no -1"),
    "a feature registered by hand": (at(POINT, Clamp(SAE, {40: 1.0})), "has features 0 to 32, and no 40"),
    "a feature of an edit": (Splice(SAE, edit={33: 0.0}).hooks, "has features 0 to 32, and no 33"),
    "a feature that is no number": (Suppress(SAE, ["7"]).hooks, "'7' names no feature of a random dictionary"),  # type: ignore[list-item]
    "half a feature": (Clamp(SAE, {1.5: 1.0}).hooks, "1.5 names no feature"),  # type: ignore[dict-item]
    "a set's feature of one dictionary": (Suppress(SAE, [FeatureId(0, 1)]).hooks, "names no feature"),
    "one dictionary's feature of a set": (Suppress(SET, [3]).hooks, r"FeatureId\(layer, index\) is expected, not 3"),
    "a layer of a set": (Inject(SET, {FeatureId(4, 0): 1.0}).hooks, "has layers 0 to 3, and no 4"),
    "a feature of a layer": (
        Inject(SET, {FeatureId(2, 6): 1.0}).hooks,
        "layer 2 of a random dictionary has features 0 to 5, and no 6",
    ),
    "a feature twice": (Suppress(SAE, [3, 7, 3]).hooks, "a feature is named twice"),
    "a feature twice under two names": (
        Suppress(SET, [FeatureId(1, 2), (1, 2)]).hooks,
        r"feature \(1, 2\) of .* is named twice",
    ),
    "no feature": (Clamp(SAE, {}).hooks, "no feature of a random dictionary is named"),
    "no feature of a set": (Suppress(SET, []).hooks, "no feature of a random dictionary is named"),
    "a list where numbers are needed": (Inject(SAE, [3]).hooks, "a mapping from features to strengths is expected"),  # type: ignore[arg-type]
    "a number where a list is needed": (Suppress(SAE, 3).hooks, "a list of features is expected"),  # type: ignore[arg-type]
    # ── by how much ──
    "a strength that is NaN": (Inject(SAE, {0: float("nan")}).hooks, "the strength must be finite"),
    "an infinite value": (Clamp(ONE, {0: 1.0, 4: float("inf")}).hooks, "the value must be finite"),
    "a NaN among a set's": (
        Inject(SET, {FeatureId(0, 0): torch.tensor([float("nan")] * 11)}).hooks,
        "strength must be finite",
    ),
    "an infinite edit": (Splice(SAE, edit={0: float("-inf")}).hooks, "the value must be finite"),
    "numbers for other tokens": (
        Clamp(SAE, {0: torch.ones(4)}).at(position=[0, 1, 2]).hooks,
        r"the value has shape \[position=4\], which does not broadcast to the part .*, \[sequence=3, position=3\]",
    ),
    "a strength that is no number": (Inject(SAE, {0: "3"}).hooks, "the strength is a str that cannot be put in"),  # type: ignore[dict-item]
    # ── splices ──
    "a splice of a set": (Splice(SET).hooks, r"one dictionary is spliced in at a time"),
    "an edit that is none": (
        Splice(SAE, edit=0.0).hooks,
        "edit is a float: values by feature are expected, or a function",
    ),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_anything_is_computed(case: str) -> None:
    make, message = REFUSED[case]
    fired: list[HookPoint] = []
    with pytest.raises(HookError, match=message):
        model_of().forward(TOKENS, make().capture("hook_embed"), sink=lambda point, value: fired.append(point))
    assert fired == []


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "fewer features": (lambda f: f[..., 1:], r"the edit of features of shape \(3, 11, 33\) gave \(3, 11, 32\)"),
    "nothing": (lambda f: None, "gave NoneType: the same shape is expected"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_edit_that_gives_no_features_is_refused_when_it_does(case: str) -> None:
    edit, message = WRONG[case]
    with pytest.raises(HookError, match=message):
        model_of().forward(TOKENS, Splice(SAE, edit=edit).hooks())
