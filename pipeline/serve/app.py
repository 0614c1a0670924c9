"""The live page over HTTP: what may be asked, of whom it is taken, and how a refusal reads."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..page.page import page, policy
from .listing import ORDERS
from .reads import MOST_ROWS, Reads
from .refusal import Refused, status_of
from .typed import Typed

HOSTS = ("127.0.0.1", "localhost")
"""Names by which this machine is asked. A page whose own name leads here by a trick of DNS has another one."""
MOST_BODY = 2**16
"""Bytes of a request."""
MOST_NUMBER = 2**53

HEADERS = {
    "Content-Security-Policy": f"{policy(connect=True)}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Asked = Mapping[str, str]


def application(reads: Reads, typed: Typed) -> Starlette:
    """The page at `/`, and its API below `/api/`: reads by GET, and one POST. No other address leads to anything, and
    none to a file.
    """
    answers: dict[str, Callable[[Asked], dict[str, Any]]] = {
        "overview": lambda asked: reads.overview(),
        "norms": lambda asked: reads.norms(),
        "sequences": lambda asked: reads.sequences(*_span(asked)),
        "lens": lambda asked: reads.lens(_whole(asked, "sequence")),
        "attention": lambda asked: reads.attention(_whole(asked, "sequence"), _whole(asked, "layer", default=0)),
        "dictionaries": lambda asked: reads.dictionaries(),
        "dictionary": lambda asked: reads.dictionary(_text(asked, "dictionary")),
        "features": lambda asked: reads.features(
            _text(asked, "dictionary"),
            ORDERS[_one_of(asked, "sort", ORDERS)],
            _one_of(asked, "order", ("desc", "asc")) == 0,
            asked.get("search", ""),
            *_span(asked),
        ),
        "feature": lambda asked: reads.feature(_text(asked, "dictionary"), _whole(asked, "id")),
    }

    async def of_text(request: Request) -> Response:
        try:
            asked = await _body(request)
            return _json(await run_in_threadpool(typed, _text(asked, "dictionary"), _text(asked, "text")))
        except Exception as error:
            return _refusal(error)

    return Starlette(
        routes=[
            Route("/", lambda request: Response(page(reads.start(), live=True), media_type="text/html")),
            Route("/favicon.ico", lambda request: Response(status_code=204)),
            *(Route(f"/api/{name}", _reading(answer)) for name, answer in answers.items()),
            Route("/api/typed", of_text, methods=["POST"]),
        ],
        middleware=[
            Middleware(Headed),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS), www_redirect=False),
            Middleware(OwnPage),
        ],
        exception_handlers={HTTPException: _http},
    )


# ── of whom it is taken ──────────────────────────────────────────────────────────────────────────────────────────────


class Headed:
    """Puts the headers that every answer has."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self.app(scope, receive, headed)


class OwnPage:
    """Refuses what another page asks for: reads where a browser tells that it does, and whatever makes work unless it
    is told to come from this page.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (why := self._fault(scope)):
            await _error(403, why)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _fault(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        foreign = site not in (None, "same-origin", "none") or origin not in (None, f"http://{headers.get('host')}")
        if foreign and scope["path"] != "/":
            return "another page asks for this: open the page of this server itself"
        if scope["method"] not in ("GET", "HEAD") and origin is None and site != "same-origin":
            return "this is taken from the page of this server only: neither Origin nor Sec-Fetch-Site names it"
        return None


# ── what is asked ────────────────────────────────────────────────────────────────────────────────────────────────────


def _text(asked: Mapping[str, Any], name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str) or not value:
        raise Refused(400, f"{name} is missing: a text is expected")
    return value


def _whole(asked: Asked, name: str, *, default: int | None = None, most: int = MOST_NUMBER) -> int:
    """A whole number from 0 to `most`."""
    said = asked.get(name)
    if said is None and default is not None:
        return default
    if said is None or not (said.isascii() and said.isdecimal() and len(said) < 17) or int(said) > most:
        raise Refused(400, f"{name} = {said!r:.99}: a whole number from 0 to {most:,} is expected")
    return int(said)


def _span(asked: Asked) -> tuple[int, int]:
    return _whole(asked, "offset", default=0), _whole(asked, "limit", default=25, most=MOST_ROWS)


def _one_of(asked: Asked, name: str, known: tuple[str, ...]) -> int:
    """The place of a word among those that are known, of which the first one need not be said."""
    said = asked.get(name, known[0])
    if said not in known:
        raise Refused(400, f"{name} = {said!r:.99}: one of {', '.join(known)} is expected")
    return known.index(said)


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "a text is sent as Content-Type: application/json")
    held = b""
    async for part in request.stream():
        held += part
        if len(held) > MOST_BODY:
            raise Refused(413, f"a request of more than {MOST_BODY:,} bytes is not read")
    try:
        found = json.loads(held)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the request is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused(400, "the request is not a JSON object")
    return found


# ── what is answered ─────────────────────────────────────────────────────────────────────────────────────────────────


def _reading(answer: Callable[[Asked], dict[str, Any]]) -> Callable[[Request], Response]:
    """An endpoint, which Starlette runs in a thread."""

    def endpoint(request: Request) -> Response:
        try:
            return _json(answer(request.query_params))
        except Exception as error:
            return _refusal(error)

    return endpoint


def _json(value: Mapping[str, Any], status: int = 200) -> Response:
    """ASCII, so that every text there is can be sent; without NaN, which JSON has not."""
    return Response(json.dumps(value, allow_nan=False, separators=(",", ":")), status, media_type="application/json")


def _error(status: int, message: str) -> Response:
    return _json({"error": message}, status)


def _refusal(error: Exception) -> Response:
    """What the reader is told of an error. One that is forebay's own fault is told where the server was started."""
    status = status_of(error)
    if status is None:
        traceback.print_exception(error)
        return _error(500, "this went wrong in forebay itself; where `forebay serve` runs it says how")
    return _error(status, str(error))


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail)
