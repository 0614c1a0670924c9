"""A real S3 server on this machine, and a proxy before it that counts what is asked and fails when it is told to."""

from __future__ import annotations

import http.client
import itertools
import logging
import os
import runpy
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import pytest

Fault = Literal["409", "500", "501", "503", "stall", "lost", "cut"] | None
"""What happens to a request: a conflict, a server's error, "not implemented", S3's "slow down", silence, silence after
it was done, or an answer that breaks off in its body.
"""
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
SCOPE = "one/20250101/us-east-1/s3/aws4_request"
SIGNED = {"Authorization": f"AWS4-HMAC-SHA256 Credential={SCOPE}, SignedHeaders=host, Signature=none"}


@dataclass(frozen=True)
class Request:
    """One request as the proxy sees it: what it wants, of which key of the bucket ("" for a listing), on condition that
    there is none, and its number among all.
    """

    method: str
    key: str
    query: str
    conditional: bool
    number: int


@dataclass
class Proxy:
    """Passes requests on to a server, unless `fault` says otherwise. `stalled` seconds is how long silence lasts."""

    upstream: tuple[str, int]
    fault: Callable[[Request], Fault] = lambda request: None
    stalled: float = 30.0
    seen: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    address: str = ""

    def counts(self) -> Counter[str]:
        """Requests by method, listings apart from reads."""
        return Counter("LIST" if one.method == "GET" and "list-type" in one.query else one.method for one in self.seen)


@contextmanager
def proxy_to(upstream: tuple[str, int]) -> Iterator[Proxy]:
    """A proxy on a free port of this machine."""
    proxy, numbers, stop = Proxy(upstream), itertools.count(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *said: object) -> None: ...

        def answer(self) -> None:
            path, _, query = self.path.partition("?")
            key = path.lstrip("/").partition("/")[2]
            request = Request(self.command, key, query, "If-None-Match" in self.headers, next(numbers))
            proxy.seen.append(request)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.fault(request)
            if fault:
                proxy.faults.append(fault)
            if fault in ("409", "500", "501", "503"):
                self.reply(int(fault), {"Content-Type": "application/xml"}, SLOW_DOWN, len(SLOW_DOWN))
                return
            if fault == "stall":
                stop.wait(proxy.stalled)
                self.close_connection = True
                return
            upstream = http.client.HTTPConnection(*proxy.upstream)
            try:
                upstream.request(self.command, self.path, body, dict(self.headers))
                found = upstream.getresponse()
                data = found.read()
            finally:
                upstream.close()
            if fault == "lost":
                stop.wait(proxy.stalled)
                self.close_connection = True
                return
            headers = {k: v for k, v in found.getheaders() if k.lower() not in SET_HERE}
            length = int(found.getheader("Content-Length") or len(data))
            self.reply(found.status, headers, data[: len(data) // 2] if fault == "cut" else data, length)
            if fault == "cut":
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        def reply(self, status: int, headers: dict[str, str], data: bytes, length: int) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if status != 204:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that was killed, or has given up, has no use for the rest."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    proxy.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield proxy
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


SET_HERE = ("connection", "content-length", "date", "server", "transfer-encoding")


def make_bucket(server: tuple[str, int], name: str) -> None:
    connection = http.client.HTTPConnection(*server)
    connection.request("PUT", f"/{name}", headers=SIGNED)
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    connection.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, int]]:
    """Address of a server of Amazon's S3 protocol that keeps objects in this process's memory."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def s3(s3_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The proxy before the server, to which `s3://` leads in this test. `s3.address` is its URL."""
    settings = {"AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "two", "AWS_REGION": "us-east-1"}
    with proxy_to(s3_server) as proxy:
        for name, value in {**settings, "AWS_ENDPOINT_URL": proxy.address, "AWS_ALLOW_HTTP": "true"}.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def run_apart(s3: Proxy, fork_run: Callable[[Path, Path], Any]) -> Iterator[Callable[[Path, str], Any]]:
    """Starts `forebay.run(recipe, url)` in a process that knows the server, and ends it when the test does."""
    started: list[Any] = []

    def start(recipe: Path, url: str) -> Any:
        known = {name: os.environ[name] for name in os.environ if name.startswith(("AWS_", "FOREBAY_"))}
        names = {"settings": known, "recipe": str(recipe), "folder": url}
        script = Path(__file__).with_name("s3_run.py")
        process = get_context("forkserver").Process(
            target=runpy.run_path, args=(str(script),), kwargs={"init_globals": names}, daemon=True
        )
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


_numbers = itertools.count(1)


@pytest.fixture
def bucket(s3: Proxy, s3_server: tuple[str, int]) -> str:
    """A new, empty bucket, as in "s3://bucket-1"."""
    name = f"bucket-{next(_numbers)}-{time.time_ns() % 10**9}"
    make_bucket(s3_server, name)
    return f"s3://{name}"
