"""Executors differ in who computes a unit when, and in nothing that is stored. Ranks and Dask have their own files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

import forebay
from forebay.pipeline.executors import Executor, Ranks, ThisProcess, executor_for, units
from forebay.pipeline.executors.this_process import run_units
from forebay.pipeline.plan import load_plan
from forebay.pipeline.progress import Quiet
from forebay.pipeline.run import run_unit
from forebay.stages.capture import Capture
from forebay.stores.errors import FingerprintMismatch
from forebay.stores.ledger import Ledger
from forebay.stores.store import Store

from ..stored import data

MakeRecipe = Callable[..., Path]

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {"tokenize": {"unit_tokens": 128}, "capture": {"threads": 1}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, ThisProcess), ({"rank": "1", "world": 4}, Ranks), ({"rank": 0, "world": 1}, Ranks)],
)
def test_options_name_an_executor(options: dict[str, Any], expected: type[Executor]) -> None:
    assert isinstance(executor_for(**options), expected)


def test_each_executor_goes_on_with_what_another_has_begun(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, folder = make_recipe(**SMALL), tmp_path / "run"
    forebay.run(recipe, folder, device="cpu")
    whole = data(folder)
    dropped = {1, 3, 4, 8}
    for executor in (ThisProcess(), Ranks(0, 3), Ranks(3, 4)):
        for unit in dropped:
            for key in Ledger(folder / "activations").record(unit)["objects"]:
                (folder / "activations" / "data.zarr" / key).unlink()
            Ledger(folder / "activations").drop(unit)
        outcome = forebay.run(recipe, folder, device="cpu", executor=executor)
        assert outcome.code == 0
        assert outcome.steps[1].tokens == 64 * len(dropped)
        assert data(folder) == whole


def test_a_unit_that_is_recorded_meanwhile_is_left_as_it_is(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Its record comes between the moment when it is chosen and the moment when it is computed, or written."""
    recipe, folder = make_recipe(**SMALL), tmp_path / "run"
    forebay.run(recipe, folder, device="cpu")
    ledger, plan = Ledger(folder / "activations"), load_plan(folder, "cpu")
    step = plan.step("activations")
    every = list(step.schema.grid)
    record = ledger.path(2).read_bytes()
    ledger.drop(2)
    stamp = (folder / "activations/data.zarr/hook_resid_post/value/c/0/2/0").stat().st_mtime_ns

    class RecordsIt(Quiet):
        """As another rank does it, while this one computes."""

        def advance(self, tokens: int) -> None:
            ledger.path(2).write_bytes(record)

    outcome = run_units(plan, step, every[2:3], RecordsIt(), Event())
    assert (outcome.tokens, outcome.failed, outcome.left) == (0, {}, 0)
    assert ledger.path(2).read_bytes() == record
    assert (folder / "activations/data.zarr/hook_resid_post/value/c/0/2/0").stat().st_mtime_ns == stamp


# ── run_unit ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_run_unit_does_not_compute_what_is_recorded(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    forebay.run(make_recipe(**SMALL), folder, device="cpu")
    monkeypatch.setattr(units, "read", lambda *_: pytest.fail("it was computed"))
    assert run_unit(folder, "activations", 1, "cpu") == Ledger(folder / "activations").record(1)


