"""Links of the documentation lead somewhere: to files that are there, and to headings that they have."""

from __future__ import annotations

import re

import pytest

from .docs_pages import ROOT, WRITTEN, anchors, links, read

PAGES = sorted(
    {*WRITTEN, *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))}
)  # the generated ones, too


def broken(page: str, text: str) -> list[str]:
    """The links of a page that lead nowhere on this machine. Links into the network are not followed."""
    wrong = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if ROOT not in (target, *target.parents) or not target.exists():
            wrong.append(f"{link}: there is no {path}")
        elif anchor and anchor not in anchors(text if not path else target.read_text(encoding="utf-8")):
            wrong.append(f"{link}: it has no heading {anchor}")
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert broken(page, read(page)) == []


def test_a_link_that_leads_nowhere_is_found() -> None:
    text = (
        "# One thing: `a`\n## Same\n## Same\n[a](hooks.md) [b](gone.md) [c](#one-thing-a) [d](#two) [e](#same-1)"
        " [f](hooks.md#gone) [g](https://example.org/gone)\n```\n[h](not.md) # [i](link.md)\n```\n"
        "[j](../../outside.md)"
    )
    found = [one.partition(": ")[0] for one in broken("docs/recipes.md", text)]
    assert found == ["gone.md", "#two", "hooks.md#gone", "../../outside.md"]


def test_every_page_is_reached_from_the_readme() -> None:
    """In one step from its table, or from an index that stands there."""
    found = {"README.md"}
    for step in (["README.md"], ["docs/README.md", "docs/api/README.md"]):
        for page in step:
            folder = (ROOT / page).parent
            found |= {
                (folder / link.partition("#")[0]).resolve().relative_to(ROOT).as_posix()
                for link in links(read(page))
                if not re.match(r"[a-z]+:|#", link)
            }
    assert set(PAGES) - found == set()
