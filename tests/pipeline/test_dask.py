"""Workers of a Dask cluster take units to the bytes of one process, and no worker's end is the run's."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forebay
from forebay.pipeline.executors import DaskWorkers, clusters, executor_for, unit_tasks
from forebay.pipeline.progress import Quiet
from forebay.stores.errors import RecipeError, StoreNotFound
from forebay.stores.ledger import Ledger
from forebay.stores.store import Store

from ..stored import values

distributed = pytest.importorskip("distributed")

MakeRecipe = Callable[..., Path]

HOOK = "blocks.1.hook_resid_post"
TABLES: dict[str, Any] = {
    "tokenize": {"unit_tokens": 256},
    "capture": {"hooks": [HOOK], "unit_tokens": 64, "threads": 1},
    "train": {"sae": {"hook": HOOK, "n_feature": 36, "k": 5, "batch": 32, "n_batch": 12, "checkpoint_every": 4}},
    "encode": {"sae": {"threads": 1}},
}

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two worker processes, as `--dask local:2` starts them."""
    with clusters.quiet():
        made = clusters.connect("local:2")
        yield made
        clusters.close(made)


class Heard(Quiet):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.works: list[str] = []
        self.texts: list[str] = []

    def working(self, what: str, done: int, total: int, said: str) -> None:
        self.works.append(what)

    def said(self, text: str) -> None:
        self.texts.append(text)


def pids(client: Any) -> list[int]:
    return list(client.run(os.getpid).values())


