"""Dask clusters by name: an address, local workers, a batch system, Kubernetes."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...stores.errors import RecipeError, nearest

if TYPE_CHECKING:
    from distributed import Client

BATCH = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "lsf": "LSFCluster",
    "sge": "SGECluster",
    "htcondor": "HTCondorCluster",
    "oar": "OARCluster",
    "moab": "MoabCluster",
}
"""Batch systems by the name of their cluster in dask_jobqueue."""
KINDS = ("local", *BATCH, "kubernetes")

STARTS = 3
"""Times that local workers are started before it is given up: one may be killed while it starts."""
LOCAL_DEATHS, REMOTE_DEATHS = 3, 10
"""Workers that may die with a unit before it is given up. A node that is preempted takes innocent units with it; on one
machine it is nearly always the unit.
"""
SETTINGS = {
    "distributed.scheduler.worker-ttl": "30 minutes",  # a worker that loads a model may be silent for long
    "distributed.worker.memory.target": False,  # nothing is kept that could be spilt
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
}
CLOSING = 10
"""Seconds in which workers are to end when they are told so."""
SETUP = "forebay.pipeline.executors.worker_setup"


def connect(where: str) -> Client:
    """A client of the cluster that `--dask WHERE` names: `tcp://host:port` or a scheduler file; `local:N` workers
    here; `slurm:N` jobs, or another batch system's, as its dask-jobqueue configuration says; `kubernetes:N` pods. A
    cluster that was started for it is closed by `close`.

    RecipeError for what is no cluster, for a library that is missing, and for a scheduler that does not answer.
    """
    if "://" in where or where.endswith(".json"):
        return _existing(where)
    found = re.fullmatch(r"([a-z]+)(?::(\d+))?", where)
    if not found or found[1] not in KINDS or found[2] == "0":
        raise RecipeError(
            f"--dask {where} is no cluster.{nearest(where.split(':')[0], KINDS)} Give the address of a scheduler "
            f"(tcp://host:port), a scheduler file (.json), or one of {', '.join(KINDS)}, with a number of workers as "
            "in local:4"
        )
    kind, n_worker = found[1], int(found[2]) if found[2] else None
    with _own_settings(LOCAL_DEATHS if kind == "local" else REMOTE_DEATHS):
        if kind == "local":
            cluster = _local(n_worker or max(1, len(_gpus())))
        else:
            cluster = _kubernetes(n_worker or 1) if kind == "kubernetes" else batch_cluster(kind)
            if kind in BATCH:
                cluster.scale(jobs=n_worker or 1)
        from distributed import Client

        return Client(cluster, set_as_default=False)


def close(client: Client) -> None:
    """Closes a client, and the cluster that was started for it; workers that hang are killed."""
    cluster = client.cluster
    client.close(timeout=5)
    if cluster is None:
        return
    try:
        cluster.close(timeout=CLOSING)
    except TimeoutError:
        for child in multiprocessing.active_children():
            if child.name.startswith("Dask Worker process"):
                child.kill()


def _existing(where: str) -> Client:
    from distributed import Client

    try:
        if where.endswith(".json") and "://" not in where:
            if not Path(where).is_file():
                raise RecipeError(f"--dask {where}: there is no such scheduler file")
            return Client(scheduler_file=where, timeout=30, set_as_default=False)
        return Client(where, timeout=30, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise RecipeError(
            f"--dask {where}: no scheduler answers there ({error}). Start one with `dask scheduler`, and give the "
            "address that it prints"
        ) from error


def _local(n_worker: int) -> Any:
    """Worker processes of one thread each on this machine: a GPU each where there are any, the cores divided."""
    from distributed import Nanny, Scheduler, SpecCluster

    gpus = _gpus()
    workers = {}
    for i in range(n_worker):
        env = {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}
        options = {"nthreads": 1, "memory_limit": 0, "env": {**_threads(n_worker), **env}, "preload": [SETUP]}
        workers[i] = {"cls": Nanny, "options": {**options, "host": "127.0.0.1"}}
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}}
    for _ in range(STARTS):
        try:
            return SpecCluster(workers=workers, scheduler=scheduler, name=f"forebay-{os.getpid()}")
        except RuntimeError as error:
            died = error
    raise RecipeError(
        f"--dask local:{n_worker}: workers died while they started, {STARTS} times over ({died}). Start fewer, or run "
        "without --dask to see why"
    ) from died


def _threads(n_worker: int) -> dict[str, str]:
    """The cores of this machine divided among workers, unless the environment says how many threads there are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    each = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // n_worker)))
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), each)


def _gpus() -> list[str]:
    """The GPUs of this machine as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else []
    return names[:n] if 0 < (n := torch.cuda.device_count()) <= len(names) else [str(i) for i in range(n)]


def batch_cluster(kind: str) -> Any:
    """A cluster of dask_jobqueue without jobs yet; what a job is, the `jobqueue` section of Dask's configuration says.

    RecipeError if it does not, or if dask_jobqueue is missing.
    """
    with _signals_kept():
        jobqueue = _require("dask_jobqueue", "slurm")
    import dask

    said = dask.config.get(f"jobqueue.{kind}.scheduler-options", None) or {}
    try:
        return getattr(jobqueue, BATCH[kind])(scheduler_options={"dashboard_address": ":0", **said})
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"--dask {kind}: {error}. Say what a job is in the section jobqueue.{kind} of a YAML file in "
            "~/.config/dask; docs/clusters.md has one"
        ) from error


def _kubernetes(n_worker: int) -> Any:
    """Pods of the Dask operator, as the `kubernetes` section of Dask's configuration describes them."""
    kubernetes = _require("dask_kubernetes.operator", "kubernetes")
    return kubernetes.KubeCluster(name=f"forebay-{os.getpid()}", n_workers=n_worker)


def _require(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        name = module.partition(".")[0]
        raise RecipeError(f"--dask needs {name}, which is not installed: pip install 'forebay[{extra}]'") from error


@contextmanager
def _signals_kept() -> Iterator[None]:
    """dask_jobqueue takes SIGINT for itself when it is imported."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


@contextmanager
def _own_settings(deaths: int) -> Iterator[None]:
    import dask

    spawn: Mapping[str, Any] = dask.config.get("distributed.nanny.pre-spawn-environ", {})
    quiet = {"DASK_LOGGING__DISTRIBUTED": "critical", "PYTHONWARNINGS": "ignore"}
    own = {
        **SETTINGS,
        "distributed.scheduler.allowed-failures": deaths,
        "distributed.nanny.pre-spawn-environ": {**spawn, **quiet},
    }
    with dask.config.set(own):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what Dask's own parts log of workers that come and go off the user's terminal: runs say what matters.

    RecipeError if Dask's distributed part is missing.
    """
    _require("distributed", "dask")
    names = [name for name in (*logging.root.manager.loggerDict, "distributed") if _noisy(name)]
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _noisy(name: str) -> bool:
    return name.partition(".")[0] in ("distributed", "tornado", "bokeh", "dask_jobqueue")
