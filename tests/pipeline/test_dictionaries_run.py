"""A recipe that trains a dictionary and encodes with it: one command, resumable, and looked at afterwards."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import forebay
from forebay.pipeline.cli import main
from forebay.pipeline.progress import Quiet
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stores.errors import IncompleteStore

MakeRecipe = Callable[..., Path]

HOOK = "blocks.1.hook_resid_post"
TRAIN = {"hook": HOOK, "n_feature": 36, "k": 5, "batch": 32, "n_batch": 12, "checkpoint_every": 4}
TABLES: dict[str, Any] = {"capture": {"hooks": [HOOK]}, "train": {"sae": TRAIN}, "encode": {"sae": {}}}


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.fixture
def finished(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    outcome = forebay.run(make_recipe(**TABLES), tmp_path / "run")
    assert outcome.code == 0
    return outcome.folder


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a run that holds data, by its path."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if "/c/" in name or name.endswith("sae_weights.safetensors")}


def test_a_plan_says_which_step_waits_for_a_dictionary_and_a_run_does_them_all(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe, folder = make_recipe(**TABLES), tmp_path / "run"
    planned = forebay.plan(recipe, folder)
    assert [step.stage.store for step in planned.steps] == ["tokens", "activations"]
    assert [stage.store for stage in planned.waiting] == ["features-sae"]
    assert "when [train.sae] is done" in cli("plan", recipe, "--to", folder, "--device", "cpu").output
    outcome = forebay.run(recipe, folder)
    assert [step.name for step in outcome.steps] == ["tokens", "activations", "features-sae"]
    assert forebay.plan(recipe, folder).waiting == ()


def test_features_are_those_of_the_dictionary_that_was_trained(finished: Path) -> None:
    run = forebay.open_run(finished)
    sae = forebay.load_dictionary(finished / "dictionaries" / "sae")
    x = run["activations/hook_resid_post/value"].isel(layer=0).values
    found = run.features("sae").dense(range(36)).values
    assert np.abs(found - sae.encode(torch.from_numpy(x)).numpy()).max() <= 1e-5 * found.max()
    assert (found > 0).sum(1).max() == 5


def test_a_second_run_computes_nothing_and_changes_nothing(make_recipe: MakeRecipe, finished: Path) -> None:
    before = files(finished)
    result = cli("run", make_recipe(**TABLES), "--to", finished, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert re.search(r"features-sae: \d+ tokens, all of it was done before", result.output)
    assert files(finished) == before


def test_a_run_that_stopped_while_training_goes_on_to_the_same_bytes(
    make_recipe: MakeRecipe, finished: Path, tmp_path: Path
) -> None:
    recipe, folder = make_recipe("again", **TABLES), tmp_path / "again"
    stopped = forebay.run(recipe, folder, progress=StopAt("train.sae", 6))
    assert stopped.code == 75
    assert not (folder / "dictionaries" / "sae" / "cfg.json").exists()
    assert forebay.run(recipe, folder).code == 0
    assert files(folder) == files(finished)


class StopAt(Quiet):
    """Asks the process to stop, as Ctrl-C does, when a piece of work is that far."""

    def __init__(self, what: str, done: int) -> None:
        self.what, self.done = what, done

    def working(self, what: str, done: int, total: int, said: str) -> None:
        if what == self.what and done >= self.done:
            signal.raise_signal(signal.SIGINT)
            self.done = 10**9


def test_a_run_stopped_while_it_indexes_says_that_it_is_not_done(
    make_recipe: MakeRecipe, finished: Path, tmp_path: Path
) -> None:
    recipe, folder = make_recipe("again", **TABLES), tmp_path / "again"
    assert forebay.run(recipe, folder, progress=StopAt("index of sae", 0)).code == 75
    assert forebay.run(recipe, folder).code == 0
    assert files(folder) == files(finished)


def test_a_recipe_that_only_trains_is_not_done_when_it_is_stopped(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = make_recipe(**{key: table for key, table in TABLES.items() if key != "encode"})
    assert forebay.run(recipe, folder, progress=StopAt("train.sae", 6)).code == 75
    assert not (folder / "dictionaries" / "sae" / "cfg.json").exists()
    assert forebay.run(recipe, folder).code == 0
    assert (folder / "dictionaries" / "sae" / "cfg.json").exists()


def test_training_alone_makes_the_dictionary_of_a_finished_capture(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert forebay.run(make_recipe(capture=TABLES["capture"]), folder).code == 0
    recipe = make_recipe(**TABLES)
    result = cli("train", recipe, "--to", folder, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert forebay.load_dictionary(folder / "dictionaries" / "sae").n_feature == 36
    lines = (folder / "dictionaries" / "sae" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 12


def test_a_name_that_is_not_to_be_trained_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    result = cli("train", make_recipe(**TABLES), "sea", "--to", tmp_path / "run")
    assert result.exit_code == 2
    assert "has no [train.sea]. Did you mean 'sae'?" in result.output


def test_other_settings_do_not_overwrite_a_dictionary(make_recipe: MakeRecipe, finished: Path) -> None:
    changed = {**TABLES, "train": {"sae": {**TRAIN, "k": 6}}}
    with pytest.raises(DictionaryError, match=r"has a dictionary of other settings: training.k: 6 here, 5"):
        forebay.run(make_recipe(**changed), finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 37}, "k = 37 features of n_feature = 36"),
        ({"activation": "topkk"}, "activation: Input should be 'topk', 'batchtopk' or 'jumprelu'"),
        ({"hook": "blocks.1.hook_resid_pots"}, "Did you mean"),
        ({"hook": "blocks.2.hook_resid_post"}, "blocks.2.hook_resid_post"),
        ({"n_features": 3}, "Did you mean 'n_feature'"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_it_begins(
    make_recipe: MakeRecipe, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = make_recipe(**{**TABLES, "train": {"sae": {**TRAIN, **changes}}})
    result = cli("run", recipe, "--to", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "run" / "activations").exists()


def test_features_are_shown_with_fit_and_contexts(finished: Path) -> None:
    result = cli("features", finished)
    assert result.exit_code == 0, result.output
    fit = forebay.dictionary_fit(finished / "features-sae").sel(dictionary="sae")
    assert f"sae: L0 {float(fit['l0']):.1f}, FVU {float(fit['fvu']):.3f}" in result.output
    assert result.output.count("feature ") == 5
    found = forebay.open_run(finished).features("sae").top_contexts(7, n=1)
    chosen = cli("features", finished, "sae", "7", "--contexts", "1").output
    assert f"up to {float(found.value[0]):.1f}" in chosen


def test_the_text_of_a_corpus_cannot_write_to_the_terminal(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    texts = ["[bold red]\x1b[31m it is a truth [/bold red] universally " * 6] * 9
    assert forebay.run(make_recipe(texts=texts, **TABLES), tmp_path / "run").code == 0
    shown = cli("features", tmp_path / "run", "--contexts", "9").output
    assert "\x1b[31m" not in shown
    assert "bold" in shown


def test_an_index_that_is_lost_is_built_again(finished: Path) -> None:
    shutil.rmtree(finished / "features-sae" / "index")
    with pytest.raises(IncompleteStore, match="forebay index"):
        forebay.open_run(finished).features("sae").top_contexts(3)
    assert cli("index", finished).exit_code == 0
    assert forebay.open_run(finished).features("sae").top_contexts(3, n=2).sizes["context"] <= 2
    result = cli("index", finished, "scope")
    assert result.exit_code == 2
    assert "has no features called 'scope'. It has: sae" in result.output.replace("\n", " ")
