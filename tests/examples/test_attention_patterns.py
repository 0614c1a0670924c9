"""The example of attention patterns writes what the library says of one prompt and of random repeats."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import xarray as xr
from click.testing import CliRunner

import forebay
from forebay.stages.analyze.head_detectors import detect_heads

SCRIPT = Path(__file__).parents[2] / "docs/examples/attention_patterns.py"
PROMPT = "It is a truth universally"


def test_it_writes_the_library_s_numbers_and_a_figure(tiny_model: Path, tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    options = ["--prompt", PROMPT, "--repeats", "3", "--length", "19", "--seed", "5"]
    ran = CliRunner().invoke(
        main, ["--model", str(tiny_model), "--output", str(tmp_path), *options], catch_exceptions=False
    )
    assert ran.exit_code == 0, ran.output
    found = xr.open_zarr(tmp_path / "attention_patterns.zarr", consolidated=False)
    model = forebay.load_model(tiny_model)
    ids = model.tokenizer.to_tokens(PROMPT)
    out = model.forward(ids, forebay.HookSpec().capture("blocks.*.attn.hook_pattern"))
    for layer in range(3):
        pattern = out[f"blocks.{layer}.attn.hook_pattern"][0].double()
        back = np.subtract.outer(np.arange(ids.shape[1]), np.arange(ids.shape[1]))
        np.testing.assert_allclose(found["attention"].sel(layer=layer), pattern[:, -1].mean(0), rtol=1e-4)
        entropy = -(pattern * pattern.clamp_min(1e-300).log()).sum(-1).mean(-1)
        np.testing.assert_allclose(found["entropy"].sel(layer=layer), entropy, rtol=1e-4)
        distance = (pattern.numpy() * back).sum(-1).mean(-1)
        np.testing.assert_allclose(found["distance"].sel(layer=layer), distance, rtol=1e-4)
    heads = detect_heads(model, n_sequences=3, length=19, seed=5)
    np.testing.assert_allclose(found["score"], heads["score"], rtol=1e-4)
    assert found["key_token_text"].values.tolist() == model.tokenizer.to_str_tokens(ids)
    assert (tmp_path / "attention_patterns.png").stat().st_size > 20_000
    best = heads["score"].sel(kind="induction").max()
    assert f"{float(best):.3f}" in ran.output
