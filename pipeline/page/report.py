"""`forebay report`: the page of a run, gathered and written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...stores.errors import SchemaError
from ...stores.places import Place, write_atomic
from ...stores.tree import open_run
from ..report.printable import printable
from .values import TokenSet, absent

SUFFIXES = (".html", ".htm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a report shows of a run: of how many `sequences` lens and attention, of how many `tokens` the norms, how
    many `features` of each dictionary. With `fetch` a model on a hub may be asked for.
    """

    sequences: int = 3
    tokens: int = 10_000
    features: int = 200
    fetch: bool = False


def report_values(folder: Place, asked: Report) -> dict[str, Any]:
    """Everything that a page shows of a run, as JSON values. StoreNotFound for what is no run, and what reading a
    damaged one raises; what a run does not have is told in its place.
    """
    from .features import features
    from .logits import LogitEffects, at_hand
    from .norms import norms
    from .overview import overview
    from .sequences import attention, lens

    said = overview(folder)
    run = open_run(folder, partial=True)
    known, tokens = at_hand(folder, run, asked.fetch), TokenSet()
    chosen = range(min(asked.sequences, run["sequences"].sizes["sequence"]))
    return {
        "name": printable(folder.resolve().name, most=200),
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "forebay": version("forebay"),
        "overview": said,
        "norms": told(lambda: norms(folder, run, tokens, asked.tokens)),
        "lens": told(lambda: lens(run, tokens, chosen, known)),
        "attention": told(lambda: attention(folder, run, tokens, chosen)),
        "features": told(lambda: features(run, tokens, asked.features, LogitEffects(known))),
        "texts": tokens.texts(folder),
    }


def told(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part of a page, or what the run lacks for it, such as its tokens."""
    try:
        return part()
    except SchemaError as error:
        return absent(error)


def write_report(folder: Place, out: Path, asked: Report) -> int:
    """Writes the page of a run, whole or not at all, and gives its size in bytes. SchemaError for a file that is not to
    be written: one that is called no page, or that lies in one of the run's steps.
    """
    from .page import page

    check_out(folder, out)
    data = page(report_values(folder, asked)).encode()
    write_atomic(out, data)
    return len(data)


def check_out(folder: Place, out: Path) -> None:
    if out.suffix.lower() not in SUFFIXES:
        raise SchemaError(f"{out} would be a page: give it a name that ends in .html")
    if not out.parent.is_dir():
        raise SchemaError(f"there is no folder {out.parent} to write {out.name} into")
    if isinstance(folder, Path) and folder.resolve() in out.parent.resolve().parents:
        raise SchemaError(
            f"{out} lies in a step of the run, where only runs write. Write it into {folder} itself, or elsewhere"
        )
