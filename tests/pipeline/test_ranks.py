"""Ranks that share nothing but a folder end with the bytes of one process, whoever dies, and however many there are."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import forebay
from forebay.pipeline import claims
from forebay.pipeline.claims import claimed
from forebay.pipeline.executors.ranks import Ranks, rank_of
from forebay.stores.errors import RecipeError
from forebay.stores.ledger import Ledger
from forebay.stores.store import Store

from ..stored import values

MakeRecipe = Callable[..., Path]
Fork = Callable[..., Any]

HOOK = "blocks.1.hook_resid_post"
FEATURES: dict[str, Any] = {
    "tokenize": {"unit_tokens": 64},
    "capture": {"hooks": [HOOK], "unit_tokens": 32, "threads": 1},
    "train": {"sae": {"hook": HOOK, "n_feature": 36, "k": 5, "batch": 32, "n_batch": 12, "checkpoint_every": 4}},
    "encode": {"sae": {"threads": 1}},
}


def recorded(folder: Path, *steps: str) -> int:
    return sum(len(Ledger(folder / step).done()) for step in steps or ("tokens", "activations"))


def start(fork: Fork, recipe: Path, folder: Path, world: int) -> list[Any]:
    options = ("--to", folder, "--device", "cpu")
    return [fork("run", recipe, *options, "--rank", rank, "--world", world) for rank in range(world)]


def codes(ranks: list[Any], seconds: float = 300) -> list[int | None]:
    """Exit codes, when all have ended."""
    until = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0.0, until - time.monotonic()))
    found = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return found


@pytest.fixture
def recipe(make_recipe: MakeRecipe, texts: list[str]) -> Path:
    """Some forty small units, whose sequences straddle their edges."""
    return make_recipe(
        texts=texts * 2,
        tokenize={"context": 60, "layout": "documents", "long_documents": "split", "unit_tokens": 100},
        capture={"store_dtype": "bfloat16", "unit_tokens": 40, "batch": 2, "threads": 1},
    )


def test_four_ranks_started_at_one_instant_train_encode_and_index_to_the_bytes_of_one_process(
    make_recipe: MakeRecipe, fork_forebay: Fork, tmp_path: Path
) -> None:
    recipe, folder = make_recipe(**FEATURES), tmp_path / "ranks"
    assert codes(start(fork_forebay, recipe, folder, 4)) == [0, 0, 0, 0]
    assert forebay.run(recipe, tmp_path / "alone", device="cpu").code == 0
    assert values(folder) == values(tmp_path / "alone")
    assert any("index/" in name for name in values(folder))
    weights = Path("dictionaries") / "sae" / "sae_weights.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "alone" / weights).read_bytes()
    assert not list(folder.glob("*/failed/*"))
    assert not list(folder.rglob("claims/*"))


@pytest.mark.slow
def test_any_number_of_ranks_goes_on_with_what_those_before_have_left(
    recipe: Path, fork_forebay: Fork, tmp_path: Path
) -> None:
    folder, chance = tmp_path / "ranks", random.Random(3)
    for world in (3, 5, 2):
        before = recorded(folder)
        ranks = start(fork_forebay, recipe, folder, world)
        until = time.monotonic() + 200
        while recorded(folder) < before + 6 and time.monotonic() < until:
            time.sleep(0.005)
        for rank in chance.sample(ranks, world):
            os.kill(rank.pid, chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1]))
        assert set(codes(ranks)) <= {-signal.SIGKILL, 75, 0}
        for step in ("tokens", "activations"):
            if (folder / step / "data.zarr").exists():
                assert Store.open(folder / step).verify() == {}
    n_unit = sum(len(Store.open(folder / step).schema.grid) for step in ("tokens", "activations"))
    assert recorded(folder) < n_unit
    assert codes(start(fork_forebay, recipe, folder, 4)) == [0, 0, 0, 0]
    forebay.run(recipe, tmp_path / "alone", device="cpu")
    assert values(folder) == values(tmp_path / "alone")


def test_the_units_of_ranks_that_never_start_are_computed_by_the_one_that_does(recipe: Path, tmp_path: Path) -> None:
    outcome = forebay.run(recipe, tmp_path / "ranks", device="cpu", executor=Ranks(2, 7))
    assert outcome.code == 0
    assert [step.left for step in outcome.steps] == [0, 0]
    forebay.run(recipe, tmp_path / "alone", device="cpu")
    assert values(tmp_path / "ranks") == values(tmp_path / "alone")


def test_a_rank_that_hangs_holds_nobody_up(recipe: Path, fork_forebay: Fork, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    ranks = start(fork_forebay, recipe, folder, 2)
    until = time.monotonic() + 200
    while recorded(folder, "activations") < 2 and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(ranks[0].pid, signal.SIGSTOP)
    ranks[1].join(300)
    assert ranks[1].exitcode == 0
    assert all(Store.open(folder / step).complete for step in ("tokens", "activations"))
    before = values(folder)
    os.kill(ranks[0].pid, signal.SIGCONT)
    assert codes(ranks) == [0, 0]
    assert values(folder) == before


def test_own_units_come_first_and_those_of_others_from_the_other_end(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    complete = Ledger.complete

    def noting(self: Ledger, index: int, record: Any) -> None:
        if self.folder.name == "activations":
            computed.append(index)
        complete(self, index, record)

    monkeypatch.setattr(Ledger, "complete", noting)
    forebay.run(recipe, tmp_path / "run", device="cpu", executor=Ranks(1, 3))
    n_unit = len(computed)
    own = list(range(1, n_unit, 3))
    others = [index for index in reversed(range(n_unit)) if index % 3 != 1]
    start = len(others) // 3
    assert computed == own + others[start:] + others[:start]


def test_a_unit_that_fails_is_told_by_every_rank_and_tried_by_two(
    poisoned: Callable[..., Path], fork_forebay: Fork, tmp_path: Path
) -> None:
    recipe, folder = poisoned(batch=2, threads=1), tmp_path / "ranks"
    for attempt in (1, 2):
        ranks = start(fork_forebay, recipe, folder, 3)
        assert codes(ranks) == [1, 1, 1]
        failed = sorted(path.name for path in (folder / "activations" / "failed").iterdir())
        units = {name.split(".")[0] for name in failed}
        assert len(units) == 1
        # Ranks that look at the same moment may each take it for their turn.
        assert 2 * attempt <= len(failed) <= 3 * attempt
    said = json.loads((folder / "activations" / "failed" / failed[0]).read_text())
    assert "does not fit float16" in said["error"]
    n_unit = len(Store.open(folder / "activations").schema.grid)
    assert Ledger(folder / "activations").done() == set(range(n_unit)) - {int(unit) for unit in units}


# ── which rank of how many ───────────────────────────────────────────────────────────────────────────────────────────

SRUN = {"SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "world", "expected"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, None, Ranks(3, 8, 1)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "16"}, None, Ranks(5, 16)),
        (
            {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"},
            None,
            Ranks(0, 4),
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "20",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_STEP": "10",
            },
            None,
            Ranks(2, 4),
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "2",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "8",
                "SLURM_LOCALID": "1",
                **SRUN,
            },
            None,
            Ranks(17, 32, 1),
        ),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_NTASKS": "8"}, None, Ranks(2, 4)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", **SRUN}, None, Ranks(5, 8, 1)),
        ({"JOB_COMPLETION_INDEX": "3"}, 6, Ranks(3, 6)),
        ({"PBS_ARRAY_INDEX": "6"}, 6, Ranks(0, 6)),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_the_rank_is_taken_from_the_launcher(environment: dict[str, str], world: int | None, expected: Ranks) -> None:
    assert rank_of("auto", world, environment) == expected


def test_a_list_of_array_tasks_with_holes_gives_ranks_that_are_there() -> None:
    base = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    for task in ("1", "5", "17"):
        assert rank_of("auto", None, {**base, "SLURM_ARRAY_TASK_ID": task}).world == 3


@pytest.mark.parametrize(
    ("rank", "world", "environment", "message"),
    [
        ("auto", None, {}, "finds no launcher's variables"),
        ("auto", None, {"PBS_ARRAY_INDEX": "6"}, "no variable says of how many: give --world"),
        ("auto", None, {"RANK": "one", "WORLD_SIZE": "2"}, "RANK = 'one' is no number"),
        ("1", None, {}, "--rank 1 needs --world"),
        ("4", 4, {}, "ranks are numbered from 0 to 3"),
        ("0", 0, {}, "a world of 0 ranks computes nothing"),
        ("-1", 4, {}, "--rank = '-1' is no number"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(
    rank: str, world: int | None, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        rank_of(rank, world, environment)


# ── claims ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_process_at_a_time_holds_a_claim_and_one_that_is_not_renewed_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.pipeline.claims.EXPIRE", 0.4)
    path, stop, said = tmp_path / "claims" / "work.json", Event(), list[str]()
    with claimed(path, stop, said.append) as first:
        assert first is not None
        assert not first.is_set()
        mark = path.read_bytes()
    assert not path.exists()
    path.write_bytes(mark)  # as an owner leaves it that was killed
    with claimed(path, stop, said.append) as second:
        assert second is not None
        assert path.read_bytes() != mark
    assert len(said) == 1
    assert f"process {os.getpid()} of" in said[0]


def test_the_claim_of_a_process_that_was_killed_on_this_machine_is_taken_at_once(tmp_path: Path) -> None:
    path, stop = tmp_path / "work.json", Event()
    code = (
        "import os, pathlib, threading\nfrom forebay.pipeline.claims import claimed\n"
        f"with claimed(pathlib.Path({str(path)!r}), threading.Event(), print):\n    os.kill(os.getpid(), 9)"
    )
    killed = subprocess.Popen([sys.executable, "-c", code])
    assert killed.wait() == -signal.SIGKILL
    assert json.loads(path.read_bytes())["pid"] == killed.pid
    started = time.monotonic()
    with claimed(path, stop, print) as asked:
        assert asked is not None
    assert time.monotonic() - started < claims.EXPIRE - 5


def test_who_loses_a_claim_hears_of_it_and_leaves_it_to_its_new_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.pipeline.claims.RENEW", 0.05)
    path = tmp_path / "work.json"
    with claimed(path, Event(), print) as asked:
        assert asked is not None
        path.write_text('{"mark": "another", "renewals": 0, "pid": 1, "host": "h"}')
        until = time.monotonic() + 10
        while not asked.is_set() and time.monotonic() < until:
            time.sleep(0.01)
        assert asked.is_set()
    assert "another" in path.read_text()


def test_who_does_not_wait_leaves_a_claim_that_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay.pipeline.claims.RENEW", 0.05)
    path = tmp_path / "work.json"
    with claimed(path, Event(), print) as first, claimed(path, Event(), print, wait=False) as second:
        assert first is not None
        assert second is None
