"""The example writes what the library call gives, a figure, and a table of its effects."""

from __future__ import annotations

import runpy
from pathlib import Path

import xarray as xr
from click.testing import CliRunner

import forebay
from forebay.stages.analyze.causal_tracing import causal_tracing, indirect_effect
from forebay.stages.analyze.metrics import Probability

SCRIPT = Path(__file__).parents[2] / "docs/examples/causal_tracing.py"
PROMPT, SUBJECT = "Mrs. Bennet is a single man", "Bennet"


def test_what_is_written_is_what_the_call_gives(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path), "--prompt", PROMPT, "--subject", SUBJECT]
    arguments += ["--answer", "of", "--samples", "2", "--layer-step", "2", "--window", "3", "--seed", "5"]
    ran = CliRunner().invoke(runpy.run_path(str(SCRIPT))["main"], arguments, catch_exceptions=False)
    assert ran.exit_code == 0
    model = forebay.load_model(tiny_model)
    token = int(model.tokenizer.to_tokens(" of", prepend_bos=False)[0, 0])
    kinds = ["hook_resid_post", "hook_mlp_out", "hook_attn_out"]
    expected = causal_tracing(
        model,
        PROMPT,
        SUBJECT,
        Probability(token=token),
        hooks=kinds,
        layers=[0, 2],
        window=3,
        n_samples=2,
        seed=5,
    )
    with xr.open_zarr(tmp_path / "causal_tracing.zarr", consolidated=False) as written:
        xr.testing.assert_allclose(written.load(), expected, atol=1e-7)
        assert written.attrs == expected.attrs
    assert (tmp_path / "causal_tracing.png").stat().st_size > 5_000
    total = float(indirect_effect(expected)["total_effect"])
    assert f"total effect {total:.3f}" in " ".join(ran.output.split())
    for name in ("last subject token", "first subsequent token", "last token"):
        assert name in ran.output
