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
SCRIPTS = ("elements.js", "runs.js", "texts.js", "features.js", "page.js")
"""One script, end to end: what the later ones name stands in the earlier ones."""
ASSETS = (TEMPLATE, STYLE, *SCRIPTS)


def page(values: Mapping[str, Any]) -> str:
    """The page of a report. Its policy lets run the one script and the one style in it, by their hashes, and nothing
    else; its data are JSON in a script element, which is never run.
    """
    template, style, script = _asset(TEMPLATE), _asset(STYLE), "".join(map(_asset, SCRIPTS))
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(f"{values['name']} · forebay report"),
        "style": style,
        "script": script,
        "data": as_json(values),
    }
    pieces = template.split("%%")  # text, the name of a part, text, the name of a part, … text
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets", name).read_text("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
