"""An index whose building is killed at any instant, and run again, has the bytes of one that never was."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from forebay.stores.errors import IncompleteStore
from forebay.stores.feature_index import FeatureIndex, index_folder
from forebay.stores.feature_rows import FeatureRows
from forebay.stores.index_builder import Build, Geometry
from forebay.stores.store import Store

from .feature_stores import every_file, random_sparse, write_features

PHASES = ("sorting", "merging")
SPARSE = random_sparse(6, 61, (40,) * 12 + (7,), most=12, levels=5)
GEOMETRY = Geometry(run=150, chunk=16, shard=128)
KILLS = 20


@pytest.fixture(scope="session")
def start() -> Callable[[Path, int], Any]:
    """Starts a build in a process that has everything imported."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["forebay.stores.index_builder"])

    def started(folder: Path, skip_positions: int = 1) -> Any:
        build = Build(FeatureRows.open(Store.open(folder), "sae"), skip_positions, GEOMETRY)
        process = context.Process(target=build.run, daemon=True)
        process.start()
        return process

    return started


def objects(folder: Path) -> dict[str, bytes]:
    return {key: content for key, content in every_file(folder / "index" / "sae").items() if "/c/" in key}


def records(build: Build) -> tuple[int, int]:
    """Runs and objects that are recorded."""
    return len(build.sorting.done()), len(build.merging.done())


def is_there(store: Store) -> bool:
    """Whether there is an index; it is whole then."""
    try:
        index = FeatureIndex.open(store, "sae")
    except IncompleteStore:
        return False
    assert index.store.verify() == {}
    return True


def test_killed_twenty_times_at_random_moments(start: Callable[..., Any], tmp_path: Path) -> None:
    chance = random.Random(5)
    whole = write_features(tmp_path / "whole" / "features-sae", {"sae": SPARSE}, 100)
    process = start(whole.path.parent)
    process.join()
    assert process.exitcode == 0
    expected = objects(whole.path.parent)
    assert len(expected) > 50

    store = write_features(tmp_path / "killed" / "features-sae", {"sae": SPARSE}, 100)
    build = Build(FeatureRows.open(store, "sae"), 1, GEOMETRY)
    n_run = len(build.spans)
    n_record = n_run + sum(key.startswith("token/") for key in expected)
    kills, phases, begun = 0, list[str](), False
    # On a machine that is busy nearly all moments may fall into one phase: it goes on until it has seen both.
    while kills < KILLS or (min(map(phases.count, PHASES)) < 2 and kills < 5 * KILLS):
        other = chance.random() < 0.3  # settings were changed, and will be changed back: what was begun is of no use
        process = start(store.path.parent, 2 if other else 1)
        there = sum(records(build))
        while process.exitcode is None and there and other != begun and sum(records(build)) >= there:
            time.sleep(0.0005)
        begun = other
        wanted = chance.randrange(chance.choice((n_run, n_record)))  # of both phases, however short one is
        while process.exitcode is None and sum(records(build)) < wanted:
            time.sleep(0.0005)
        time.sleep(chance.choice((0.0, chance.uniform(0, 0.05))))
        process.kill()
        process.join()
        if process.exitcode == 0:
            (index_folder(store, "sae") / "done" / "000000.json").unlink()
            continue
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        runs, merged = records(build)
        phases.append("merging" if merged else "sorting" if runs else "neither")
        if is_there(store) and not other:
            assert objects(store.path.parent) == expected
    process = start(store.path.parent)
    process.join()
    assert process.exitcode == 0
    assert is_there(store)
    assert objects(store.path.parent) == expected
    assert not (index_folder(store, "sae") / "work").exists()
    leftovers = (".partial", ".tmp", ".data.zarr.")
    assert not [path for path in store.path.parent.rglob("*") if any(mark in path.name for mark in leftovers)]
    # Else the kills came before the first run or after the last object, and show nothing.
    assert min(map(phases.count, PHASES)) >= 2, phases
