"""A recipe from a stranger names what is read; it runs nothing, and writes nothing outside its run's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from forebay.pipeline.cli import main
from forebay.pipeline.foreign import require_same_corpus
from forebay.pipeline.plan import load_plan, make_plan
from forebay.pipeline.recipe import Recipe, read_recipe
from forebay.pipeline.run import run
from forebay.stages.models.errors import ModelError
from forebay.stages.models.source import open_checkpoint
from forebay.stores.errors import FingerprintMismatch, ForebayError, RecipeError, UnsafePath

from .watching import contents, watched

TABLES = {
    "corpus": '[corpus]\nfiles = ["x.jsonl"]\n',
    "model": '[model]\nsource = "nobody/nothing"\n',
    "tokenize": "[tokenize]\ncontext = 16\n",
}


def written(folder: Path, more: str = "", **tables: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text("\n".join((TABLES | tables).values()) + more)
    return path


RECIPES = {
    "arrays without end": "[corpus]\nfiles = " + "[" * 100_000,
    "tables without end": "[corpus." + ".".join("a" * 5000) + "]\nx = 1\n",
    "a number without end": "[tokenize]\ncontext = " + "9" * 10_000 + "\n",
    "a number that no array has": TABLES["corpus"] + TABLES["model"] + "[tokenize]\ncontext = 1" + "0" * 30 + "\n",
    "deep arrays": TABLES["corpus"] + TABLES["model"] + TABLES["tokenize"] + "x = " + "[" * 60 + "]" * 60 + "\n",
    "a null": '[corpus]\nfiles = ["a\\u0000b"]\n' + TABLES["model"] + TABLES["tokenize"],
    "a date": TABLES["corpus"] + TABLES["model"] + "[tokenize]\ncontext = 2020-01-01\n",
    "a table that is none": TABLES["corpus"] + TABLES["model"] + TABLES["tokenize"] + '["__class__"]\nx = 1\n',
    "a key that is none": TABLES["corpus"] + TABLES["model"] + TABLES["tokenize"] + "__class__ = 1\n",
}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_a_recipe_that_is_none_is_refused_as_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with watched(), pytest.raises(RecipeError):
        read_recipe(path)


def test_a_recipe_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    with path.open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(RecipeError, match="larger than"):
        read_recipe(path)


NAMES = ["../x", "/etc/x", "a/b", "a.b", ".x", "", "a\\u0000", "\\u001b[2J", "x" * 101, "a\\\\b", "c d"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["encode", "train", "capture"])
def test_no_step_is_named_out_of_its_run(tmp_path: Path, kind: str, name: str) -> None:
    keys = {
        "encode": 'dictionary = "x"',
        "train": 'hook = "blocks.0.hook_resid_post"\nn_feature = 4',
        "capture": 'hooks = ["blocks.0.hook_resid_post"]',
    }
    with pytest.raises(RecipeError, match=r"a name consists of|null character"):
        read_recipe(written(tmp_path, f'[{kind}."{name}"]\n{keys[kind]}\n'))


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "a\\\\b", ".x", "c", "zarr.json", "\\u202ex"])
def test_no_dictionary_of_a_step_is_named_out_of_its_store(tmp_path: Path, name: str) -> None:
    more = f'[capture]\nhooks = ["blocks.0.hook_resid_post"]\n[encode.sae.dictionary]\n"{name}" = "x"\n'
    with pytest.raises(RecipeError, match="cannot be the name of a group"):
        read_recipe(written(tmp_path, more))


SOURCES = [
    "../../etc",
    "../etc",
    "a/..",
    "a/../../b",
    "./a",
    "package:os/path.py",
    "package:os.path/x",
    "package:../x/y.gguf",
    "package:torch/../secret.gguf",
    "package:torch//etc/passwd",
    "package:/etc/passwd",
    "package:torch/",
    "https://evil.example/model",
    "file:///etc/passwd",
    "hf://a/b",
    "--config=x/y",
    "a b/c",
    "/etc/passwd",
    "",
]


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_that_is_no_model_is_refused_and_nothing_is_fetched_or_imported(source: str) -> None:
    import sys

    known = {*sys.modules}
    with watched(), pytest.raises(ModelError):
        open_checkpoint(source)
    assert not [name for name in {*sys.modules} - known if name.startswith(("antigravity", "this", "os.path.x"))]


RUN_RECIPES: dict[str, Any] = {
    "nothing": None,
    "a list": [1],
    "no corpus": {"name": "x"},
    "a root that is no path": {"name": "x", "corpus": {"root": 5, "files": ["a"]}},
    "no name": {"corpus": {"root": "/", "files": ["a"]}},
    "tables that are none": {"name": "x", "corpus": {"root": "/", "files": ["a"]}, "model": 5, "tokenize": []},
}


@pytest.mark.parametrize("value", RUN_RECIPES.values(), ids=RUN_RECIPES)
def test_the_recipe_of_a_run_that_is_none_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(RecipeError):
        Recipe.from_json(value)
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": value}))
    with pytest.raises(RecipeError):
        load_plan(tmp_path, "cpu")


# ── a run from a stranger ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A small run of one step, as it comes with its corpus."""
    folder = tmp_path_factory.mktemp("received")
    (folder / "x.jsonl").write_text('{"id": "a", "text": "It is a truth universally acknowledged"}\n')
    run(written(folder, model=f'[model]\nsource = "{tiny_model}"\n'), folder / "run", device="cpu")
    return folder


