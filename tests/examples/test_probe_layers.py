"""The example writes what the library call gives of labels told from the texts of tokens, a figure, and a table."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import xarray as xr
from click.testing import CliRunner

import forebay
from forebay.stages.analyze.probing import probe

SCRIPT = Path(__file__).parents[2] / "docs/examples/probe_layers.py"


def test_what_is_written_is_what_the_call_gives(tiny_model: Path, tmp_path: Path) -> None:
    options = ["--documents", "9", "--characters", "700", "--kind", "lda", "--layer-step", "2", "--seed", "3"]
    options += ["--context", "48"]
    ran = CliRunner().invoke(
        runpy.run_path(str(SCRIPT))["main"],
        ["--model", str(tiny_model), "--output", str(tmp_path), *options],
        catch_exceptions=False,
    )
    assert ran.exit_code == 0, ran.output
    node = forebay.open_run(tmp_path / "run")["activations/hook_resid_post"].to_dataset().load()
    tokenizer = forebay.load_model(tiny_model).tokenizer
    texts = [tokenizer.to_string([token]) for token in node["token_id"].values.tolist()]
    sequence = node["sequence"].values.tolist()
    follows = [
        -1 if i + 1 == len(texts) or sequence[i + 1] != sequence[i] else int(texts[i + 1][0] == ",")
        for i in range(len(texts))
    ]
    assert 0 < follows.count(1) < follows.count(0)
    capital = [len(text) > 1 and text[0] == " " and text[1].isupper() for text in texts]
    with xr.open_zarr(tmp_path / "probe_layers.zarr", consolidated=False) as written:
        assert written["layer"].values.tolist() == [0, 2]
        for name, label in (("capital", capital), ("comma next", follows)):
            of_tokens = xr.DataArray(np.array(label), dims="token")
            expected = probe(node.sel(layer=[0, 2]), of_tokens, kind="lda", validation=0.3, seed=3)
            found = written.sel(label=name)
            for variable in ("auc", "accuracy_low", "selectivity_high", "n_example", "weight"):
                xr.testing.assert_allclose(
                    found[variable].drop_vars("label").load(), expected[variable], rtol=1e-5, atol=1e-7
                )
            assert f"{float(expected['auc'].sel(layer=2, split='validation')):.3f}" in ran.output
    assert (tmp_path / "probe_layers.png").stat().st_size > 20_000
