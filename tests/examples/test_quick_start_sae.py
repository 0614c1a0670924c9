"""The example tells the features that a dictionary has at the tokens of a prompt, as worked out by hand."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from click.testing import CliRunner
from safetensors.torch import save_file

from ..analyze.hooked_llama import run

SCRIPT = Path(__file__).parents[2] / "docs/examples/quick_start_sae.py"
WIDE, N_FEATURE = 28, 37


def write_sae(folder: Path) -> dict[str, torch.Tensor]:
    """A random autoencoder after block 1, as SAELens writes one."""
    random = torch.Generator().manual_seed(3)
    tensors = {
        "W_enc": torch.randn(WIDE, N_FEATURE, generator=random),
        "b_enc": torch.randn(N_FEATURE, generator=random) - 1,
        "W_dec": torch.randn(N_FEATURE, WIDE, generator=random) * 0.1,
        "b_dec": torch.randn(WIDE, generator=random) * 0.1,
    }
    said = {
        "architecture": "standard",
        "d_in": WIDE,
        "d_sae": N_FEATURE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_resid_post", "sae_lens_version": "6.5.1"},
    }
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(said))
    save_file(tensors, folder / "sae_weights.safetensors")
    return tensors


def test_what_is_written_are_the_features_of_the_prompt(tiny_model: Path, tmp_path: Path) -> None:
    tensors = write_sae(tmp_path / "sae")
    text = "You want to tell me"
    arguments = ["--model", str(tiny_model), "--dictionary", str(tmp_path / "sae"), "--prompt", text, "--top", "30"]
    script = runpy.run_path(str(SCRIPT))
    ran = CliRunner().invoke(script["main"], [*arguments, "--output", str(tmp_path)], catch_exceptions=False)
    assert ran.exit_code == 0
    with xr.open_zarr(tmp_path / "quick_start_sae.zarr", consolidated=False) as written:
        result = written.load()
    x = run(tiny_model, result["token_id"].values.tolist(), keep=[("hook_resid_post", 1)])[1]["hook_resid_post", 1]
    f = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).clamp_min(0)
    error = (f @ tensors["W_dec"] + tensors["b_dec"] - x).square()
    np.testing.assert_array_equal(result["n_active"], (f > 0).sum(-1))
    np.testing.assert_allclose(result["mean_square_error"], error.mean(-1), rtol=1e-4)
    spread = (x[1:] - x[1:].mean(0)).square().sum()
    np.testing.assert_allclose(result["fvu"], error[1:].sum() / spread, rtol=1e-4)
    for place, row in enumerate(f):
        expected = sorted(((float(value), n) for n, value in enumerate(row) if value > 0), reverse=True)[:30]
        told = result.isel(position=place, rank=slice(len(expected)))
        assert told["feature"].values.tolist() == [n for _, n in expected]
        np.testing.assert_allclose(told["activation"], [value for value, _ in expected], rtol=1e-4, atol=1e-4)
        assert (result["feature"][place, len(expected) :] == -1).all()
        assert np.isnan(result["activation"][place, len(expected) :]).all()
    assert (tmp_path / "quick_start_sae.png").stat().st_size > 5_000
    assert "Features at blocks.1.hook_resid_post" in ran.output
