"""What a batch's captures leave the device as: what was handed out, cast once, and what is measured of it.

On a GPU they leave while it computes; these tests run there too where one is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from forebay.stages.captured import STATISTICS, CapturedBatch
from forebay.stages.models.points import HookPoint
from forebay.stages.sequences import Batch, batches_of
from forebay.stores.errors import SchemaError
from forebay.stores.schema import Schema, along_token

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
LENGTHS = (5, 3, 7, 1, 6, 4)
POINTS = {
    "hook_resid_post": tuple(HookPoint.parse(f"blocks.{layer}.hook_resid_post") for layer in (0, 3)),
    "hook_embed": (HookPoint.parse("hook_embed"),),
}
D_MODEL = 9


def schema(dtype: str, unit_tokens: int) -> Schema:
    n_token, starts = sum(LENGTHS), np.cumsum([0, *LENGTHS[:-1]])
    sizes = {"layer": 2, "token": n_token, "d_model": D_MODEL}
    return Schema(
        kind="activations",
        n_token=n_token,
        unit_tokens=unit_tokens,
        arrays={
            "hook_resid_post/value": along_token(("layer", "token", "d_model"), sizes, dtype, unit_tokens),
            "hook_embed/value": along_token(("token", "d_model"), sizes, dtype, unit_tokens),
        },
        labels={"sequences/start": (("sequence",), starts)},
    )


def handed_out(batch: Batch, device: str) -> dict[HookPoint, torch.Tensor]:
    """Captures [sequence, position, d_model], as a forward of the batch gives them."""
    generator, shape = torch.Generator().manual_seed(4), (len(batch.lengths), max(batch.lengths), D_MODEL)
    points = [point for kind in POINTS.values() for point in kind]
    return {point: torch.randn(shape, generator=generator).to(device) for point in points}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("unit", [0, 1])
def test_pieces_hold_the_units_rows_of_what_was_handed_out_though_a_later_forward_was_begun(
    device: str, stored: Any, unit: int
) -> None:
    own = schema(stored, 14)
    batches = list(batches_of(own.grid[unit], own, 2))
    forward = [handed_out(batch, device) for batch in batches]
    begun = []
    for batch, captures in zip(batches, forward, strict=True):
        captured = CapturedBatch(batch, own, POINTS, stored, "capture.store_dtype")
        for point, tensor in captures.items():
            captured(point, tensor)
        begun.append(captured)
    for batch, captures, captured in zip(batches, forward, begun, strict=True):
        piece, unit_tokens = captured.piece(), range(own.grid[unit].start, own.grid[unit].stop)
        starts = own.labels["sequences/start"][1][batch.sequences]
        every = np.concatenate([s + np.arange(n) for s, n in zip(starts, batch.lengths, strict=True)])
        here = np.isin(every, unit_tokens)
        for kind, points in POINTS.items():
            rows = []
            for point in points:
                valid = [row[:n] for row, n in zip(captures[point].cpu(), batch.lengths, strict=True)]
                rows.append(torch.cat(valid)[here])
            kept = torch.stack(rows).to(getattr(torch, stored))
            found = piece[kind]["value"]
            assert found.indexes["token"].tolist() == every[here].tolist()
            bits = kept.view(torch.int16).numpy().view(np.uint16) if stored == "bfloat16" else kept.numpy()
            np.testing.assert_array_equal(found.values, bits if kind == "hook_resid_post" else bits[0])
            whole, rounded = torch.stack(rows).double().numpy(), kept.double().numpy()
            expected = (abs(whole).max((1, 2)), (whole**2).sum((1, 2)), ((rounded - whole) ** 2).sum((1, 2)))
            for name, values in zip(STATISTICS, expected, strict=True):
                np.testing.assert_allclose(piece[kind].attrs["statistics"][name], values, rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_value_that_does_not_fit_is_refused_with_its_point_and_infinities_that_were_there_are_not(
    device: str,
) -> None:
    own = schema("float16", 28)
    (batch,) = batches_of(own.grid[0], own, 6)
    captured = CapturedBatch(batch, own, POINTS, "float16", "capture.store_dtype")
    for point in (point for kind in POINTS.values() for point in kind):
        values = torch.zeros(6, 7, D_MODEL, device=device)
        values[0, 0, :2] = torch.tensor([-torch.inf, torch.nan], device=device)
        values[2, 6, 3] = -70_000.0 if point.layer == 3 else 65_504.0
        captured(point, values)
    with pytest.raises(SchemaError, match=r"^blocks\.3\.hook_resid_post: the value 70000 does not fit float16"):
        captured.piece()


def test_sequences_are_batched_by_length_and_every_token_of_a_unit_is_in_one_batch() -> None:
    own = schema("float32", 14)
    for unit in own.grid:
        batches = list(batches_of(unit, own, 2))
        assert np.array_equal(
            np.sort(np.concatenate([batch.tokens for batch in batches])), range(unit.start, unit.stop)
        )
        longest = [max(batch.lengths) for batch in batches]
        assert longest == sorted(longest, reverse=True)
    whole = schema("float32", 28)
    found = [batch.sequences.tolist() for batch in batches_of(whole.grid[0], whole, 2)]
    assert found == [[2, 4], [0, 5], [1, 3]]  # 7 and 6 tokens, 5 and 4, 3 and 1


def test_sequences_of_one_length_stay_in_their_order() -> None:
    starts = np.arange(0, 40, 8)
    own = Schema(
        kind="tokens", n_token=38, unit_tokens=38, arrays={}, labels={"sequences/start": (("sequence",), starts)}
    )
    found = [batch.sequences.tolist() for batch in batches_of(own.grid[0], own, 2)]
    assert found == [[0, 1], [2, 3], [4]]  # the last one has 6 tokens
