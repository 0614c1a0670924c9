"""Commands that make runs larger."""

from __future__ import annotations

from pathlib import Path

import click

from .completing import devices
from .manual import Command
from .shared import JSON, RUN, end, refuse


@click.command(
    cls=Command,
    short_help="Put more text behind what a run has, and compute what is new",
    examples=(
        "forebay append runs/novels more.jsonl",
        "forebay append runs/novels 2024/*.jsonl.zst --device cuda:1",
        "forebay append runs/novels      # go on with what was begun",
    ),
)
@RUN
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--device",
    shell_complete=devices,
    help="As in `forebay run`.  [default: the device that the run was made on]",
)
@JSON
@refuse
def append(run: Path, files: tuple[Path, ...], device: str | None, as_json: bool) -> None:
    """Put corpus FILES behind those of RUN and compute what is new: the run grows where it lies.

    What it holds then is what its recipe would have made of all files at once. Killed or stopped early (exit code 75),
    it goes on when the same command is run again. Without FILES it goes on with what was begun. Put FILES into the
    recipe, too, if you mean to run that again.
    """
    from ..appending import append as append_files
    from ..progress import progress_for
    from ..report.tables import console

    outcome = append_files(run, files, device=device, progress=progress_for(console(err=True)))
    end(outcome, as_json)
