"""A unit is done when its record stands: whole or not at all, whoever else writes, whenever one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.stores.errors import CorruptStore
from forebay.stores.ledger import Ledger, read_json, write_atomic

RECORD = {"unit": 3, "objects": {"a/c/0": {"bytes": 7, "sha256": "ff"}}, "seconds": {"compute": 0.5}, "host": "ä"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that runs `code`, with `arguments` in sys.argv, and talks by standard output."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


# ── one writer ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_record_stands_as_a_file_that_any_json_reader_opens(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "step")
    ledger.complete(3, RECORD)
    assert names(tmp_path / "step") == ["done"]
    assert names(tmp_path / "step" / "done") == ["000003.json"]
    assert json.loads((tmp_path / "step" / "done" / "000003.json").read_text("utf-8")) == RECORD
    assert ledger.record(3) == RECORD


def test_the_units_that_are_done_are_one_listing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.done() == set()
    for unit in (5, 0, 17):
        ledger.complete(unit, RECORD)
    assert ledger.done() == {0, 5, 17}
    (tmp_path / "done" / "000005.json").write_bytes(b"")
    assert ledger.done() == {0, 5, 17}


OTHERS = (
    *(".000001.json.tmp", ".000001.json", "000001.json.tmp", "000001.json~", "x000001.json", "000001.1.json", "1"),
    *("+1.json", "1_0.json", " 1.json", "000001.json.json", ".json", "1.0.json", "-1.json", "1e1.json", "json"),
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_are_no_records(tmp_path: Path, name: str) -> None:
    ledger = Ledger(tmp_path)
    ledger.complete(0, RECORD)
    (tmp_path / "done" / name).write_text(json.dumps(RECORD))
    assert ledger.done() == {0}


@settings(max_examples=20)
@given(st.sets(st.integers(0, 10**9), max_size=4) | st.just({999_998, 999_999, 1_000_000, 12_345_678}))
def test_numbers_may_have_more_than_six_digits(tmp_path_factory: pytest.TempPathFactory, units: set[int]) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("ledger"))
    for unit in units:
        ledger.complete(unit, {"unit": unit})
        ledger.fail(unit, ValueError("before"), {})
    assert ledger.done() == units
    assert [ledger.record(unit)["unit"] for unit in units] == list(units)
    for unit in units:
        ledger.drop(unit)
    assert list(ledger.failed()) == sorted(units)


def test_putting_again_replaces_the_record(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.complete(3, {"long": "x" * 10_000})
    ledger.complete(3, {"short": 1})
    assert ledger.record(3) == {"short": 1}
    assert names(tmp_path / "done") == ["000003.json"]


def test_a_dropped_record_is_to_do_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.drop(3)
    ledger.complete(3, RECORD)
    ledger.drop(3)
    assert ledger.done() == set()


def test_a_put_that_fails_leaves_the_former_file_and_nothing_beside_it(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.complete(3, RECORD)
    with pytest.raises(TypeError):
        ledger.complete(3, {"unit": object()})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_atomic(tmp_path / "folder", b"a folder stands where this would go")
    assert ledger.record(3) == RECORD
    assert names(tmp_path) == ["done", "folder"]
    assert names(tmp_path / "done") == ["000003.json"]


# ── failed attempts ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_failed_attempts_are_counted_and_keep_their_tracebacks(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)

    def attempt(reason: str) -> Path:
        try:
            raise ArithmeticError(reason)
        except ArithmeticError as error:
            return ledger.fail(7, error, {"host": "here"})

    assert ledger.failed() == {}
    paths = [attempt("once"), attempt("twice")]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "failed/000007.1.json",
        "failed/000007.2.json",
    ]
    assert ledger.failed() == {7: 2}
    assert ledger.done() == set()
    second = ledger.failure(7, 2)
    assert (second["error"], second["host"]) == ("ArithmeticError('twice')", "here")
    assert "in attempt" in second["traceback"]
    assert "raise ArithmeticError(reason)" in second["traceback"]


def test_a_unit_that_succeeded_in_the_end_did_not_fail(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for unit in (2, 1):
        ledger.fail(unit, ValueError(), {})
    ledger.complete(2, RECORD)
    assert ledger.failed() == {1: 1}


def test_no_attempt_overwrites_the_record_of_another(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.fail(0, ValueError("first"), {})
    ledger.complete(0, RECORD)
    ledger.drop(0)
    ledger.fail(0, ValueError("second"), {})
    ledger.complete(0, RECORD)
    ledger.fail(0, ValueError("a late one, of another process"), {})
    assert [ledger.failure(0, attempt)["error"] for attempt in (1, 2, 3)] == [
        "ValueError('first')",
        "ValueError('second')",
        "ValueError('a late one, of another process')",
    ]


# ── what is no record ────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_a_record_cut_anywhere_is_refused_by_name(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("ledger"))
    ledger.complete(3, RECORD)
    path = ledger.path(3)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(CorruptStore, match=r"done/000003\.json is not readable as JSON .*; delete it and run again"):
        ledger.record(3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfe\x00", "is not readable as JSON"),
        (b"[1, 2]", "holds list, not a JSON object"),
        (b"null", "holds NoneType, not a JSON object"),
    ],
)
def test_what_is_no_object_is_refused_by_name(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(data)
    with pytest.raises(CorruptStore, match=rf"recipe\.json {message}.*; delete it and run again"):
        read_json(path)


# ── many writers ─────────────────────────────────────────────────────────────────────────────────────────────────────

PUT_OFTEN = """
import sys
from pathlib import Path
from forebay.stores.ledger import Ledger

