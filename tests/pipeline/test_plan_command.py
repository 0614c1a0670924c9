"""What `forebay plan` says from a measured minute, a stored profile or a run's records: bytes, memory, time, passes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import forebay
from forebay.pipeline.cli import main
from forebay.stores.ledger import Ledger

MakeRecipe = Callable[..., Path]
SAE = {"sae": {"hook": "blocks.1.hook_resid_post", "n_feature": 40, "k": 4, "batch": 64, "n_batch": 4}}
CAPTURE = {"store_dtype": "bfloat16", "threads": 1}


def cli(*arguments: str | Path | float) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments)])


def values(*arguments: str | Path | float) -> Any:
    """What a command that succeeds prints on standard output as JSON."""
    result = cli(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def says(result: Any, code: int = 0) -> str:
    assert result.exit_code == code, result.output
    return str(result.output)


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> Path:
    return make_recipe(capture=CAPTURE)


@pytest.fixture
def finished(recipe: Path, tmp_path: Path) -> Path:
    forebay.run(recipe, tmp_path / "run", device="cpu")
    return tmp_path / "run"


def numbers(value: Any, path: str = "") -> list[str]:
    """Paths of all numbers in JSON that stand in no figure with its unit and basis."""
    if isinstance(value, dict):
        if {"value", "unit", "basis"} == set(value):
            return [] if value["unit"] and value["basis"] else [path]
        return [found for key, one in value.items() for found in numbers(one, f"{path}/{key}")]
    if isinstance(value, list):
        return [found for one in value for found in numbers(one, path)]
    return [path] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_a_measured_plan_says_everything_with_its_unit_and_basis(recipe: Path, tmp_path: Path) -> None:
    text = says(cli("plan", recipe, "--to", tmp_path / "run", "--device", "cpu", "--measure", 0.4, "--passes", 3))
    for said in (
        r"profile: measured \d{4}-\d\d-\d\d \d\d:\d\d UTC on ",
        r"on disk, uncompressed +[\d.]+ kB +exact",
        r"on disk, zstd +[\d.]+ kB +computed",
        r"a layer of hook_resid_post, uncompressed +[\d.]+ kB +exact",
        r"tokens a second +[\d,]+ tokens/s +measured",
        r"host memory, at most +[\d.]+ [MG]B +computed",
        r"bandwidth of the folder, writing +[\d.]+ [kMG]B/s +measured",
        r"activations +64 +\d+ s +[\d.]+ [kMG]B/s +(compute|storage)",
        r"assumed: workers are equal, and share the bandwidth",
        r"store dense .* (\d+ passes|never)",
        r"cheapest for 3 passes by device time: (store dense|recompute)\.",
    ):
        assert re.search(said, text), f"{said}\n{text}"
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".measuring")]
    assert not list((tmp_path / "run").glob("*/data.zarr"))


def test_json_has_no_number_without_unit_and_basis(recipe: Path, tmp_path: Path) -> None:
    options = ("--measure", 0.2, "--gpu-price", 2, "--storage-price", 20, "--workers", 3)
    value = values("plan", recipe, "--to", tmp_path / "run", "--device", "cpu", *options)
    counts = {"/profile/format", "/profile/taken", "/steps/workers/workers", "/passes"}
    assert set(numbers(value)) == counts
    assert value["cheapest"] in {one["name"] for one in value["strategies"]}
    assert [[at["workers"] for at in step["workers"]] for step in value["steps"]] == [[3], [3]]
    bare = values("plan", recipe, "--to", tmp_path / "run", "--device", "cpu")
    assert bare["profile"] is None
    assert bare["strategies"] == []
    assert bare["steps"][1]["figures"]["on disk, uncompressed"]["basis"] == "exact"


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_predicted_bytes_are_the_recorded_ones(make_recipe: MakeRecipe, tmp_path: Path, compression: str) -> None:
    """Exactly, of uncompressed stores; compressed, what the run's own records make of it."""
    hooks = ["blocks.{0,2}.hook_resid_post", "blocks.1.attn.hook_pattern", "hook_embed"]
    capture = {"hooks": hooks, "unit_tokens": 48, "compression": compression, **CAPTURE}
    recipe, folder = make_recipe(capture=capture), tmp_path / "run"
    assert forebay.run(recipe, folder, device="cpu").code == 0
    value = values("plan", recipe, "--to", folder, "--device", "cpu", "--profile", folder)
    for step in value["steps"]:
        ledger = Ledger(folder / step["name"])
        records = [ledger.record(unit) for unit in ledger.done()]
        plain = step["name"] == "tokens" or compression == "none"
        said = step["figures"]["on disk, uncompressed" if plain else "on disk, zstd"]
        assert said["basis"] == ("exact" if plain else "computed")
        assert said["value"] == pytest.approx(sum(record["bytes"] for record in records), rel=0 if plain else 1e-12)
        assert step["objects"]["value"] == sum(len(record["objects"]) for record in records)
        assert step["units"]["value"] == len(records)