@pytest.fixture
def foreign(received: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(received / "run", tmp_path / "run"))


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A text of the user's, below which nothing of it may appear in the run."""
    path = tmp_path / "home" / "diary.jsonl"
    path.parent.mkdir()
    path.write_text('{"id": "my-secret-id", "text": "dear diary"}\n')
    return path


def edit_recipe(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    said = json.loads((folder / "recipe.json").read_text())
    change(said["recipe"])
    (folder / "recipe.json").write_text(json.dumps(said))


def test_a_run_goes_on_by_its_own_recipe(foreign: Path) -> None:
    plan = load_plan(foreign, "cpu")
    assert plan.step("tokens").todo() == []


def test_the_recipe_of_a_strangers_run_has_no_other_text_of_this_machine_read_into_it(
    foreign: Path, private: Path
) -> None:
    for change in (
        lambda said: said["corpus"].update(root=str(private.parent), files=["*.jsonl"]),
        lambda said: said["corpus"].update(root="/", files=[str(private)]),
    ):
        edit_recipe(foreign, change)
        before = contents(foreign)
        with watched() as watch, pytest.raises(FingerprintMismatch, match="not those that its tokens were made of"):
            load_plan(foreign, "cpu")
        assert contents(foreign) == before
        assert str(private) not in watch.opened
        for command in (["verify", "--recompute", "1"], ["append"]):
            found = CliRunner().invoke(main, [*command, str(foreign)])
            assert found.exit_code == 2
            assert contents(foreign) == before


def test_a_file_of_the_same_name_is_hashed_and_no_more(foreign: Path, private: Path) -> None:
    shutil.copy(private, private.with_name("x.jsonl"))
    edit_recipe(foreign, lambda said: said["corpus"].update(root=str(private.parent)))
    before = contents(foreign)
    with watched(), pytest.raises(FingerprintMismatch, match="its sha256 is another one"):
        require_same_corpus(Recipe.from_json(json.loads((foreign / "recipe.json").read_text())["recipe"]), foreign)
    assert contents(foreign) == before
    assert b"my-secret-id" not in b"".join(one for one in before.values() if isinstance(one, bytes))


@pytest.mark.parametrize("name", ["tokens", "tokens/counts", "tokens/data.zarr"])
def test_nothing_is_written_through_a_link_in_a_run(foreign: Path, received: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    (foreign / name).rename(elsewhere)
    (foreign / name).symlink_to(elsewhere)
    for record in elsewhere.rglob("000000.json"):
        record.unlink()
    before = contents(elsewhere)
    with watched(foreign), pytest.raises(UnsafePath, match="symbolic link"):
        make_plan(read_recipe(received / "recipe.toml"), foreign, "cpu").step("tokens").open()
    assert contents(elsewhere) == before


def test_a_run_may_be_reached_by_a_link(foreign: Path, received: Path, tmp_path: Path) -> None:
    (tmp_path / "way").symlink_to(foreign)
    assert run(received / "recipe.toml", tmp_path / "way", device="cpu").code == 0


def test_a_dictionary_is_not_trained_through_a_link(foreign: Path, tmp_path: Path) -> None:
    from threading import Event

    from forebay.pipeline.dictionaries import train_in_run
    from forebay.pipeline.progress import Quiet
    from forebay.stages.train import Training

    (tmp_path / "home" / "sae").mkdir(parents=True)
    (foreign / "dictionaries").symlink_to(tmp_path / "home")
    made = Recipe.from_json(json.loads((foreign / "recipe.json").read_text())["recipe"])
    object.__setattr__(made, "training", {"sae": Training(hook="blocks.0.hook_resid_post", n_feature=4)})
    with watched(foreign), pytest.raises((UnsafePath, ForebayError), match="symbolic link"):
        train_in_run(made, foreign, "sae", "cpu", Quiet(), Event())
    assert contents(tmp_path / "home") == {}
