"""Gradients flow through interventions on features, which compute in the dictionary's dtype, whatever the model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from forebay.stages.dictionaries.dictionary import Dictionary
from forebay.stages.dictionaries.interventions import Clamp, Inject, Splice
from forebay.stages.models.interventions import Add
from forebay.stages.models.points import HookPoint
from forebay.stages.models.taps import HookSpec

from .feature_edits import POINT, TOKENS, D, transcoder
from .feature_models import dictionary_of, model_of

# ── dtypes and gradients ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("of_dictionary", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_model", ["float64", "float32", "bfloat16", "float16"])
def test_a_dictionary_of_another_dtype_encodes_and_decodes_in_its_own(
    of_model: str, of_dictionary: torch.dtype
) -> None:
    """What flows on is the sum of the activation and of what is written, each as it is, rounded once."""
    model, dictionary = model_of(dtype=of_model), dictionary_of(POINT, D, dtype=of_dictionary)
    x = model.forward(TOKENS, HookSpec().capture(POINT))[POINT]
    out = model.forward(TOKENS, Clamp(dictionary, {0: 2.0, 7: 1.5}).hooks().capture(POINT))[POINT]
    assert out.dtype == x.dtype
    f = dictionary.encode(x)
    assert f.dtype == of_dictionary
    change = torch.tensor([2.0, 1.5], dtype=of_dictionary) - f[..., [0, 7]]
    exact = x.double() + (change @ dictionary.W_dec[[0, 7]]).double()
    wide = torch.promote_types(x.dtype, of_dictionary)
    spacing = torch.finfo(x.dtype).eps * exact.abs()
    # rounded once to the model's dtype; what is computed in the wider one may itself be off by a little
    assert bool(((out.double() - exact).abs() <= 0.5 * spacing + 8 * torch.finfo(wide).eps * (1 + exact.abs())).all())
    assert bool((out != x).any(-1).all())


def clamp_by_hand(dictionary: Dictionary, values: Tensor) -> HookSpec:
    """Features 3 and 8 set to values, by two plain functions."""
    held: dict[str, Tensor] = {}

    def read(value: Tensor, point: HookPoint) -> Tensor:
        held["f"], held["scale"] = dictionary.encode(value), dictionary.output_scale(value)
        return value

    def write(value: Tensor, point: HookPoint) -> Tensor:
        for n, feature in enumerate((3, 8)):
            value = value + (values[n] - held["f"][..., feature, None]) * dictionary.W_dec[feature] * held["scale"]
        return value

    return HookSpec().intervene(dictionary.hook, read).intervene(dictionary.hook_out, write)


def slopes_of(hooks: HookSpec, *others: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a loss by the stream after the first block, and by other tensors."""
    before = "blocks.0.hook_resid_post"
    out = model_of().forward(TOKENS, hooks.capture(before), gradients=True)
    assert out.logits is not None
    return torch.autograd.grad(out.logits[:, 2].square().sum(), (out[before], *others))


def assert_equal_slopes(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert float(other.norm()) > 1e-3
        assert float((one - other).norm() / other.norm()) < 1e-6


GRADIENTS: dict[str, Callable[[], Dictionary]] = {
    "an autoencoder": lambda: dictionary_of(POINT, D, kind="jumprelu", input_norm="layer_norm"),
    "a transcoder": lambda: transcoder("ln2.hook_normalized", "mlp.hook_out", D, D, kind="gated"),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_through_a_clamp_are_those_of_the_edit_written_out(case: str) -> None:
    """With respect to what comes before it, and to the values themselves."""
    dictionary = GRADIENTS[case]()
    values = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)
    found = slopes_of(Clamp(dictionary, {3: values[0], 8: values[1]}).hooks(), values)
    assert_equal_slopes(found, slopes_of(clamp_by_hand(dictionary, values), values))
    (without,) = slopes_of(HookSpec())
    assert float((without - found[0]).norm() / without.norm()) > 1e-2


def test_gradients_by_a_strength_are_those_along_the_decoder_row() -> None:
    dictionary = dictionary_of(POINT, D)
    strength = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    vector = (1.5 * dictionary.W_dec[6]).requires_grad_()
    before, by_strength = slopes_of(Inject(dictionary, {6: strength}).hooks(), strength)
    expected, by_vector = slopes_of(HookSpec().intervene(POINT, Add(vector)), vector)
    assert_equal_slopes([before, by_strength], [expected, by_vector @ dictionary.W_dec[6]])


def test_gradients_pass_through_a_reconstruction() -> None:
    dictionary = dictionary_of(POINT, D, kind="batchtopk")
    by_hand = HookSpec().intervene(POINT, lambda x, point: dictionary.reconstruct(x))
    assert_equal_slopes(slopes_of(Splice(dictionary).hooks()), slopes_of(by_hand))
