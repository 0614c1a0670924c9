"""Stores written from rows of stores: the same bits as the rows that they were made from, killed or not."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr

import forebay
from forebay.pipeline.combining import export
from forebay.stages.models.errors import HookError
from forebay.stores.concat import concat
from forebay.stores.errors import CorruptStore, DiskFull, FingerprintMismatch, IncompleteStore, SchemaError
from forebay.stores.ledger import Ledger
from forebay.stores.store import Store
from forebay.stores.tree import open_run, open_store

from ..stored import data
from .small_runs import RUNS, laid, numbers, write_run

STEPS = ("tokens", "activations", "features-sae", "features-top")
UNITS = (8, 12, 8)
WHOLE = laid(RUNS)
LONG = RUNS[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / f"run-{n}", run, unit, steps=STEPS)
        for n, (run, unit) in enumerate(zip(RUNS, UNITS, strict=True))
    ]


@pytest.fixture(scope="module")
def written(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs end to end, written."""
    folder = tmp_path_factory.mktemp("written") / "all"
    (runs[0] / "tokenizer.json").write_text("{}")
    assert export(runs, folder).code == 0
    return folder


# ── end to end ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_what_reading_the_runs_as_one_gives(runs: list[Path], written: Path) -> None:
    found, expected = open_run(written), concat(runs)
    assert set(found.children) == set(expected.children)
    for node in expected.subtree:
        xr.testing.assert_equal(found[node.path].to_dataset(inherit=False), node.to_dataset(inherit=False))
    resid = found["activations/hook_resid_post/value"]
    np.testing.assert_array_equal(resid.values, WHOLE.values["activations/hook_resid_post"])


def test_values_are_the_same_bits(runs: list[Path], written: Path) -> None:
    """NaN, infinities, negative zero and subnormals among them."""
    parts = [Store.open(run / "activations").array("hook_resid_post/value")[:] for run in runs]
    kept = Store.open(written / "activations").array("hook_resid_post/value")[:]
    assert kept.dtype == np.uint16
    np.testing.assert_array_equal(kept, np.concatenate(parts, axis=1))


def test_any_reader_opens_it_and_every_object_is_recorded(written: Path) -> None:
    plain = xr.open_zarr(written / "activations/data.zarr", group="hook_embed", consolidated=False)
    np.testing.assert_array_equal(plain.value.values, WHOLE.values["activations/hook_embed"])
    for step in STEPS:
        store = Store.open(written / step)
        assert store.complete
        assert store.verify() == {}
        assert store.schema.unit_tokens == (16 if step == "tokens" else 8)  # the first run's
        listed = {key for index in store.ledger.done() for key in store.ledger.record(index)["objects"]}
        there = {path.relative_to(store.path).as_posix() for path in store.path.rglob("*") if path.is_file()}
        assert listed == {key for key in there if "/c/" in key and key in listed | store_objects(store)}


def store_objects(store: Store) -> set[str]:
    return {key for unit in store.schema.grid for key in store.objects_of(unit)}


def test_features_are_read_by_token_and_by_feature(written: Path) -> None:
    run: Any = forebay.open_run(written)
    sae, dense = run.features("sae"), WHOLE.values["features-sae/sae"]
    np.testing.assert_array_equal(sae.dense(list(range(12))).values, dense)
    counted = WHOLE.table["position"].to_numpy() >= 1
    np.testing.assert_array_equal(sae.statistics()["n_active"].values, WHOLE.fires[counted].sum(0))
    assert len(run.features("top").rows(0, WHOLE.n_token).count) == WHOLE.n_token


def test_what_was_recorded_of_the_runs_is_told_again(written: Path) -> None:
    store = Store.open(written / "features-sae")
    told = [store.ledger.record(index)["statistics"].get("sae", {}) for index in sorted(store.ledger.done())]
    assert sum(one.get("token_sum", [0])[0] for one in told) == WHOLE.n_token
    assert sum(one.get("l0_sum", [0])[0] for one in told) == WHOLE.fires.sum()
    store = Store.open(written / "activations")
    peaks = [store.ledger.record(index)["statistics"].get("hook_resid_post") for index in sorted(store.ledger.done())]
    finite = np.nan_to_num(WHOLE.values["activations/hook_resid_post"], posinf=0, neginf=0)
    np.testing.assert_array_equal(
        np.max([one["abs_max"] for one in peaks if one], axis=0), np.abs(finite).max(axis=(1, 2))
    )


