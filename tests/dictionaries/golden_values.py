"""What other libraries made of small random dictionaries, and how ours is compared with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from forebay.stages.dictionaries.dictionary import Dictionary
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.load import load_dictionary
from forebay.stages.dictionaries.transcoders import TranscoderSet

GOLDEN = Path(__file__).parent / "golden"
ROUNDING = 1e-6


def values_of(folder: Path) -> Mapping[str, Tensor]:
    """What the library that wrote the dictionary of this folder computed."""
    return load_file(folder / "values.safetensors")


def assert_equal(found: Tensor, expected: Tensor, rounding: float = ROUNDING) -> None:
    """Equal up to float32 rounding, as a whole and in every number, measured by the whole and by the largest."""
    assert found.shape == expected.shape
    assert expected.norm() > 0
    error = found.double() - expected.double()
    assert error.norm() <= rounding * expected.double().norm()
    assert error.abs().max() <= rounding * expected.double().abs().max()


def assert_same_features(found: Tensor, expected: Tensor) -> None:
    """The same features fire, with equal values; both some that fire and some that do not."""
    assert torch.equal(found != 0, expected != 0)
    assert 0 < int((expected != 0).sum()) < expected.numel()
    assert_equal(found, expected)


def one(folder: Path | str, **options: Any) -> Dictionary:
    """A dictionary of one layer."""
    loaded = load_dictionary(folder, **options)
    assert isinstance(loaded, Dictionary)
    return loaded


def many(folder: Path | str, **options: Any) -> TranscoderSet:
    """A set of transcoders."""
    loaded = load_dictionary(folder, **options)
    assert isinstance(loaded, TranscoderSet)
    return loaded


def refused(folder: Path | str, **options: Any) -> str:
    """With what loading is refused."""
    with pytest.raises(DictionaryError) as error:
        load_dictionary(folder, **options)
    return str(error.value)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object in a file; None takes a key away."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def edit_tensors(path: Path, **changes: Tensor | None) -> None:
    """Change tensors of a safetensors file; None takes one away. Dots are written as two underscores."""
    named = {name.replace("__", "."): value for name, value in changes.items()}
    tensors = {name: value.clone() for name, value in load_file(path).items()} | named
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
