"""The command line: verbs over recipes and runs. What a run does stands in its recipe, not in flags."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from .exit_codes import FAILED, INTERRUPTED, REFUSED

if TYPE_CHECKING:
    from ..stores.store import Store

RUN = click.argument("run", type=click.Path(path_type=Path))
RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
TO = click.option(
    "--to", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/NAME of the recipe]"
)
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps, or auto for the best there is."
)


class Refusal(click.ClickException):
    """Something the user can mend: one message, no traceback."""

    exit_code = REFUSED


class Broken(Refusal):
    """Something that went wrong on disk."""

    exit_code = FAILED


P = ParamSpec("P")
R = TypeVar("R")


def refuse(command: Callable[P, R]) -> Callable[P, R]:
    """Turns forebay's own errors into a message and an exit code."""

    @wraps(command)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        from ..stages.dictionaries.errors import DictionaryError
        from ..stages.models.errors import HookError, ModelError
        from ..stores.errors import FULL, CorruptStore, DiskFull, ForebayError

        try:
            return command(*args, **kwargs)
        except (DiskFull, CorruptStore) as error:
            raise Broken(str(error)) from error
        except (ForebayError, ModelError, HookError, DictionaryError) as error:
            raise Refusal(str(error)) from error
        except KeyboardInterrupt:
            # Before a run could take signals over, or at the second one. Exit code 1 would say that units had failed.
            click.echo("Interrupted. What is recorded is safe; run the same command again to go on.", err=True)
            sys.exit(INTERRUPTED)
        except OSError as error:
            if error.errno in FULL:
                raise Broken(f"{error.strerror}. What is recorded is safe. Free some space and run again") from error
            raise Broken(f"{error.filename or 'the file system'}: {error.strerror or error}") from error

    return checked


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="forebay")
def main() -> None:
    """Compute a language model's activations once, keep them labelled, ask them anything later.

    \b
    forebay plan RECIPE      what a run would do: units, bytes, time
    forebay run RECIPE       do it, or go on with it
    forebay status RUN       how far it is
    forebay lens RUN         a first look: what each layer would say next
    forebay features RUN     what its dictionaries' features fire at
    """


@main.command()
@RECIPE
@TO
@DEVICE
@refuse
def plan(recipe: Path, to: Path | None, device: str) -> None:
    """Check RECIPE and print units, bytes and time, without computing anything.

    Counts the corpus's tokens and keeps the counts in the run's folder, so that the run need not count again.
    """
    from .plan import default_folder, make_plan, resolve_device
    from .progress import progress_for
    from .recipe import read_recipe
    from .report.estimate import plan_table
    from .report.tables import console

    specs = read_recipe(recipe)
    with progress_for(console(err=True)) as progress:
        made = make_plan(specs, default_folder(specs, to), resolve_device(device), progress.counted)
    console().print(plan_table(made))
    made.check_space()


@main.command()
@RECIPE
@TO
@DEVICE
@refuse
def run(recipe: Path, to: Path | None, device: str) -> None:
    """Run RECIPE, or go on where an earlier run of it stopped.

    Ctrl-C and SIGTERM stop cleanly. Exit codes: 0 complete, 75 stopped early (run again), 1 some units failed, 2
    refused.
    """
    from .progress import progress_for
    from .report.tables import console, outcome_text
    from .run import run as run_recipe

    outcome = run_recipe(recipe, to, device=device, progress=progress_for(console(err=True)))
    console().print(outcome_text(outcome), highlight=False, markup=False, soft_wrap=True)
    sys.exit(outcome.code)


@main.command()
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
    from .dictionaries import train_recipe
    from .progress import progress_for
    from .recipe import read_recipe
    from .report.tables import console

    sys.exit(train_recipe(read_recipe(recipe), names, to, device, progress_for(console(err=True))))


@main.command()
@RUN
@click.argument("name", required=False)
@refuse
def index(run: Path, name: str | None) -> None:
    """Build the index of RUN's features, or only of those called NAME: it says where a feature fires.

    `forebay run` builds it too; this builds one that is missing or damaged. Goes on where an earlier call stopped.
    """
    from .dictionaries import index_run
    from .progress import progress_for
    from .report.tables import console

    sys.exit(index_run(run, name, progress_for(console(err=True))))


@main.command()
@RUN
@click.argument("name", required=False)
@click.argument("features", nargs=-1, type=int)
@click.option("--contexts", default=5, show_default=True, help="Contexts of each feature, the strongest first.")
@click.option("--window", default=12, show_default=True, help="Tokens shown before and after.")
@refuse
def features(run: Path, name: str | None, features: tuple[int, ...], contexts: int, window: int) -> None:
    """How well the dictionary NAME fits RUN's activations, and where FEATURES fire (by default five telling ones)."""
    from .report.features import feature_report
    from .report.tables import console, features_text

    console().print(features_text(feature_report(run, name, features, contexts, window)))


@main.command()
@RUN
@refuse
def status(run: Path) -> None:
    """How far RUN is: units, tokens, bytes, rate, failures. Reads the ledgers only, also while it runs."""
    from .report.status import status as read_status
    from .report.tables import console, status_table

    console().print(status_table(read_status(run)))


def stores_of(run: Path) -> list[Store]:
    """The stores of a run. StoreNotFound if there is none, so that no wrong path is taken for a run that is whole."""
    from ..stores.errors import StoreNotFound
    from ..stores.tree import run_stores

    found = list(run_stores(run))
    if not found:
        raise StoreNotFound(f"{run} is no run: it holds no store. Give the folder that `forebay run` wrote")
    return found


@main.command()
@RUN
@refuse
def verify(run: Path) -> None:
    """Read everything RUN has recorded again and compare checksums. Exit code 1 if anything is damaged."""
    damaged = 0
    for store in stores_of(run):
        wrong = store.verify()
        done = len(store.ledger.done())
        click.echo(
            f"{store.name}: {done - len(wrong)} of {done} recorded units are whole ({len(store.schema.grid)} in all)"
        )
        for unit, lines in wrong.items():
            damaged += 1
            for line in lines:
                click.echo(f"  unit {unit}: {line}", err=True)
    if damaged:
        raise Broken(
            f"{damaged} units are damaged. `forebay repair {run}` drops their records; "
            "running the recipe again computes them anew"
        )


@main.command()
@RUN
@refuse
def repair(run: Path) -> None:
    """Drop the records of RUN's damaged units, so that running the recipe again computes them anew."""
    for store in stores_of(run):
        wrong = store.verify()
        for unit in wrong:
            store.ledger.drop(unit)
        click.echo(
            f"{store.name}: dropped {len(wrong)} damaged units" + (f" ({', '.join(map(str, wrong))})" if wrong else "")
        )


@main.command()
@click.argument("model")
@click.argument("patterns", nargs=-1)
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@refuse
def hooks(model: str, patterns: tuple[str, ...], revision: str | None) -> None:
    """List the hook points of MODEL with their dimensions and sizes; only those that PATTERNS name, if any are given.

    Reads the model's configuration, not its weights.
    """
    from ..stages.models.source import open_checkpoint
    from .report.tables import console, hooks_table

    spec = open_checkpoint(model, revision).spec
    console().print(hooks_table(spec, patterns))


@main.command()
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
    from .report.lens import lens_of_run
    from .report.tables import console, lens_table

    found, decode = lens_of_run(
        run, document=document, sequence=sequence, positions=positions, layers=layers, hook=hook, partial=partial
    )
    console().print(lens_table(found, decode))
