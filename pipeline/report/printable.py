"""Text from anywhere, made safe to show: no character of it steers the terminal, hides, or turns the line round."""

from __future__ import annotations

MOST_SHOWN = 4000
"""Characters of a message that are shown: what a stranger's file says may be a gigabyte."""


def printable(text: object, *, lines: bool = False, most: int = MOST_SHOWN) -> str:
    """The text as it may be written to a terminal: whatever would not be seen as itself is spelt out as Python does,
    `\\x1b` for an escape, `\\u202e` for an override of direction, `\\ud800` for what no encoding can write.

    With `lines`, ends of lines stay, as in messages that have several. What is longer than `most` is cut in its middle.
    Brackets are kept: what goes to rich as markup must be escaped besides, or be a `Text`.
    """
    text = str(text)
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or (lines and one == "\n") else _spelt(one) for one in text)


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii") if character != "\\" else character
