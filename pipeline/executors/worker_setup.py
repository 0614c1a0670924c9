"""What a Dask worker does before its first task, where forebay has started it: it leaves signals to whoever runs it.

Ctrl-C, and what a batch system sends ahead of its end, reach every process of a group; the one that drives the run
then lets workers finish what they are at.
"""

from __future__ import annotations

import signal
from typing import Any

from ..stopping import STOPPING


def dask_setup(worker: Any) -> None:
    """Called by Dask in the worker's own process."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
