"""Runs that are killed at random moments, over and over, until they are done; and what they must hold then."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from forebay.pipeline.exit_codes import COMPLETE, INTERRUPTED
from forebay.stores.ledger import Ledger
from forebay.stores.schema import DATA

STEPS = ("tokens", "activations")
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
ENDINGS = {COMPLETE: "", INTERRUPTED: "SIGTERM", -signal.SIGTERM: "SIGTERM", -signal.SIGKILL: "SIGKILL"}
"""Exit codes of a process that was sent signals, by the one that ended it: none where it was done before."""
MOST_WORKERS = 4
MOST_UNITS = 8
"""Units that a run may record between two kills."""
PATIENCE = 600.0
"""Seconds after which a run that neither ends nor is killed is taken for hung."""

CONTEXT = get_context("forkserver")
PRELOADED = ("forebay.pipeline.run", "forebay.stages.models.load", "forebay.stores.tree")


class Torn(Exception):
    """A run that was killed did not end up with what it must hold."""


# ── what is killed ───────────────────────────────────────────────────────────────────────────────────────────────────


def _compute(recipe: Path, folder: Path, kind: str, number: int, n_worker: int) -> None:
    """One process of a run: the whole of it, one rank, or the client of a local Dask cluster. Ends with its code."""
    from forebay.pipeline.executors import DaskWorkers, Executor, Ranks, ThisProcess
    from forebay.pipeline.run import run

    os.setpgid(0, 0)  # so that the workers that it starts can be told from those of others
    made: dict[str, Callable[[], Executor]] = {
        "process": ThisProcess,
        "ranks": lambda: Ranks(number, n_worker),
        "dask": lambda: DaskWorkers(f"local:{n_worker}"),
    }
    try:
        raise SystemExit(run(recipe, folder, device="cpu", executor=made[kind]()).code)
    except KeyboardInterrupt:  # a second SIGTERM; the command line says so too
        raise SystemExit(INTERRUPTED) from None


def warm_up(preloaded: Sequence[str] = PRELOADED) -> None:
    """Starts the server that processes are forked from, with everything imported: a fork costs a tenth of a second."""
    CONTEXT.set_forkserver_preload(list(preloaded))
    first = CONTEXT.Process(target=int)
    first.start()
    first.join()


def start(recipe: Path, folder: Path, kind: str, n_worker: int) -> list[BaseProcess]:
    """The processes of one run with so many workers."""
    n_process = n_worker if kind == "ranks" else 1
    # Workers of Dask are children of the client, which a daemon may not have.
    started = [
        CONTEXT.Process(target=_compute, args=(recipe, folder, kind, number, n_worker), daemon=kind != "dask")
        for number in range(n_process)
    ]
    for process in started:
        process.start()
    return started


def workers_of(client: BaseProcess) -> list[int]:
    """Process ids of the workers that the client of a local cluster has started."""
    assert client.pid is not None
    tasks = Path(f"/proc/{client.pid}/task")
    try:
        found = [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
        return [pid for pid in found if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except (FileNotFoundError, ProcessLookupError):
        return []


# ── what it holds ────────────────────────────────────────────────────────────────────────────────────────────────────


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of every store of a run but the half-written ones that Zarr never takes for its own."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for store in sorted(folder.glob(f"*/{DATA}"))
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.suffix != ".partial"
    }


def recorded(folder: Path) -> int:
    return sum(len(Ledger(folder / step).done()) for step in STEPS)


def check_recorded(folder: Path) -> int:
    """How many units are recorded; Torn unless all of them are whole. At any time, also while others write."""
    from forebay.stores.store import Store

    n_unit = 0
    for step in STEPS:
        if (folder / step / DATA).exists():
            store = Store.open(folder / step)
            if wrong := store.verify():
                raise Torn(f"{folder / step}: recorded, and not whole: {wrong}")
            n_unit += len(store.done())
    return n_unit


def check_whole(folder: Path, expected: dict[str, bytes]) -> None:
    """Torn unless a run that is done holds the bytes of one that never was killed, every row once."""
    from forebay.pipeline.audit import audit

    if found := audit(folder):
        raise Torn("\n".join(map(str, found)))
    own = contents(folder)
    different = [name for name in {*own, *expected} if own.get(name) != expected.get(name)]
    if different:
        raise Torn(f"{folder}: {len(different)} files differ from the uninterrupted run, as {sorted(different)[:5]}")


# ── the matrix ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Tally:
    """What came of it: signals that ended a process, by name, those that came in the middle of the work, rounds, runs
    that were finished, and units verified after kills.
    """

    kills: dict[str, int] = field(default_factory=dict)
    hits: int = 0
    rounds: int = 0
    runs: int = 0
    verified: int = 0

    @property
    def n_kill(self) -> int:
        return sum(self.kills.values())


@dataclass
class Matrix:
    """Kills of one kind of executor: a run is started, killed at a random moment and started again with another number
    of workers, until it is done and compared with `expected`; then the next run begins.
    """

    recipe: Path
    folder: Path
    kind: str
    chance: random.Random
    said: Callable[[str], None] = lambda text: None
    tally: Tally = field(default_factory=Tally)
    expected: dict[str, bytes] = field(default_factory=dict)
    n_unit: int = 0
    length: float = 0.0
    """Seconds of an uninterrupted run."""

    def measure(self) -> None:
        """Runs once without a kill, in one process, and remembers what came of it and how long it took."""
        began = time.monotonic()
        whole = self.folder / "uninterrupted"
        self._finish(whole, "process")
        self.length = time.monotonic() - began
        self.expected, self.n_unit = contents(whole), recorded(whole)
        check_whole(whole, self.expected)

    def _finish(self, folder: Path, kind: str, n_worker: int = 2) -> None:
        self._ended(start(self.recipe, folder, kind, n_worker))

    def torture(self, n_kill: int) -> Tally:
        """Goes on until so many processes have been killed, and finishes the last run."""
        while self.tally.n_kill < n_kill:
            folder = self.folder / f"killed-{self.tally.runs}"
            while self.tally.n_kill < n_kill:
                self._round(folder)
                if recorded(folder) == self.n_unit:
                    break
            self._finish(folder, self.kind, self.chance.randint(1, MOST_WORKERS))
            check_whole(folder, self.expected)
            self.tally.runs += 1
            self.said(f"{self.tally.n_kill} kills, {self.tally.hits} amid the work; {self.tally.runs} runs whole")
        return self.tally

    def _round(self, folder: Path) -> None:
        """Starts a run that goes on from what is there, and kills some or all of it once."""
        n_worker = self.chance.randint(1, MOST_WORKERS) if self.kind != "process" else 1
        processes = start(self.recipe, folder, self.kind, n_worker)
        self._wait(folder, processes)
        before = recorded(folder)
        signalled = self._signal(processes)
        n_verified = check_recorded(folder)  # while those that were not hit are at work
        if signalled and self.chance.random() < 0.5:
            signalled += self._signal(processes)
        ended = self._ended(processes, signalled)
        self.tally.rounds += 1
        self.tally.verified += n_verified + check_recorded(folder)
        for name in ended:
            self.tally.kills[name] = self.tally.kills.get(name, 0) + 1
        self.tally.hits += len(ended) if 0 < before < self.n_unit else 0

    def _wait(self, folder: Path, processes: Sequence[BaseProcess]) -> None:
        """Until a random moment of the run, by the clock or, as a machine may be slow, by the units that are there."""
        if self.chance.random() < 0.3:
            time.sleep(self.chance.uniform(0, 0.5 * self.length))
            return
        units = min(self.n_unit, recorded(folder) + self.chance.randint(0, MOST_UNITS))
        while recorded(folder) < units and any(process.is_alive() for process in processes):
            time.sleep(0.003)
        time.sleep(self.chance.uniform(0, self.length / self.n_unit))

    def _signal(self, processes: Sequence[BaseProcess]) -> list[int]:
        """Sends a signal to some of the processes, or to a worker of a cluster, and says to which."""
        alive = [process for process in processes if process.is_alive()]
        chosen = self.chance.sample(alive, self.chance.randint(1, len(alive))) if alive else []
        sent = []
        for process in chosen:
            assert process.pid is not None
            number = self.chance.choice(SIGNALS)
            workers = workers_of(process) if self.kind == "dask" else []
            if workers and self.chance.random() < 0.5:
                _send(self.chance.choice(workers), signal.SIGKILL)
                self.tally.kills["worker SIGKILL"] = self.tally.kills.get("worker SIGKILL", 0) + 1
            else:
                _send(process.pid, number)
                sent.append(process.pid)
        return sent

    def _ended(self, processes: Sequence[BaseProcess], signalled: Sequence[int] = ()) -> list[str]:
        """Waits for all; Torn for one that hangs or ends otherwise than it should. Names the signals that ended one."""
        until, names = time.monotonic() + PATIENCE, []
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                raise Torn(f"a process of {self.kind} did not end within {PATIENCE:.0f} s")
            assert process.pid is not None
            if self.kind == "dask":  # what a batch system does with what is left of a job
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            due = ENDINGS if process.pid in signalled else {COMPLETE: ""}
            if process.exitcode not in due:
                raise Torn(f"a process of {self.kind} ended with {process.exitcode}, not with one of {list(due)}")
            if name := due[process.exitcode]:
                names.append(name)
        return names


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended since
        os.kill(pid, number)
