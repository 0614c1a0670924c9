"""The command that makes a run of another library's files."""

from __future__ import annotations

from pathlib import Path

import click

from ...stores.places import Place
from .manual import Command
from .shared import JSON, RUN, end, refuse


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    """FROM=TO, several times. UsageError for anything else."""
    found = {}
    for text in texts:
        name, equals, point = text.partition("=")
        if not (name and equals and point):
            raise click.UsageError(f"--rename {text!r} is not FROM=TO, as in layers.3.ln=blocks.3.hook_mlp_out")
        found[name] = point
    return found


@click.command(
    "import",
    cls=Command,
    short_help="Make a run of another library's cache of activations or latents",
    examples=(
        "forebay import results/run/latents runs/latents --format delphi",
        "forebay import vault/llama runs/llama --format activault --hooks models.layers.24.mlp.post",
        "forebay import vault/old runs/old --format activault --rename emb=hook_embed",
    ),
)
@click.argument("source", type=click.Path(path_type=Path))
@RUN
@click.option(
    "--format",
    "of",
    type=click.Choice(["delphi", "activault"]),
    required=True,
    help="delphi: a cache of latents, as features; activault: a run's files, as activations.",
)
@click.option("--hooks", multiple=True, help="Only these, by their names there; may be given several times.")
@click.option(
    "--rename",
    multiple=True,
    metavar="FROM=TO",
    help="The hook point that a name there stands for; may be given several times.",
)
@click.option("--transcode", is_flag=True, help="delphi: the latents are of transcoders, which read what enters.")
@click.option("--skip-positions", type=click.IntRange(min=0), help="delphi: first tokens left out of the index.  [1]")
@click.option("--model", help="The model's name, where the files have none.")
@click.option("--tokenizer", type=click.Path(path_type=Path, dir_okay=False), help="A tokenizer.json, for the text.")
@JSON
@refuse
def import_(
    source: Path,
    run: Place,
    of: str,
    hooks: tuple[str, ...],
    rename: tuple[str, ...],
    transcode: bool,
    skip_positions: int | None,
    model: str | None,
    tokenizer: Path | None,
    as_json: bool,
) -> None:
    """Write what another library has kept in the folder SOURCE as a run in RUN, or go on with it.

    Nothing is rounded, no code in the files is run, no model is asked for. Killed or stopped early (exit code 75), it
    goes on when the same command is run again. What does not go together is refused by name. Exit codes as of `forebay
    run`. See docs/coming-from.md.
    """
    from ..interchange.activault_files import from_activault
    from ..interchange.delphi_cache import from_delphi
    from ..progress import progress_for
    from ..report.tables import console

    if of != "delphi" and (transcode or skip_positions is not None):
        raise click.UsageError("--transcode and --skip-positions are for --format delphi")
    progress, chosen, names = progress_for(console(err=True)), hooks or None, _pairs(rename)
    if of == "delphi":
        outcome = from_delphi(
            source,
            run,
            hookpoints=chosen,
            transcode=transcode,
            rename=names,
            model=model,
            tokenizer=tokenizer,
            skip_positions=1 if skip_positions is None else skip_positions,
            progress=progress,
        )
    else:
        outcome = from_activault(
            source, run, hooks=chosen, rename=names, model=model, tokenizer=tokenizer, progress=progress
        )
    end(outcome, as_json)
