"""How work is asked to stop, and how it does so between two pieces."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Ctrl-C; what schedulers send before they kill; a terminal that is closed; what schedulers can be told to send early.
"""
STOPPING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))


class Stopped(Exception):
    """Raised where work is left to go on with later; caught by what began it."""


@contextmanager
def stop_on_signals() -> Iterator[Event]:
    """An event that any of `STOPPING` sets, once; a second signal interrupts at once. Outside the main thread, never
    set.

    SIGHUP stays ignored where it is, as under nohup: such a run is meant to outlive its terminal.
    """
    stop = Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    former: dict[signal.Signals, Callable[..., object] | int | None] = {}
    try:
        for number in STOPPING:
            if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                former[number] = signal.signal(number, ask)
    except ValueError:
        # Only the main thread may handle signals; a run started elsewhere is stopped by whoever started it.
        former.clear()
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
