"""The first example writes the tokens with which transformers' model would go on."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from click.testing import CliRunner

import forebay
from forebay.stages.analyze.logit_lens import format_probability

SCRIPT = Path(__file__).parents[2] / "docs/examples/quick_start.py"
PROMPT = "It is a truth [universally"


def test_it_writes_the_strongest_next_tokens_and_a_figure(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    main = runpy.run_path(str(SCRIPT))["main"]
    options = ["--model", str(tiny_model), "--output", str(tmp_path), "--prompt", PROMPT, "--top", "7"]
    ran = CliRunner().invoke(main, options, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    tokenizer = forebay.load_model(tiny_model).tokenizer
    reference = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.inference_mode():
        said = reference(tokenizer.to_tokens(PROMPT)).logits[0, -1].double().softmax(-1).topk(7)
    found = xr.open_zarr(tmp_path / "quick_start.zarr", consolidated=False)
    assert found["token_id"].values.tolist() == said.indices.tolist()
    np.testing.assert_allclose(found["probability"], said.values, rtol=1e-4)
    assert found["token_text"].values.tolist() == [tokenizer.to_string([one]) for one in said.indices.tolist()]
    assert found.attrs["prompt"] == PROMPT
    assert format_probability(float(said.values[0])) in ran.output
    assert (tmp_path / "quick_start.png").stat().st_size > 5_000
