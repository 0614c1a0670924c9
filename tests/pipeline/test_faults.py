"""What goes wrong around a run, each made to happen: disks, folders, bits, records, clocks, processes, documents.

Whatever it is: what is recorded stays whole, what is damaged is refused by name, and a run that is repaired and run
again holds the bytes of one that nothing befell.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import forebay
from forebay.pipeline.audit import audit
from forebay.pipeline.cli import main
from forebay.pipeline.report.status import status
from forebay.stores.batches import Batches
from forebay.stores.errors import CorruptStore, DiskFull
from forebay.stores.ledger import Ledger
from forebay.stores.store import Store

from ..stored import data

STEPS = ("tokens", "activations")
SLOWER = ("a shorter object", "an empty object")
HOOKS = "blocks.1.hook_resid_post"


def assert_recorded_is_whole(folder: Path) -> None:
    for step in STEPS:
        if (folder / step / "data.zarr").exists():
            assert Store.open(folder / step).verify() == {}


def cli(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def fork_code(fork_run: Callable[[Path, Path], Any]) -> Callable[..., Any]:
    """Runs a recipe in a forked process in which some lines of Python were executed first: faults of its own."""

    def start(fault: str, recipe: Path, folder: Path) -> Any:
        lines = f"""
import os, random, resource, signal, sys, time
from pathlib import Path
from forebay.pipeline.run import run
{fault}
sys.exit(run(Path({str(recipe)!r}), Path({str(folder)!r}), device="cpu").code)
"""
        process = get_context("forkserver").Process(target=exec, args=(lines, {}), daemon=True)
        process.start()
        return process

    return start


# ── disks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("call", ["fsync", pytest.param("replace", marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_any_moment_ends_the_run_and_room_lets_it_go_on(
    call: str, whole_run: Path, whole_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th time that something is to be made durable, or put into its place."""
    folder, real = tmp_path / "run", getattr(os, call)
    left = 0

    def full(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, full)
    n_done = []
    for left in (0, 25, 60):  # noqa: B007 - counted down by what is called
        with pytest.raises(OSError, match=r"[Nn]o space") as refusal:
            forebay.run(whole_recipe, folder, device="cpu")
        assert isinstance(refusal.value, DiskFull) or refusal.value.errno == errno.ENOSPC
        assert_recorded_is_whole(folder)
        n_done.append(sum(len(Ledger(folder / step).done()) for step in STEPS))
    assert n_done[0] == 0
    assert n_done == sorted(n_done)
    assert n_done[-1] > 0
    monkeypatch.setattr(os, call, real)
    assert forebay.run(whole_recipe, folder, device="cpu").code == 0
    assert data(folder) == data(whole_run)
    assert not list(folder.rglob("*.partial"))


