"""What the commands share: their arguments, and how an error becomes a message and an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import click
from click.shell_completion import CompletionItem

from ...stores.errors import SchemaError
from ...stores.places import Place, place
from ..exit_codes import FAILED, INTERRUPTED, REFUSED
from ..report.printable import printable
from .completing import devices

if TYPE_CHECKING:
    from ...stores.store import Store
    from ..run import Outcome


class PlaceType(click.ParamType):  # type: ignore[type-arg]
    """A folder of this machine, or an address in an object store."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return click.Path().shell_complete(ctx, param, incomplete)

    def convert(self, value: str | Place, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        try:
            return place(value)
        except SchemaError as error:
            self.fail(str(error), param, ctx)


RUN = click.argument("run", type=PlaceType())
RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
TO = click.option(
    "--to", type=PlaceType(), help="Folder of the run, or s3://…, gs://…, az://…  [default: runs/NAME of the recipe]"
)
DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    shell_complete=devices,
    help="cpu, cuda, cuda:1, mps, or auto for the best there is.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for scripts.")


class Refusal(click.ClickException):
    """Something the user can mend: one message, no traceback. What it quotes may come from anywhere."""

    exit_code = REFUSED

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, lines=True, most=20_000))


class Broken(Refusal):
    """Something that went wrong on disk."""

    exit_code = FAILED


P = ParamSpec("P")
R = TypeVar("R")


def refuse(command: Callable[P, R]) -> Callable[P, R]:
    """Turns forebay's own errors into a message and an exit code."""

    @wraps(command)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        from ...stages.dictionaries.errors import DictionaryError
        from ...stages.models.errors import HookError, ModelError
        from ...stores.errors import FULL, CorruptStore, DiskFull, ForebayError, StorageError

        try:
            return command(*args, **kwargs)
        except (DiskFull, CorruptStore, StorageError) as error:
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


def print_json(value: dict[str, Any]) -> None:
    """One JSON object to standard output. It is ASCII, so that nothing in it steers a terminal; numbers are finite."""
    click.echo(json.dumps(value, indent=1, allow_nan=False))


def end(outcome: Outcome, as_json: bool) -> NoReturn:
    """Says what a call has done, as a text or as one JSON object, and ends the process with its code."""
    from ..report.tables import console, outcome_text
    from ..report.values import outcome_values

    if as_json:
        print_json(outcome_values(outcome))
    else:
        console().print(outcome_text(outcome), highlight=False, markup=False, soft_wrap=True)
    sys.exit(outcome.code)


def stores_of(run: Place) -> list[Store]:
    """The stores of a run. StoreNotFound if there is none, so that no wrong path is taken for a run that is whole."""
    from ...stores.errors import StoreNotFound
    from ...stores.tree import run_stores

    found = list(run_stores(run))
    if not found:
        raise StoreNotFound(f"{run} is no run: it holds no store. Give the folder that `forebay run` wrote")
    return found