def test_it_says_what_it_was_made_from(runs: list[Path], written: Path) -> None:
    said = json.loads((written / "recipe.json").read_text())
    assert [one["run"] for one in said["cut_from"]] == list(map(str, runs))
    assert said["recipe"]["tokenize"] == {"context": 6}
    assert said["fingerprints"]["tokens"] == Store.open(written / "tokens").fingerprint
    assert (written / "tokenizer.json").read_text() == "{}"
    provenance = Store.open(written / "activations").header.provenance
    prints = [Store.open(run / "activations").fingerprint for run in runs]
    assert [one["fingerprint"] for one in provenance["cut_from"]] == prints
    assert [one["fingerprint"] for one in provenance["determines"]["source"]["rows_of"]] == prints
    assert provenance["determines"]["files"] == [["model.safetensors", "ab" * 32]]
    assert str(runs[0]) not in json.dumps(provenance["determines"])  # a run that was moved is the same run


def test_to_go_on_with_what_is_done_writes_nothing(runs: list[Path], written: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*") if path.is_file()}
    outcome = export(runs, written)
    assert (outcome.code, sum(step.tokens for step in outcome.steps)) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_what_was_written_can_be_put_end_to_end_again(runs: list[Path], written: Path, tmp_path: Path) -> None:
    assert export([written, runs[2]], tmp_path / "again").code == 0
    found = open_run(tmp_path / "again")["activations/hook_embed/value"].values
    parts = [WHOLE.values["activations/hook_embed"], RUNS[2].values["activations/hook_embed"]]
    np.testing.assert_array_equal(found, np.concatenate(parts))


# ── a part ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def expected_tokens(start: int, stop: int) -> np.ndarray[Any, Any]:
    """The tokens of every sequence of the long run that holds any of [start, stop), the long way."""
    table = LONG.table
    touched = set(table["sequence"][start:stop])
    return np.flatnonzero(table["sequence"].isin(touched))


@pytest.mark.parametrize(("start", "stop"), [(5, 7), (13, 31)])
def test_tokens_are_cut_at_whole_sequences(runs: list[Path], tmp_path: Path, start: int, stop: int) -> None:
    own, table = expected_tokens(start, stop), LONG.table
    assert export(runs[1], tmp_path / "part", tokens=slice(start, stop)).code == 0
    run: Any = forebay.open_run(tmp_path / "part")
    node = run["activations/hook_resid_post"]
    np.testing.assert_array_equal(node["value"].values, LONG.values["activations/hook_resid_post"][:, own])
    np.testing.assert_array_equal(node["token_id"].values, LONG.values["tokens/token_id"][own])
    np.testing.assert_array_equal(run.features("sae").dense(list(range(12))), LONG.values["features-sae/sae"][own])
    part = table.iloc[own]
    np.testing.assert_array_equal(node["position"].values, part["position"])
    np.testing.assert_array_equal(node["sequence"].values, part["sequence"] - part["sequence"].iloc[0])
    names = list(LONG.documents)
    ids = run["documents/id"].values[node["document"].values].tolist()
    assert ids == [names[document] for document in part["document"]]
    pattern = LONG.values["activations/attn.hook_pattern"][:, sorted(set(part["sequence"]))]
    np.testing.assert_array_equal(run["activations/attn.hook_pattern/value"].values, pattern)
    assert all(Store.open(tmp_path / "part" / step).verify() == {} for step in STEPS)


@pytest.mark.parametrize(
    ("first", "beyond", "named"),
    [
        (2, 3, ["d", "zwölf 🐟"]),  # its sequence begins in the document before
        (2, 4, ["d", "zwölf 🐟", "end"]),
        (0, 4, ["none", "d", "zwölf 🐟", "end"]),
    ],
)
def test_documents_come_with_the_sequences_that_hold_them(
    runs: list[Path], tmp_path: Path, first: int, beyond: int, named: list[str]
) -> None:
    export(runs[1], tmp_path / "part", documents=slice(first, beyond), steps=["tokens"])
    tree = open_store(tmp_path / "part/tokens")
    edges = np.cumsum([0, *LONG.documents.values()])
    own = expected_tokens(edges[first], edges[beyond])
    np.testing.assert_array_equal(tree["tokens/token_id"].values, LONG.values["tokens/token_id"][own])
    # Of a document that is cut off, what there is; all that touch what was asked for are told of.
    assert [name for name in named if name in tree["documents/id"].values] == named
    lengths = LONG.table.iloc[own]["document"].value_counts()
    held = dict(zip(tree["documents/id"].values.tolist(), tree["documents/n_token"].values.tolist(), strict=True))
    assert held == {name: int(lengths.get(list(LONG.documents).index(name), 0)) for name in held}


def test_layers_and_hook_points_are_chosen(runs: list[Path], tmp_path: Path) -> None:
    export(runs[1], tmp_path / "part", layers=[7, 3], hooks=["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern"])
    run: Any = forebay.open_run(tmp_path / "part")
    assert set(run["activations"].children) == {"hook_resid_post", "attn.hook_pattern"}
    value = run["activations/hook_resid_post/value"]
    assert value.layer.values.tolist() == [3, 7]
    np.testing.assert_array_equal(value.values, LONG.values["activations/hook_resid_post"][1:])
    pattern = run["activations/attn.hook_pattern/value"]
    assert pattern.layer.values.tolist() == [7]
    np.testing.assert_array_equal(pattern.values, LONG.values["activations/attn.hook_pattern"][1:])
    record = Store.open(tmp_path / "part/activations").ledger.record(0)
    assert len(record["statistics"]["hook_resid_post"]["abs_max"]) == 2
    assert next(iter(run.batches("blocks.3.hook_resid_post", batch=4))).shape == (4, 5)
    export(runs[1], tmp_path / "embed", layers=[0], hooks="hook_embed", steps="activations")
    assert set(open_run(tmp_path / "embed")["activations"].children) == {"hook_embed"}


def test_only_what_is_kept_is_read(runs: list[Path], tmp_path: Path) -> None:
    """A damaged object of another layer is nobody's business."""
    own = shutil.copytree(runs[1], tmp_path / "own")
    (own / "activations/data.zarr/hook_resid_post/value/c/0/0/0").write_bytes(b"torn")
    export(own, tmp_path / "fine", layers=[3], hooks=["blocks.3.hook_resid_post"])
    with pytest.raises(CorruptStore, match=r"hook_resid_post/value/c/0/0/0 is not what was recorded"):
        export(own, tmp_path / "torn", layers=[0])


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        ({"tokens": slice(40, 50)}, SchemaError, r"has no tokens 40:50: it has 31"),
        ({"tokens": slice(0, 9, 2)}, SchemaError, r"has no tokens 0:9:2"),
        ({"documents": slice(4, 9)}, SchemaError, r"has no documents 4:9: it has 4"),
        ({"documents": slice(0, 1)}, SchemaError, r"documents 0:1 have no tokens"),
        ({"documents": slice(0, 2), "tokens": slice(0, 2)}, SchemaError, "not both"),
        ({"steps": ["token"]}, SchemaError, r"has no token\. Did you mean 'tokens'"),
        ({"layers": [5]}, SchemaError, r"no capture has layer 5; there are 0, 3, 7"),
        ({"hooks": ["blocks.3.hook_resid_pre"]}, HookError, "hook_resid_post"),
        ({"hooks": ["hook_embed"], "steps": []}, SchemaError, "nothing"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_written(
    runs: list[Path], tmp_path: Path, wanted: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        export(runs[1], tmp_path / "part", **wanted)
    assert not (tmp_path / "part").exists()


def test_what_is_incomplete_or_damaged_is_refused(runs: list[Path], tmp_path: Path) -> None:
    own = shutil.copytree(runs[1], tmp_path / "own")
    shard = own / "activations/data.zarr/hook_embed/value/c/1/0"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptStore, match=r"hook_embed/value/c/1/0 is not what was recorded: its bytes have changed"):
        export([runs[0], own], tmp_path / "one")
    with pytest.raises(IncompleteStore):  # what was written of it says so
        open_run(tmp_path / "one")
    Ledger(own / "activations").drop(1)
    with pytest.raises(IncompleteStore, match=r"own.activations is incomplete: 2 of 3"):
        export([runs[0], own], tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_nothing_is_written_over(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="is the run that is read"):
        export(runs[1], runs[1])
    export(runs[1], tmp_path / "part", tokens=slice(0, 6), steps=["tokens"])
    before = data(tmp_path / "part")
    for wanted in ({"tokens": slice(6, 12)}, {"tokens": slice(0, 6), "steps": ["tokens", "activations"]}):
        with pytest.raises(FingerprintMismatch, match="another part of this one"):
            export(runs[1], tmp_path / "part", **{"steps": ["tokens"], **wanted})
    own = shutil.copytree(runs[0], tmp_path / "own")
    with pytest.raises(FingerprintMismatch, match="holds another run"):
        export(runs[1], own)
    assert data(tmp_path / "part") == before
    assert data(own) == data(runs[0])


def test_a_disk_that_is_too_small_is_refused(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda where: SimpleNamespace(free=10))
    with pytest.raises(DiskFull, match=r"part needs [\d,]+ more bytes \(before compression\), and 10 are free"):
        export(runs[1], tmp_path / "a/b/part")
    assert not (tmp_path / "a").exists()


def test_rows_are_chosen_of_one_run(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="chosen of one run"):
        export(runs, tmp_path / "part", tokens=slice(0, 4))


# ── kills ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("most", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_it_goes_on_to_the_same_bytes(tmp_path: Path, most: int) -> None:
    rng = np.random.default_rng(0)
    parts = []
    for seed in range(2):
        lengths = tuple(int(n) for n in rng.integers(1, 7, 3 * most))
        parts.append(numbers(seed, lengths, {"a": sum(lengths) - 4, "b": 4}))
    steps = ("tokens", "activations", "features-sae")
    sources = [write_run(tmp_path / f"run-{n}", part, 8, steps=steps) for n, part in enumerate(parts)]
    context = get_context("forkserver")
    context.set_forkserver_preload(["forebay.pipeline.combining", "forebay.stores.index_builder"])

    def start(folder: Path) -> Any:
        process = context.Process(target=export, args=(sources, folder), daemon=True)
        process.start()
        return process

    def recorded(folder: Path) -> int:
        return sum(1 for _ in folder.glob("*/done/[0-9]*.json"))

    whole = tmp_path / "whole"
    process = start(whole)
    process.join()
    n_unit, expected, chance = recorded(whole), data(whole), random.Random(3)
    assert process.exitcode == 0
    kills = hits = n_folder = 0
    while kills < most:
        folder, n_folder = tmp_path / f"killed-{n_folder}", n_folder + 1
        process = start(folder)
        while kills < most:
            # Moments are counted in units, whose time depends on the machine, and a little more.
            due, until = chance.randint(min(recorded(folder), n_unit - 1), n_unit - 1), time.monotonic() + 60
            while recorded(folder) < due and process.is_alive() and time.monotonic() < until:
                time.sleep(0.001)
            process.join(chance.uniform(0, 0.02))
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            kills += 1
            held = [Store.open(path.parent) for path in folder.glob("*/data.zarr")]
            hits += any(store.done() for store in held) and not all(store.complete for store in held)
            assert all(store.verify() == {} for store in held)
            process = start(folder)
        process.join()
        assert process.exitcode == 0
        assert data(folder) == expected
    assert hits >= most // 4, f"{hits} of {kills} kills hit the middle of {n_unit} units"
    values = laid(parts).values["activations/hook_embed"]
    np.testing.assert_array_equal(open_run(whole)["activations/hook_embed/value"].values, values)