def test_run_unit_records_a_failure_and_gives_it_back(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    forebay.run(make_recipe(**SMALL), folder, device="cpu")
    Ledger(folder / "activations").drop(1)

    def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(units, "read", broken)
    for attempt in (1, 2):
        record = run_unit(folder, "activations", 1, "cpu")
        assert record["unit"] == 1
        assert "Input/output error" in record["error"]
        assert "Traceback" in record["traceback"]
        assert Path(record["path"]).name == f"000001.{attempt}.json"
    assert Ledger(folder / "activations").failed() == {1: 2}


def test_a_process_loads_a_step_once_and_again_when_its_store_is_another(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    loaded: list[int] = []
    load = Capture.load

    def noting(self: Capture, *arguments: Any) -> Any:
        loaded.append(self.batch)
        return load(self, *arguments)

    folder = tmp_path / "run"
    for batch in (8, 4):
        shutil.rmtree(folder / "activations", ignore_errors=True)
        forebay.run(make_recipe(capture={"threads": 1, "batch": batch}), folder, device="cpu")
        monkeypatch.setattr(Capture, "load", noting)
        for unit in range(4):
            Ledger(folder / "activations").drop(unit)
            assert "error" not in run_unit(folder, "activations", unit, "cpu")
        monkeypatch.setattr(Capture, "load", load)
    assert loaded == [8, 4]


# ── threads ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_number_of_threads_that_a_run_was_begun_with_is_kept(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """As when a run goes on where there are more cores, or on workers that share them."""
    recipe, folder = make_recipe(), tmp_path / "run"
    torch.set_num_threads(1)
    forebay.run(recipe, folder, device="cpu")
    for unit in (0, 3):
        Ledger(folder / "activations").drop(unit)
    torch.set_num_threads(2)
    assert forebay.run(recipe, folder, device="cpu").code == 0
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    Ledger(folder / "activations").drop(0)
    assert "error" not in run_unit(folder, "activations", 0, "cpu")
    with pytest.raises(FingerprintMismatch, match=r"numerics\.threads: 2 here, 1 in the store"):
        forebay.run(make_recipe(capture={"threads": 2}), folder, device="cpu")


# ── what limits a run ────────────────────────────────────────────────────────────────────────────────────────────────


class Heard(Quiet):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def said(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.slow
def test_a_run_that_waits_for_its_disk_says_so_with_both_rates(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, heard = make_recipe(**SMALL), Heard()
    forebay.run(recipe, tmp_path / "quick", device="cpu", progress=heard)
    assert not any("the disk is the limit" in text for text in heard.texts)

    fsync = os.fsync

    def slow(handle: int) -> None:
        fsync(handle)
        time.sleep(0.03)

    monkeypatch.setattr(os, "fsync", slow)
    outcome = forebay.run(recipe, tmp_path / "slow", device="cpu", progress=heard)
    (text,) = [text for text in heard.texts if text.startswith("activations: the disk is the limit")]
    step = next(step for step in outcome.steps if step.name == "activations")
    assert 1 <= step.waited <= step.seconds
    assert step.computing < step.writing
    rates = [step.nbytes / seconds / 1e6 for seconds in (step.computing, step.writing)]
    assert f"computed at {rates[0]:,.0f} MB/s and written at {rates[1]:,.0f} MB/s" in text


# ── what is lost between units ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_n_workers_are_n_times_as_fast_as_one(tmp_path: Path) -> None:
    """Units sleep a second, so that the processor of a small machine is not what is measured."""
    out = tmp_path / "out.json"
    command = [sys.executable, ROOT / "scripts/bench", "--only", "executors", "--units", "16", "--json", out]
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    shares = {row["variant"]: row["share"] for row in json.loads(out.read_text())["executors"]}
    assert set(shares) == {"this process", *(f"{n} {kind}" for n in (1, 2, 4) for kind in ("ranks", "Dask workers"))}
    alone = {"ranks": shares["1 ranks"], "Dask workers": shares["1 Dask workers"]}
    for name, share in shares.items():
        if name != "this process":
            assert share >= 0.95 * alone[name.partition(" ")[2]], shares


def test_a_store_says_the_same_of_itself_whoever_computed_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(**SMALL)
    forebay.run(recipe, tmp_path / "one", device="cpu")
    forebay.run(recipe, tmp_path / "two", device="cpu", executor=Ranks(1, 2))
    for step in ("tokens", "activations"):
        assert Store.open(tmp_path / "one" / step).header == Store.open(tmp_path / "two" / step).header
