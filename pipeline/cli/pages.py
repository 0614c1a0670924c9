"""Commands that make pages of a run to look at."""

from __future__ import annotations

from pathlib import Path

import click

from ...stores.places import Place
from .manual import Command
from .shared import DEVICE, RUN, refuse


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


@click.command(
    cls=Command,
    short_help="Serve that page live, to this machine, and read texts you type",
    examples=(
        "forebay serve runs/smollm2",
        "forebay serve runs/smollm2 --port 8080 --device cuda",
    ),
)
@RUN
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Of 127.0.0.1.  [default: a free one]")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=10_000, show_default=True, help="First tokens, for the norms."
)
@DEVICE
@click.option("--fetch", is_flag=True, help="Look for what is on a hub there: the model, a dictionary.")
@refuse
def serve(run: Place, port: int, tokens: int, device: str, fetch: bool) -> None:
    """Serve the page of RUN on this machine, and print its address: every feature, sequence and layer, each read from
    the store when it is looked at, and progress while the run goes on.

    Texts typed into the page are run through the run's model, on --device, to show which features fire. Ctrl-C ends
    it.
    """
    from ..serve.server import serve as serve_page

    serve_page(run, port=port, tokens=tokens, device=device, fetch=fetch, say=click.echo)
