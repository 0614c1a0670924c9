"""The threads in which a process reads: they are kept, for a read of a few MiB takes less time than starting some."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any

N_CORE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Processors of this process."""
WAITING = 4
"""Threads at least: those that wait for a disk or an object store need no processor."""


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(WAITING, N_CORE), "read")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # which has none of the threads


def at_once(work: Callable[..., object], tasks: Sequence[tuple[Any, ...]]) -> None:
    """Does `work(*task)` for every task, the first in this thread. The first that fails ends those that have not begun;
    it is raised when none is at work any more. `work` must not call `at_once`.
    """
    others = [_pool().submit(work, *task) for task in tasks[1:]]
    try:
        for task in tasks[:1]:
            work(*task)
        for one in others:
            one.result()
    except BaseException:
        for one in others:
            one.cancel()
        raise
    finally:
        wait(others)
