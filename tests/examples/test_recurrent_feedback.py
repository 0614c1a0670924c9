"""The example of recurrent feedback writes what the library gives, on any model."""

from __future__ import annotations

import runpy
from pathlib import Path

import xarray as xr
from click.testing import CliRunner

import forebay
from forebay.stages.analyze.recurrent_feedback import FeedbackCondition, feedback_sweep

SCRIPT = Path(__file__).parents[2] / "docs/examples/recurrent_feedback.py"


def test_lines_and_counts_are_those_of_the_library_and_are_drawn(tiny_model: Path, tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--max-new-tokens", "3"]
    arguments += ["--strength", "4", "--sustained", "--last", "1"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    conditions = [
        FeedbackCondition(first=1, last=1),
        FeedbackCondition(first=1, last=1, strength=4.0, sustained=True),
    ]
    expected = feedback_sweep(forebay.load_model(str(tiny_model)), conditions, max_new_tokens=3)
    written = xr.open_zarr(tmp_path / "out/recurrent_feedback.zarr", consolidated=False).load()
    for name in (
        "line",
        "baseline_line",
        "rhymes",
        "n_rhymes",
        "n_repeats",
        "n_baseline_rhymes",
        "n_baseline_repeats",
        "sustained",
        "depth",
    ):
        assert written[name].values.tolist() == expected[name].values.tolist()
    xr.testing.assert_equal(written["strength"], expected["strength"])
    assert "Second lines" in result.output
    assert (tmp_path / "out/recurrent_feedback.png").stat().st_size > 5000
