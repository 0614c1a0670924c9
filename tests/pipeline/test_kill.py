"""A run that is killed at any instant, however often, and run again holds the bytes of one that never was."""

from __future__ import annotations

import importlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forebay.stores.ledger import Ledger
from forebay.stores.store import Store

from ..stored import data

STEPS = ("tokens", "activations")
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def recipe(make_recipe: Callable[..., Path]) -> Path:
    """Many small units in both steps, in sequences that straddle their edges; what a kill may hit most often."""
    return make_recipe(
        tokenize={"context": 60, "layout": "documents", "long_documents": "split", "unit_tokens": 100},
        capture={
            "hooks": ["blocks.*.hook_resid_post", "blocks.1.attn.hook_pattern"],
            "store_dtype": "bfloat16",
            "unit_tokens": 40,
            "batch": 2,
        },
    )


def recorded(folder: Path) -> int:
    return sum(len(Ledger(folder / step).done()) for step in STEPS)


def assert_what_is_recorded_is_whole(folder: Path) -> None:
    """At any time, also right after a kill."""
    for step in STEPS:
        if (folder / step / "data.zarr").exists():
            assert Store.open(folder / step).verify() == {}


def wait_for_records(folder: Path, n: int, alive: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while recorded(folder) < n and alive() and time.monotonic() < until:
        time.sleep(0.005)


def test_killed_twenty_times_at_random_moments(
    recipe: Path, fork_run: Callable[[Path, Path], Any], tmp_path: Path
) -> None:
    whole = tmp_path / "uninterrupted"
    process = fork_run(recipe, whole)
    process.join()
    n_unit = recorded(whole)
    assert process.exitcode == 0
    assert n_unit > 20
    expected, chance = data(whole), random.Random(9)

    kills = hits = n_folder = 0
    while kills < 20:
        folder = tmp_path / f"killed-{n_folder}"
        n_folder += 1
        process = fork_run(recipe, folder)
        # Several kills a folder, each of a run that goes on from what those before it have left.
        while kills < 20 and (begun := recorded(folder)) < n_unit:
            # Moments are counted in units, whose time depends on the machine, and a little more.
            wait_for_records(folder, chance.randint(begun, n_unit - 1), process.is_alive)
            process.join(chance.uniform(0, 0.1))
            process.kill()
            process.join()
            if process.exitcode == 0:  # it was done before
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            hits += 0 < recorded(folder) < n_unit
            assert_what_is_recorded_is_whole(folder)
            process = fork_run(recipe, folder)
        process.join()
        assert process.exitcode == 0
        assert recorded(folder) == n_unit
        assert data(folder) == expected
    # Else the kills came before the first unit or after the last one, and show nothing.
    assert hits >= 8, f"{hits} of {kills} kills hit the middle of a run"


@pytest.mark.slow
def test_killed_three_times_through_the_command_line(
    recipe: Path, start_forebay: Callable[..., Any], fork_run: Callable[[Path, Path], Any], tmp_path: Path
) -> None:
    folder, chance = tmp_path / "killed", random.Random(9)
    for n in (1, 6, 12):
        process = start_forebay("run", recipe, "--to", folder, "--device", "cpu")
        wait_for_records(folder, n, lambda process=process: process.poll() is None)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert recorded(folder) >= n
        assert_what_is_recorded_is_whole(folder)
    n_unit = sum(len(Store.open(folder / step).schema.grid) for step in STEPS)
    assert recorded(folder) < n_unit
    process = start_forebay("run", recipe, "--to", folder, "--device", "cpu")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, output + errors
    assert recorded(folder) == n_unit
    whole = fork_run(recipe, tmp_path / "uninterrupted")
    whole.join()
    assert data(folder) == data(tmp_path / "uninterrupted")


# ── the kill matrix, which scripts/torture runs at length ────────────────────────────────────────────────────────────


def test_some_kills_of_some_ranks_whose_number_changes_lose_and_double_nothing(
    fork_run: Callable[[Path, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    kills, material = (importlib.import_module(f"faults.{name}") for name in ("kills", "material"))
    matrix = kills.Matrix(material.make(tmp_path, 12), tmp_path, "ranks", random.Random(2))
    matrix.measure()
    tally = matrix.torture(5)
    assert tally.n_kill >= 5
    assert tally.runs >= 1
    assert tally.verified > 0


def test_a_run_that_lost_a_row_or_changed_a_byte_does_not_pass_for_whole(
    fork_run: Callable[[Path, Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the matrix can fail."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    kills, material = (importlib.import_module(f"faults.{name}") for name in ("kills", "material"))
    matrix = kills.Matrix(material.make(tmp_path, 6), tmp_path, "process", random.Random(2))
    matrix.measure()
    whole = tmp_path / "uninterrupted"
    shard = next((whole / "activations" / "data.zarr" / "hook_resid_post").rglob("c/*/0/0"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(kills.Torn, match="its bytes have changed"):
        kills.check_recorded(whole)
    with pytest.raises(kills.Torn, match="1 files differ from the uninterrupted run"):
        kills.check_whole(whole, matrix.expected)
    shard.write_bytes(content)
    Ledger(whole / "activations").drop(1)
    with pytest.raises(kills.Torn, match="activations: unit 1: it is not recorded"):
        kills.check_whole(whole, matrix.expected)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["process", "ranks", "dask"])
def test_a_hundred_kills_of_each_executor_lose_and_double_nothing(executor: str, tmp_path: Path) -> None:
    options = ("--executor", executor, "--kills", "100", "--documents", "12", "--in", tmp_path)
    done = subprocess.run([sys.executable, SCRIPTS / "torture", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no row lost or double" in done.stdout
