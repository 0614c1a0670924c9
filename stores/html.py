"""Small tables for notebooks: text escaped, readable on light and on dark ground, no script, nothing from outside.

`stages/models/html.py` is the same for the model side, since the two know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

MOST_ROWS = 100
"""Rows that are shown of a table; a last one says how many there are besides."""
MOST_SHOWN = 300
"""Characters that are shown of a cell: what a stranger's file says may be a gigabyte."""

_LINE = "border-bottom:1px solid currentColor"
_CELL = "text-align:left;vertical-align:top;padding:0 1em 0 0;background:none;color:inherit"


def html_table(
    title: str,
    facts: Mapping[str, object],
    header: Sequence[str] = (),
    rows: Iterable[Sequence[object]] = (),
) -> str:
    """Give `facts` as a table with a name and a value a row, and below it `rows` under their `header`.

    Everything is shown as text, cut where it is long; facts that are None are left out. What would not be seen as
    itself, such as an override of direction, is spelt out as Python does.
    """
    known = [_row((name, value), "td") for name, value in facts.items() if value is not None]
    parts = [f"<strong>{_shown(title)}</strong>", *_table(known)]
    if header:
        listed = list(rows)
        body = [_row(header, "th"), *(_row(row, "td") for row in listed[:MOST_ROWS])]
        if len(listed) > MOST_ROWS:
            body.append(_row((f"… {len(listed) - MOST_ROWS:,} more",), "td"))
        parts += _table(body)
    return f"<div>{''.join(parts)}</div>"


def _table(rows: Sequence[str]) -> list[str]:
    return [f'<table style="border-collapse:collapse">{"".join(rows)}</table>'] if rows else []


def _row(cells: Sequence[object], tag: str) -> str:
    style = f"{_CELL};{_LINE}" if tag == "th" else _CELL
    shown = (f'<{tag} style="{style}">{_shown(cell)}</{tag}>' for cell in cells)
    return f"<tr>{''.join(shown)}</tr>"


def _shown(cell: object) -> str:
    text = str(cell)
    text = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} […{len(text) - MOST_SHOWN:,} characters]"
    return escape("".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text))
