"""A measured minute: the bytes of what a run records, memory that bounds what was held, and a profile that travels."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest

from forebay.pipeline import measuring
from forebay.pipeline.measuring import ASIDE, measure, prefix
from forebay.pipeline.plan import Plan, plan
from forebay.pipeline.profile import parse_profile, profile_of_run, save_profile
from forebay.pipeline.report.memory import PROCESS, memory_of
from forebay.pipeline.run import run
from forebay.pipeline.stopping import Stopped
from forebay.stores.errors import SchemaError, StoreNotFound
from forebay.stores.ledger import Ledger

MakeRecipe = Callable[..., Path]
JUMPRELU = {"hook": "blocks.1.hook_resid_post", "n_feature": 40, "activation": "jumprelu", "k": 4, "batch": 64}


def planned(recipe: Path, folder: Path) -> Plan:
    return plan(recipe, folder, device="cpu")


def first_record(folder: Path, step: str) -> dict[str, Any]:
    return Ledger(folder / step).record(0)


@pytest.mark.parametrize(
    ("tokenize", "compression"),
    [({}, "none"), ({"context": 60, "layout": "documents", "long_documents": "split", "unit_tokens": 100}, "zstd")],
)
def test_what_is_measured_is_what_a_run_records_of_its_first_unit(
    make_recipe: MakeRecipe, tmp_path: Path, tokenize: dict[str, Any], compression: str
) -> None:
    """Bytes, compressed too, of every step; of features that vary in number as well."""
    hooks = ["blocks.{0,1}.hook_resid_post", "blocks.1.attn.hook_pattern"]
    capture = {"hooks": hooks, "store_dtype": "bfloat16", "compression": compression, "threads": 1}
    encode = {"sae": {"compression": compression, "threads": 1}}
    recipe = make_recipe(tokenize=tokenize, capture=capture, train={"sae": {**JUMPRELU, "n_batch": 4}}, encode=encode)
    assert run(recipe, tmp_path / "run", device="cpu").code == 0
    made = planned(recipe, tmp_path / "run")
    profile = measure(made, 0.0, Event())
    assert [step.name for step in profile.steps] == ["tokens", "activations", "features-sae"]
    for step, of in zip(profile.steps, made.steps, strict=True):
        assert (step.host_peak or 0) - (step.host_before or 0) <= memory_of(of, "cpu").host
    for step in profile.steps[1:]:
        record = first_record(tmp_path / "run", step.name)
        assert step.written[compression].nbytes == measuring.WRITES * record["bytes"], step.name
        assert step.read is not None
        assert step.read.nbytes == record["bytes"]
        assert set(step.written) == {"none", "zstd"}
    statistics = record["statistics"]["sae"]
    # A record leaves the first position of every sequence out; a profile counts every token.
    assert profile.steps[2].nonzeros["sae/value"] * (record["rows"]["token"][1]) >= statistics["l0_sum"][0] > 0


def test_a_measurement_that_is_stopped_leaves_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    made, stop = planned(make_recipe(), tmp_path / "run"), Event()
    before = sorted(tmp_path.rglob("*"))
    timer = Timer(1.0, stop.set)
    timer.start()
    with pytest.raises(Stopped):
        measure(made, 600.0, stop)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_killed_measurement_left_is_removed_a_day_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f"{ASIDE}killed" / "none"
    left.mkdir(parents=True)
    measuring.sweep(tmp_path)
    assert left.exists()
    monkeypatch.setattr(measuring, "FORGOTTEN", -1.0)
    measuring.sweep(tmp_path)
    assert not left.parent.exists()


HELD = """
import json, sys
from pathlib import Path
from threading import Event
from forebay.pipeline import measuring
from forebay.pipeline.plan import plan
from forebay.pipeline.report.memory import memory_of

