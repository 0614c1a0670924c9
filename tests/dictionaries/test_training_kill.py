"""A training that is killed at any instant, and started again, leaves the bytes of one that never was."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forebay.stages.dictionaries.training import train
from forebay.stages.train import Training

from .training_stores import RESID, sparse_coefficients, unit_atoms, write_run

TRAINING = Training(
    hook=RESID,
    n_feature=52,
    k=3,
    activation="batchtopk",
    n_batch=200,
    batch=200,
    learning_rate=1e-2,
    dead_after=5000,
    validation=0.1,
    log_every=2,
    checkpoint_every=20,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = np.random.default_rng(3)
    x = sparse_coefficients(chance, 6000, 37, 3) @ unit_atoms(chance, 37, 23)
    return write_run(tmp_path_factory.mktemp("run"), {"hook_resid_post": x})


@pytest.fixture(scope="module")
def start(run: Path) -> Callable[[Path], Any]:
    """Trains into a folder in a process of its own, which has everything imported."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["forebay.stages.dictionaries.training", "forebay.stores.batches"])

    def start(folder: Path) -> Any:
        process = context.Process(target=train, args=(TRAINING, run, folder), kwargs={"device": "cpu"}, daemon=True)
        process.start()
        return process

    return start


def lines(folder: Path) -> list[dict[str, Any]]:
    """Metrics without their times; a line that is being written is none."""
    path = folder / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return [{name: value for name, value in one.items() if name != "tokens_per_second"} for one in found]


def left(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


def test_killed_and_started_again_it_leaves_the_same_bytes(start: Callable[[Path], Any], tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    chance, folder, reached = random.Random(5), tmp_path / "killed", 0
    for _ in range(2):
        process = start(folder)
        until = time.monotonic() + 120
        while len(lines(folder)) < reached + 12 and process.is_alive() and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert reached < len(lines(folder)) < 100
        reached = len(lines(folder))
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    assert lines(folder) == lines(tmp_path / "whole")
    assert [one["step"] for one in lines(folder)] == list(range(2, 201, 2))
    assert left(folder) == left(tmp_path / "whole")
    assert {"checkpoint.safetensors", "cfg.json", "evaluation.json"} <= set(left(folder))
