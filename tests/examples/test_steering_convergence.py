"""The example of steering convergence writes what the library gives, on any model."""

from __future__ import annotations

import runpy
from pathlib import Path

import xarray as xr
from click.testing import CliRunner

import forebay
from forebay.stages.analyze.steering_convergence import steering_convergence, strength_sweep

SCRIPT = Path(__file__).parents[2] / "docs/examples/steering_convergence.py"
PROMPTS = "a truth universally acknowledged", "a single man"


def test_matrix_and_sweep_are_those_of_the_library_and_are_drawn(tiny_model: Path, tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--threshold", "0.8"]
    arguments += ["--prompt", PROMPTS[0], "--contrastive", PROMPTS[1], "--word", "wife"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    model = forebay.load_model(str(tiny_model))
    matrix = steering_convergence(model, *PROMPTS, tokens="wife", threshold=0.8)
    best = int(matrix["best_injection_layer"])
    sweep = strength_sweep(model, *PROMPTS, layer=best, tokens="wife", threshold=0.8)
    for name, expected in (("steering_convergence", matrix), ("strength_sweep", sweep)):
        written = xr.open_zarr(tmp_path / f"out/{name}.zarr", consolidated=False).load()
        for variable in expected.data_vars:
            xr.testing.assert_allclose(written[variable], expected[variable], atol=1e-6)
    assert f"Injections into layer {best}" in result.output
    assert (tmp_path / "out/steering_convergence.png").stat().st_size > 5000
