"""The example of attention knockouts writes what the library says of one cut, of heads, and of windows of layers."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from click.testing import CliRunner

import forebay

SCRIPT = Path(__file__).parents[2] / "docs/examples/attention_knockout.py"
PROMPT, SUBJECT = "It is a truth universally", "truth"


def test_it_writes_the_library_s_numbers_and_a_figure(tiny_model: Path, tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    options = ["--prompt", PROMPT, "--subject", SUBJECT, "--window", "2"]
    ran = CliRunner().invoke(
        main, ["--model", str(tiny_model), "--output", str(tmp_path), *options], catch_exceptions=False
    )
    assert ran.exit_code == 0, ran.output
    found = xr.open_zarr(tmp_path / "attention_knockout.zarr", consolidated=False)
    model = forebay.load_model(tiny_model)
    encoding = model.tokenizer.encode(PROMPT)
    ids = [list(encoding.token_ids)]

    def probabilities(edges: object = None, **where: object) -> torch.Tensor:
        hooks = forebay.KnockoutSpec(edges=edges, **where).hooks(model.spec) if edges else None
        logits = model.forward(ids, hooks).logits
        assert logits is not None
        return logits[0, -1].double().softmax(-1)

    base = probabilities()
    answer = int(base.argmax())
    cut = probabilities([(-1, 0)], layers=1)
    np.testing.assert_allclose(found["kl_divergence"], (base * (base / cut).log()).sum(), rtol=2e-3)
    assert found["vocab"].values.tolist() == [answer]
    np.testing.assert_allclose(found["asked_changed_probability"], [cut[answer]], rtol=1e-3)
    head = probabilities([(-1, 0)], layers=2, heads=3)
    np.testing.assert_allclose(found["by_head"].sel(layer=2, head=3), (base * (base / head).log()).sum(), rtol=5e-3)
    subject = [(-1, list(encoding.label_spans({"s": SUBJECT})["s"]))]
    for target, edges in {"first": [(-1, 0)], "subject": subject, "last": [(-1, -1)]}.items():
        for layer, around in enumerate(([0], [0, 1], [1, 2])):
            changed = probabilities(edges, layers=around)[answer]
            expected = 100 * (changed - base[answer]) / base[answer]
            np.testing.assert_allclose(found["by_layer"].sel(target=target, layer=layer), expected, atol=2e-2)
    assert (tmp_path / "attention_knockout.png").stat().st_size > 20_000
    assert f"KL {float(found['kl_divergence']):.5f} nats" in ran.output
