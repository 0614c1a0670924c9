"""The example writes the sweep that the library gives, of a cross-layer transcoder and of an autoencoder."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import forebay
from forebay.stages.analyze.metrics import Logit, Probability
from forebay.stages.analyze.position_sweep import position_sweep
from forebay.stages.dictionaries.interventions import Inject
from forebay.stages.dictionaries.transcoders import FeatureId, TranscoderSet

from .test_quick_start_sae import write_sae

SCRIPT = Path(__file__).parents[2] / "docs/examples/figure13_planning_poems.py"
PROMPT = "Mr. Bennet made no answer. You want to tell "
WIDE, N_FEATURE = 28, (9, 7, 8)


def write_transcoders(folder: Path) -> Path:
    """A random cross-layer transcoder as circuit-tracer reads it."""
    folder.mkdir()
    said = {
        "model_name": "tiny",
        "model_kind": "cross_layer_transcoder",
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(said))
    random = torch.Generator().manual_seed(5)
    for layer, n in enumerate(N_FEATURE):
        encoder = {
            f"W_enc_{layer}": torch.randn(n, WIDE, generator=random),
            f"b_enc_{layer}": torch.randn(n, generator=random),
            f"b_dec_{layer}": torch.randn(WIDE, generator=random),
        }
        save_file(encoder, folder / f"W_enc_{layer}.safetensors")
        rows = torch.randn(n, 3 - layer, WIDE, generator=random) * 0.2
        save_file({f"W_dec_{layer}": rows}, folder / f"W_dec_{layer}.safetensors")
    return folder


def ran(output: Path, *arguments: str | Path) -> Result:
    main = runpy.run_path(str(SCRIPT))["main"]
    given = [*map(str, arguments), "--prompt", PROMPT, "--word", "me", "--output", str(output)]
    return CliRunner().invoke(main, given, catch_exceptions=False)


def test_features_of_a_cross_layer_transcoder_are_swept_over_every_position(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_transcoders(tmp_path / "clt")
    features = ["--suppress", "0:3", "--suppress", "L1:6", "--inject", "1:2", "--strength", "4"]
    result = ran(tmp_path, "--model", tiny_model, "--dictionary", folder, *features)
    assert result.exit_code == 0
    model, of = forebay.load_model(tiny_model), forebay.load_dictionary(folder)
    assert isinstance(of, TranscoderSet)
    token = model.tokenizer.find_token_id("me", last=True)
    edits = [
        Inject(of, {FeatureId(0, 3): -4.0, FeatureId(1, 6): -4.0}),
        Inject(of, {FeatureId(1, 2): 4.0}),
    ]
    metrics = [Probability(token=token), Logit(token=token)]
    expected = position_sweep(model, PROMPT, edits, metric=metrics, where="hook_resid_post")
    with xr.open_zarr(tmp_path / "figure13_planning_poems.zarr", consolidated=False) as written:
        xr.testing.assert_allclose(written.load(), expected, atol=1e-5)
        assert written.attrs["inject"] == "L1:2"
        assert written.attrs["suppress"] == ["L0:3", "L1:6"]
    assert (tmp_path / "figure13_planning_poems.png").stat().st_size > 5_000
    assert "Δlogit" in result.output
    strongest = int(np.argmax(abs(expected["logit_change"].values)))
    assert f"│ {strongest:>8} │" in result.output


def test_without_a_feature_the_one_most_like_the_word_is_injected(tiny_model: Path, tmp_path: Path) -> None:
    tensors = write_sae(tmp_path / "sae")
    result = ran(tmp_path, "--model", tiny_model, "--dictionary", tmp_path / "sae")
    assert result.exit_code == 0
    model = forebay.load_model(tiny_model)
    token = model.tokenizer.find_token_id("me", last=True)
    alike = torch.cosine_similarity(tensors["W_dec"], model.unembedding.weight[token])
    with xr.open_zarr(tmp_path / "figure13_planning_poems.zarr", consolidated=False) as written:
        assert written.attrs["inject"] == str(int(alike.argmax()))
        assert np.isfinite(written["probability_change"]).all()


@pytest.mark.parametrize("preset", ["llama3.2-1b-524k", "gemma2-2b-426k", "gemma2-2b-2.5m"])
def test_every_published_sweep_is_complete(preset: str) -> None:
    held = runpy.run_path(str(SCRIPT))["PRESETS"][preset]
    assert set(held) == {"model", "dictionary", "prompt", "suppress", "inject", "word"}
    assert held["prompt"].endswith(" ")
    assert held["inject"] not in held["suppress"]


def test_a_sweep_of_nothing_is_refused() -> None:
    result = CliRunner().invoke(runpy.run_path(str(SCRIPT))["main"], ["--word", "me"])
    assert result.exit_code == 2
    assert "give --preset, or --dictionary" in result.output
