"""A run does what is left to do, once, whatever stopped it before, and never mixes two recipes in one folder."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import forebay
from forebay.pipeline.exit_codes import COMPLETE, FAILED, INTERRUPTED
from forebay.pipeline.progress import Quiet
from forebay.pipeline.report.tables import outcome_text
from forebay.pipeline.run import run_unit
from forebay.pipeline.stopping import stop_on_signals
from forebay.stages.capture import Capture
from forebay.stages.tokenize import Tokenize
from forebay.stores.errors import DiskFull, FingerprintMismatch, IncompleteStore, StoreNotFound
from forebay.stores.store import Store
from forebay.stores.writer import UnitWriter

from ..stored import data

MakeRecipe = Callable[..., Path]
Start = Callable[..., "subprocess.Popen[str]"]

SMALL: dict[str, Any] = {"tokenize": {"unit_tokens": 128}}


def stamps(folder: Path, *steps: str) -> dict[str, tuple[int, int]]:
    """Inode and time of change of everything that was recorded: equal if and only if nothing was written again."""
    found = {}
    for step in steps:
        for part in ("data.zarr", "done"):
            for path in sorted((folder / step / part).rglob("*")):
                if path.is_file():
                    stat = path.stat()
                    found[str(path.relative_to(folder))] = (stat.st_ino, stat.st_mtime_ns)
    assert found
    return found


def done(folder: Path, step: str = "activations") -> set[int]:
    return {int(path.stem) for path in (folder / step / "done").glob("[0-9]*.json")}


def assert_whole(folder: Path) -> None:
    for step in ("tokens", "activations"):
        store = Store.open(folder / step)
        assert store.complete
        assert store.verify() == {}


# ── what a run does and says ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_records_every_unit_of_every_step_and_says_so(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcome = forebay.run(make_recipe(**SMALL), folder)
    assert (outcome.code, outcome.interrupted, outcome.folder) == (COMPLETE, False, folder)
    assert [step.name for step in outcome.steps] == ["tokens", "activations"]
    assert_whole(tmp_path / "run")
    tree = forebay.open_run(tmp_path / "run")
    n_token = tree["tokens"].sizes["token"]
    for step in outcome.steps:
        arrays = {"tokens": ["token_id", "char_start", "char_end"], "activations": ["hook_resid_post/value"]}
        objects = [p for a in arrays[step.name] for p in (folder / step.name / "data.zarr" / a / "c").rglob("*")]
        assert step.tokens == step.n_token == n_token
        assert step.nbytes == sum(path.stat().st_size for path in objects if path.is_file())
        assert step.left == 0
        assert step.failed == {}
        assert step.seconds > 0
    assert len(done(tmp_path / "run")) == -(-n_token // 64)
    assert len(done(tmp_path / "run", "tokens")) == -(-n_token // 128)
    values = tree["activations/hook_resid_post"]["value"]
    assert np.isfinite(values).all()


def test_without_a_capture_only_tokens_are_made(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    outcome = forebay.run(make_recipe(capture=None), tmp_path / "run")
    assert [step.name for step in outcome.steps] == ["tokens"]
    assert set(forebay.open_run(tmp_path / "run").children) == {"tokens", "sequences", "documents"}


def test_by_default_a_run_lies_in_runs_under_the_recipes_name(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("novels", capture=None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert forebay.run(recipe).folder.resolve() == tmp_path / "elsewhere" / "runs" / "novels"
    assert done(tmp_path / "elsewhere" / "runs" / "novels", "tokens")


def test_a_run_explains_itself_without_the_recipe_the_corpus_and_the_model(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe()
    forebay.run(recipe, tmp_path / "run")
    said = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert said["recipe"] == json.loads(json.dumps(forebay.plan(recipe, tmp_path / "run").recipe.to_json()))
    assert said["fingerprints"] == {
        name: Store.open(tmp_path / "run" / name).fingerprint for name in ("tokens", "activations")
    }
    assert said["device"] == "cpu"
    assert {"forebay", "torch", "zarr"} <= set(said["versions"])
    tree = forebay.open_run(tmp_path / "run")
    tokenizer = Tokenizer.from_file(str(tmp_path / "run" / "tokenizer.json"))
    first = tree["tokens/token_id"].sel(document=2).values.tolist()
    corpus = [json.loads(line)["text"] for line in (tmp_path / "recipe.jsonl").read_text().splitlines()]
    assert tokenizer.decode(first) == corpus[2]


# ── again ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_run_touches_nothing_and_loads_no_model(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(**SMALL)
    forebay.run(recipe, tmp_path / "run")
    before = stamps(tmp_path / "run", "tokens", "activations")

    def loading(*args: Any) -> None:
        raise AssertionError("something was loaded")

    for stage in (Tokenize, Capture):
        monkeypatch.setattr(stage, "load", loading)
    started = time.perf_counter()
    outcome = forebay.run(recipe, tmp_path / "run")
    assert time.perf_counter() - started < 2
    assert outcome.code == COMPLETE
    assert [(step.tokens, step.nbytes, step.left) for step in outcome.steps] == [(0, 0, 0), (0, 0, 0)]
    assert stamps(tmp_path / "run", "tokens", "activations") == before


def test_only_what_is_missing_is_computed_and_to_the_same_bytes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, folder = make_recipe(**SMALL), tmp_path / "run"
    forebay.run(recipe, folder)
    whole, before = data(folder), stamps(folder, "tokens", "activations")
    store = Store.open(folder / "activations")
    gone = {1, 4}
    for unit in gone:
        for key in store.ledger.record(unit)["objects"]:
            (store.path / key).unlink()
        store.ledger.drop(unit)
    outcome = forebay.run(recipe, folder)
    assert outcome.steps[1].tokens == 2 * 64
    assert data(folder) == whole
    after = stamps(folder, "tokens", "activations")
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {f"activations/done/{unit:06d}.json" for unit in gone} | {
        f"activations/data.zarr/hook_resid_post/value/c/{layer}/{unit}/0" for layer in range(3) for unit in gone
    }


def test_two_runs_of_one_recipe_have_the_same_bytes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(**SMALL)
    for name in ("one", "two"):
        forebay.run(recipe, tmp_path / name)
    assert data(tmp_path / "one") == data(tmp_path / "two")


@pytest.mark.parametrize("step", ["tokens", "activations"])
def test_run_unit_computes_a_dropped_unit_to_the_same_bytes(make_recipe: MakeRecipe, tmp_path: Path, step: str) -> None:
    folder = tmp_path / "run"
    forebay.run(make_recipe(**SMALL), folder)
    whole, store = data(folder), Store.open(folder / step)
    for unit in (2, len(store.schema.grid) - 1):
        recorded = store.ledger.record(unit)
        for key in recorded["objects"]:
            (store.path / key).write_bytes(b"torn")
        store.ledger.drop(unit)
        record = run_unit(folder, step, unit, "cpu")
        assert data(folder) == whole
        assert record == store.ledger.record(unit)
        for same in ("unit", "fingerprint", "rows", "objects", "bytes", "statistics"):
            assert record[same] == recorded[same]


def test_run_unit_of_no_run_or_no_unit_says_so(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match=r"is no run: it has no recipe.json"):
        run_unit(tmp_path / "nothing", "activations", 0, "cpu")
    forebay.run(make_recipe(), tmp_path / "run")
    n_unit = len(Store.open(tmp_path / "run" / "activations").schema.grid)
    with pytest.raises(IndexError, match=f"unit {n_unit} does not exist: there are {n_unit} units"):
        run_unit(tmp_path / "run", "activations", n_unit, "cpu")


# ── another recipe ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "value", "was"),
    [
        ("hooks", ["blocks.*.hook_resid_pre"], ["blocks.*.hook_resid_post"]),
        ("batch", 4, 8),
        ("dtype", "bfloat16", "float32"),
        ("store_dtype", "float16", "float32"),
        ("unit_tokens", 128, 64),
        ("compression", "zstd", "none"),
    ],
    ids=lambda value: str(value).strip("[']"),
)
def test_another_capture_is_refused_with_both_fingerprints_and_the_setting_named(
    make_recipe: MakeRecipe, tmp_path: Path, key: str, value: Any, was: Any
) -> None:
    folder = tmp_path / "run"
    forebay.run(make_recipe(), folder)
    before, ours = stamps(folder, "tokens", "activations"), Store.open(folder / "activations").fingerprint
    changed = make_recipe(capture={key: value})
    theirs = forebay.plan(changed, tmp_path / "other").step("activations").fingerprint
    with pytest.raises(FingerprintMismatch) as refused:
        forebay.run(changed, folder)
    message = str(refused.value)
    assert f"{folder / 'activations'} was made by another recipe" in message
    assert ours[:12] in message
    assert theirs[:12] in message
    assert f"parameters.{key}: {value!r} here, {was!r} in the store" in message
    assert message.count("parameters.") == 1
    assert stamps(folder, "tokens", "activations") == before
    assert json.loads((folder / "recipe.json").read_text())["fingerprints"]["activations"] == ours


def test_another_number_of_threads_is_refused_for_it_can_change_a_bit(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    forebay.run(make_recipe(capture={"threads": 1}), folder)
    with pytest.raises(FingerprintMismatch, match=r"numerics\.threads: 2 here, 1 in the store"):
        forebay.run(make_recipe(capture={"threads": 2}), folder)


def test_another_capture_may_use_the_same_tokens_once_the_activations_are_deleted(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    forebay.run(make_recipe(), folder)
    before = stamps(folder, "tokens")
    shutil.rmtree(folder / "activations")
    outcome = forebay.run(make_recipe(capture={"batch": 4}), folder)
    assert (outcome.steps[0].tokens, outcome.steps[1].left) == (0, 0)
    assert stamps(folder, "tokens") == before
    assert_whole(folder)


def test_another_tokenization_is_refused_before_anything_is_written(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    forebay.run(make_recipe(), folder)
    before = stamps(folder, "tokens", "activations")
    with pytest.raises(FingerprintMismatch, match=r"parameters.context: 32 here, 16 in the store"):
        forebay.run(make_recipe(tokenize={"context": 32}), folder)
    assert stamps(folder, "tokens", "activations") == before


@pytest.mark.parametrize("change", ["another letter", "one document more", "one document less"])
def test_another_corpus_is_refused_and_the_old_one_is_still_there_to_go_on(
    make_recipe: MakeRecipe, tmp_path: Path, texts: list[str], change: str
) -> None:
    folder = tmp_path / "run"
    recipe = make_recipe()
    forebay.run(recipe, folder)
    before = stamps(folder, "tokens", "activations")
    changed = {
        "another letter": [*texts[:3], texts[3].replace("e", "i", 1), *texts[4:]],
        "one document more": [*texts, "More."],
        "one document less": texts[:-1],
    }[change]
    make_recipe(texts=changed)
    with pytest.raises(FingerprintMismatch, match="tokens was made by another recipe"):
        forebay.run(recipe, folder)
    make_recipe()
    assert forebay.run(recipe, folder).code == COMPLETE
    assert stamps(folder, "tokens", "activations") == before


def test_a_file_taken_out_of_the_corpus_between_plan_and_run_leaves_no_trace(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """What was counted for another corpus stands in the same folder, and must not come back as documents."""
    recipe = make_recipe(capture=None)
    more = make_recipe("more", texts=["More of it."] * 3, capture=None)
    one, both = recipe.read_text(), recipe.read_text().replace('["recipe.jsonl"]', '["recipe.jsonl", "more.jsonl"]')
    assert both != one
    recipe.write_text(both)
    assert forebay.plan(recipe, tmp_path / "run").steps[0].schema.n_token > 0
    recipe.write_text(one)
    more.with_suffix(".jsonl").unlink()
    forebay.run(recipe, tmp_path / "run")
    forebay.run(recipe, tmp_path / "fresh")
    assert data(tmp_path / "run") == data(tmp_path / "fresh")


def test_other_weights_are_refused_and_named(
    make_recipe: MakeRecipe, altered_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, model = tmp_path / "run", altered_model(lambda weights: None)
    recipe = make_recipe(model=model)
    forebay.run(recipe, folder)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    before = stamps(folder, "tokens", "activations")
    with pytest.raises(FingerprintMismatch, match=r"activations was made by another recipe[\s\S]*model.safetensors"):
        forebay.run(recipe, folder)
    assert stamps(folder, "tokens", "activations") == before


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_unit_that_fails_is_recorded_and_the_others_are_done(poisoned: Callable[..., Path], tmp_path: Path) -> None:
    recipe, folder = poisoned(batch=2), tmp_path / "run"
    outcome = forebay.run(recipe, folder)
    store = Store.open(folder / "activations")
    token_id = forebay.open_run(folder, partial=True)["tokens/token_id"].values
    tilde = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("~")
    (unit,) = {int(token) // 64 for token in np.flatnonzero(token_id == tilde)}
    assert 0 < unit < len(store.schema.grid) - 1
    assert outcome.code == FAILED
    assert set(outcome.steps[1].failed) == {unit}
    assert done(folder) == {u.index for u in store.schema.grid} - {unit}
    assert store.verify() == {}
    said = json.loads(outcome.steps[1].failed[unit].read_text())
    assert "does not fit float16" in said["error"]
    assert "Traceback (most recent call last)" in said["traceback"]
    assert "capture.py" in said["traceback"]
    assert {"host", "pid", "versions"} <= set(said)

    with pytest.raises(IncompleteStore, match="incomplete: "):
        forebay.open_run(folder)
    before = stamps(folder, "activations")
    again = forebay.run(recipe, folder)
    assert again.code == FAILED
    assert again.steps[1].failed[unit].name == f"{unit:06d}.2.json"
    assert stamps(folder, "activations") == before


def test_the_first_and_the_last_unit_may_fail_as_well(poisoned: Callable[..., Path], tmp_path: Path) -> None:
    outcome = forebay.run(poisoned(["~ first", *["quiet words in between"] * 20, "last ~"]), tmp_path / "run")
    n_unit = len(Store.open(tmp_path / "run" / "activations").schema.grid)
    assert n_unit > 2
    assert set(outcome.steps[1].failed) == {0, n_unit - 1}
    assert done(tmp_path / "run") == set(range(1, n_unit - 1))


def test_a_failure_to_write_is_the_units_own(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when one object's folder cannot be written to; a full disk, on the other hand, ends the run."""
    recipe, folder = make_recipe(), tmp_path / "run"
    write, broken = Store.write_rows, {2: OSError(5, "Input/output error")}

    def sometimes(self: Store, path: str, rows: Any, values: Any) -> dict[str, dict[str, Any]]:
        if self.name == "activations" and rows["token"].start // 64 in broken:
            raise broken[rows["token"].start // 64]
        return write(self, path, rows, values)

    monkeypatch.setattr(Store, "write_rows", sometimes)
    outcome = forebay.run(recipe, folder)
    assert outcome.code == FAILED
    assert set(outcome.steps[1].failed) == {2}
    assert done(folder) == {u.index for u in Store.open(folder / "activations").schema.grid} - {2}
    broken = {5: OSError(28, "No space left on device")}
    for unit in (5, 6):
        Store.open(folder / "activations").ledger.drop(unit)
    with pytest.raises(DiskFull, match="no space for unit 5 of"):
        forebay.run(recipe, folder)
    assert 2 in done(folder)
    assert 6 not in done(folder)
    broken = {}
    assert forebay.run(recipe, folder).code == COMPLETE
    assert_whole(folder)


# ── stopping ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def wait_for_units(process: subprocess.Popen[str], folder: Path, n: int) -> None:
    until = time.monotonic() + 60
    while len(done(folder)) < n and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def test_signals_stop_a_run_cleanly_and_the_next_one_goes_on(
    make_recipe: MakeRecipe, start_forebay: Start, texts: list[str], tmp_path: Path
) -> None:
    recipe, folder = make_recipe(texts=texts * 2, capture={"unit_tokens": 32}), tmp_path / "run"
    recorded: set[int] = set()
    before: dict[str, tuple[int, int]] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start_forebay("run", recipe, "--to", folder, "--device", "cpu")
        wait_for_units(process, folder, len(recorded) + 3)
        process.send_signal(number)
        started = time.monotonic()
        output, errors = process.communicate(timeout=60)
        assert time.monotonic() - started < 10
        assert process.returncode == INTERRUPTED
        assert "Traceback" not in errors
        assert "Stopped before the end. What is recorded is safe; run the same command again" in output
        store = Store.open(folder / "activations")
        assert len(recorded) + 3 <= len(done(folder)) < len(store.schema.grid)
        assert store.verify() == {}
        recorded, after = done(folder), stamps(folder, "tokens", "activations")
        assert {name: after[name] for name in before} == before
        before = {name: stamp for name, stamp in after.items() if not name.endswith(".partial")}
    outcome = forebay.run(recipe, folder)
    assert outcome.code == COMPLETE
    assert outcome.steps[1].tokens == outcome.steps[1].n_token - 32 * len(recorded)
    after = stamps(folder, "tokens", "activations")
    assert {name: after[name] for name in before} == before
    forebay.run(recipe, tmp_path / "uninterrupted")
    assert data(folder) == data(tmp_path / "uninterrupted")


def test_stopping_before_the_first_unit_does_not_claim_that_it_was_done(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    class StopAtOnce(Quiet):
        def start(self, step: str, n_token: int, done: int) -> None:
            signal.raise_signal(signal.SIGTERM)

    outcome = forebay.run(make_recipe(), tmp_path / "run", progress=StopAtOnce())
    assert outcome.code == INTERRUPTED
    assert [step.tokens for step in outcome.steps] == [0]
    text = outcome_text(outcome)
    assert "was done before" not in text
    assert "tokens: stopped before the first unit was recorded" in text


def test_a_second_signal_stops_at_once_and_the_handlers_are_given_back() -> None:
    former = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signals() as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == former


@pytest.mark.slow
def test_two_signals_at_once_end_the_process_with_the_same_code(
    make_recipe: MakeRecipe, start_forebay: Start, texts: list[str], tmp_path: Path
) -> None:
    """1 would say that units have failed."""
    recipe, folder = make_recipe(texts=texts * 2, capture={"unit_tokens": 32}), tmp_path / "run"
    process = start_forebay("run", recipe, "--to", folder, "--device", "cpu")
    wait_for_units(process, folder, 2)
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, output + errors
    assert "Traceback" not in errors
    assert "What is recorded is safe; run the same command again" in output + errors
    assert Store.open(folder / "activations").verify() == {}


def test_outside_the_main_thread_a_run_leaves_signals_alone(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    found: list[Any] = []
    recipe = make_recipe(capture=None)
    thread = threading.Thread(target=lambda: found.append(forebay.run(recipe, tmp_path / "run")))
    former = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert found[0].code == COMPLETE
    assert signal.getsignal(signal.SIGTERM) is former


# ── at once ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_runs_at_once_both_end_well_and_never_take_a_recorded_object_away(
    make_recipe: MakeRecipe, fork_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Both write the same units at nearly the same moments, over and over; meanwhile every object that a record names
    is there and whole.
    """
    recipe = make_recipe(**SMALL)
    forebay.run(recipe, tmp_path / "alone")
    for attempt in range(2):
        folder = tmp_path / f"run-{attempt}"
        both = [fork_run(recipe, folder) for _ in range(2)]
        while any(process.is_alive() for process in both):
            for step in ("tokens", "activations"):
                if (folder / step / "data.zarr").exists():
                    assert Store.open(folder / step).verify() == {}
        assert [process.exitcode for process in both] == [0, 0]
        assert not list(folder.glob("*/failed/*"))
        assert_whole(folder)
        assert data(folder) == data(tmp_path / "alone")


def test_a_run_clears_away_what_killed_ones_left_and_nothing_that_another_is_writing(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe, folder = make_recipe(), tmp_path / "run"
    forebay.run(recipe, folder)
    store = Store.open(folder / "activations")
    store.ledger.drop(1)
    shards = store.path / "hook_resid_post" / "value" / "c" / "0" / "1"
    old, new = (shards / f"0.{name}.partial" for name in ("aaaa", "bbbb"))
    aside = folder / "activations" / ".data.zarr.cccc"
    aside.mkdir()
    for path in (old, new):
        path.write_bytes(b"half a shard")
    for path, seconds in ((old, -60), (aside, -60), (new, 3600)):
        os.utime(path, times=(time.time() + seconds,) * 2)
    forebay.run(recipe, folder)
    assert [old.exists(), aside.exists(), new.exists()] == [False, False, True]


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_at_most_two_units_are_held_in_memory(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While writing is slower than computing, so that buffers would pile up if nothing held them back."""
    recipe = make_recipe(capture={"batch": 2})
    live: weakref.WeakSet[UnitWriter] = weakref.WeakSet()
    seen: list[int] = []
    put, finish = UnitWriter.put, UnitWriter.finish

    def counting_put(self: UnitWriter, piece: Any) -> None:
        live.add(self)
        put(self, piece)
        seen.append(len(live))

    def slow_finish(self: UnitWriter, timing: Any) -> Any:
        time.sleep(0.1)
        return finish(self, timing)

    monkeypatch.setattr(UnitWriter, "put", counting_put)
    monkeypatch.setattr(UnitWriter, "finish", slow_finish)
    gc.disable()
    try:
        assert forebay.run(recipe, tmp_path / "run").code == COMPLETE
    finally:
        gc.enable()
    assert max(seen) == 2