def test_a_saved_profile_gives_what_measuring_gave(recipe: Path, tmp_path: Path) -> None:
    common, saved = ("plan", recipe, "--to", tmp_path / "run", "--device", "cpu"), tmp_path / "profile.json"
    first = values(*common, "--measure", 0.2, "--save-profile", saved)
    again = values(*common, "--profile", saved)
    assert again == first


def test_a_profile_of_something_else_is_refused_by_name(
    make_recipe: MakeRecipe, altered_model: Callable[..., Path], finished: Path, tmp_path: Path
) -> None:
    def refusal(recipe: Path) -> str:
        where = ("--to", tmp_path / f"to-{recipe.stem}", "--device", "cpu", "--profile", finished)
        return says(cli("plan", recipe, *where), 2)

    message = refusal(make_recipe("dtype", capture={**CAPTURE, "dtype": "bfloat16"}))
    assert f"{finished} was taken of the step activations with other settings" in message
    assert "parameters.dtype: 'bfloat16' here, 'float32' in the profile" in message
    message = refusal(make_recipe("context", capture=CAPTURE, tokenize={"context": 32}))
    assert "parameters.context: 32 here, 16 in the profile" in message
    other = altered_model(lambda weights: weights["lm_head.weight"].neg_())
    message = refusal(make_recipe("other", capture=CAPTURE, model=other))
    assert f"of another model or dictionary in the step activations: of {finished.parent}" not in message
    assert "was taken of another model or dictionary in the step activations" in message
    assert f"the recipe's model is {other}" in message
    # Another corpus and other units cost a token the same.
    fits = make_recipe("fits", capture={**CAPTURE, "unit_tokens": 80}, texts=["Other words of another text."] * 30)
    says(cli("plan", fits, "--to", tmp_path / "fits", "--device", "cpu", "--profile", finished))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a profile"),
        ('{"origin": "measured"}', "model: Field required"),
        (None, "there is no profile at"),
    ],
)
def test_what_is_no_profile_is_refused(recipe: Path, tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    message = says(cli("plan", recipe, "--to", tmp_path / "run", "--device", "cpu", "--profile", path), 2)
    assert said in message


def test_options_that_exclude_each_other_are_refused(recipe: Path, finished: Path) -> None:
    message = says(cli("plan", recipe, "--measure", 1, "--profile", finished), 2)
    assert "--measure and --profile both give rates" in message
    assert "name one of them" in says(cli("plan", recipe, "--save-profile", "x.json"), 2)


def test_features_are_compared_with_dense_activations_and_with_nothing_kept(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(capture=CAPTURE, train=SAE, encode={"sae": {"threads": 1}})
    waiting = says(cli("plan", recipe, "--to", tmp_path / "run", "--device", "cpu", "--measure", 0.1))
    assert "features-sae: not measured, for its dictionary is not trained yet" in waiting
    assert forebay.run(recipe, tmp_path / "run", device="cpu").code == 0
    common = ("plan", recipe, "--to", tmp_path / "run", "--device", "cpu")
    for options in (("--measure", 0.3), ("--profile", tmp_path / "run")):
        value = values(*common, *options)
        assert [one["name"] for one in value["strategies"]] == ["store dense", "store features only", "recompute"]
        dense, features, nothing = value["strategies"]
        assert dense["kept"]["value"] == value["steps"][1]["figures"]["on disk, uncompressed"]["value"]
        assert features["kept"]["value"] > 0
        assert nothing["kept"]["value"] == 0
        assert nothing["a_pass"]["value"] <= features["once"]["value"]
