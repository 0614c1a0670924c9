"""What every hook point holds, checked against equations that are computed here from other points and the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forebay.stages.models.forward import Forward
from forebay.stages.models.model import Model
from forebay.stages.models.points import BLOCK
from forebay.stages.models.taps import HookSpec

LAYER = 1


@pytest.fixture
def out(tiny: Model, tokens: Tensor) -> Forward:
    return tiny.forward(tokens, HookSpec().capture("*", "blocks.*.attn.hook_result"))


def at(out: Forward, kind: str) -> Tensor:
    return out[f"blocks.{LAYER}.{kind}"].double()


def weight(model: Model, name: str) -> Tensor:
    assert model.checkpoint is not None
    return model.checkpoint.read(f"blocks.{LAYER}.{name}.weight").double()


def close(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-5, atol=1e-5)


def test_captures_have_the_shape_of_their_dims(out: Forward, tiny: Model, tokens: Tensor) -> None:
    n_sequences, n_positions = tokens.shape
    tokens_sizes = {"sequence": n_sequences, "position": n_positions, "query": n_positions, "key": n_positions}
    sizes = {**tiny.spec.sizes, **tokens_sizes}
    assert list(out.captures) == list(tiny.spec.points())
    for point, value in out.captures.items():
        assert value.shape == tuple(sizes[dim] for dim in point.dims), point
        assert value.is_contiguous(), point


def test_the_residual_stream_is_a_sum(out: Forward) -> None:
    assert close(at(out, "hook_resid_pre") + at(out, "hook_attn_out"), at(out, "hook_resid_mid"))
    assert close(at(out, "hook_resid_mid") + at(out, "hook_mlp_out"), at(out, "hook_resid_post"))
    assert torch.equal(out[f"blocks.{LAYER}.hook_resid_post"], out[f"blocks.{LAYER + 1}.hook_resid_pre"])
    assert torch.equal(out["hook_embed"], out["blocks.0.hook_resid_pre"])


def test_without_norms_after_the_sublayers_raw_outputs_are_what_is_added(out: Forward) -> None:
    assert torch.equal(at(out, "attn.hook_out"), at(out, "hook_attn_out"))
    assert torch.equal(at(out, "mlp.hook_out"), at(out, "hook_mlp_out"))


@pytest.mark.parametrize(
    ("name", "given", "result"), [("ln1", "hook_resid_pre", "attn.hook_in"), ("ln2", "hook_resid_mid", "mlp.hook_in")]
)
def test_norms(out: Forward, tiny: Model, name: str, given: str, result: str) -> None:
    x = at(out, given)
    scale = (x.pow(2).mean(-1) + tiny.spec.norm_eps).sqrt()
    assert close(at(out, f"{name}.hook_scale"), scale)
    assert close(at(out, f"{name}.hook_normalized") * scale[..., None], x)
    assert close(at(out, f"{name}.hook_normalized") * weight(tiny, name), at(out, result))


def test_the_final_norm_and_the_logits(out: Forward, tiny: Model) -> None:
    x = out[f"blocks.{tiny.spec.n_layers - 1}.hook_resid_post"]
    assert close(out["ln_final.hook_normalized"] * out["ln_final.hook_scale"][..., None], x)
    assert close(out["ln_final.hook_normalized"] * tiny.weights.ln_final.weight, out["hook_final_norm"])
    assert close(out["hook_final_norm"] @ tiny.weights.unembed.T, out["hook_logits"])
    assert out.logits is out["hook_logits"]


def test_queries_keys_and_values_are_projections_before_rotation(out: Forward, tiny: Model) -> None:
    for letter in "qkv":
        projected = at(out, "attn.hook_in") @ weight(tiny, f"attn.{letter}").T
        assert close(at(out, f"attn.hook_{letter}").flatten(-2), projected)


@pytest.mark.parametrize("letter", ["q", "k"])
def test_rotation_turns_pairs_in_the_complex_plane(out: Forward, tiny: Model, letter: str) -> None:
    half = tiny.spec.d_head // 2
    plain, turned = at(out, f"attn.hook_{letter}"), at(out, f"attn.hook_rot_{letter}")
    frequencies = tiny.spec.rope.base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(plain.shape[1])[:, None, None] * frequencies
    expected = torch.complex(plain[..., :half], plain[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    assert close(turned, torch.cat((expected.real, expected.imag), -1))


def test_scores_are_scaled_products_with_the_future_masked(out: Forward, tiny: Model) -> None:
    shared = tiny.spec.n_heads // tiny.spec.n_kv_heads
    keys = at(out, "attn.hook_rot_k").repeat_interleave(shared, 2)
    expected = torch.einsum("bqhe,bkhe->bhqk", at(out, "attn.hook_rot_q"), keys) / tiny.spec.d_head**0.5
    scores = at(out, "attn.hook_attn_scores")
    future = torch.ones(scores.shape[-2:]).triu(1).bool()
    assert (scores[..., future] == -torch.inf).all()
    assert close(scores[..., ~future], expected[..., ~future])


def test_patterns_are_the_softmax_of_scores(out: Forward) -> None:
    pattern = at(out, "attn.hook_pattern")
    assert torch.allclose(pattern.sum(-1), torch.ones(()).double(), atol=1e-6)
    powers = at(out, "attn.hook_attn_scores").exp()
    assert close(pattern, powers / powers.sum(-1, keepdim=True))


def test_z_is_the_values_weighed_by_the_pattern(out: Forward, tiny: Model) -> None:
    values = at(out, "attn.hook_v").repeat_interleave(tiny.spec.n_heads // tiny.spec.n_kv_heads, 2)
    assert close(torch.einsum("bhqk,bkhe->bqhe", at(out, "attn.hook_pattern"), values), at(out, "attn.hook_z"))


def test_results_of_the_heads_add_up_to_the_output(out: Forward, tiny: Model) -> None:
    result = at(out, "attn.hook_result")
    assert close(result.sum(2), at(out, "attn.hook_out"))
    matrix = weight(tiny, "attn.out").reshape(tiny.spec.d_model, tiny.spec.n_heads, tiny.spec.d_head)
    head = 4
    assert close(result[:, :, head], at(out, "attn.hook_z")[:, :, head] @ matrix[:, head].T)


def test_the_mlp(out: Forward, tiny: Model) -> None:
    x = at(out, "mlp.hook_in")
    assert close(at(out, "mlp.hook_pre"), x @ weight(tiny, "mlp.gate").T)
    assert close(at(out, "mlp.hook_pre_linear"), x @ weight(tiny, "mlp.up").T)
    gate = at(out, "mlp.hook_pre")
    assert close(at(out, "mlp.hook_post"), gate * gate.sigmoid() * at(out, "mlp.hook_pre_linear"))
    assert close(at(out, "mlp.hook_out"), at(out, "mlp.hook_post") @ weight(tiny, "mlp.down").T)


def test_points_fire_in_the_order_of_the_vocabulary(tiny: Model, tokens: Tensor) -> None:
    fired: list[str] = []
    tiny.forward(
        tokens,
        HookSpec().capture("*", "blocks.*.attn.hook_result"),
        sink=lambda point, tensor: fired.append(str(point)),
    )
    assert fired == [str(point) for point in tiny.spec.points()]
    in_one = [name.removeprefix("blocks.1.") for name in fired if name.startswith("blocks.1.")]
    assert in_one == [kind for kind in BLOCK if kind in in_one]
    assert {"attn.hook_in", "attn.hook_result", "mlp.hook_pre_linear", "hook_resid_post"} <= {*in_one}
