"""The example of the character-count helix writes NumPy's numbers of what the model reads, and a figure."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import xarray as xr
from click.testing import CliRunner

import forebay
from forebay.stages.analyze.character_count import WIDTHS, wrap_prose

SCRIPT = Path(__file__).parents[2] / "docs/examples/character_count_helix.py"


def test_it_writes_the_means_by_character_count_of_the_captured_streams(tiny_model: Path, tmp_path: Path) -> None:
    prose = json.loads((SCRIPT.parent / "novels.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"][:400]
    main = runpy.run_path(str(SCRIPT))["main"]
    options = ["--characters", "400", "--layer", "0", "--layer", "2", "--max-count", "60"]
    options += ["--context", "64", "--skip-positions", "4"]
    ran = CliRunner().invoke(
        main, ["--model", str(tiny_model), "--output", str(tmp_path), *options], catch_exceptions=False
    )
    assert ran.exit_code == 0, ran.output
    wrapped = [json.loads(line)["text"] for line in (tmp_path / "wrapped.jsonl").read_text().splitlines()]
    assert wrapped == [wrap_prose(prose, width) for width in WIDTHS]
    found = xr.open_zarr(tmp_path / "character_count_helix.zarr", consolidated=False)
    run = forebay.open_run(tmp_path / "run")
    ends, documents = run["tokens/char_end"].values.tolist(), run["tokens/document"].values.tolist()
    begins, position = run["tokens/char_start"].values, run["tokens/position"].values
    counts = np.array([len(wrapped[d][:end].rpartition("\n")[2]) for end, d in zip(ends, documents, strict=True)])
    for layer in (0, 2):
        value = run["activations/hook_resid_post/value"].sel(layer=layer).values.astype(np.float64)
        for count in (1, 17, 60):
            chosen = (counts == count) & (begins < ends) & (position >= 4)
            one = found.sel(layer=layer, character_count=count)
            assert int(one["n_token"]) == chosen.sum() > 0
            np.testing.assert_allclose(one["mean"], value[chosen].mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        found["projection"].var("character_count", ddof=1), found["explained_variance"], rtol=1e-9
    )
    assert f"{float(found['explained_variance_ratio'].sel(layer=2).sum()):.1%}" in ran.output
    assert (tmp_path / "character_count_helix.png").stat().st_size > 20_000
