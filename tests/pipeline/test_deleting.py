"""What is deleted is gone whole or not at all, is nothing else, and was nobody's any more."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from forebay.pipeline.cli import main
from forebay.pipeline.deleting import delete
from forebay.stores.errors import SchemaError, StoreNotFound, UnsafePath
from forebay.stores.index_builder import build_index
from forebay.stores.ledger import Ledger
from forebay.stores.places import place
from forebay.stores.store import Store
from forebay.stores.tree import open_run

from ..stores.small_runs import RUNS, provenance_of, schema_of, write_run, write_step

STEPS = ("tokens", "activations", "features-sae")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an index, whose features were computed from its activations, and a dictionary."""
    folder = tmp_path_factory.mktemp("made") / "run"
    write_run(folder, RUNS[1], 8, steps=("tokens", "activations"))
    about = provenance_of("features-sae", RUNS[1])
    about["determines"]["source"] = Store.open(folder / "activations").fingerprint
    write_step(folder / "features-sae", RUNS[1], 8, about)
    build_index(folder / "features-sae")
    (folder / "dictionaries/sae").mkdir(parents=True)
    (folder / "dictionaries/sae/cfg.json").write_text("{}")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def recipe(run: Path, **tables: Any) -> None:
    (run / "recipe.json").write_text(json.dumps({"recipe": tables}))


@pytest.mark.parametrize(
    ("part", "below"),
    [
        ("activations", "activations/"),
        ("features-sae", "features-sae/"),
        ("index-sae", "features-sae/index/"),
        ("dictionary-sae", "dictionaries/sae/"),
    ],
)
def test_a_part_goes_and_nothing_else(run: Path, part: str, below: str) -> None:
    before = files(run)
    size = sum(len(data) for name, data in before.items() if name.startswith(below))
    assert delete(run, part) == size
    assert files(run) == {name: data for name, data in before.items() if not name.startswith(below)}
    assert not any(path.name.startswith(".") for path in run.rglob("*"))
    assert set(open_run(run).children) >= {"tokens"}


def test_it_is_computed_anew_where_it_was(run: Path) -> None:
    before = files(run / "activations/data.zarr")
    delete(run, "activations")
    write_step(run / "activations", RUNS[1], 8)
    assert files(run / "activations/data.zarr") == before


@pytest.mark.parametrize(
    "name", ["..", "../run", "activations/done", "/etc", ".", "", "data.zarr", "recipe.json", "a b"]
)
def test_nothing_outside_is_ever_named(run: Path, name: str) -> None:
    before = files(run.parent)
    with pytest.raises(SchemaError, match=r"has no .*It has: activations, features-sae, tokens, index-sae"):
        delete(run, name)
    assert files(run.parent) == before


def test_a_name_that_is_nearly_right_is_offered(run: Path) -> None:
    with pytest.raises(SchemaError, match=r"Did you mean 'features-sae'"):
        delete(run, "feature-sae")
    with pytest.raises(StoreNotFound):
        delete(run / "nothing", "tokens")


@pytest.mark.parametrize("part", ["activations", "features-sae", "index-sae", "dictionary-sae"])
def test_links_are_not_followed(run: Path, tmp_path: Path, part: str) -> None:
    places = {"index-sae": "features-sae/index", "dictionary-sae": "dictionaries/sae"}
    folder = run / places.get(part, part)
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path / "elsewhere")
    with pytest.raises(UnsafePath, match="symbolic link"):
        delete(run, part)
    assert files(tmp_path / "elsewhere") == before


def test_links_below_go_alone(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "000000.json").write_text("mine")
    shutil.rmtree(run / "activations/done")
    (run / "activations/done").symlink_to(precious)
    (run / "activations/data.zarr/hook_embed/value/elsewhere").symlink_to(precious)
    delete(run, "activations")
    assert (precious / "000000.json").read_text() == "mine"
    assert not (run / "activations").exists()


# ── what is still needed ─────────────────────────────────────────────────────────────────────────────────────────────


def test_tokens_go_last(run: Path) -> None:
    with pytest.raises(SchemaError, match=r"tokens of .* still needed: .*activations, features-sae"):
        delete(run, "tokens")
    for part in ("features-sae", "activations", "tokens"):
        delete(run, part)
    assert not (run / "tokens").exists()


def test_activations_that_unfinished_features_read_stay(run: Path) -> None:
    recipe(run, encode={"sae": {"fused": False, "dictionary": "d"}})
    Ledger(run / "features-sae").drop(1)
    with pytest.raises(SchemaError, match="features-sae is not finished, and reads it"):
        delete(run, "activations")
    recipe(run, encode={"sae": {"fused": True, "dictionary": "d"}})
    delete(run, "activations")


def test_activations_that_are_yet_to_be_encoded_stay(run: Path) -> None:
    recipe(run, encode={"sae": {"dictionary": "d"}, "new": {"dictionary": "d"}})
    with pytest.raises(SchemaError, match="features-new is not finished, and reads it"):
        delete(run, "activations")


def test_activations_of_another_capture_are_not_needed(run: Path) -> None:
    """By unfinished features that say what they read."""
    shutil.copytree(run / "activations", run / "activations-late")
    header = run / "activations-late/data.zarr/zarr.json"
    header.write_text(header.read_text().replace(Store.open(run / "activations").fingerprint, "e" * 64))
    recipe(run, encode={"sae": {"dictionary": "d"}})
    Ledger(run / "features-sae").drop(1)
    delete(run, "activations-late")
    with pytest.raises(SchemaError, match="still needed"):
        delete(run, "activations")


