"""The pages of the documentation taken apart: blocks of code, headings, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
WRITTEN = ("README.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
"""Pages that people wrote, by their paths in the repository; docs/api is made from docstrings."""

_FENCE = re.compile(r"( *)(`{3,})(\S*)\s*$")


class Block(NamedTuple):
    """A fenced block: the page, the line of its fence, the language behind the fence, and what is in it."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, page: str = "page.md") -> Iterator[Block]:
    """Every fenced block of a page, however deep it is indented. ValueError for a fence that is never closed."""
    begun: tuple[int, re.Match[str]] | None = None
    inside: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = _FENCE.match(line)
        if begun is None and fence:
            begun, inside = (number, fence), []
        elif begun is not None and fence and fence[2] == begun[1][2] and not fence[3]:
            indent = len(begun[1][1])
            yield Block(page, begun[0], begun[1][3], "".join(f"{one[indent:]}\n" for one in inside))
            begun = None
        else:
            inside.append(line)
    if begun is not None:
        raise ValueError(f"{page}:{begun[0]}: the block is never closed")


def all_blocks(*languages: str) -> list[Block]:
    """The blocks of all written pages in these languages; in any, where none is named."""
    found = [block for page in WRITTEN for block in blocks(read(page), page)]
    return [block for block in found if not languages or block.language in languages]


def prose(text: str) -> str:
    """A page without its fenced blocks and without code between backticks."""
    kept, inside = [], False
    for line in text.splitlines():
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            kept.append(re.sub(r"`[^`]*`", "", line) if "](" not in line else line)
    return "\n".join(kept)


def links(text: str) -> list[str]:
    """The targets of a page's links, in the order of the page."""
    return re.findall(r"\]\(([^()\s]+)\)", prose(text))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them; a heading that comes again is numbered."""
    found: set[str] = set()
    for title in re.findall(
        r"^#{1,6} (.+?)\s*$", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S), re.MULTILINE
    ):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number, name = 0, slug
        while name in found:
            number += 1
            name = f"{slug}-{number}"
        found.add(name)
    return found
