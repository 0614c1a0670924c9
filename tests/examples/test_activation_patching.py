"""The example writes what the library call gives, a figure, and a table of it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import xarray as xr
from click.testing import CliRunner

import forebay
from forebay.stages.analyze.activation_patching import activation_patching
from forebay.stages.analyze.patching import divergence_from

SCRIPT = Path(__file__).parents[2] / "docs/examples/activation_patching.py"
CLEAN, CORRUPTED = "the wife of 1 man", "the wife of 2 man"


@pytest.mark.parametrize("hooks", [("hook_resid_post",), ("attn.hook_z", "hook_mlp_out")], ids=str)
def test_what_is_written_is_what_the_call_gives(hooks: tuple[str, ...], tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path), "--clean", CLEAN, "--corrupted", CORRUPTED]
    arguments += [part for kind in hooks for part in ("--hook", kind)]
    ran = CliRunner().invoke(runpy.run_path(str(SCRIPT))["main"], arguments, catch_exceptions=False)
    assert ran.exit_code == 0
    model = forebay.load_model(tiny_model)
    expected = activation_patching(model, CLEAN, CORRUPTED, divergence_from(model, CLEAN), hooks=hooks)
    with xr.open_zarr(tmp_path / "activation_patching.zarr", consolidated=False) as written:
        xr.testing.assert_allclose(written.load(), expected, atol=1e-6)
        assert written.attrs == expected.attrs
    assert (tmp_path / "activation_patching.png").stat().st_size > 5_000
    assert f"Recovery by {hooks[0]}" in ran.output
    assert f"{float(expected['corrupted'][0]):.2f} nats" in " ".join(ran.output.split())
    assert ran.output.count(" %") == 3 * 2
