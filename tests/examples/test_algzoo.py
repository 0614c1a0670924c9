"""The example takes a network apart as the library does, and trains one where there is none."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import xarray as xr
from click.testing import CliRunner
from safetensors.torch import save_file

from forebay.stages.algzoo.ablation import ablate_neurons
from forebay.stages.algzoo.load import load_algzoo
from forebay.stages.algzoo.probing import probe_neurons
from forebay.stages.algzoo.regions import classify_regions, enumerate_regions
from forebay.stages.algzoo.standardize import standardize
from forebay.stages.algzoo.surprise import OracleEstimator, RegionEstimator, surprise_accounting
from forebay.stages.algzoo.tasks import evaluate, sample_inputs

EXAMPLE = Path(__file__).parents[2] / "docs/examples/algzoo.py"


def run(*arguments: object) -> str:
    found = CliRunner().invoke(runpy.run_path(str(EXAMPLE))["main"], [str(one) for one in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.output


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """An imperfect network of three neurons that reads two numbers."""
    generator = torch.Generator().manual_seed(4)
    path = tmp_path / "2nd_argmax_3_2_1073741824_0.safetensors"
    shapes = {"rnn.weight_ih_l0": (3, 1), "rnn.weight_hh_l0": (3, 3), "linear.weight": (2, 3)}
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path)
    return path


def test_what_is_written_is_what_the_library_says(weights: Path, tmp_path: Path) -> None:
    said = run("--weights", weights, "--output", tmp_path / "out")
    assert "2nd_argmax: 3 neurons, 2 steps, 18 parameters" in said
    assert (tmp_path / "out/algzoo.png").stat().st_size > 10_000
    tree = xr.open_datatree(tmp_path / "out/algzoo.zarr", engine="zarr", consolidated=False)
    network = standardize(load_algzoo(weights, dtype="float64"))
    x = sample_inputs(network.spec, 10_000, seed=102)
    expected = {
        "evaluation": evaluate(network, x),
        "regions": enumerate_regions(network),
        "regions_seen": classify_regions(network, x),
        "ablation": ablate_neurons(network, x, by_time=True),
    }
    for name, dataset in expected.items():
        xr.testing.assert_allclose(tree[name].to_dataset(), dataset)
    roles = probe_neurons(network)["best_role"].values
    assert tree["probing/best_role"].values.tolist() == roles.tolist()
    first = surprise_accounting(
        network, OracleEstimator(spec=network.spec), sample_inputs(network.spec, 10_000, seed=103)
    )
    oracle = OracleEstimator(spec=network.spec, confidence=first["agreement"].item())
    bits = surprise_accounting(network, oracle, x)["residual_bits"].item()
    assert tree["oracle/residual_bits"].item() == pytest.approx(bits)
    assert f"{bits:,.0f}" in said.replace("\n", " ")


def test_regions_are_trusted_as_far_as_they_are_right_where_they_expect_something(weights: Path) -> None:
    network = standardize(load_algzoo(weights, dtype="float64"))
    x = sample_inputs(network.spec, 2_000, seed=1)
    kept = RegionEstimator.from_regions(network, classify_regions(network, x), most=1)
    expected = kept.predict(x.values)
    assert 0.1 < (expected < 0).mean() < 0.9
    answers = surprise_accounting(network, kept, x)["answer"].values
    right = [answer == one for answer, one in zip(answers, expected, strict=True) if one >= 0]
    confidence = runpy.run_path(str(EXAMPLE))["trust"](network, kept, x)["confidence"]
    assert confidence == pytest.approx(min(sum(right) / len(right), 0.999))
    assert confidence > 0.99


@pytest.mark.slow
def test_a_network_that_it_trains_does_better_than_chance(tmp_path: Path) -> None:
    run("--hidden", 2, "--length", 2, "--steps", 150, "--starts", 2, "--output", tmp_path / "out")
    tree = xr.open_datatree(tmp_path / "out/algzoo.zarr", engine="zarr", consolidated=False)
    assert tree["evaluation/score"] > 0.7
    assert tree["regions"].sizes["region"] <= 16
    run("--task", "median", "--hidden", 3, "--length", 3, "--steps", 100, "--starts", 1, "--no-enumerate",
        "--output", tmp_path / "median")  # fmt: skip
    tree = xr.open_datatree(tmp_path / "median/algzoo.zarr", engine="zarr", consolidated=False)
    assert tree["evaluation/score"] > -0.67  # the median's own deviation, which 0 as the answer would leave
    assert "regions" not in tree