def test_objects_that_may_not_become_so_large_fail_their_units_and_no_others(
    whole_run: Path, whole_recipe: Path, fork_code: Callable[..., Any], tmp_path: Path
) -> None:
    """A limit of the process on the size of a file, which patterns exceed and vectors do not."""
    folder = tmp_path / "run"
    sizes = {path: path.stat().st_size for path in whole_run.rglob("*") if path.is_file()}
    limit = 1000 + max(size for path, size in sizes.items() if "attn.hook_pattern" not in path.parts)
    assert max(sizes.values()) > limit
    process = fork_code(f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))", whole_recipe, folder)
    process.join()
    assert process.exitcode == 1
    assert_recorded_is_whole(folder)
    step = status(folder)[1]
    assert step.failed
    assert step.units_done + len(step.failed) == step.units
    assert all("File too large" in failure.error for failure in step.failures)
    assert forebay.run(whole_recipe, folder, device="cpu").code == 0
    assert data(folder) == data(whole_run)
    assert status(folder)[1].failed == ()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Makes a folder read-only, also for root, for whom permissions are none."""
    mounted = []

    def seal(folder: Path) -> None:
        if os.geteuid():
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o555 if path.is_dir() else 0o444)
            return
        for options in ("bind", "remount,bind,ro"):
            done = subprocess.run(["mount", "-o", options, folder, folder], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"root may not mount here: {done.stderr.strip()}")
        mounted.append(folder)

    yield seal
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)
    for path in tmp_path.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)


def test_a_read_only_run_is_read_and_verified_and_a_run_into_it_is_refused(
    own_run: Path, whole_run: Path, whole_recipe: Path, read_only: Callable[[Path], None]
) -> None:
    Ledger(own_run / "activations").drop(3)
    read_only(own_run)
    text = cli("run", whole_recipe, "--to", own_run, "--device", "cpu", code=1)
    assert "Read-only file system" in text or "Permission denied" in text
    assert "11 in all" in cli("verify", own_run)
    assert "10/11" in cli("status", own_run)
    values, whole = (forebay.open_run(run, partial=True)["activations"] for run in (own_run, whole_run))
    kept = values["hook_resid_post/value"].isel(token=slice(0, 192)).values
    np.testing.assert_array_equal(kept, whole["hook_resid_post/value"].isel(token=slice(0, 192)).values)


# ── bits ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def objects_of(folder: Path) -> list[Path]:
    """Every object of the activations that a record names."""
    store = Store.open(folder / "activations")
    return sorted(store.path / key for unit in store.schema.grid for key in store.ledger.record(unit.index)["objects"])


def read_all(folder: Path) -> None:
    """Everything that a run holds, by every way of reading."""
    tree = forebay.open_run(folder)["activations"]
    for node in tree.subtree:
        for variable in node.data_vars.values():
            variable.values  # noqa: B018
    list(Batches(run=folder, hooks=("blocks.0.hook_resid_post", HOOKS, "blocks.2.hook_resid_post")))


@pytest.mark.parametrize(
    "damage", ["a flipped bit", *(pytest.param(how, marks=pytest.mark.slow) for how in SLOWER), "no object"]
)
def test_damage_anywhere_is_refused_by_readers_named_by_verify_and_healed(
    damage: str, own_run: Path, whole_run: Path, whole_recipe: Path
) -> None:
    chance = random.Random(damage)
    healed = []
    for path in chance.sample(objects_of(own_run), 4):
        content = path.read_bytes()
        at = chance.randrange(len(content))
        if damage == "a flipped bit":
            flipped = content[at] ^ 1 << chance.randrange(8)
            path.write_bytes(content[:at] + bytes([flipped]) + content[at + 1 :])
        elif damage == "no object":
            path.unlink()
        else:
            os.truncate(path, at if damage == "a shorter object" else 0)
        with pytest.raises(CorruptStore, match="`forebay repair` drops their units"):
            read_all(own_run)
        (lines,) = Store.open(own_run / "activations").verify().values()
        assert [str(path) in line for line in lines] == [True]
        healed.append(path)
        if len(healed) < 4:
            path.write_bytes(content)  # so that the next damage is seen alone
    cli("repair", own_run)
    assert forebay.run(whole_recipe, own_run, device="cpu").code == 0
    assert data(own_run) == data(whole_run)


@pytest.mark.parametrize("label", ["sequences/start", "hook_resid_post/layer"])
def test_a_damaged_label_is_refused_by_name(label: str, own_run: Path) -> None:
    """Labels are no unit's, and have no record: what they were stands in the other stores of the run."""
    (path,) = [path for path in (own_run / "activations" / "data.zarr" / label / "c").rglob("*") if path.is_file()]
    whole = path.read_bytes()
    for damage in (whole[:-3], b"", whole[:5] + bytes([whole[5] ^ 0xFF]) + whole[6:]):
        path.write_bytes(damage)
        with pytest.raises(CorruptStore, match=label):
            forebay.open_run(own_run)
        assert label in cli("verify", own_run, code=1)
        path.write_bytes(whole)
    cli("verify", own_run)


def test_a_label_that_is_lost_is_missed_by_the_other_stores(own_run: Path) -> None:
    shutil.rmtree(own_run / "activations" / "data.zarr" / "documents" / "id" / "c")
    assert "activations: its documents/id is not that of tokens" in cli("verify", own_run, code=1)


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_finds_a_bad_record_says_so_at_its_end_and_heals_after_repair(
    own_run: Path, whole_run: Path, whole_recipe: Path
) -> None:
    """Of another recipe, unreadable, of no unit; a deleted one is simply computed again."""
    ledger = Ledger(own_run / "activations")
    ledger.complete(2, {**ledger.record(2), "fingerprint": "00" * 32})
    ledger.path(5).write_bytes(b"\x00" * 300)
    shutil.copy(ledger.path(1), ledger.path(50))
    ledger.drop(7)
    with pytest.raises(CorruptStore, match="are not the rows of the corpus") as refusal:
        forebay.run(whole_recipe, own_run, device="cpu")
    assert [f"unit {unit}: " in str(refusal.value) for unit in (2, 5, 50, 7)] == [True, True, True, False]
    text = cli("run", whole_recipe, "--to", own_run, "--device", "cpu", code=1)
    assert f"`forebay repair {own_run}` drops what is wrong" in text
    cli("repair", own_run)
    assert forebay.run(whole_recipe, own_run, device="cpu").code == 0
    assert data(own_run) == data(whole_run)
    assert audit(own_run) == []


# ── clocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────

JUMPING = """
chance, real = random.Random({seed}), time.time
time.time = lambda: real() + chance.choice([-86400.0, 0.0, 86400.0])
"""


@pytest.mark.slow
def test_clocks_that_jump_by_a_day_do_no_harm_to_runs_side_by_side(
    whole_run: Path, whole_recipe: Path, fork_code: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    both = [fork_code(JUMPING.format(seed=seed), whole_recipe, folder) for seed in (1, 2)]
    chance = random.Random(3)
    while any(process.is_alive() for process in both):
        for path in list(folder.rglob("*")):
            try:
                os.utime(path, times=(time.time() + chance.choice([-86_400, 86_400]),) * 2)
            except FileNotFoundError:
                continue
        time.sleep(0.05)
    assert [process.exitcode for process in both] == [0, 0]
    assert data(folder) == data(whole_run)
    assert audit(folder) == []
    assert all(step.left == 0 for step in status(folder))
    for path in folder.rglob("*.json"):
        os.utime(path, times=(time.time() + 86_400,) * 2)
    assert forebay.run(whole_recipe, folder, device="cpu").code == 0
    assert data(folder) == data(whole_run)


def test_a_sweep_amid_a_duplicate_s_write_fails_neither_run(
    own_run: Path, whole_run: Path, whole_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock a day ahead, of another run that has recorded the same unit just before our objects are in place."""
    store = Store.open(own_run / "activations")
    kept = store.ledger.path(4).read_bytes()
    store.ledger.drop(4)
    replace, swept = os.replace, []

    def late(source: Any, target: Any, *arguments: Any, **options: Any) -> None:
        if str(source).endswith(".partial") and not swept:
            swept.append(source)
            store.ledger.path(4).write_bytes(kept)
            store.sweep(before=time.time() + 86_400)
        replace(source, target, *arguments, **options)

    monkeypatch.setattr(os, "replace", late)
    outcome = forebay.run(whole_recipe, own_run, device="cpu")
    assert swept
    assert (outcome.code, outcome.steps[1].failed) == (0, {})
    assert status(own_run)[1].failed == ()
    assert data(own_run) == data(whole_run)


def test_a_store_that_another_run_made_and_swept_meanwhile_is_joined(
    whole_run: Path, whole_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename, swept = tmp_path / "run", os.rename, []

    def late(source: Any, target: Any) -> None:
        if Path(target).name == "data.zarr" and Path(target).parent.name == "activations" and not swept:
            swept.append(source)
            for part in ("data.zarr", "done"):
                shutil.copytree(whole_run / "activations" / part, folder / "activations" / part)
            shutil.rmtree(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert forebay.run(whole_recipe, folder, device="cpu").code == 0
    assert swept
    assert data(folder) == data(whole_run)


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────

DYING = """
from forebay.stores.writer import UnitWriter
finish = UnitWriter.finish
def die(self, timing):
    if self.store.name == "activations":
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(self, timing)
UnitWriter.finish = die
"""


def test_a_process_that_dies_in_every_unit_loses_nothing_and_another_one_finishes(
    whole_run: Path, whole_recipe: Path, fork_code: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = fork_code(DYING, whole_recipe, folder)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert Ledger(folder / "activations").done() == set()
    assert_recorded_is_whole(folder)
    assert forebay.run(whole_recipe, folder, device="cpu").code == 0
    assert data(folder) == data(whole_run)


# ── documents ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_document_that_the_model_cannot_take_fails_its_units_alone_and_is_tried_again(
    poisoned: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, folder = poisoned(), tmp_path / "run"
    for attempt in (1, 2):
        text = cli("run", recipe, "--to", folder, "--device", "cpu", code=1)
        assert "running again tries the failed ones again" in text
        (failure,) = status(folder)[1].failures
        assert failure.attempts == attempt
        assert "does not fit float16" in failure.error
        assert "Traceback" in json.loads(Path(failure.record).read_text())["traceback"]
        times = "failed" if attempt == 1 else f"failed {attempt} times"
        assert f"activations: unit {failure.unit} {times}: " in cli("status", folder)
    step = status(folder)[1]
    assert step.units_done == step.units - 1
    assert_recorded_is_whole(folder)
    assert [one.unit for one in audit(folder)] == [failure.unit]
