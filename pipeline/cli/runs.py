"""Commands that do what a recipe says."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .shared import DEVICE, RECIPE, RUN, TO, refuse


@click.command()
@RECIPE
@TO
@DEVICE
@refuse
def plan(recipe: Path, to: Path | None, device: str) -> None:
    """Check RECIPE and print units, bytes and time, without computing anything.

    Counts the corpus's tokens and keeps the counts in the run's folder, so that the run need not count again.
    """
    from ..plan import default_folder, make_plan, resolve_device
    from ..progress import progress_for
    from ..recipe import read_recipe
    from ..report.estimate import plan_table
    from ..report.tables import console

    specs = read_recipe(recipe)
    with progress_for(console(err=True)) as progress:
        made = make_plan(specs, default_folder(specs, to), resolve_device(device), progress.counted)
    console().print(plan_table(made))
    made.check_space()


@click.command()
@RECIPE
@TO
@DEVICE
@refuse
def run(recipe: Path, to: Path | None, device: str) -> None:
    """Run RECIPE, or go on where an earlier run of it stopped.

    Ctrl-C and SIGTERM stop cleanly. Exit codes: 0 complete, 75 stopped early (run again), 1 some units failed, 2
    refused.
    """
    from ..progress import progress_for
    from ..report.tables import console, outcome_text
    from ..run import run as run_recipe

    outcome = run_recipe(recipe, to, device=device, progress=progress_for(console(err=True)))
    console().print(outcome_text(outcome), highlight=False, markup=False, soft_wrap=True)
    sys.exit(outcome.code)


@click.command()
@RECIPE
@click.argument("names", nargs=-1)
@TO
@DEVICE
@refuse
def train(recipe: Path, names: tuple[str, ...], to: Path | None, device: str) -> None:
    """Train the dictionaries of RECIPE's tables [train.NAME], or only NAMES, on what its run has captured.

    Goes on where an earlier call stopped; Ctrl-C and SIGTERM stop cleanly, with exit code 75. `forebay run` trains them
    too, between capturing and encoding.
    """
    from ..dictionaries import train_recipe
    from ..progress import progress_for
    from ..recipe import read_recipe
    from ..report.tables import console

    sys.exit(train_recipe(read_recipe(recipe), names, to, device, progress_for(console(err=True))))


@click.command()
@RUN
@click.argument("name", required=False)
@refuse
def index(run: Path, name: str | None) -> None:
    """Build the index of RUN's features, or only of those called NAME: it says where a feature fires.

    `forebay run` builds it too; this builds one that is missing or damaged. Goes on where an earlier call stopped.
    """
    from ..dictionaries import index_run
    from ..progress import progress_for
    from ..report.tables import console

    sys.exit(index_run(run, name, progress_for(console(err=True))))
