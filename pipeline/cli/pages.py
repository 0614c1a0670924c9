"""Commands that make pages of a run to look at."""

from __future__ import annotations

from pathlib import Path

import click

from ...stores.places import Place
from .manual import Command
from .shared import RUN, refuse


@click.command(
    cls=Command,
    short_help="Write a page about a run: norms, lens, attention, features",
    examples=(
        "forebay report runs/smollm2 -o smollm2.html",
        "forebay report runs/smollm2 --sequences 8 --features 1000",
    ),
)
@RUN
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("report.html"),
    show_default=True,
    help="The page.",
)
@click.option("--sequences", type=click.IntRange(min=0), default=3, show_default=True, help="Texts of lens, attention.")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=10_000, show_default=True, help="First tokens, for the norms."
)
@click.option("--features", type=click.IntRange(min=0), default=200, show_default=True, help="Of each dictionary.")
@click.option("--fetch", is_flag=True, help="Look for a hub's model on its hub, for lens and logits.")
@refuse
def report(run: Place, out: Path, sequences: int, tokens: int, features: int, fetch: bool) -> None:
    """Write a page about RUN: progress, provenance, norms, logit lens, attention, features.

    One HTML file that loads nothing. It holds texts of the corpus, and the recipe. Of a run that is not complete it
    shows what is there.
    """
    from ..page.report import Report, write_report
    from ..report.printable import printable
    from ..report.tables import size

    asked = Report(sequences=sequences, tokens=tokens, features=features, fetch=fetch)
    click.echo(f"Wrote {printable(out)} ({size(write_report(run, out, asked))})")
