"""Who is at a piece of work that only one process should do at a time: training a dictionary, building an index.

A claim is a small file that its owner renews. It is advice: one that is no longer renewed expires by the clock of
whoever looks at it, so that a dead owner holds nobody up (at once where it died on the same machine); and who loses a
claim hears of it and stops.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from ..stores.fingerprint import whereabouts
from ..stores.places import Place, put_new, write_atomic

RENEW = 3.0
"""Seconds after which an owner renews its claim."""
EXPIRE = 20.0
"""Seconds without a renewal after which an owner is taken for dead."""
POLL = 0.2


@contextmanager
def claimed(path: Place, stop: Event, said: Callable[[str], None], wait: bool = True) -> Iterator[Event | None]:
    """Holds the claim at `path` for the length of the block, and gives the event on which its work is to stop: `stop`
    was set, or the claim was lost.

    Where another process holds it, waits until that one is done or dead, and says so by `said`; None if `stop` is set
    meanwhile, or if `wait` is not set and the other one is alive.
    """
    mark = uuid.uuid4().hex
    if not _taken(path, mark, stop, said, wait):
        yield None
        return
    lost, over = _Asked(stop), Event()
    keeper = Thread(target=_keep, args=(path, mark, lost, over), daemon=True)
    keeper.start()
    try:
        yield lost
    finally:
        over.set()
        keeper.join()
        if _read(path).get("mark") == mark:
            path.unlink(missing_ok=True)


def _taken(path: Place, mark: str, stop: Event, said: Callable[[str], None], wait: bool) -> bool:
    """Takes the claim as soon as nobody renews it. False if it is not to be had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seen, since, told = _read(path), time.monotonic(), False
    while True:
        if not seen and put_new(path, _claim(mark, 0)):
            return True
        if seen and (time.monotonic() - since > EXPIRE or _is_dead(seen)):
            write_atomic(path, _claim(mark, 0))
            # Several may have taken it over at once: the last one to write has it, and by then all have written.
            time.sleep(1)
            if _read(path).get("mark") == mark:
                return True
        elif seen and not told:
            owner = f"process {seen['pid']} of {seen['host']}"
            said(f"another process is at it ({owner}): waiting for its {path.name.removesuffix('.json')}")
            told = True
        if stop.wait(POLL):
            return False
        found = _read(path)
        if found != seen:
            if not wait and seen and found.get("mark") == seen["mark"]:
                return False
            seen, since = found, time.monotonic()


class _Asked(Event):
    """Set, or another event is."""

    def __init__(self, other: Event) -> None:
        super().__init__()
        self.other = other

    def is_set(self) -> bool:
        return super().is_set() or self.other.is_set()


def _keep(path: Place, mark: str, lost: Event, over: Event) -> None:
    """Renews a claim until it is given back, or another process has it, of which `lost` tells."""
    renewals = 0
    while not over.wait(RENEW):
        try:
            if _read(path).get("mark") != mark:
                lost.set()
                return
            renewals += 1
            write_atomic(path, _claim(mark, renewals))
        except OSError:
            continue  # a file system that is away for a moment is asked again, and the claim is advice


def _claim(mark: str, renewals: int) -> bytes:
    return json.dumps({"mark": mark, "renewals": renewals, "namespace": _namespace(), **whereabouts()}).encode()


def _read(path: Place) -> dict[str, Any]:
    """What a claim says; nothing if there is none that can be read."""
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    whole = isinstance(said, dict) and {"mark", "renewals", "pid", "host"} <= set(said)
    return said if whole else {}


def _is_dead(said: dict[str, Any]) -> bool:
    """Whether the owner of a claim was a process of this machine that is no more: then nobody need wait."""
    here = whereabouts()["host"], _namespace()
    if here[1] is None or (said["host"], said.get("namespace")) != here:
        return False
    try:
        os.kill(int(said["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError, TypeError):
        return False
    return False


def _namespace() -> str | None:
    """Within which numbers of processes mean the same, for containers may share the name of their machine."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
