"""The state of a run is one listing away: from the records alone, at any time, without Zarr, xarray or torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import forebay
from forebay.pipeline.cli import main
from forebay.pipeline.report.status import NEWEST, status, step_status
from forebay.stores.errors import CorruptStore, SchemaError, StoreNotFound
from forebay.stores.store import Store

MakeRecipe = Callable[..., Path]


@pytest.fixture
def run(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """A run that is complete: tokens in units of 128, activations in units of 64."""
    return forebay.run(make_recipe(tokenize={"unit_tokens": 128}), tmp_path / "run").folder


def printed(folder: Path) -> str:
    result = CliRunner().invoke(main, ["status", str(folder)])
    assert result.exit_code == 0, result.output
    return result.output


def set_seconds(folder: Path, unit: int, seconds: float) -> int:
    """Makes a unit's record say that it took this long, and gives its number of tokens."""
    path = folder / "activations" / "done" / f"{unit:06d}.json"
    record = json.loads(path.read_text())
    record["seconds"]["compute"] = seconds
    path.write_text(json.dumps(record))
    first, beyond = record["rows"]["token"]
    return int(beyond - first)


# ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_complete_run_is_done_in_every_step(run: Path) -> None:
    tokens, activations = status(run)
    n = forebay.open_run(run)["tokens"].sizes["token"]
    assert (tokens.name, activations.name) == ("tokens", "activations")
    assert (tokens.units, tokens.units_done) == (-(-n // 128),) * 2
    assert (activations.units, activations.units_done) == (-(-n // 64),) * 2
    for step, width in ((tokens, 3), (activations, 3 * 28)):
        assert (step.n_token, step.tokens_done, step.nbytes) == (n, n, n * width * 4)
        assert step.left == 0
        assert step.failed == {}
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


def test_the_rate_is_that_of_the_newest_units_and_the_time_left_follows_from_it(run: Path) -> None:
    ledger, n_unit = Store.open(run / "activations").ledger, status(run)[1].units
    assert n_unit > NEWEST + 1
    for unit in range(n_unit - NEWEST - 1):
        set_seconds(run, unit, 1e6)  # long ago, on a slow machine
    ledger.drop(0)
    newest = range(n_unit - NEWEST, n_unit)
    seconds = np.linspace(0.5, 2, NEWEST)
    tokens = sum(set_seconds(run, unit, float(s)) for unit, s in zip(newest, seconds, strict=True))
    step = status(run)[1]
    assert step.tokens_per_second == pytest.approx(tokens / seconds.sum())
    assert step.left == pytest.approx(64 / step.tokens_per_second)
    (line,) = [line for line in printed(run).splitlines() if line.startswith("activations")]
    assert f"{tokens / seconds.sum():,.0f}" in line.split()


def test_the_time_left_is_said_as_people_say_it(run: Path) -> None:
    for unit in range(status(run)[1].units):
        set_seconds(run, unit, 3600)
    for unit in range(3):
        Store.open(run / "activations").ledger.drop(unit)
    # Three units of 64 tokens are left; the newest eight took an hour each, the last of them for fewer tokens.
    hours = 3 * 64 / sum(len(Store.open(run / "activations").schema.grid[u]) for u in range(3, 11)) * 8
    assert 3 < hours < 4
    assert f"3 h {int((hours - 3) * 60):02d} min" in printed(run)


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_failed_units_are_listed_with_their_last_error_until_they_are_done(run: Path) -> None:
    ledger = Store.open(run / "activations").ledger
    record = ledger.record(2)
    ledger.drop(2)
    for error in (ValueError("the first"), OSError("the [bold]second[/bold] \x1b[31m")):
        ledger.fail(2, error, {})
    step = status(run)[1]
    assert step.failed == {2: repr(OSError("the [bold]second[/bold] \x1b[31m"))}
    text = printed(run)
    assert r"activations: unit 2 failed: OSError('the [bold]second[/bold] \x1b[31m')" in text
    assert "the first" not in text
    assert "\x1b" not in text
    ledger.complete(2, record)
    assert status(run)[1].failed == {}
    assert "failed" not in printed(run)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match=r"is no run: it holds no folder with a data\.zarr"):
        status(tmp_path)


def test_a_broken_record_and_a_broken_header_are_named(run: Path) -> None:
    path = run / "activations" / "done" / "000010.json"
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(CorruptStore, match=r"000010\.json is not readable as JSON .*; delete it and run again"):
        status(run)
    path.write_text(whole)
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
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "forebay", "status", str(run)], check=True, capture_output=True)
        return time.perf_counter() - started

    # A quarter of a second on an idle machine; importing torch alone would take the better part of two.
    assert min(seconds() for _ in range(3)) < 1


def test_a_listing_and_a_handful_of_records_are_all_that_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the state of a store of many thousand units is as quick to know."""
    step = Store.open(run / "activations")
    record = step.ledger.record(0)
    for unit in range(20_000):
        path = step.ledger.path(unit)
        if not path.exists():
            path.write_text(json.dumps(record) if unit >= 19_000 else "never read")
    schema = step.schema
    grown = type(schema)(
        kind=schema.kind, n_token=64 * 20_000, unit_tokens=64, arrays=schema.arrays, compression=schema.compression
    )
    opened: list[Any] = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self) or read(self))
    found = step_status(run / "activations", grown)
    assert (found.units, found.units_done) == (20_000, 20_000)
    assert len(opened) == NEWEST