def test_activations_of_a_training_that_is_not_done_stay(run: Path) -> None:
    recipe(run, train={"new": {"hook": "blocks.3.hook_resid_post"}, "sae": {"hook": "blocks.3.hook_resid_post"}})
    with pytest.raises(SchemaError, match=r"\[train.new\] is not finished, and reads blocks.3.hook_resid_post of it"):
        delete(run, "activations")
    recipe(run, train={"new": {"hook": "blocks.1.hook_resid_post"}})
    delete(run, "activations")


def test_a_dictionary_that_unfinished_features_are_encoded_with_stays(run: Path) -> None:
    recipe(run, encode={"sae": {"dictionary": None}})
    Ledger(run / "features-sae").drop(1)
    with pytest.raises(SchemaError, match="features-sae are not finished, and are encoded with it"):
        delete(run, "dictionary-sae")
    recipe(run, encode={"sae": {"dictionary": "another"}})
    delete(run, "dictionary-sae")


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_asks_and_says_what_stays(run: Path) -> None:
    said = CliRunner().invoke(main, ["delete", str(run), "activations"], input="n\n")
    assert said.exit_code == 1
    assert "Stays, and stays readable: features-sae, tokens, index-sae, dictionary-sae." in said.output
    assert (run / "activations").exists()
    said = CliRunner().invoke(main, ["delete", str(run), "activations", "--yes"])
    assert said.exit_code == 0, said.output
    assert "Deleted activations: " in said.output
    said = CliRunner().invoke(main, ["delete", str(run), "activations", "--yes"])
    assert said.exit_code == 2
    assert "has no 'activations'" in said.output


def test_the_commands_write_parts_and_wholes(made: Path, tmp_path: Path) -> None:
    for arguments in (
        [
            "export",
            made,
            tmp_path / "a",
            "--documents",
            "0:2",
            "--layers",
            "0-3",
            "--hooks",
            "blocks.*.hook_resid_post",
        ],
        ["export", made, tmp_path / "b", "--tokens", "12:", "--layers", "0,3", "--hooks", "blocks.*.hook_resid_post"],
        ["concat", tmp_path / "c", tmp_path / "a", tmp_path / "b", "--steps", "tokens,activations"],
    ):
        said = CliRunner().invoke(main, list(map(str, arguments)))
        assert said.exit_code == (2 if "0-3" in arguments else 0), said.output
        if "0-3" in arguments:
            assert "no capture has layer 1; there are 0, 3, 7" in said.output
            arguments[arguments.index("0-3")] = "0,3"
            assert CliRunner().invoke(main, list(map(str, arguments))).exit_code == 0
    run = open_run(tmp_path / "c")
    whole = RUNS[1].values["activations/hook_resid_post"][:2]
    # Of documents 0 and 1 the sequences that hold any token, 0 to 29; then those from the third sequence on.
    expected = whole[:, [*range(30), *range(12, 31)]]
    np.testing.assert_array_equal(run["activations/hook_resid_post/value"].values, expected)
    assert set(run.children) == {"tokens", "activations", "sequences", "documents"}
    for wrong in (["--tokens", "5"], ["--documents", "a:b"], ["--layers", "x"]):
        said = CliRunner().invoke(main, ["export", str(made), str(tmp_path / "d"), *wrong])
        assert said.exit_code == 2
        assert wrong[1] in said.output


# ── kills ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_killed_at_any_time_a_store_is_whole_or_missing(run: Path, tmp_path: Path) -> None:
    context, chance = get_context("forkserver"), random.Random(1)
    context.set_forkserver_preload(["forebay.pipeline.deleting"])
    for n in range(400):  # so that removing takes a while
        (run / "activations/failed").mkdir(exist_ok=True)
        (run / f"activations/failed/{n:06d}.1.json").write_text("{}")
    whole = files(run / "activations")
    process = context.Process(target=delete, args=(shutil.copytree(run, tmp_path / "first"), "activations"))
    process.start()
    process.join()
    seen = {"whole": 0, "missing": 0, "left over": 0}
    for n in range(8):
        folder = shutil.copytree(run, tmp_path / f"run-{n}")
        began, going = time.monotonic(), chance.uniform(0, 0.02)
        process = context.Process(target=delete, args=(folder, "activations"))
        process.start()
        while (folder / "activations").exists() and time.monotonic() - began < 20:
            pass
        time.sleep(going)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        check_whole_or_missing(folder, whole, seen)
    assert seen["left over"] >= 1, seen


def check_whole_or_missing(folder: Path, whole: dict[str, bytes], seen: dict[str, int]) -> None:
    left = [name for name in os.listdir(folder) if name.endswith(".deleted")]
    seen["left over"] += len(left)
    if (folder / "activations").exists():
        seen["whole"] += 1
        assert files(folder / "activations") == whole
        delete(folder, "activations")
    else:
        seen["missing"] += 1
        assert set(open_run(folder).children) == {"tokens", "features-sae", "sequences", "documents"}
        # What was left over disturbs nobody, and goes with the next deletion.
        schema = schema_of("activations", RUNS[1], 8)
        store = Store.create(folder / "activations", schema, "0" * 64, provenance_of("activations", RUNS[1]))
        assert store.done() == set()
        delete(folder, "activations")
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []


def test_a_rename_that_fails_leaves_everything(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(run)

    def refuse(*_: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError):
        delete(run, "activations")
    assert files(run) == before


def test_an_object_store_is_left_to_its_own_tools() -> None:
    with pytest.raises(SchemaError, match="own tools"):
        delete(place("memory://bucket/run"), "activations")
