"""The example of recurrent inference predicts, continues and leaves writes out as the library does."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import xarray as xr
from click.testing import CliRunner

import forebay
from forebay.stages.analyze.state_ablation import state_knockout_effect, state_sweep

from ..models.rwkv_models import write_pth

SCRIPT = Path(__file__).parents[2] / "docs/examples/rwkv_inference.py"
PROMPT = "def fibonacci(n):\n    "


@pytest.mark.parametrize("version", [6, 7])
def test_predictions_and_knockouts_are_those_of_the_library_and_are_drawn(version: int, tmp_path: Path) -> None:
    checkpoint = write_pth(tmp_path / "model.pth", version, d_vocab=2**16)
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = ["--model", str(checkpoint), "--output", str(tmp_path / "out"), "--max-new-tokens", "3"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    model = forebay.load_model(str(checkpoint))
    ids = model.tokenizer.to_tokens(PROMPT)
    assert ids[0].tolist() == [7334, 21676, 41943, 41, 111, 501, 28352]
    effect = state_knockout_effect(model, ids, 0, layers=1, top=5)
    swept = state_sweep(model, ids)
    for name, expected in (("state_knockout", effect), ("state_sweep", swept)):
        written = xr.open_zarr(tmp_path / f"out/{name}.zarr", consolidated=False).load()
        xr.testing.assert_allclose(written["kl_divergence"], expected["kl_divergence"], atol=1e-7)
    logits = model.forward(ids).logits[0, -1]
    for token in logits.topk(5).indices.tolist():
        assert f"{float(logits[token]):.4f}" in result.output
    assert f"KL {float(effect['kl_divergence'][-1]):.5f} nats" in " ".join(result.output.split())
    assert (tmp_path / "out/rwkv_inference.png").stat().st_size > 5000
