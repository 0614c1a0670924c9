"""Commands that look at a run or a model and change nothing."""

from __future__ import annotations

from pathlib import Path

import click

from .completing import dictionaries, kinds, known_hooks
from .manual import Command
from .shared import JSON, RUN, print_json, refuse


@click.command(
    cls=Command,
    short_help="Say how far a run is, while it runs or after",
    examples=(
        "forebay status runs/recipe",
        "forebay status s3://bucket/run --json",
    ),
)
@RUN
@JSON
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
        print_json(as_values(run, steps))
    else:
        console().print(status_table(steps))


@click.command(
    cls=Command,
    short_help="Show what a dictionary's features fire at, and how well it fits",
    examples=(
        "forebay features runs/recipe",
        "forebay features runs/recipe sae 1097 12 --contexts 20",
        "forebay features runs/recipe sae --json",
    ),
)
@RUN
@click.argument("name", required=False, shell_complete=dictionaries)
@click.argument("features", nargs=-1, type=int)
@click.option("--contexts", default=5, show_default=True, help="Contexts of each feature, the strongest first.")
@click.option("--window", default=12, show_default=True, help="Tokens shown before and after.")
@JSON
@refuse
def features(run: Path, name: str | None, features: tuple[int, ...], contexts: int, window: int, as_json: bool) -> None:
    """How well the dictionary NAME fits RUN's activations, and where FEATURES fire (by default five telling ones)."""
    from ..report.features import feature_report
    from ..report.tables import console, features_text
    from ..report.values import features_values

    report = feature_report(run, name, features, contexts, window)
    if as_json:
        print_json(features_values(run, report))
    else:
        console().print(features_text(report))


@click.command(
    cls=Command,
    short_help="List a model's hook points with their dimensions and sizes",
    examples=(
        "forebay hooks HuggingFaceTB/SmolLM2-135M",
        "forebay hooks ./model 'blocks.{0,5}.attn.*' hook_embed",
        "forebay hooks model.gguf --json",
    ),
)
@click.argument("model")
@click.argument("patterns", nargs=-1, shell_complete=known_hooks)
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@JSON
@refuse
def hooks(model: str, patterns: tuple[str, ...], revision: str | None, as_json: bool) -> None:
    """List the hook points of MODEL with their dimensions and sizes; only those that PATTERNS name, if any are given.

    Reads the model's configuration, not its weights.
    """
    from ...stages.models.source import open_checkpoint
    from ..report.tables import console, hooks_table
    from ..report.values import hooks_values

    spec = open_checkpoint(model, revision).spec
    if as_json:
        print_json(hooks_values(model, spec, patterns))
    else:
        console().print(hooks_table(spec, patterns))


@click.command(
    cls=Command,
    short_help="Show what each layer would say next: the logit lens",
    examples=(
        "forebay lens runs/recipe",
        "forebay lens runs/recipe --document 7 --positions 0:40 --layers 0,10-12",
        "forebay lens runs/recipe --sequence 3 --json",
    ),
)
@RUN
@click.option("--document", type=int, help="Only this document, by its number.")
@click.option("--sequence", type=int, help="Only this sequence.  [default: the first]")
@click.option(
    "--positions", default="0:16", show_default=True, help="FIRST:LAST positions of each sequence, both included."
)
@click.option("--layers", help="Layers, as in 0,10-12.  [default: all captured]")
@click.option(
    "--hook",
    default="hook_resid_post",
    show_default=True,
    shell_complete=kinds,
    help="Kind of residual-stream hook point.",
)
@click.option("--partial", is_flag=True, help="Look at a run that is not complete.")
@JSON
@refuse
def lens(
    run: Path,
    document: int | None,
    sequence: int | None,
    positions: str,
    layers: str | None,
    hook: str,
    partial: bool,
    as_json: bool,
) -> None:
    """Logit lens over RUN's stored residual stream: each layer's top token, its probability, and the true next token's
    rank.
    """
    from ..report.lens import lens_of_run
    from ..report.tables import console, lens_table
    from ..report.values import lens_values

    found, decode = lens_of_run(
        run, document=document, sequence=sequence, positions=positions, layers=layers, hook=hook, partial=partial
    )
    if as_json:
        print_json(lens_values(run, hook, found, decode))
    else:
        console().print(lens_table(found, decode))
