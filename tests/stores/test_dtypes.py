"""bfloat16 is kept bit for bit, read exactly, and rounded to as IEEE 754 says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from forebay.stores.dtypes import FORMATS, bfloat16_to_float32, float32_to_bfloat16, format_of
from forebay.stores.errors import SchemaError

EVERY_PATTERN = np.arange(2**16, dtype=np.uint16)
EXPONENT, MANTISSA, QUIET = np.uint16(0x7F80), np.uint16(0x007F), np.uint16(0x0040)
IS_NAN = ((EVERY_PATTERN & EXPONENT) == EXPONENT) & ((EVERY_PATTERN & MANTISSA) != 0)


def torch_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The oracle of rounding, as bits."""
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def float32_of(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_pattern_reads_as_torch_reads_it() -> None:
    ours = bfloat16_to_float32(EVERY_PATTERN)
    theirs = torch.from_numpy(EVERY_PATTERN.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize(
    ("bits", "value"),
    [
        (0x0000, 0.0),
        (0x8000, -0.0),
        (0x3F80, 1.0),
        (0xC049, -3.140625),
        (0x7F7F, 2.0**127 * (2 - 2**-7)),
        (0x0080, 2.0**-126),
        (0x0001, 2.0**-133),
        (0x807F, -127 * 2.0**-133),
        (0x7F80, np.inf),
        (0xFF80, -np.inf),
    ],
)
def test_patterns_whose_values_are_known(bits: int, value: float) -> None:
    read = bfloat16_to_float32(np.array([bits], dtype=np.uint16))[0]
    assert read == value
    assert np.signbit(read) == np.signbit(value)
    assert float32_to_bfloat16(np.array([value], dtype=np.float32))[0] == bits


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_pattern_that_is_a_number_survives_the_way_through_float32() -> None:
    back = float32_to_bfloat16(bfloat16_to_float32(EVERY_PATTERN))
    np.testing.assert_array_equal(back[~IS_NAN], EVERY_PATTERN[~IS_NAN])
    np.testing.assert_array_equal(torch_bfloat16(bfloat16_to_float32(EVERY_PATTERN))[~IS_NAN], EVERY_PATTERN[~IS_NAN])


def test_every_nan_keeps_its_sign_and_payload_and_becomes_quiet() -> None:
    assert IS_NAN.sum() == 2 * 127
    back = float32_to_bfloat16(bfloat16_to_float32(EVERY_PATTERN))
    np.testing.assert_array_equal(back[IS_NAN], EVERY_PATTERN[IS_NAN] | QUIET)


# ── rounding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_rounds_as_torch_does(values: NDArray[np.float32]) -> None:
    ours, theirs = float32_to_bfloat16(values), torch_bfloat16(values)
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(bfloat16_to_float32(ours[nan])).all()
    np.testing.assert_array_equal(ours[nan] >> 15, values[nan].view(np.uint32) >> 31)


@pytest.mark.parametrize("lower", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_rounding_on_both_sides_of_every_half_way_is_torchs(lower: int) -> None:
    assert_rounds_as_torch_does(((EVERY_PATTERN.astype(np.uint32) << 16) | np.uint32(lower)).view(np.float32))


def test_rounding_of_random_patterns_is_torchs() -> None:
    patterns = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    assert_rounds_as_torch_does(patterns.view(np.float32))


def test_a_nan_whose_payload_lies_in_the_lower_half_does_not_become_infinite() -> None:
    values = np.array([float32_of(0x7F800001), float32_of(0xFF800001)])
    assert float32_to_bfloat16(values).tolist() == [0x7FC0, 0xFFC0]


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4),
        np.asfortranarray(np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)),
        np.linspace(-3, 3, 24, dtype=np.float32)[::-3],
        np.zeros((0, 4), dtype=np.float32),
    ],
)
def test_shapes_and_strides_do_not_matter(values: NDArray[np.float32]) -> None:
    bits = float32_to_bfloat16(values)
    assert bits.shape == values.shape
    np.testing.assert_array_equal(bits.ravel(), torch_bfloat16(values.ravel().copy()))
    assert bfloat16_to_float32(bits).shape == values.shape


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [name for name in FORMATS if name != "bfloat16"])
def test_every_other_dtype_is_kept_as_itself(dtype: str) -> None:
    values = np.array([0, 1, 1, 0]).astype(dtype)
    format_ = format_of(dtype)
    assert (format_.kept, format_.read, format_.itemsize) == (dtype, dtype, values.itemsize)
    kept = format_of(dtype).encode(values)
    assert kept.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(format_.decode(kept), values)


def test_a_cell_without_a_value_reads_as_nan_where_there_is_one() -> None:
    missing = {name: format_.decode(np.array([format_.missing], format_.kept))[0] for name, format_ in FORMATS.items()}
    assert {name for name, value in missing.items() if np.isnan(value)} == {
        "bfloat16", "float16", "float32", "float64"
    }  # fmt: skip
    assert format_of("bfloat16").itemsize == 2


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("bfloat17", r"dtype 'bfloat17' cannot be kept\. Did you mean 'bfloat16'\? Known: bfloat16, bool, float16, "),
        ("complex128", r"dtype 'complex128' cannot be kept\..* Known: .*uint8$"),
        ("", r"dtype '' cannot be kept\. Known: "),
    ],
)
def test_an_unknown_dtype_is_refused_with_the_known_ones(dtype: str, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        format_of(dtype)
