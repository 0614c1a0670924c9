"""Commands that make one run of several, a part of one, or less of one."""

from __future__ import annotations

from pathlib import Path

import click

from ...stores.places import Place
from .completing import hooks as kept_hooks
from .completing import parts, step_list
from .manual import Command
from .shared import JSON, RUN, PlaceType, end, refuse

STEPS = click.option(
    "--steps", shell_complete=step_list, help="Only these steps, as in tokens,activations.  [default: all]"
)


@click.command(
    cls=Command,
    short_help="Write several runs end to end as one",
    examples=(
        "forebay concat runs/all runs/2023 runs/2024",
        "forebay concat s3://bucket/all runs/2023 runs/2024 --steps tokens,activations",
    ),
)
@click.argument("out", type=PlaceType())
@click.argument("runs", type=PlaceType(), nargs=-1, required=True)
@STEPS
@JSON
@refuse
def concat(out: Place, runs: tuple[Place, ...], steps: str | None, as_json: bool) -> None:
    """Write RUNS end to end as one run in OUT, or go on with it. Sequences and documents are numbered through.

    Runs of other hook points, layers, models, tokenizers or dtypes are refused by name. Everything that is read is
    verified. Exit codes as of `forebay run`. In Python, forebay.concat([...]) reads runs as one without a copy.
    """
    from ..combining import export as write
    from ..progress import progress_for
    from ..report.tables import console

    chosen = steps.split(",") if steps is not None else None
    outcome = write(runs, out, steps=chosen, progress=progress_for(console(err=True)))
    end(outcome, as_json)


def _as_safetensors(run: Place, out: Place, hooks: tuple[str, ...]) -> None:
    from ..interchange.safetensors_files import to_safetensors
    from ..progress import progress_for
    from ..report.tables import console

    click.echo(to_safetensors(run, _folder(out), hooks=hooks or "*", progress=progress_for(console(err=True))))


def _as_sae_lens(run: Place, out: Place, hooks: tuple[str, ...]) -> None:
    from ..interchange.sae_lens_dataset import to_sae_lens
    from ..progress import progress_for
    from ..report.tables import console

    if not hooks:
        raise click.UsageError("name the hook points that SAELens will train on: --hooks blocks.15.hook_resid_post")
    n_row = to_sae_lens(run, _folder(out), hooks=hooks, progress=progress_for(console(err=True)))
    click.echo(f"{n_row:,} rows in {out}")


def _folder(out: Place) -> Path:
    if not isinstance(out, Path):
        raise click.UsageError(f"{out}: other formats are written into folders of this machine")
    return out


_EXPORTS = {"safetensors": _as_safetensors, "sae-lens": _as_sae_lens}


@click.command(
    cls=Command,
    short_help="Write a part of a run as a run of its own, or in another format",
    examples=(
        "forebay export runs/novels runs/layer-10 --layers 10",
        "forebay export runs/novels runs/first --documents 0:100 --hooks 'blocks.*.hook_resid_post'",
        "forebay export runs/novels for-sae-lens --format sae-lens --hooks blocks.15.hook_resid_post",
    ),
)
@RUN
@click.argument("out", type=PlaceType())
@STEPS
@click.option(
    "--hooks",
    multiple=True,
    shell_complete=kept_hooks,
    help="Only these hook points; may be given several times, and have patterns.",
)
@click.option("--layers", help="Only these layers, as in 3,7 or 0-5; what has none is kept.")
@click.option("--documents", help="FIRST:STOP documents by number, STOP left out: the sequences that hold any of them.")
@click.option("--tokens", help="FIRST:STOP tokens by number, STOP left out: the sequences that hold any of them.")
@click.option(
    "--format",
    "to",
    type=click.Choice(["run", "safetensors", "sae-lens"]),
    default="run",
    show_default=True,
    help="safetensors: the activations alone, of all tokens; sae-lens: as the dataset on which SAELens trains.",
)
@JSON
@refuse
def export(
    run: Place,
    out: Place,
    steps: str | None,
    hooks: tuple[str, ...],
    layers: str | None,
    documents: str | None,
    tokens: str | None,
    to: str,
    as_json: bool,
) -> None:
    """Write a part of RUN as a run of its own in OUT, or go on with it; or its activations in another format.

    Sequences are kept whole. Sequences and documents are numbered from 0 again; documents keep their ids. Everything
    that is read is verified. Exit codes as of `forebay run`.
    """
    from ..combining import export as write
    from ..combining import parse_layers, parse_range
    from ..progress import progress_for
    from ..report.tables import console

    if to != "run":
        choices = {"steps": steps, "layers": layers, "documents": documents, "tokens": tokens}
        if given := [name for name, value in choices.items() if value is not None]:
            raise click.UsageError(f"--{given[0]} chooses what a run has: export that as a run, and then the run")
        if as_json:
            raise click.UsageError("--json tells of a run that is written: leave it out with other formats")
        _EXPORTS[to](run, out, hooks)
        return
    outcome = write(
        run,
        out,
        steps=steps.split(",") if steps is not None else None,
        hooks=hooks or None,
        layers=parse_layers(layers) if layers is not None else None,
        documents=parse_range(documents, "documents") if documents is not None else None,
        tokens=parse_range(tokens, "tokens") if tokens is not None else None,
        progress=progress_for(console(err=True)),
    )
    end(outcome, as_json)


@click.command(
    cls=Command,
    short_help="Delete a step, an index or a dictionary of a run",
    examples=(
        "forebay delete runs/novels index-sae",
        "forebay delete runs/novels activations --yes",
    ),
)
@RUN
@click.argument("part", shell_complete=parts)
@click.option("--yes", is_flag=True, help="Do not ask.")
@refuse
def delete(run: Place, part: str, yes: bool) -> None:
    """Delete PART of RUN: a step by the name of its folder (activations, features-NAME), index-NAME or
    dictionary-NAME. What something unfinished still needs is refused. Not while the run is being written.
    """
    from ..deleting import check, deletable, stays
    from ..deleting import delete as remove

    check(run, part)
    click.echo(f"{part}: {deletable(run)[part]}\n{stays(run, part)}")
    if not yes:
        click.confirm("Delete it?", abort=True)
    click.echo(f"Deleted {part}: {remove(run, part):,} bytes.")
