"""The example of a dose–response curve writes what the library gives, on any model."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import xarray as xr
from click.testing import CliRunner

import forebay
from forebay.stages.analyze.steering import dose_response, scale_for_target

SCRIPT = Path(__file__).parents[2] / "docs/examples/steering_dose_response.py"
PROMPT = "a truth universally acknowledged"


@pytest.fixture(scope="module")
def main() -> object:
    return runpy.run_path(str(SCRIPT))["main"]


def test_the_curve_is_that_of_the_library_and_is_drawn(main: object, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--prompt", PROMPT, "--word", "wife"]
    result = CliRunner().invoke(main, [*arguments, "--key", "1"], catch_exceptions=False)  # type: ignore[arg-type]
    assert result.exit_code == 0
    written = xr.open_zarr(tmp_path / "out/steering_dose_response.zarr", consolidated=False).load()
    model = forebay.load_model(str(tiny_model))
    curve = dose_response(model, PROMPT, [(-1, 1)], layer=1, tokens="wife")
    for name in curve.data_vars:
        xr.testing.assert_allclose(written[name], curve[name], atol=1e-6)
    doubled = scale_for_target(curve, 2 * float(curve["baseline_attention"]))
    assert written["scale_to_double"].item() == pytest.approx(doubled.item(), nan_ok=True, rel=1e-5)
    assert f"{curve['attention'].values[-1]:.3f}" in result.output
    assert (tmp_path / "out/steering_dose_response.png").stat().st_size > 5000
