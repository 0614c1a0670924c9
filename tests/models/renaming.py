"""Checkpoints whose config.json hides what they are, and tiny models of kinds that forebay has no row for."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from forebay.stages.models.checkpoint import Checkpoint
from forebay.stages.models.errors import ModelError, UnverifiedModelWarning
from forebay.stages.models.families import FAMILIES
from forebay.stages.models.families.report import CompatibilityReport
from forebay.stages.models.source import check_compatibility, open_checkpoint

from .families import build

Json = dict[str, Any]

_built = functools.cache(build)


def save(variant: str, folder: Path) -> PreTrainedModel:
    """Save the model of a variant. It is shared by the tests and not to be changed."""
    model = _built(variant)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")


def renamed(family: str) -> Json:
    """The settings that hide what a model is. "gemma" in the name is all that tells Gemma's norms."""
    return {"model_type": "gemma_new" if "gemma" in family else "something_new", "architectures": "absent"}


def open_unknown(folder: Path) -> Checkpoint:
    with pytest.warns(UnverifiedModelWarning):
        return open_checkpoint(folder)


def refused(folder: Path) -> CompatibilityReport:
    """The report on a checkpoint that cannot be opened; the error is the report."""
    report = check_compatibility(folder)
    assert not report.compatible
    with pytest.raises(ModelError) as error:
        open_checkpoint(folder)
    assert str(error.value).startswith(str(report))
    return report


SMALL: Json = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 52,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
HEADS = {**SMALL, "head_dim": 12}
SLIDING = {**HEADS, "sliding_window": 7}


def foreign(model_type: str, settings: Json) -> PreTrainedModel:
    """A tiny random model of transformers of a kind that forebay has no row for."""
    assert model_type not in FAMILIES
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
        model.set_attn_implementation("eager")
        centre = 0.0 if "gemma" in model_type else 1.0
        with torch.no_grad():
            for name, weight in model.named_parameters():
                is_norm = "norm" in name and name.endswith("weight")
                weight.copy_(torch.randn(weight.shape) * (0.3 if is_norm else 0.2) + (centre if is_norm else 0.0))
    return model
