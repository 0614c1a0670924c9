"""What docs/migrating.md says of runs that move, and of stores of other versions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import forebay
from forebay.pipeline.audit import audit
from forebay.pipeline.recompute import recompute
from forebay.stages.capture import Capture
from forebay.stores.errors import CorpusError, FingerprintMismatch, SchemaError
from forebay.stores.store import Store

from ..stored import data


@pytest.fixture
def moved(whole_recipe: Path, tmp_path: Path) -> Path:
    """A folder with a run, made elsewhere of a recipe and texts that are there no more, and with both."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for path in whole_recipe.parent.iterdir():
        shutil.copy(path, old)
    assert forebay.run(old / "recipe.toml", old / "run", device="cpu").code == 0
    old.rename(new)
    return new


def test_a_run_that_moved_opens_and_verifies(moved: Path) -> None:
    value = forebay.open_run(moved / "run")["activations/hook_resid_post/value"]
    assert bool((value.sum() != 0).compute())
    assert audit(moved / "run") == []
    assert [Store.open(moved / "run" / step).verify() for step in ("tokens", "activations")] == [{}, {}]


def test_its_recipe_goes_on_with_it_and_then_it_grows_where_it_is(moved: Path) -> None:
    before = data(moved / "run")
    more = moved / "more.jsonl"
    more.write_text(json.dumps({"id": "new", "text": "This was invitation enough."}) + "\n")
    with pytest.raises(CorpusError, match=r"old/corpus\.jsonl, of which .* was made, is gone"):
        forebay.append(moved / "run", [more])
    outcome = forebay.run(moved / "recipe.toml", moved / "run", device="cpu")
    assert (outcome.code, sum(step.tokens for step in outcome.steps)) == (0, 0)
    assert data(moved / "run") == before
    assert list(recompute(moved / "run", 1, "cpu", 0)) == []
    assert forebay.append(moved / "run", [more]).code == 0
    assert audit(moved / "run") == []


def test_a_store_of_an_older_version_of_its_step_is_read_and_not_gone_on_with(
    moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = data(moved / "run")
    monkeypatch.setattr(Capture, "version", Capture.version + 1)
    with pytest.raises(FingerprintMismatch, match="version"):
        forebay.run(moved / "recipe.toml", moved / "run", device="cpu")
    assert data(moved / "run") == before
    assert Store.open(moved / "run/activations").verify() == {}
    assert forebay.open_run(moved / "run")["activations/hook_resid_post/value"].sizes["token"] > 0


def test_a_format_that_is_not_known_is_refused(own_run: Path) -> None:
    path = own_run / "activations/data.zarr/zarr.json"
    said = json.loads(path.read_text())
    for written in (2, 0, "1", None):
        said["attributes"]["forebay"]["schema"]["format"] = written
        path.write_text(json.dumps(said))
        with pytest.raises(SchemaError, match=r"this forebay reads format 1\. Update forebay, or capture again"):
            forebay.open_run(own_run)
