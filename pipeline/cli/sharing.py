"""Commands that take a run to the Hugging Face hub and back."""

from __future__ import annotations

from dataclasses import asdict

import click

from ...stores.places import Place
from .manual import Command
from .shared import JSON, RUN, PlaceType, print_json, refuse

REPOSITORY = click.argument("repository", metavar="OWNER/NAME")


@click.command(
    cls=Command,
    short_help="Publish a run as a dataset on the Hugging Face hub",
    examples=(
        "forebay push runs/novels ada/novels --dry-run",
        "forebay push runs/novels ada/novels --private",
    ),
)
@RUN
@REPOSITORY
@click.option("--private", is_flag=True, help="Make the repository private; refused where it is there and public.")
@click.option("--revision", metavar="BRANCH", help="The branch to push to, made if need be.  [default: the main one]")
@click.option("--dry-run", is_flag=True, help="Check the run and say what would go there, without asking the hub.")
@JSON
@refuse
def push(run: Place, repository: str, private: bool, revision: str | None, dry_run: bool, as_json: bool) -> None:
    """Publish RUN as the dataset OWNER/NAME on the Hugging Face hub: stores, records, recipe, tokenizer, indexes and
    trained dictionaries, after all of it was read again. Only what is new is sent. The login is that of
    `hf auth login`, or HF_TOKEN.

    Recipe and records say where a run was made: names of folders and machines. A run that is not finished, or does not
    verify, is refused.
    """
    from ..hub.push import push_to_hub
    from ..progress import Quiet, progress_for
    from ..report.tables import console

    said = Quiet() if as_json else progress_for(console(err=True))
    found = push_to_hub(run, repository, private=private, revision=revision, dry_run=dry_run, progress=said)
    if as_json:
        print_json(asdict(found))
        return
    click.echo(f"{found.repository}: {found.n_file:,} files, {found.nbytes:,} bytes")
    if found.commit is None:
        click.echo("Nothing was sent.")
        return
    click.echo(f"sent: {found.n_sent:,} files, {found.sent_bytes:,} bytes\ncommit: {found.commit}\n{found.url}")


@click.command(
    cls=Command,
    short_help="Fetch a run from the Hugging Face hub, checked",
    examples=(
        "forebay pull ada/novels runs/novels",
        "forebay pull ada/novels runs/novels --revision v1 --steps tokens,features-sae",
    ),
)
@REPOSITORY
@click.argument("run", type=PlaceType())
@click.option("--revision", metavar="REV", help="A branch, a tag or a commit.  [default: the main branch]")
@click.option("--steps", help="Only these steps, as in tokens,activations.  [default: all]")
@JSON
@refuse
def pull(repository: str, run: Place, revision: str | None, steps: str | None, as_json: bool) -> None:
    """Fetch the run in the dataset OWNER/NAME of the Hugging Face hub into RUN, a new folder, or go on with it: what is
    there and whole is not fetched again. Every object is checked against the run's own records as it comes.

    Prints the commit that was read: give it as --revision to have the same bytes again.
    """
    from ..hub.pull import from_hub
    from ..progress import Quiet, progress_for
    from ..report.tables import console

    chosen = steps.split(",") if steps is not None else None
    said = Quiet() if as_json else progress_for(console(err=True))
    found = from_hub(repository, run, revision=revision, steps=chosen, progress=said)
    if as_json:
        print_json({**asdict(found), "folder": str(found.folder)})
        return
    click.echo(
        f"{found.folder}: {found.n_file:,} files, {found.nbytes:,} bytes\n"
        f"fetched: {found.n_fetched:,} files, {found.fetched_bytes:,} bytes\ncommit: {found.commit}"
    )
