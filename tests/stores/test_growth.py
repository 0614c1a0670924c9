"""A store that becomes longer where it lies keeps what is whole, and is never taken for what it is not, whenever the
process that does it is killed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from forebay.stores.digests import disagreement
from forebay.stores.errors import CorruptStore, IncompleteStore, SchemaError
from forebay.stores.growth import check_geometry, roll_forward, steady_tokens
from forebay.stores.schema import GROWING, read_header
from forebay.stores.store import Store
from forebay.stores.tree import open_store
from forebay.stores.writer import UnitWriter

from . import growing_stores
from .growing_stores import KEPT, LONG, SHORT, UNIT, create, fill, fingerprint_of, grow, schema_of


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long run, made at once."""
    run = tmp_path_factory.mktemp("whole")
    create(run, LONG)
    return run


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("short")
    create(run, SHORT)
    return run


@pytest.fixture
def run(short: Path, tmp_path: Path) -> Path:
    """A run that is complete, and may grow."""
    return Path(shutil.copytree(short, tmp_path / "run"))


def files(run: Path) -> dict[str, bytes]:
    """Every file of the run but headers and records, which tell of what was."""
    found = {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    told = ("data.zarr/zarr.json", "/done/")
    return {name: data for name, data in found.items() if not any(part in name for part in told)}


def assert_grown(run: Path, whole: Path) -> None:
    assert files(run) == files(whole)
    for step in UNIT:
        store, other = Store.open(run / step), Store.open(whole / step)
        assert store.verify() == {}
        assert store.complete
        assert {**store.header.to_json(), "provenance": None} == {**other.header.to_json(), "provenance": None}
        assert store.header.grown_from == [{"fingerprint": fingerprint_of(step, SHORT), "n_unit": KEPT[step]}]


def assert_records_tell_the_truth(run: Path) -> None:
    """Whatever lies in the folder: each record is of this store, and each object that it names is as it says."""
    for step in UNIT:
        header = read_header(run / step / "data.zarr")
        for path in (run / step / "done").glob("*.json"):
            record = json.loads(path.read_text())
            assert header.accepts(record["fingerprint"], record["unit"])
            for key, said in record["objects"].items():
                assert disagreement(run / step / "data.zarr" / key, said) is None, path


def test_it_becomes_what_would_have_been_made_at_once(run: Path, whole: Path) -> None:
    before = {path: path.stat().st_ino for path in run.rglob("*") if path.is_file()}
    grow(run)
    assert fill(run) == {"tokens": [1, 2], "activations": [2, 3, 4]}
    assert_grown(run, whole)
    for step, n_unit in KEPT.items():
        ledger = Store.open(run / step).ledger
        for unit in range(n_unit):
            kept = [ledger.path(unit), *(run / step / "data.zarr" / key for key in ledger.record(unit)["objects"])]
            assert [path.stat().st_ino for path in kept] == [before[path] for path in kept]


def test_any_reader_finds_the_longer_arrays_and_labels(run: Path, whole: Path) -> None:
    grow(run)
    fill(run)
    for group in ("resid", "pattern", "sequences", "documents"):
        one, other = (xr.open_zarr(path / "activations/data.zarr", group=group).load() for path in (run, whole))
        assert one.identical(other)
        assert len(one.variables) > 0
    assert open_store(run / "activations")["resid/value"].sizes["token"] == sum(LONG)


def assert_goes_on(folder: Path, run: Path, whole: Path) -> bool:
    """What holds after a kill, and what the next process makes of it. Whether the growth had been decided."""
    assert_records_tell_the_truth(folder)
    for step in UNIT:
        if (folder / step / GROWING).exists():
            with pytest.raises(IncompleteStore, match=f"forebay append {folder}"):
                Store.open(folder / step)
        else:
            assert Store.open(folder / step).verify() == {}
    seen = {name: data for name, data in files(folder).items() if "/." not in f"/{name}"}
    decided = roll_forward(folder)
    if not decided and read_header(folder / "tokens/data.zarr").schema.n_token == sum(SHORT):
        assert seen == files(run)
        grow(folder)
    assert (folder / "recipe.json").read_text() == f'{{"tokens": {sum(LONG)}}}'
    assert fill(folder) == {"tokens": [1, 2], "activations": [2, 3, 4]}
    for leftover in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):  # beside the data, where nobody looks
        leftover.unlink()
    assert_grown(folder, whole)
    return decided


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_killed_before_its_changes_it_goes_on_to_the_same(every: int, run: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    out.mkdir()
    script = [sys.executable, growing_stores.__file__, str(run), str(out), str(every)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    killed = sorted(path for path in out.iterdir() if path.is_dir())
    decided = [assert_goes_on(folder, run, whole) for folder in killed]
    assert sum(decided) > 30 // every
    assert len(decided) > sum(decided)


def test_one_who_had_it_open_reads_on_what_stays_and_is_told_that_it_has_grown(run: Path) -> None:
    early, late = open_store(run / "activations", chunks=None), Store.open(run / "activations")
    expected = early["resid/value"].load().copy()
    early = open_store(run / "activations", chunks=None)
    grow(run)
    fill(run)
    assert early["resid/value"].load().identical(expected)
    with pytest.raises(IncompleteStore, match="has grown, or was made anew, since it was opened: open it again"):
        assert late.labels


def test_a_unit_that_was_computed_for_the_shorter_store_is_not_recorded_in_the_longer_one(run: Path) -> None:
    store = Store.open(run / "activations")
    writer = UnitWriter(store, store.schema.grid[2])
    writer.put(growing_stores.piece_of(store, writer.rows))
    grow(run)
    with pytest.raises(IncompleteStore, match="open it again"):
        writer.finish({})
    assert fill(run)["activations"] == [2, 3, 4]
    assert Store.open(run / "activations").verify() == {}


def test_the_record_of_an_ancestor_counts_for_units_that_were_kept_and_for_no_other(run: Path) -> None:
    kept = {unit: Store.open(run / "activations").ledger.record(unit) for unit in (1, 2)}
    grow(run)
    fill(run)
    store = Store.open(run / "activations")
    store.ledger.complete(2, kept[2])
    assert list(store.verify()) == [2]
    assert "is not the store's" in store.verify()[2][0]
    store.ledger.complete(1, {**kept[1], "fingerprint": "0" * 64})
    assert list(store.verify()) == [1, 2]


def test_what_it_was_is_remembered_over_several_growths(run: Path) -> None:
    longest = (*LONG[:-1], 4, 4, 1)
    grow(run)
    fill(run)
    second = [growing_stores.grown(run, step, longest, 4 if step == "activations" else 2) for step in UNIT]
    growing_stores.commit_growth(run, second, {"recipe.json": "{}"})
    assert fill(run) == {"tokens": [2, 3], "activations": [4, 5]}
    header = Store.open(run / "activations").header
    assert [one["n_unit"] for one in header.grown_from] == [2, 4]
    assert {Store.open(run / "activations").ledger.record(unit)["fingerprint"] for unit in range(6)} == {
        fingerprint_of("activations", lengths) for lengths in (SHORT, LONG, longest)
    }
    assert Store.open(run / "activations").verify() == {}


# ── several at once ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_growth_that_was_laid_out_of_what_has_grown_since_is_void(run: Path, whole: Path) -> None:
    stale = [growing_stores.grown(run, step, (*LONG, 4), KEPT[step]) for step in UNIT]
    grow(run)
    with pytest.raises(IncompleteStore, match="changed by another process meanwhile: append again"):
        growing_stores.commit_growth(run, stale, {})
    assert not (run / GROWING).exists()
    fill(run)
    assert_grown(run, whole)


def test_one_process_at_a_time_decides(run: Path) -> None:
    entries = [growing_stores.grown(run, step, LONG, KEPT[step]) for step in UNIT]
    (run / GROWING).write_text("{}")
    with pytest.raises(IncompleteStore, match="being made longer by another process"):
        growing_stores.commit_growth(run, entries, {})


def test_an_announcement_that_was_put_too_late_is_taken_back(run: Path, whole: Path) -> None:
    entries = [growing_stores.grown(run, step, LONG, KEPT[step]) for step in UNIT]
    growing_stores.commit_growth(run, entries, {"recipe.json": f'{{"tokens": {sum(LONG)}}}'})
    (run / "tokens" / GROWING).write_text(json.dumps(entries[0]))
    with pytest.raises(IncompleteStore, match="is being made longer, or was when that was killed"):
        Store.open(run / "tokens")
    assert not roll_forward(run)
    fill(run)
    assert_grown(run, whole)


def test_a_store_that_was_replaced_amid_a_growth_is_not_touched(run: Path, tmp_path: Path) -> None:
    entries = [growing_stores.grown(run, step, LONG, KEPT[step]) for step in UNIT]
    growing_stores.commit_growth(run, entries, {})
    (run / GROWING).write_text(json.dumps({"stores": [entries[0], {**entries[1], "to": "f" * 64}], "files": {}}))
    before = files(run)
    with pytest.raises(CorruptStore, match="activations is neither what it was nor what it becomes"):
        roll_forward(run)
    assert files(run) == before


# ── what cannot be ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("change", ["ids", "starts", "fewer"])
def test_what_is_not_a_beginning_of_the_longer_one_is_refused(change: str) -> None:
    short, long = schema_of("tokens", SHORT), schema_of("tokens", LONG)
    labels = dict(long.labels)
    if change == "ids":
        labels["documents/id"] = (("document",), np.array(["one", "two", "three"], dtype=object))
    elif change == "starts":
        labels["sequences/start"] = (("sequence",), labels["sequences/start"][1] + np.arange(9))
    else:
        labels["documents/start"] = (("document",), np.array([0]))
    with pytest.raises(SchemaError, match="is not the beginning of what would be"):
        steady_tokens(short, replace(long, labels=labels))


def test_only_the_last_sequence_may_become_longer() -> None:
    short, long = schema_of("tokens", SHORT), schema_of("tokens", LONG)
    assert steady_tokens(short, long) == 20
    assert steady_tokens(schema_of("tokens", SHORT[:-1]), long) == 20
    assert steady_tokens(long, long) == sum(LONG)


def test_units_that_are_whole_are_not_cut_anew() -> None:
    short, long = schema_of("activations", SHORT), schema_of("activations", LONG)
    check_geometry("activations", short, long, 2)
    pattern = long.arrays["pattern/value"]
    wider = {"pattern/value": replace(pattern, shape=(2, 9, 5, 5), chunks=(1, 1, 5, 5), shards=(1, 2, 5, 5))}
    cut = replace(long, arrays={**long.arrays, **wider})
    with pytest.raises(
        SchemaError, match=r"pattern/value is kept in chunks \(1, 1, 4, 4\) .* the 2 units that are whole"
    ):
        check_geometry("activations", short, cut, 2)
    check_geometry("activations", short, cut, 0)
    wider = {"pattern/value": replace(pattern, shape=(3, *pattern.shape[1:]))}
    with pytest.raises(SchemaError, match="layer cannot become longer"):
        check_geometry("activations", short, replace(long, arrays={**long.arrays, **wider}), 2)
