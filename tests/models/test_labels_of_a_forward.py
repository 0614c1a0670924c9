"""A forward's captures with their labels: dimensions, coordinates, and nothing where there is no token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from forebay.stages.models.errors import HookError
from forebay.stages.models.model import Model
from forebay.stages.models.points import HookPoint, dims_of
from forebay.stages.models.taps import HookSpec


def test_every_variable_is_a_kind_with_its_dims(tiny: Model, tokens: Tensor) -> None:
    out = tiny.forward(tokens, HookSpec().capture("*", "blocks.*.attn.hook_result"))
    data = out.to_dataset()
    assert set(data.data_vars) == {point.kind for point in tiny.spec.points()}
    for kind, variable in data.data_vars.items():
        layered = any(point.layer is not None for point in tiny.spec.points() if point.kind == kind)
        assert variable.dims == (("layer",) if layered else ()) + dims_of(str(kind))
    one = data["attn.hook_z"].sel(layer=2, sequence=1, position=5, head=3)
    assert np.array_equal(one.values, out["blocks.2.attn.hook_z"][1, 5, 3].numpy())
    assert np.array_equal(data["token_id"].values, tokens.numpy())


def test_layers_carry_their_own_numbers(tiny: Model, tokens: Tensor) -> None:
    out = tiny.forward(tokens, HookSpec().capture("blocks.{0,2}.hook_resid_post", "blocks.1.hook_mlp_out"))
    data = out.to_dataset()
    assert data["layer"].values.tolist() == [0, 1, 2]
    assert np.array_equal(data["hook_resid_post"].sel(layer=2), out["blocks.2.hook_resid_post"].numpy())
    assert np.isnan(data["hook_resid_post"].sel(layer=1)).all()
    assert np.isnan(data["hook_mlp_out"].sel(layer=[0, 2])).all()


def test_beyond_a_sequence_there_is_nothing(tiny: Model) -> None:
    hooks = HookSpec().capture("blocks.1.{hook_resid_post,attn.hook_pattern}", "hook_logits")
    data = tiny.forward([[1, 2, 3, 4], [5, 6]], hooks).to_dataset()
    assert data["token_id"].values.tolist() == [[1, 2, 3, 4], [5, 6, -1, -1]]
    for name in ("hook_resid_post", "hook_logits"):
        assert np.isnan(data[name].sel(sequence=1, position=slice(2, None))).all()
        assert np.isfinite(data[name].sel(sequence=1, position=slice(0, 1))).all()
        assert np.isfinite(data[name].sel(sequence=0)).all()
    pattern = data["attn.hook_pattern"].sel(layer=1, sequence=1)
    assert np.isnan(pattern.sel(query=2)).all()
    assert np.isnan(pattern.sel(key=3)).all()
    assert np.isfinite(pattern.sel(query=slice(0, 1), key=slice(0, 1))).all()


def test_bfloat16_becomes_float32_without_loss(tiny: Model, tokens: Tensor) -> None:
    assert tiny.checkpoint is not None
    from forebay.stages.models.load import load_model

    out = load_model(tiny.checkpoint.source, device="cpu", dtype="bfloat16").forward(
        tokens, HookSpec().capture("hook_embed"), logits=False
    )
    data = out.to_dataset()["hook_embed"]
    assert data.dtype == np.float32
    assert torch.equal(torch.from_numpy(data.values).bfloat16(), out["hook_embed"])


def test_a_capture_is_had_by_name_by_point_and_by_alias(tiny: Model, tokens: Tensor) -> None:
    out = tiny.forward(tokens, HookSpec().capture("blocks.1.hook_resid_post"))
    by_name = out["blocks.1.hook_resid_post"]
    assert out[HookPoint("hook_resid_post", 1)] is by_name
    assert out["blocks.1.hook_out"] is by_name
    with pytest.raises(HookError, match=r"was not captured in this forward; captured: blocks\.1\.hook_resid_post"):
        out["blocks.0.hook_resid_post"]
    with pytest.raises(HookError, match=r"captured: nothing"):
        tiny.forward(tokens)["hook_embed"]
