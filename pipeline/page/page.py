"""One HTML file that holds everything it shows: style, script and data inside, and nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from .values import as_json

TEMPLATE, STYLE = "page.html", "page.css"
SCRIPTS = ("elements.js", "embedded.js", "runs.js", "texts.js", "features.js", "page.js")
"""One script, end to end: what the later ones name stands in the earlier ones. The second one says where data are."""
LIVE_SCRIPTS = ("elements.js", "live.js", "runs.js", "texts.js", "features.js", "typed.js", "page.js")
"""The same of the page that asks for its data."""
ASSETS = {TEMPLATE, STYLE, *SCRIPTS, *LIVE_SCRIPTS}


def page(values: Mapping[str, Any], *, live: bool = False) -> str:
    """The page of a report. Its policy lets run the one script and the one style in it, by their hashes, and nothing
    else; its data are JSON in a script element, which is never run. The `live` page asks the server that it comes from
    for what it shows.
    """
    parts = {
        "policy": policy(connect=live),
        "title": html.escape(f"{values['name']} · forebay {'serve' if live else 'report'}"),
        "style": _asset(STYLE),
        "script": _script(live),
        "data": as_json(values),
    }
    pieces = _asset(TEMPLATE).split("%%")  # text, the name of a part, text, the name of a part, … text
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def policy(*, connect: bool) -> str:
    """The page's Content-Security-Policy; `connect` lets its script ask the server that it comes from."""
    asks = "connect-src 'self'; " if connect else ""
    return (
        f"default-src 'none'; script-src '{_hash(_script(connect))}'; style-src '{_hash(_asset(STYLE))}'; {asks}"
        "base-uri 'none'; form-action 'none'"
    )


def _script(live: bool) -> str:
    return "".join(map(_asset, LIVE_SCRIPTS if live else SCRIPTS))


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
