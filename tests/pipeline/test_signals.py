"""Every signal that asks a process to end is taken as: stop soon, keep what is recorded, and say that there is more."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forebay
from forebay.pipeline.exit_codes import INTERRUPTED
from forebay.pipeline.progress import Quiet
from forebay.pipeline.stopping import stop_on_signals
from forebay.stores.ledger import Ledger
from forebay.stores.store import Store

MakeRecipe = Callable[..., Path]
Fork = Callable[..., Any]

HOOK = "blocks.1.hook_resid_post"
ON_A_TERMINAL = pytest.mark.skipif(
    signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, reason="the tests themselves run under nohup"
)
HANGUP = pytest.param("SIGHUP", marks=ON_A_TERMINAL)
AND_LATER = [
    "SIGUSR1",
    pytest.param("SIGUSR2", marks=pytest.mark.slow),
    pytest.param("SIGHUP", marks=[pytest.mark.slow, ON_A_TERMINAL]),
]
LONG = {
    "hook": HOOK,
    "n_feature": 36,
    "k": 5,
    "batch": 32,
    "n_batch": 10**6,
    "log_every": 10,
    "checkpoint_every": 10**5,
}


def wait_until(happened: Callable[[], bool], process: Any) -> None:
    until = time.monotonic() + 200
    while not happened() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.005)
    assert happened()
    assert process.is_alive()


@pytest.mark.parametrize("name", AND_LATER)
def test_a_run_stops_at_the_next_batch_and_goes_on_later(
    make_recipe: MakeRecipe, fork_forebay: Fork, texts: list[str], tmp_path: Path, name: str
) -> None:
    """SIGINT and SIGTERM are in test_run.py."""
    recipe, folder = make_recipe(texts=texts * 4, capture={"unit_tokens": 16, "batch": 1}), tmp_path / "run"
    process = fork_forebay("run", recipe, "--to", folder, "--device", "cpu")
    ledger = Ledger(folder / "activations")
    wait_until(lambda: len(ledger.done()) > 2, process)
    os.kill(process.pid, getattr(signal, name))
    process.join(200)
    assert process.exitcode == INTERRUPTED
    store = Store.open(folder / "activations")
    assert 2 < len(ledger.done()) < len(store.schema.grid)
    assert store.verify() == {}
    assert not list(folder.glob("*/failed/*"))
    recorded = len(ledger.done())
    outcome = forebay.run(recipe, folder, device="cpu")
    assert outcome.code == 0
    assert outcome.steps[1].tokens == sum(len(unit) for unit in store.schema.grid) - 16 * recorded


def test_training_stops_with_a_checkpoint(make_recipe: MakeRecipe, fork_forebay: Fork, tmp_path: Path) -> None:
    recipe, folder = make_recipe(capture={"hooks": [HOOK]}, train={"sae": LONG}), tmp_path / "run"
    process = fork_forebay("run", recipe, "--to", folder, "--device", "cpu")
    metrics = folder / "dictionaries" / "sae" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, process)
    os.kill(process.pid, signal.SIGUSR2)
    process.join(200)
    assert process.exitcode == INTERRUPTED
    assert (folder / "dictionaries" / "sae" / "checkpoint.safetensors").exists()
    assert not (folder / "dictionaries" / "sae" / "cfg.json").exists()
    assert not list(folder.rglob("claims/*"))  # the next run need not wait for it to expire


def test_counting_the_corpus_stops_and_nothing_else_begins(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    class StopWhileCounting(Quiet):
        def counted(self, documents: int, characters: int) -> None:
            signal.raise_signal(signal.SIGUSR1)

    outcome = forebay.run(make_recipe(), tmp_path / "run", device="cpu", progress=StopWhileCounting())
    assert (outcome.code, outcome.steps) == (INTERRUPTED, ())
    assert not (tmp_path / "run" / "tokens" / "data.zarr").exists()
    assert Ledger(tmp_path / "run" / "tokens" / "counts").done() == {0}
    assert forebay.run(make_recipe(), tmp_path / "run", device="cpu").code == 0


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", HANGUP, "SIGUSR1", "SIGUSR2"])
def test_each_signal_asks_once_and_has_its_former_handler_afterwards(name: str) -> None:
    number = getattr(signal, name)
    former = signal.getsignal(number)
    with stop_on_signals() as stop:
        signal.raise_signal(number)
        assert stop.is_set()
    assert signal.getsignal(number) is former


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)
