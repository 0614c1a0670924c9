"""Commands that do what a recipe says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..exit_codes import INTERRUPTED
from .completing import dictionaries, trained
from .manual import Command
from .shared import DEVICE, JSON, RECIPE, RUN, TO, PlaceType, end, print_json, refuse

if TYPE_CHECKING:
    from ...stores.places import Place
    from ..plan import Plan
    from ..profile import Profile


@click.command(
    cls=Command,
    short_help="Check a recipe; print units, bytes, memory and time",
    examples=(
        "forebay plan recipe.toml",
        "forebay plan recipe.toml --measure 20 --save-profile profile.json",
        "forebay plan larger.toml --profile runs/recipe --workers 64 --json",
    ),
)
@RECIPE
@TO
@DEVICE
@click.option(
    "--measure",
    "seconds",
    type=click.FloatRange(min=0, min_open=True),
    is_flag=False,
    flag_value=60,
    metavar="[SECONDS]",
    help="Run real batches of every step for so long, and keep nothing.  [60 where no number follows]",
)
@click.option(
    "--profile",
    type=PlaceType(),
    help="Take rates from a file of --save-profile, or from the records of a run's folder.",
)
@click.option("--save-profile", type=click.Path(path_type=Path, dir_okay=False), help="Keep what was measured.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="Workers to tell the time for; may be given several times.  [1, 8, 64]",
)
@click.option(
    "--passes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Passes over the data that are to be served.",
)
@click.option(
    "--bandwidth",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MB/S",
    help="MB/s of the folder, for all workers.",
)
@click.option("--gpu-price", type=click.FloatRange(min=0), metavar="PRICE", help="€/h of a worker's device.")
@click.option("--storage-price", type=click.FloatRange(min=0), metavar="PRICE", help="€/TB-month of what is kept.")
@click.option(
    "--months",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    metavar="N",
    help="Months that it is kept.",
)
@JSON
@refuse
def plan(
    recipe: Path,
    to: Path | None,
    device: str,
    seconds: float | None,
    profile: Place | None,
    save_profile: Path | None,
    as_json: bool,
    bandwidth: float | None,
    **asked: Any,
) -> None:
    """Check RECIPE and print units, bytes and time, without computing anything that is kept.

    Counts the corpus's tokens and keeps the counts in the run's folder, so that the run need not count again. With
    --measure or --profile also rates, memory, time by workers, the bandwidth that is needed, and whether to store
    activations, features, or nothing. With --json no number is without its unit and basis. See docs/planning.md.
    """
    from ..plan import default_folder, make_plan, resolve_device
    from ..progress import progress_for
    from ..recipe import read_recipe
    from ..report.estimate import plan_table
    from ..report.tables import console

    if save_profile and not (seconds or profile):
        raise click.UsageError("--save-profile keeps what --measure or --profile gives: name one of them")
    if seconds and profile:
        raise click.UsageError("--measure and --profile both give rates: name one of them")
    specs = read_recipe(recipe)
    with progress_for(console(err=True)) as progress:
        made = make_plan(specs, default_folder(specs, to), resolve_device(device), progress.counted)
    if not as_json:
        console().print(plan_table(made))
    made.check_space()
    if seconds or profile or as_json:
        taken = _profile(made, seconds, profile)
        if taken and save_profile:
            from ..profile import save_profile as save

            save(taken, save_profile)
        _forecast(made, taken, bandwidth, as_json, **asked)


def _profile(made: Plan, seconds: float | None, source: Place | None) -> Profile | None:
    """The profile that is asked for, measured or opened, if it is the plan's."""
    from ..measuring import measure
    from ..profile import open_profile
    from ..stopping import Stopped, stop_on_signals

    if source:
        found = open_profile(source)
        found.check(made, str(source))
        return found
    if not seconds:
        return None
    with stop_on_signals() as stop:
        try:
            return measure(made, seconds, stop)
        except Stopped:
            click.echo("Interrupted. What was measured is dropped.", err=True)
            sys.exit(INTERRUPTED)


def _forecast(
    made: Plan,
    profile: Profile | None,
    bandwidth: float | None,
    as_json: bool,
    *,
    workers: tuple[int, ...],
    passes: int,
    gpu_price: float | None,
    storage_price: float | None,
    months: float,
) -> None:
    from ..report.costs import Prices
    from ..report.forecast import WORKERS, Assumptions, forecast
    from ..report.forecast_tables import forecast_tables
    from ..report.tables import console

    priced = gpu_price is not None or storage_price is not None
    asked = Assumptions(
        workers=workers or WORKERS,
        passes=passes,
        bandwidth=None if bandwidth is None else bandwidth * 1e6,
        prices=Prices(storage=storage_price or 0.0, gpu=gpu_price or 0.0, months=months) if priced else None,
    )
    found = forecast(made, profile, asked)
    if as_json:
        print_json(found.to_json())
    else:
        console().print("", forecast_tables(found), sep="\n", highlight=False)


@click.command(
    cls=Command,
    short_help="Run a recipe, or go on where it stopped",
    examples=(
        "forebay run recipe.toml",
        "forebay run recipe.toml --to s3://bucket/run --device cuda",
        "forebay run recipe.toml --rank auto",
    ),
)
@RECIPE
@TO
@DEVICE
@click.option("--rank", help="Which of several processes this is, from 0; auto: as Slurm, torchrun or mpirun say.")
@click.option("--world", type=int, help="How many processes there are; may be another number at every restart.")
@click.option("--dask", help="Workers: local:N, a scheduler's tcp://…, slurm:N, pbs:N, lsf:N, kubernetes:N.")
@JSON
@refuse
def run(
    recipe: Path,
    to: Path | None,
    device: str,
    rank: str | None,
    world: int | None,
    dask: str | None,
    as_json: bool,
) -> None:
    """Run RECIPE, or go on where an earlier run of it stopped.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 stop cleanly. Exit codes: 0 complete, 75 stopped early (run again), 1
    some units failed, 2 refused.
    """
    from ..executors import executor_for
    from ..progress import progress_for
    from ..report.tables import console
    from ..run import run as run_recipe

    executor = executor_for(dask=dask, rank=rank, world=world)
    outcome = run_recipe(recipe, to, device=device, progress=progress_for(console(err=True)), executor=executor)
    end(outcome, as_json)


@click.command(
    cls=Command,
    short_help="Train the dictionaries that a recipe asks for",
    examples=(
        "forebay train recipe.toml",
        "forebay train recipe.toml sae --device cuda",
    ),
)
@RECIPE
@click.argument("names", nargs=-1, shell_complete=trained)
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


@click.command(
    cls=Command,
    short_help="Build the index that says where a feature fires",
    examples=(
        "forebay index runs/recipe",
        "forebay index runs/recipe sae",
    ),
)
@RUN
@click.argument("name", required=False, shell_complete=dictionaries)
@refuse
def index(run: Path, name: str | None) -> None:
    """Build the index of RUN's features, or only of those called NAME: it says where a feature fires.

    `forebay run` builds it too; this builds one that is missing or damaged. Goes on where an earlier call stopped.
    """
    from ..dictionaries import index_run
    from ..progress import progress_for
    from ..report.tables import console

    sys.exit(index_run(run, name, progress_for(console(err=True))))