ledger, writer = Ledger(Path(sys.argv[1])), int(sys.argv[2])
for round in range(60):
    ledger.complete(3, {"writer": writer, "round": round, "filling": [writer] * (1 + 400 * ((writer + round) % 5))})
"""


def whole_records(ledger: Ledger, while_any: list[subprocess.Popen[str]]) -> Iterator[dict[str, object]]:
    """What a reader sees as long as the writers run, and once more."""
    while any(process.poll() is None for process in while_any):
        if ledger.done():
            yield ledger.record(3)
    yield ledger.record(3)


def test_a_reader_sees_whole_records_while_processes_put_the_same_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    writers = [child(PUT_OFTEN, tmp_path, writer) for writer in range(4)]
    seen = set()
    for record in whole_records(ledger, writers):
        assert set(record["filling"]) == {record["writer"]}  # type: ignore[call-overload]
        seen.add((record["writer"], record["round"]))
    for process in writers:
        process.communicate()
    assert [process.returncode for process in writers] == [0] * 4
    assert len(seen) > 1
    assert names(tmp_path / "done") == ["000003.json"]


def test_writers_with_the_same_process_id_do_not_meet(tmp_path: Path) -> None:
    """Machines that share a file system share process ids too, containers above all; threads stand for them."""
    ledger = Ledger(tmp_path)
    errors: list[Exception] = []

    def put_often(writer: int) -> None:
        try:
            for round_ in range(40):
                ledger.complete(3, {"filling": [writer] * (1 + 400 * ((writer + round_) % 5))})
                assert len(set(ledger.record(3)["filling"])) == 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=put_often, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert names(tmp_path / "done") == ["000003.json"]


KILLED = """
import os, sys, time
from pathlib import Path
from forebay.stores import ledger

def stop(*paths):
    print("written aside", flush=True)
    time.sleep(60)

setattr(os, sys.argv[2], stop)      # the last moment before, or within, what makes the file whole
ledger.Ledger(Path(sys.argv[1])).complete(3, {"writer": "killed"})
"""


@pytest.mark.parametrize("moment", ["replace", "fsync"])
def test_a_writer_killed_before_the_end_leaves_no_record(tmp_path: Path, moment: str) -> None:
    ledger = Ledger(tmp_path)
    ledger.complete(2, RECORD)
    with child(KILLED, tmp_path, moment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written aside\n"
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    leftovers = set(names(tmp_path / "done")) - {"000002.json"}
    assert leftovers
    assert all(name.startswith(".") and name.endswith(".tmp") for name in leftovers)
    assert ledger.done() == {2}
    ledger.complete(3, RECORD)
    assert (ledger.done(), ledger.record(3)) == ({2, 3}, RECORD)
