"""Edits of features, each as an intervention and written out one vector at a time, and the check that they agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from forebay.stages.dictionaries.dictionary import Dictionary
from forebay.stages.dictionaries.interventions import Clamp, FeatureIntervention, Inject, Splice, Suppress
from forebay.stages.models.forward import Forward
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

from .feature_models import dictionary_of, sequences_of

LENGTHS = (11, 5, 8)
TOKENS = sequences_of(*LENGTHS)
POINT = "blocks.1.hook_resid_post"
D = 36
WHERE: dict[str, Any] = {"sequence": [2, 0], "position": [-1, 2]}
ADDRESSED = [(sequence, position) for sequence in (2, 0) for position in (LENGTHS[sequence] - 1, 2)]

Edit = tuple[Callable[[Dictionary], FeatureIntervention], Callable[[Dictionary, Tensor, Tensor], Tensor]]


def rows(dictionary: Dictionary, f: Tensor, scale: Tensor, said: Mapping[int, float], counts: bool) -> Tensor:
    """Σ (what is said of a feature, less its activation where it counts) · decoder row, one feature at a time."""
    total = torch.zeros(dictionary.d_out, dtype=torch.float64)
    for feature, value in said.items():
        total = total + (value - (f[feature] if counts else 0.0)) * dictionary.W_dec[feature] * scale
    return total


def edit_of(make: Callable[[Dictionary], FeatureIntervention], said: Mapping[int, float], counts: bool) -> Edit:
    def expected(dictionary: Dictionary, x: Tensor, y: Tensor) -> Tensor:
        f = dictionary.encode(x[None])[0]
        return y + rows(dictionary, f, dictionary.output_scale(x[None])[0], said, counts)

    return make, expected


def clamped(f: Tensor, said: Mapping[int, float]) -> Tensor:
    f = f.clone()
    for feature, value in said.items():
        f[..., feature] = value
    return f


SAID = {0: 2.0, 7: -1.5, 32: 0.25}
EDITS: dict[str, Edit] = {
    "Inject": edit_of(lambda d: Inject(d, SAID), SAID, counts=False),
    "Clamp": edit_of(lambda d: Clamp(d, SAID), SAID, counts=True),
    "Suppress": edit_of(lambda d: Suppress(d, range(20)), dict.fromkeys(range(20), 0.0), counts=True),
    "Splice": (Splice, lambda d, x, y: d.reconstruct(x[None])[0]),
    "Splice of edited features": (
        lambda d: Splice(d, edit=lambda f: f.mul_(2).sub_(0.1)),
        lambda d, x, y: d.decode(2 * d.encode(x[None]) - 0.1, x[None])[0],
    ),
    "Splice of clamped features": (
        lambda d: Splice(d, edit=SAID),
        lambda d, x, y: d.decode(clamped(d.encode(x[None]), SAID), x[None])[0],
    ),
    "Splice of edited features with the error": (
        lambda d: Splice(d, error=True, edit=torch.square),
        lambda d, x, y: y + d.decode(d.encode(x[None]).square(), x[None])[0] - d.reconstruct(x[None])[0],
    ),
    "Splice of clamped features with the error": (
        lambda d: Splice(d, error=True, edit=SAID),
        edit_of(Splice, SAID, counts=True)[1],
    ),
}


def flat(value: Tensor, head: int | None = None) -> Tensor:
    """Vectors [sequence, position, d] of an activation, of all heads end to end or of one."""
    return value.flatten(2) if head is None else value[:, :, head]


def expected_at(
    clean: Forward, dictionary: Dictionary, expected: Callable[[Dictionary, Tensor, Tensor], Tensor]
) -> Tensor:
    """The activation at `hook_out` with the vectors of the tokens addressed replaced one by one."""
    read, written = clean[dictionary.hook], clean[dictionary.hook_out].clone()
    head_out = dictionary.head if dictionary.hook == dictionary.hook_out else None
    for sequence, position in ADDRESSED:
        x = flat(read, dictionary.head)[sequence, position].double()
        y = flat(written, head_out)[sequence, position].double()
        new = expected(dictionary, x, y)
        place = written[sequence, position] if head_out is None else written[sequence, position, head_out]
        place.copy_(new.reshape(place.shape))
    return written


def check(
    model: Model,
    dictionary: Dictionary,
    edit: str,
    hooks: Callable[[FeatureIntervention], HookSpec] = FeatureIntervention.hooks,
) -> None:
    """That an intervention gives the activation that is computed one vector at a time, and nothing else differs, also
    in what comes of it.
    """
    make, expected = EDITS[edit]
    clean = model.forward(TOKENS, HookSpec().capture(dictionary.hook, dictionary.hook_out))
    new = expected_at(clean, dictionary, expected)
    out = model.forward(TOKENS, hooks(make(dictionary).at(**WHERE)).capture(dictionary.hook_out))
    torch.testing.assert_close(out[dictionary.hook_out], new, rtol=1e-9, atol=1e-9)
    untouched = torch.ones(clean[dictionary.hook_out].shape[:2], dtype=torch.bool)
    for place in ADDRESSED:
        untouched[place] = False
    assert torch.equal(out[dictionary.hook_out][untouched], clean[dictionary.hook_out][untouched])
    by_hand = model.forward(TOKENS, HookSpec().intervene(dictionary.hook_out, lambda value, point: new))
    assert logits_differ(out, by_hand) < 1e-6
    assert logits_differ(out, clean) > 1e-3


def logits_differ(one: Forward, other: Forward) -> float:
    """The largest relative difference of one token's logits."""
    assert one.logits is not None
    assert other.logits is not None
    found, expected = one.logits.double(), other.logits.double()
    return max(
        float((found[n, p] - expected[n, p]).norm() / expected[n, p].norm())
        for n, length in enumerate(LENGTHS)
        for p in range(length)
    )


def transcoder(kind_in: str, kind_out: str, d_in: int, d_out: int, layer: int = 1, **settings: Any) -> Dictionary:
    return dictionary_of(
        f"blocks.{layer}.{kind_in}", d_in, hook_out=f"blocks.{layer}.{kind_out}", d_out=d_out, **settings
    )
