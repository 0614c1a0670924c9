"""The example reads a model under a name that nobody knows, and says why it cannot read another."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

EXAMPLE = Path(__file__).parents[2] / "docs/examples/auto_config.py"


def run(*arguments: object) -> Result:
    found = CliRunner().invoke(runpy.run_path(str(EXAMPLE))["main"], [str(one) for one in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


@pytest.mark.parametrize("model_type", [None, "something_new"])
def test_a_model_is_the_same_whatever_it_calls_itself(model_type: str | None, tiny_model: Path, tmp_path: Path) -> None:
    named = [] if model_type is None else ["--as", model_type]
    found = run("--model", tiny_model, *named, "--output", tmp_path / "out")
    assert found.exit_code == 0, found.output
    assert "hidden_size" in found.output
    result = xr.open_zarr(tmp_path / "out/auto_config.zarr", consolidated=False)
    assert result.attrs["model_type"] == (model_type or "llama")
    assert result.attrs["resembles"] == "llama"
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        made = theirs(torch.tensor([[1, 2, 3, 4, 5]]), output_hidden_states=True)
    np.testing.assert_allclose(result["hook_logits"].values, made.logits[0].numpy(), atol=1e-4)
    assert result["prediction"].values.tolist() == made.logits[0].argmax(-1).tolist()
    sizes = [state[0].norm(dim=-1).numpy() for state in made.hidden_states[1:-1]]  # the last is after the final norm
    np.testing.assert_allclose(result["resid_norm"].isel(layer=slice(0, 2)).values, sizes, rtol=1e-4)
    assert (tmp_path / "out/auto_config.png").stat().st_size > 5_000
    assert json.loads((tiny_model / "config.json").read_text())["model_type"] == "llama"
    assert ("is of unknown model_type 'something_new'" in found.output) == (model_type is not None)


def test_a_model_that_cannot_be_read_is_answered_with_the_reasons(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.sinks"] = weights.pop("model.layers.1.input_layernorm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = run("--model", folder, "--as", "something_new", "--output", tmp_path / "out")
    assert found.exit_code == 1
    assert "cannot be read" in found.output
    assert "model.layers.1.self_attn.sinks" in found.output
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_here_is_refused_with_what_to_do(tmp_path: Path) -> None:
    found = run("--model", "nobody/nothing", "--output", tmp_path / "out")
    assert found.exit_code == 1
    assert "hf download nobody/nothing" in found.output
