"""Features and their index from a stranger: numbers that fit nothing are told, and lead nowhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forebay.stores.errors import CorruptStore, FingerprintMismatch, ForebayError, UnsafePath
from forebay.stores.features import Features
from forebay.stores.index_builder import build_index
from forebay.stores.store import Store

from ..stores.feature_stores import random_sparse, write_features
from .hostile_stores import edit_header
from .watching import contents, watched

STEP = "features-sae"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("made") / "run"
    write_features(run / STEP, {"sae": random_sparse(3, 11, (9, 1, 30), most=5)}, 12)
    build_index(run / STEP)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def features(run: Path) -> Features:
    return Features.open(Store.open(run / STEP), "sae")


HEADERS: dict[str, Change] = {
    "a thousand million features": lambda said: said["provenance"]["dictionaries"]["sae"].update(n_feature=10**12),
    "no features": lambda said: said["provenance"]["dictionaries"]["sae"].update(n_feature=0),
    "features in words": lambda said: said["provenance"]["dictionaries"]["sae"].update(n_feature="11"),
    "dictionaries as a list": lambda said: said["provenance"].update(dictionaries=["sae"]),
    "no dictionaries": lambda said: said["provenance"].pop("dictionaries"),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_dictionary_that_is_none_is_told(run: Path, change: Change) -> None:
    edit_header(run, change, STEP)
    shutil.rmtree(run / STEP / "index")
    with watched(run):
        with pytest.raises(CorruptStore):
            features(run).rows(0, 40)
        with pytest.raises(CorruptStore):
            build_index(run / STEP)


INDEXES: dict[str, Change] = {
    "other tokens": lambda said: said["provenance"].update(tokens="all"),
    "nothing skipped in words": lambda said: said["provenance"]["determines"].update(skip_positions="1"),
    "what determines as a list": lambda said: said["provenance"].update(determines=[1]),
    "no postings": lambda said: said["schema"]["arrays"].pop("token"),
    "postings along features": lambda said: said["schema"]["arrays"]["ptr"].update(dims=["feature"]),
    "a shape beyond memory": lambda said: said["schema"]["arrays"]["token"].update(shape=[2**60]),
}


@pytest.mark.parametrize("change", INDEXES.values(), ids=INDEXES)
def test_an_index_that_is_none_is_told(run: Path, change: Change) -> None:
    edit_header(run, change, f"{STEP}/index/sae")
    with watched(run), pytest.raises(FingerprintMismatch):
        features(run).activations(0)


@pytest.mark.parametrize("wrong", [[5, 3], [0, -4], [0, 2**62], [-8, 0], [0, 10**6]], ids=str)
def test_postings_that_fit_nothing_are_told(run: Path, wrong: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers as a stranger writes them, with checksums that are right."""
    index = Store.open(run / STEP / "index" / "sae")
    ptr = np.array(index.array("ptr")[...])
    ptr[:2] = wrong
    index.write_rows("ptr", {"edge": slice(0, len(ptr))}, ptr)
    with pytest.raises(CorruptStore, match="does not ascend"):
        features(run).activations(0)


def test_tokens_that_do_not_exist_are_told(run: Path) -> None:
    index = Store.open(run / STEP / "index" / "sae")
    tokens = np.array(index.array("token")[...])
    tokens[:] = 2**31
    index.write_rows("token", {"nonzero": slice(0, len(tokens))}, tokens)
    with pytest.raises(CorruptStore, match="tokens that do not exist"):
        features(run).top_contexts([int(np.argmax(features(run).statistics()["n_active"].values))], text=False)


@pytest.mark.parametrize("name", ["index", "index/sae", "index/sae/data.zarr", "index/sae/done", "index/sae/work"])
def test_an_index_is_not_built_through_a_link(run: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "home"
    (elsewhere / "sae" / "work").mkdir(parents=True)
    for kept in ("a.json", "000000.json", "plan.json", "sae/work/plan.json"):
        (elsewhere / kept).write_text("{}")
    path = run / STEP / name
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(elsewhere)
    before = contents(elsewhere)
    with watched(run), pytest.raises((UnsafePath, ForebayError), match="symbolic link"):
        build_index(run / STEP)
    assert contents(elsewhere) == before


def test_what_a_stranger_left_of_an_index_half_built_is_put_aside(run: Path) -> None:
    """The plan of another build, with records of runs that were never sorted."""
    shutil.rmtree(run / STEP / "index")
    work = run / STEP / "index" / "sae" / "work"
    for name in ("runs", "objects"):
        (work / name / "done").mkdir(parents=True)
        (work / name / "done" / "000000.json").write_text('{"objects": {"../../x": {}}, "features": [0, 99]}')
    (work / "plan.json").write_text("[" * 10)
    with watched(run):
        try:
            build_index(run / STEP)
        except CorruptStore:
            (work / "plan.json").unlink()
            build_index(run / STEP)
    assert Store.open(run / STEP / "index" / "sae").verify() == {}
    assert features(run).activations(0).sizes["token"] >= 0
