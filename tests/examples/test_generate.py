"""The example of generation writes the strongest token each time, as transformers' model goes on."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner

import forebay

SCRIPT = Path(__file__).parents[2] / "docs/examples/generate.py"
PROMPT = "It is a truth [universally"


@pytest.mark.parametrize("cache", ["--cache", "--no-cache"])
def test_it_writes_every_token_with_its_probability(tiny_model: Path, tmp_path: Path, cache: str) -> None:
    from transformers import AutoModelForCausalLM

    main = runpy.run_path(str(SCRIPT))["main"]
    options = ["--model", str(tiny_model), "--output", str(tmp_path), "--prompt", PROMPT, "--tokens", "9", cache]
    ran = CliRunner().invoke(main, options, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    tokenizer = forebay.load_model(tiny_model).tokenizer
    reference = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    ids = tokenizer.to_tokens(PROMPT)
    n_before, probabilities = ids.shape[1], []
    with torch.inference_mode():
        for _ in range(9):
            best = reference(ids).logits[0, -1].double().softmax(-1).max(-1)
            probabilities.append(float(best.values))
            ids = torch.cat([ids, best.indices[None, None]], 1)
    assert 0 not in ids[0, n_before:], "the tiny model does not end here"
    found = xr.open_zarr(tmp_path / "generate.zarr", consolidated=False)
    assert found["token_id"].values.tolist() == ids[0, n_before:].tolist()
    assert found["position"].values.tolist() == list(range(n_before, n_before + 9))
    np.testing.assert_allclose(found["probability"], probabilities, rtol=1e-4)
    assert PROMPT in ran.output
    assert (tmp_path / "generate.png").stat().st_size > 5_000
