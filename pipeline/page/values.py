"""What stands in a page: JSON values, and the tokens whose texts it needs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...stores.errors import ForebayError
from ...stores.places import Place

DIGITS = 5
"""Significant digits of a number that is shown."""
MOST_TEXT = 4000
"""Characters of a text out of a header."""
MOST_TOKEN = 200
"""Characters of a token's text."""

_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def number(value: float) -> float | None:
    """A number as JSON has it, to five significant digits; None for NaN and infinities, which JSON has not."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def numbers(values: NDArray[Any]) -> list[Any]:
    """An array as nested lists of such numbers."""
    if values.ndim == 0:
        raise ValueError("a list is made of an array with dimensions")
    if values.ndim > 1:
        return [numbers(row) for row in values]
    return [number(value) for value in values.tolist()]


def table(value: object) -> dict[str, str]:
    """A mapping of plain values out of a header, as texts, without those that are None. Empty for what is no mapping:
    headers are anybody's.
    """
    found = value.items() if isinstance(value, Mapping) else ()
    return {str(key)[:MOST_TEXT]: _text(one) for key, one in found if one is not None}


def _text(value: object) -> str:
    said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return said[:MOST_TEXT]


def as_json(value: object) -> str:
    """JSON for a script element: ASCII, and without any character that could end the element or begin a comment."""
    said = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character, escape in _ESCAPED.items():
        said = said.replace(character, escape)
    return said


@dataclass
class TokenSet:
    """The tokens that a page names: gathered while its values are, and decoded together at the end."""

    ids: set[int] = field(default_factory=set)

    def add(self, ids: NDArray[Any]) -> list[Any]:
        """Take in an array of token ids, and give them as nested lists. Negative ones stand for no token."""
        self.ids.update(np.unique(ids[ids >= 0]).tolist())
        listed: list[Any] = ids.tolist()
        return listed

    def texts(self, folder: Place) -> dict[str, str]:
        """The text of each token by the run's own tokenizer, parts of characters as their bytes; none where the run
        keeps no tokenizer that can be read.
        """
        from ...stages.models.errors import ModelError
        from ...stages.token_text import Decoder

        wanted, path = sorted(self.ids), folder / "tokenizer.json"
        if not wanted or not path.is_file():
            return {}
        try:
            texts = Decoder(path).alone(wanted)
        except (ModelError, ForebayError):
            return {}
        return {str(id): text[:MOST_TOKEN] for id, text in zip(wanted, texts, strict=True)}


def absent(reason: object) -> dict[str, str]:
    """What stands where there is nothing to show: why."""
    return {"absent": str(reason)[:MOST_TEXT]}


def some(values: Iterable[dict[str, Any]], reason: str) -> dict[str, Any]:
    """A part that shows several things, or why it shows none."""
    found = list(values)
    return {"shown": found} if found else absent(reason)
