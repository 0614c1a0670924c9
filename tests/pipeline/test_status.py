"""The state of a run is one listing away: from the records alone, at any time, without Zarr, xarray or torch."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import forebay
from forebay.pipeline.cli import main
from forebay.pipeline.report import status as report
from forebay.pipeline.report.status import status, step_status
from forebay.stores.errors import SchemaError, StoreNotFound
from forebay.stores.schema import Schema
from forebay.stores.store import Store

MakeRecipe = Callable[..., Path]


@pytest.fixture
def run(own_run: Path) -> Path:
    """A run that is complete: tokens in units of 128, activations in units of 64."""
    return own_run


def printed(folder: Path) -> str:
    result = CliRunner().invoke(main, ["status", str(folder)])
    assert result.exit_code == 0, result.output
    return result.output


# ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_complete_run_is_done_in_every_step(run: Path) -> None:
    tokens, activations = status(run)
    n = forebay.open_run(run)["tokens"].sizes["token"]
    assert (tokens.name, activations.name) == ("tokens", "activations")
    assert (tokens.units, tokens.units_done) == (-(-n // 128),) * 2
    assert (activations.units, activations.units_done) == (-(-n // 64),) * 2
    patterns = forebay.open_run(run)["activations/attn.hook_pattern/value"].size
    for step, nbytes in ((tokens, 3 * 4 * n), (activations, 3 * 28 * 2 * n + 2 * patterns)):
        assert (step.n_token, step.tokens_done, step.nbytes) == (n, n, nbytes)
        assert step.left == 0
        assert step.failed == ()
    text = printed(run)
    assert f"{activations.units}/{activations.units}" in text
    assert f"{n:,}/{n:,}" in text
    assert text.count("done") == 2


def test_an_incomplete_run_counts_what_is_recorded_the_short_last_unit_included(run: Path) -> None:
    store = Store.open(run / "activations")
    sizes = [len(unit) for unit in store.schema.grid]
    assert sizes[-1] < 64
    for gone in ({0, 3}, {0, 3, len(sizes) - 1}):
        for unit in gone:
            store.ledger.drop(unit)
        step = status(run)[1]
        left = [size for unit, size in enumerate(sizes) if unit in gone]
        assert (step.units, step.units_done) == (len(sizes), len(sizes) - len(gone))
        assert (step.n_token, step.tokens_done) == (sum(sizes), sum(sizes) - sum(left))
    assert f"{len(sizes) - 3}/{len(sizes)}" in printed(run)


def test_a_run_that_has_not_begun_its_activations_shows_its_tokens(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = forebay.run(make_recipe(capture=None), tmp_path / "run").folder
    assert [step.name for step in status(folder)] == ["tokens"]


def test_a_store_without_a_record_has_no_rate_and_no_end(run: Path) -> None:
    for unit in Store.open(run / "activations").schema.grid:
        Store.open(run / "activations").ledger.drop(unit.index)
    step = status(run)[1]
    assert (step.units_done, step.tokens_done) == (0, 0)
    assert step.tokens_per_second is None
    assert step.left is None
    (line,) = [line for line in printed(run).splitlines() if line.startswith("activations")]
    assert line.split()[-2:] == ["–", "?"]


# ── rates ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def set_record(folder: Path, unit: int, **values: Any) -> None:
    """Makes a unit's record say something else; `finished`, for one, and the file's time of change follows it."""
    path = folder / "activations" / "done" / f"{unit:06d}.json"
    record = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps(record))
    os.utime(path, times=(record["finished"],) * 2)


def finish(folder: Path, at: Sequence[float], seconds: float, worker: Callable[[int], int] = lambda unit: 1) -> None:
    """Units from 0 on finished at these times, each after so many seconds of work."""
    for unit, finished in enumerate(at):
        timing = {"compute": 0.8 * seconds, "write": 0.2 * seconds}
        set_record(folder, unit, finished=1e9 + finished, seconds=timing, host="here", pid=worker(unit))


def rate(folder: Path) -> float:
    found = status(folder)[1].tokens_per_second
    assert found is not None
    return found


def test_the_rate_of_one_worker_is_that_at_which_units_are_finished(run: Path) -> None:
    finish(run, [10.0 * unit for unit in range(10)], seconds=10)
    Store.open(run / "activations").ledger.drop(10)
    assert rate(run) == pytest.approx(64 / 10)
    last = len(Store.open(run / "activations").schema.grid[10])
    assert status(run)[1].left == pytest.approx(last / 6.4)
    (line,) = [line for line in printed(run).splitlines() if line.startswith("activations ")]
    assert line.split()[-3:] == ["6", f"{last / 6.4:.0f}", "s"]


def test_workers_side_by_side_add_up(run: Path) -> None:
    """Four workers, thirty seconds a unit: together or one after the other, it is the same eight tokens a second."""
    Store.open(run / "activations").ledger.drop(10)
    Store.open(run / "activations").ledger.drop(9)
    finish(run, [7.5 * unit for unit in range(9)], seconds=30, worker=lambda unit: unit % 4)
    assert rate(run) == pytest.approx(4 * 64 / 30)
    Store.open(run / "activations").ledger.drop(8)
    finish(run, [30.0 * (unit // 4) + 0.1 * (unit % 4) for unit in range(8)], seconds=30, worker=lambda unit: unit % 4)
    assert rate(run) == pytest.approx(4 * 64 / 30, rel=0.02)
    finish(run, [0.1 * unit for unit in range(8)], seconds=30, worker=lambda unit: unit)  # the first of each
    assert rate(run) == pytest.approx(8 * 64 / 30, rel=0.03)


def test_a_night_between_two_runs_is_no_work(run: Path) -> None:
    Store.open(run / "activations").ledger.drop(10)
    finish(run, [*(5.0 * n for n in range(5)), *(40_000 + 10.0 * n for n in range(5))], seconds=10)
    assert rate(run) == pytest.approx(64 / 10)


def test_clocks_that_jump_make_no_rate_negative_or_infinite(run: Path) -> None:
    Store.open(run / "activations").ledger.drop(10)
    for at in ([0.0] * 10, [-86_400.0 * n for n in range(10)], [86_400.0 * (n % 2) for n in range(10)]):
        finish(run, at, seconds=10)
        assert 0 < rate(run) < 1e6
    finish(run, [0.0] * 10, seconds=0)
    assert status(run)[1].tokens_per_second is None


def test_the_newest_units_are_those_recorded_last_wherever_they_lie(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "NEWEST", 3)
    finish(run, [10.0 * unit for unit in range(11)], seconds=10)
    finish(run, [5000.0, 5005.0, 5010.0], seconds=5)  # the first units were repaired, by a faster machine
    Store.open(run / "activations").ledger.drop(5)
    assert rate(run) == pytest.approx(64 / 5)


# ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_workers_are_named_with_their_units_and_when_they_were_seen(run: Path) -> None:
    finish(run, [0.0] * 10, seconds=1)
    Store.open(run / "activations").ledger.drop(10)
    now = time.time()
    for unit, (pid, ago) in enumerate([(7, 5), (7, 25), (8, 40), (9, 9000)]):
        set_record(run, unit, finished=now - ago, host="node-1", pid=pid)
    workers = {worker.name: worker for worker in status(run)[1].workers}
    assert {name: (one.units, one.live) for name, one in workers.items()} == {
        "node-1:7": (2, True),
        "node-1:8": (1, True),
        "node-1:9": (1, False),
        "here:1": (6, False),
    }
    (line,) = [line for line in printed(run).splitlines() if "at work" in line]
    assert line.startswith("activations: 2 at work: node-1:7 (2 units, ")
    for unit in range(3):
        set_record(run, unit, finished=now - 7200 - unit)
    assert "activations: nobody is at work: node-1:7 was seen last, 2 h 00 min ago" in printed(run)
    assert "at work" not in [line for line in printed(run).splitlines() if line.startswith("tokens")]


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_failed_units_are_listed_with_attempts_and_last_error_until_they_are_done(run: Path) -> None:
    ledger = Store.open(run / "activations").ledger
    record = ledger.record(2)
    ledger.drop(2)
    for error in (ValueError("the first"), OSError("the [bold]second[/bold] \x1b[31m")):
        path = ledger.fail(2, error, {})
    step = status(run)[1]
    assert step.failed == (2,)
    assert step.failures == (report.Failure(2, 2, repr(OSError("the [bold]second[/bold] \x1b[31m")), str(path)),)
    text = printed(run)
    said = r"OSError('the [bold]second[/bold] \x1b[31m')"
    assert f"activations: unit 2 failed 2 times: {said} (traceback in {path})" in text.replace("\n", "")
    assert "the first" not in text
    assert "\x1b" not in text
    ledger.complete(2, record)
    assert status(run)[1].failed == ()
    assert "failed" not in printed(run)


def test_of_very_many_failures_the_first_are_told_and_all_are_counted(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MOST_FAILURES", 2)
    ledger = Store.open(run / "activations").ledger
    for unit in (1, 4, 6, 7):
        ledger.drop(unit)
        ledger.fail(unit, ValueError("no"), {})
    step = status(run)[1]
    assert (step.failed, [one.unit for one in step.failures]) == ((1, 4, 6, 7), [1, 4])
    assert "activations: 2 more units have failed" in printed(run)


def test_the_name_of_a_host_cannot_write_to_the_terminal(run: Path) -> None:
    Store.open(run / "activations").ledger.drop(10)
    set_record(run, 3, finished=time.time() + 1, host="\x1b[31m[red]evil\x07")
    text = printed(run)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert r"\x1b[31m[red]evil\x07:" in text


# ── for scripts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_says_the_same_to_scripts(run: Path) -> None:
    ledger = Store.open(run / "activations").ledger
    ledger.drop(2)
    path = ledger.fail(2, ValueError("\x1b no"), {})
    said = json.loads(CliRunner().invoke(main, ["status", str(run), "--json"]).output)
    assert (said["run"], said["complete"]) == (str(run), False)
    tokens, activations = said["steps"]
    step = status(run)[1]
    assert tokens["left"] == 0
    assert activations["units_done"] == 10
    assert activations["left"] == pytest.approx(step.left)
    assert activations["failures"] == [
        {"unit": 2, "attempts": 1, "error": repr(ValueError("\x1b no")), "record": str(path)}
    ]
    assert [worker["name"] for worker in activations["workers"]] == [f"{socket.gethostname()}:{os.getpid()}"]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match=r"is no run: it holds no folder with a data\.zarr"):
        status(tmp_path)


def test_a_broken_record_is_named_and_the_rest_is_told_all_the_same(run: Path) -> None:
    done = run / "activations" / "done"
    (done / "000010.json").write_text((done / "000010.json").read_text()[:100])
    (done / "000009.json").write_text("{}")
    step = status(run)[1]
    assert step.units_done == 11
    assert step.tokens_per_second is not None
    text = printed(run)
    assert f"activations: {done / '000010.json'} is not readable as JSON" in text
    assert f"activations: {done / '000009.json'} is not the record of a unit" in text


def test_a_record_of_a_unit_that_does_not_exist_is_not_counted(run: Path) -> None:
    done = run / "activations" / "done"
    shutil.copy(done / "000003.json", done / "000099.json")
    (done / "000004.json").unlink()
    step = status(run)[1]
    assert (step.units, step.units_done) == (11, 10)
    assert step.tokens_done == step.n_token - 64


def test_a_broken_header_is_named(run: Path) -> None:
    header = run / "activations" / "data.zarr" / "zarr.json"
    said = json.loads(header.read_text())
    said["attributes"]["forebay"]["schema"]["format"] = 99
    header.write_text(json.dumps(said))
    with pytest.raises(SchemaError, match=r"has format 99; this forebay reads format 1\. Update forebay"):
        status(run)


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────────────

HEAVY = ("zarr", "xarray", "torch", "dask", "pandas", "tokenizers", "transformers", "safetensors", "huggingface_hub")


def test_status_imports_nothing_that_computes_or_opens_arrays(run: Path) -> None:
    program = (
        "import sys; from forebay.pipeline.cli import main; "
        f"main(['status', {str(run)!r}], standalone_mode=False); "
        f"print(*sorted({set(HEAVY)!r} & sys.modules.keys()), sep=',', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "activations" in done.stdout
    assert done.stderr.strip() == ""


def test_status_takes_no_longer_than_a_glance(run: Path) -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "forebay", "status", str(run)], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Seconds of the processor: a quarter of one; importing torch alone would take the better part of two.
    assert min(seconds() for _ in range(3)) < 1


def grown(schema: Schema, n_unit: int) -> Schema:
    """The same store with so many units of 64 tokens."""
    return Schema(
        kind=schema.kind, n_token=64 * n_unit, unit_tokens=64, arrays=schema.arrays, compression=schema.compression
    )


def test_a_listing_and_some_hundreds_of_records_are_all_that_is_read(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the state of a store of many thousand units is as quick to know: of four ranks at work, and a hole."""
    step = Store.open(run / "activations")
    record, now = step.ledger.record(0), time.time()
    ends = {4000: 5, 9000: 6, 14_000: 7, 19_000: 8}  # each rank walks a quarter of its own
    for end, pid in ends.items():
        for unit in range(end - 3000, end):
            path = step.ledger.path(unit)
            fresh = unit >= end - 20
            path.write_text(json.dumps({**record, "pid": pid, "finished": now - end + unit}) if fresh else "never read")
            os.utime(path, times=(now - (end - unit if fresh else 9000),) * 2)
    for unit in range(11):
        os.utime(step.ledger.path(unit), times=(now - 9000,) * 2)
    monkeypatch.setattr(report, "NEWEST", 80)
    opened: list[Any] = []
    read, looked = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self) or read(self))
    monkeypatch.setattr(report, "changed_at", lambda path: looked.append(path) or path.stat().st_mtime_ns)
    found = step_status(run / "activations", grown(step.schema, 20_000))
    assert (found.units, found.units_done) == (20_000, 12_011)
    assert {worker.name.split(":")[1]: worker.units for worker in found.workers} == dict.fromkeys("5678", 20)
    assert found.tokens_per_second == pytest.approx(4 * 64, rel=0.06)
    assert found.unreadable == ()
    assert len(opened) == 80
    assert len(looked) <= report.LOOKED_AT


