"""A training that is killed at any instant, and started again, leaves the bytes of one that never was."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .training_stores import RESID, sparse_coefficients, unit_atoms, write_run

TRAIN = f"""
import sys
from forebay.stages.dictionaries.training import train
from forebay.stages.train import Training
training = Training(
    hook="{RESID}", n_feature=300, k=3, activation=sys.argv[3], n_batch=500, batch=200, learning_rate=1e-2,
    dead_after=5000, log_every=5, checkpoint_every=7, validation=0.1,
)
train(training, sys.argv[1], sys.argv[2], device="cpu")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chance = np.random.default_rng(3)
    x = sparse_coefficients(chance, 6000, 37, 3) @ unit_atoms(chance, 37, 23)
    return write_run(tmp_path_factory.mktemp("run"), {"hook_resid_post": x})


def start(run: Path, folder: Path, activation: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", TRAIN, str(run), str(folder), activation]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def lines(folder: Path) -> list[dict[str, Any]]:
    """Metrics without their times; a line that is being written is none."""
    path = folder / "metrics.jsonl"
    whole = [line for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    found = [json.loads(line) for line in whole]
    return [{name: value for name, value in one.items() if name != "tokens_per_second"} for one in found]


def left(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_killed_and_started_again_it_leaves_the_same_bytes(activation: str, run: Path, tmp_path: Path) -> None:
    whole = start(run, tmp_path / "whole", activation)
    _, said = whole.communicate(timeout=300)
    assert whole.returncode == 0, said.decode()
    chance, folder, reached = random.Random(5), tmp_path / "killed", 0
    for _ in range(3):
        process = start(run, folder, activation)
        until = time.monotonic() + 120
        while len(lines(folder)) < reached + 12 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert reached < len(lines(folder)) < 100
        reached = len(lines(folder))
    process = start(run, folder, activation)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said.decode()
    assert lines(folder) == lines(tmp_path / "whole")
    assert [one["step"] for one in lines(folder)] == list(range(5, 501, 5))
    assert left(folder) == left(tmp_path / "whole")
    assert {"checkpoint.safetensors", "cfg.json", "evaluation.json"} <= set(left(folder))