def test_workers_capture_train_encode_and_index_to_the_bytes_of_one_process(
    client: Any, make_recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, folder, heard = make_recipe(**TABLES), tmp_path / "workers", Heard()
    outcome = forebay.run(recipe, folder, device="cpu", executor=DaskWorkers(client), progress=heard)
    assert outcome.code == 0
    assert [(step.left, step.tokens == step.n_token) for step in outcome.steps] == [(0, True)] * 3
    assert forebay.run(recipe, tmp_path / "alone", device="cpu").code == 0
    assert values(folder) == values(tmp_path / "alone")
    assert any("index/" in name for name in values(folder))
    assert {"train.sae", "index of sae"} <= set(heard.works)
    assert "dashboard at http://" in heard.texts[0]
    records = [Ledger(folder / "activations").record(unit) for unit in Ledger(folder / "activations").done()]
    assert {record["pid"] for record in records} <= set(pids(client))
    assert os.getpid() not in {record["pid"] for record in records}
    assert capfd.readouterr().err == ""
    again = forebay.run(recipe, folder, device="cpu", executor=DaskWorkers(client))
    assert [step.tokens for step in again.steps] == [0, 0, 0]


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_no_unit_with_it(
    client: Any, make_recipe: MakeRecipe, texts: list[str], tmp_path: Path
) -> None:
    recipe = make_recipe(texts=texts * 3, capture={"unit_tokens": 32, "threads": 1})
    folder, chosen = tmp_path / "workers", pids(client)[0]

    def kill() -> None:
        ledger, until = Ledger(folder / "activations"), time.monotonic() + 200
        while len(ledger.done()) < 3 and time.monotonic() < until:
            time.sleep(0.005)
        os.kill(chosen, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = forebay.run(recipe, folder, device="cpu", executor=DaskWorkers(client))
    killer.join()
    assert outcome.code == 0
    assert outcome.steps[1].failed == {}
    forebay.run(recipe, tmp_path / "alone", device="cpu")
    assert values(folder) == values(tmp_path / "alone")
    client.wait_for_workers(2, timeout=200)


def test_a_unit_that_fails_is_recorded_by_its_worker_and_the_others_are_done(
    client: Any, poisoned: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, folder = poisoned(threads=1), tmp_path / "run"
    outcome = forebay.run(recipe, folder, device="cpu", executor=DaskWorkers(client))
    assert outcome.code == 1
    ((unit, path),) = outcome.steps[1].failed.items()
    said = json.loads(path.read_text())
    assert "does not fit float16" in said["error"]
    assert "Traceback (most recent call last)" in said["traceback"]
    assert said["pid"] in pids(client)
    n_unit = len(Store.open(folder / "activations").schema.grid)
    assert Ledger(folder / "activations").done() == set(range(n_unit)) - {unit}


def test_a_result_that_never_comes_is_read_from_the_ledger_or_computed_again(
    client: Any, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """As when a worker dies between recording a unit, or before that, and handing over what came of it."""
    from forebay.pipeline.executors.dask_workers import unit_task
    from forebay.pipeline.plan import load_plan

    class Lost:
        def __reduce__(self) -> tuple[Any, ...]:
            return int, ("is no number, and cannot be read",)

    def loses(folder: str, step: str, index: int, device: str) -> Any:
        once = Path(folder) / f"once-{index}"
        if index % 2 and not once.exists():
            if index % 4 == 1:
                unit_task(folder, step, index, device)
            once.touch()
            return Lost()
        return unit_task(folder, step, index, device)

    folder = tmp_path / "run"
    forebay.run(make_recipe(**TABLES), folder, device="cpu")
    expected, store = values(folder), Store.open(folder / "activations")
    for unit in store.schema.grid:
        store.ledger.drop(unit.index)
    plan = load_plan(folder, "cpu")
    tasks = unit_tasks.UnitTasks(client, plan, plan.step("activations"), loses, Quiet(), threading.Event())
    outcome = tasks.run()
    assert (outcome.failed, outcome.left, outcome.tokens) == ({}, 0, outcome.n_token)
    assert len(list(folder.glob("once-*"))) >= 2
    assert values(folder) == expected


def test_a_worker_that_has_gone_is_not_started_anew(client: Any, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """As when one that hung dies between the look at who is at what and the word to its nanny."""
    from forebay.pipeline.executors.dask_workers import unit_task
    from forebay.pipeline.plan import load_plan

    forebay.run(make_recipe(capture={"threads": 1}), tmp_path / "run", device="cpu")
    plan, heard = load_plan(tmp_path / "run", "cpu"), Heard()
    step = plan.step("activations")
    tasks = unit_tasks.UnitTasks(client, plan, step, unit_task, heard, threading.Event())
    flight = unit_tasks.Flight(next(iter(tasks.store.schema.grid)), time.monotonic())
    tasks._again(flight, "a task", "tcp://127.0.0.1:9", hopeless=True, workers=[])
    assert heard.texts[-1] == "tcp://127.0.0.1:9 has gone by itself"


def test_what_travels_is_small(client: Any, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from forebay.pipeline.executors.dask_workers import unit_task

    folder = tmp_path / "run"
    forebay.run(make_recipe(**TABLES), folder, device="cpu")
    record = unit_task(str(folder), "activations", 0, "cpu")  # recorded: nothing is computed
    assert set(record) == {"unit", "bytes", "seconds"}
    assert len(pickle.dumps((str(folder), "activations", 0, "cpu"))) < 200
    assert len(pickle.dumps(record)) < 200


def test_a_folder_that_workers_do_not_see_ends_the_run(client: Any, tmp_path: Path) -> None:
    from forebay.pipeline.executors.dask_workers import unit_task

    task = client.submit(unit_task, str(tmp_path / "elsewhere"), "tokens", 0, "cpu", pure=False)
    with pytest.raises(StoreNotFound, match="is no run"):
        task.result()


# ── workers that hang, and runs that stop ────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_worker_that_hangs_does_not_hold_the_run_up(
    make_recipe: MakeRecipe, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit_tasks, "LEAST_SLOW", 5.0)
    recipe, folder, heard = make_recipe(texts=texts * 3, capture={"unit_tokens": 32, "threads": 1}), tmp_path, Heard()
    with clusters.quiet():
        client = clusters.connect("local:2")
        chosen = pids(client)[0]

        def hang() -> None:
            ledger, until = Ledger(folder / "run" / "activations"), time.monotonic() + 200
            while len(ledger.done()) < 3 and time.monotonic() < until:
                time.sleep(0.005)
            os.kill(chosen, signal.SIGSTOP)

        stopper = threading.Thread(target=hang)
        stopper.start()
        outcome = forebay.run(recipe, folder / "run", device="cpu", executor=DaskWorkers(client), progress=heard)
        stopper.join()
        clusters.close(client)
    assert outcome.code == 0
    assert any("another worker begins it too" in text for text in heard.texts)
    forebay.run(recipe, tmp_path / "alone", device="cpu")
    assert values(folder / "run") == values(tmp_path / "alone")


@pytest.mark.slow
def test_a_unit_that_ends_every_worker_is_recorded_as_failed_and_the_others_are_done(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    from forebay.pipeline.executors.dask_workers import unit_task
    from forebay.pipeline.plan import load_plan

    folder = tmp_path / "run"
    forebay.run(make_recipe(capture={"threads": 1}), folder, device="cpu")
    store = Store.open(folder / "activations")
    for unit in store.schema.grid:
        store.ledger.drop(unit.index)

    def deadly(folder: str, step: str, index: int, device: str) -> Any:
        if index == 2:
            os._exit(9)
        return unit_task(folder, step, index, device)

    with clusters.quiet():
        client = clusters.connect("local:2")
        plan = load_plan(folder, "cpu")
        step = plan.step("activations")
        outcome = unit_tasks.UnitTasks(client, plan, step, deadly, Quiet(), threading.Event()).run()
        clusters.close(client)
    assert set(outcome.failed) == {2}
    said = json.loads(outcome.failed[2].read_text())
    assert "KilledWorker" in said["error"]
    assert store.ledger.done() == {unit.index for unit in store.schema.grid} - {2}


def runs(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_whole_group_stops_the_run_and_the_next_goes_on(
    make_recipe: MakeRecipe, texts: list[str], tmp_path: Path, name: str
) -> None:
    """As a batch system, or Ctrl-C in a terminal, sends it: to the workers too."""
    import subprocess
    import sys

    recipe, folder = make_recipe(texts=texts * 8, capture={"unit_tokens": 16, "threads": 1}), tmp_path / "run"
    command = [sys.executable, "-m", "forebay", "run", recipe, "--to", folder, "--device", "cpu", "--dask", "local:2"]
    process = subprocess.Popen(
        [str(one) for one in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    ledger, until = Ledger(folder / "activations"), time.monotonic() + 300
    while len(ledger.done()) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(process.pid, getattr(signal, name))
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 75, output + errors
    assert "Traceback" not in errors
    assert "distributed" not in errors
    store = Store.open(folder / "activations")
    assert 3 <= len(ledger.done()) < len(store.schema.grid)
    assert store.verify() == {}
    assert not list(folder.glob("*/failed/*"))
    # Nothing of it runs on, though trackers of its semaphores may outlive it by a moment.
    until = time.monotonic() + 20
    while runs(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not runs(process.pid)
    assert forebay.run(recipe, folder, device="cpu").code == 0


# ── clusters by name ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("locale:2", r"--dask locale:2 is no cluster. Did you mean 'local'\?"),
        ("local:0", "--dask local:0 is no cluster"),
        ("slurm:many", "--dask slurm:many is no cluster"),
        ("missing.json", "there is no such scheduler file"),
        ("kubernetes:2", r"needs dask_kubernetes, which is not installed: pip install 'forebay\[kubernetes\]'"),
    ],
)
def test_what_is_no_cluster_is_refused(where: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        clusters.connect(where)


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(RecipeError, match="--dask and --rank are two ways"):
        executor_for(dask="local:2", rank=0, world=2)
    with pytest.raises(RecipeError, match="--world 4 needs --rank"):
        executor_for(world=4)


def test_jobs_of_slurm_are_those_that_daskes_configuration_describes() -> None:
    pytest.importorskip("dask_jobqueue")
    import dask

    described = {
        "cores": 1,
        "memory": "64GB",
        "queue": "gpu",
        "walltime": "02:00:00",
        "job-extra-directives": ["--gres=gpu:1", "--requeue"],
    }
    former = signal.getsignal(signal.SIGINT)
    with clusters.quiet(), dask.config.set({f"jobqueue.slurm.{key}": value for key, value in described.items()}):
        cluster = clusters.batch_cluster("slurm")
        try:
            script = cluster.job_script()
        finally:
            cluster.close()
    assert signal.getsignal(signal.SIGINT) is former
    lines = script.splitlines()
    for line in ("#SBATCH -p gpu", "#SBATCH -t 02:00:00", "#SBATCH --gres=gpu:1", "#SBATCH --requeue"):
        assert line in lines
    assert "--nthreads 1" in script
    assert script.count("distributed.cli.dask_worker") == 1


def test_a_batch_system_without_a_description_of_its_jobs_is_refused() -> None:
    pytest.importorskip("dask_jobqueue")
    with clusters.quiet(), pytest.raises(RecipeError, match=r"Say what a job is in the section jobqueue\.slurm"):
        clusters.batch_cluster("slurm")


# ── lazy analyses under a client ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_what_is_opened_lazily_is_computed_by_processes_as_by_threads(
    client: Any, make_recipe: MakeRecipe, tiny_model: Path, tmp_path: Path
) -> None:
    recipe, folder = make_recipe(**TABLES), tmp_path / "run"
    assert forebay.run(recipe, folder, device="cpu").code == 0
    run = forebay.open_run(folder)
    node = run["activations/hook_resid_post"]
    values = node["value"]
    features = run.features("sae")
    lens = forebay.logit_lens(node, forebay.load_unembedding(str(tiny_model), device="cpu"))
    asked = {
        "mean": values.mean("token"),
        "document": values.sel(document=7).sum(),
        "norms": (values**2).sum("d_model").groupby("position").mean(),
        "dense": features.dense([3, 1, 17]),
        "lens": lens["next_rank"],
    }
    for name, question in asked.items():
        with_threads = question.compute(scheduler="threads")
        graph = client.compute(question)
        found = graph.result(timeout=300)
        np.testing.assert_allclose(found.values, with_threads.values, rtol=1e-6, err_msg=name)
        assert set(found.coords) == set(with_threads.coords), name