@pytest.mark.slow
def test_a_million_records_are_a_glance_and_what_is_left_is_known_in_seconds(run: Path, tmp_path: Path) -> None:
    """A real folder of a million small files. Times are of the processor, memory of the whole process."""
    folder, step = tmp_path / "large" / "activations", Store.open(run / "activations")
    shutil.copytree(step.path, folder / "data.zarr")
    header = json.loads((folder / "data.zarr" / "zarr.json").read_text())
    header["attributes"]["forebay"]["schema"] = grown(step.schema, 10**6).to_json()
    for array in header["attributes"]["forebay"]["schema"]["arrays"].values():
        if "token" in array["dims"]:
            array["shape"][array["dims"].index("token")] = 64 * 10**6
    (folder / "data.zarr" / "zarr.json").write_text(json.dumps(header))
    whole = step.ledger.path(0).read_bytes()
    (folder / "done").mkdir()
    for unit in range(10**6):
        if unit % 1000 != 7:
            with open(folder / "done" / f"{unit:06d}.json", "wb") as file:
                file.write(whole)
    said = json.loads(measured("status", folder.parent))
    assert (said["units"], said["done"]) == (10**6, 999_000)
    assert said["seconds"] < 2, said
    left = json.loads(measured("todo", folder.parent))
    assert left["left"] == 1000
    assert left["seconds"] < 10, left
    assert max(said["bytes"], left["bytes"]) < 1e9


def measured(what: str, folder: Path) -> str:
    """What a fresh process says of a run's state, with the seconds and the memory that it took."""
    program = f"""
import json, sys, time
from pathlib import Path
from forebay.pipeline.report.status import status
from forebay.stores.ledger import Ledger
from forebay.stores.schema import read_header

folder, began = Path({str(folder)!r}), time.process_time()
if {what!r} == "status":
    (step,) = status(folder)
    said = {{"units": step.units, "done": step.units_done}}
else:
    grid = read_header(folder / "activations" / "data.zarr").schema.grid
    said = {{"left": len(grid.left(Ledger(folder / "activations").done()))}}
said["seconds"] = time.process_time() - began
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
said["bytes"] = int(peak.split()[1]) * 1024
print(json.dumps(said))
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
