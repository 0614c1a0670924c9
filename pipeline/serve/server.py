"""The server of the live page: this machine only, until it is told to stop."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn

from ...stores.errors import SchemaError
from ...stores.places import Place
from ...stores.tree import run_stores
from .app import HOSTS, application
from .reads import Reads
from .typed import Typed

GRACE = 1
"""Seconds that answers under way are waited for at the end."""


def serve(folder: Place, *, port: int, tokens: int, device: str, fetch: bool, say: Callable[[str], None]) -> None:
    """Serves the page of a run on 127.0.0.1, says its address, and returns on SIGINT or SIGTERM. With `port` 0 the
    system chooses a free one.

    StoreNotFound for what is no run; SchemaError for a port that cannot be had.
    """
    from ..page.overview import overview

    overview(folder)
    list(run_stores(folder))
    reads = Reads(folder, tokens=tokens, fetch=fetch)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind((HOSTS[0], port))
            own.listen()
        except OSError as error:
            raise SchemaError(
                f"port {port} cannot be had ({error.strerror}): leave --port out for a free one"
            ) from error
        config = uvicorn.Config(
            application(reads, Typed(reads, device)),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=GRACE,
        )
        server = uvicorn.Server(config)

        def stop(number: int, frame: object) -> None:
            server.should_exit = True

        # The server has handlers of its own while it runs, and afterwards raises what it took once more.
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            reads.warm()
            say(f"http://{HOSTS[0]}:{own.getsockname()[1]}/")
            server.run(sockets=[own])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
