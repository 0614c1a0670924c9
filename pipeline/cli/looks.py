"""Commands that look at a run or a model and change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .shared import RUN, refuse


@click.command()
@RUN
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for scripts.")
@refuse
def status(run: Path, as_json: bool) -> None:
    """How far RUN is: units, tokens, rate, time left, who is at work, failures. Reads the ledgers only, also while it
    runs.
    """
    from ..report.status import as_values
    from ..report.status import status as read_status
    from ..report.tables import console, status_table

    steps = read_status(run)
    if as_json:
        click.echo(json.dumps(as_values(run, steps), indent=1))
    else:
        console().print(status_table(steps))


@click.command()
@RUN
@click.argument("name", required=False)
@click.argument("features", nargs=-1, type=int)
@click.option("--contexts", default=5, show_default=True, help="Contexts of each feature, the strongest first.")
@click.option("--window", default=12, show_default=True, help="Tokens shown before and after.")
@refuse
def features(run: Path, name: str | None, features: tuple[int, ...], contexts: int, window: int) -> None:
    """How well the dictionary NAME fits RUN's activations, and where FEATURES fire (by default five telling ones)."""
    from ..report.features import feature_report
    from ..report.tables import console, features_text

    console().print(features_text(feature_report(run, name, features, contexts, window)))


@click.command()
@click.argument("model")
@click.argument("patterns", nargs=-1)
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@refuse
def hooks(model: str, patterns: tuple[str, ...], revision: str | None) -> None:
    """List the hook points of MODEL with their dimensions and sizes; only those that PATTERNS name, if any are given.

    Reads the model's configuration, not its weights.
    """
    from ...stages.models.source import open_checkpoint
    from ..report.tables import console, hooks_table

    spec = open_checkpoint(model, revision).spec
    console().print(hooks_table(spec, patterns))


@click.command()
@RUN
@click.option("--document", type=int, help="Only this document, by its number.")
@click.option("--sequence", type=int, help="Only this sequence.  [default: the first]")
@click.option(
    "--positions", default="0:16", show_default=True, help="FIRST:LAST positions of each sequence, both included."
)
@click.option("--layers", help="Layers, as in 0,10-12.  [default: all captured]")
@click.option("--hook", default="hook_resid_post", show_default=True, help="Kind of residual-stream hook point.")
@click.option("--partial", is_flag=True, help="Look at a run that is not complete.")
@refuse
def lens(
    run: Path, document: int | None, sequence: int | None, positions: str, layers: str | None, hook: str, partial: bool
) -> None:
    """Logit lens over RUN's stored residual stream: each layer's top token, its probability, and the true next token's
    rank.
    """
    from ..report.lens import lens_of_run
    from ..report.tables import console, lens_table

    found, decode = lens_of_run(
        run, document=document, sequence=sequence, positions=positions, layers=layers, hook=hook, partial=partial
    )
    console().print(lens_table(found, decode))