# The unit once, whole, however long it takes; and no rounds to fill the time.
measuring._repeat = lambda apply, block, unit, seconds, stop: measuring.Computed((), unit, 0, 0.0)
made = plan(sys.argv[1], sys.argv[2], device="cpu")
measured = measuring.measure(made, 600.0, Event()).steps[1]
step = made.steps[1]
print(json.dumps([measured.host_before, measured.host_peak, step.unit_bytes, memory_of(step, "cpu").host]))
"""


@pytest.mark.slow
def test_predicted_memory_bounds_what_was_held(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """In a process of its own, with every hook point in float32 and one unit, so that buffers are the most of it."""
    texts = ["A paragraph of words, of which there are more. " * 50] * 4
    capture = {"hooks": ["*"], "unit_tokens": 2**15, "threads": 1}
    recipe = make_recipe(texts=texts, tokenize={"context": 64}, capture=capture)
    command = [sys.executable, "-c", HELD, recipe, tmp_path / "run"]
    before, peak, unit, predicted = json.loads(subprocess.check_output(command, text=True))
    assert unit > 30_000_000
    assert 2 * unit < peak - before <= predicted <= 4 * (peak - before)
    assert before < 2 * PROCESS


def test_a_unit_that_there_is_no_time_for_is_measured_in_part(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The deadline passes with the first batch of eight sequences of 16 tokens; what was computed is a store."""
    capture = {"unit_tokens": 512, "threads": 1}
    made = planned(make_recipe(capture=capture), tmp_path / "run")
    step = measure(made, 1e-9, Event()).steps[1]
    row = 3 * 28 * 4
    assert step.values == measuring.WRITES * 8 * 16 * row


def test_a_profile_of_a_run_sums_its_records_and_agrees_with_a_measurement(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Rates within two orders of magnitude, for machines are busy."""
    recipe, folder = make_recipe(capture={"threads": 1}), tmp_path / "run"
    assert run(recipe, folder, device="cpu").code == 0
    profile = profile_of_run(folder)
    profile.check(planned(recipe, folder), "it")
    for step in profile.steps:
        records = [Ledger(folder / step.name).record(unit) for unit in Ledger(folder / step.name).done()]
        assert step.tokens == sum(record["rows"]["token"][1] - record["rows"]["token"][0] for record in records)
        assert step.compute_seconds == pytest.approx(sum(record["seconds"]["compute"] for record in records))
        assert step.written["none"].nbytes == sum(record["bytes"] for record in records)
        assert step.written["none"].seconds == pytest.approx(sum(record["seconds"]["write"] for record in records))
    assert profile.hosts == (records[0]["host"],)
    assert profile.taken == pytest.approx(max(record["finished"] for record in records))
    measured = measure(planned(recipe, folder), 0.3, Event())
    for one, other in zip(profile.steps, measured.steps, strict=True):
        assert 0.01 < one.tokens_per_second / other.tokens_per_second < 100, one.name
        assert one.settings == other.settings


def test_a_run_without_records_gives_no_profile(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="no run with finished units"):
        profile_of_run(tmp_path)


def test_a_profile_is_json_and_all_that_is_left_behind(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    made = planned(make_recipe(), tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    profile = measure(made, 0.0, Event())
    assert sorted(tmp_path.rglob("*")) == before
    path = tmp_path / "profile.json"
    save_profile(profile, path)
    assert parse_profile(path.read_bytes(), "it") == profile
    value = json.loads(path.read_text())
    for wrong, said in (
        ({**value, "format": 2}, "format 2; this forebay reads 1"),
        ({**value, "origin": "guessed"}, "origin"),
        ({**value, "steps": [{**value["steps"][0], "tokens": 0}]}, "no tokens, or no time"),
        ({key: one for key, one in value.items() if key != "device"}, "device: Field required"),
    ):
        with pytest.raises(SchemaError, match=said):
            parse_profile(json.dumps(wrong).encode(), "it")


def test_the_first_tokens_of_a_store_are_a_store_of_the_same_shards(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    step = planned(make_recipe(), tmp_path / "run").steps[1]
    first = prefix(step.schema, 100)
    assert first.n_token == 100
    assert len(first.labels["sequences/start"][1]) == 7  # of 16 tokens each: the seventh begins at 96
    assert first.arrays["hook_resid_post/value"].shape == (3, 100, 28)
    whole = step.schema.arrays["hook_resid_post/value"]
    assert dataclasses.replace(first.arrays["hook_resid_post/value"], shape=whole.shape) == whole
