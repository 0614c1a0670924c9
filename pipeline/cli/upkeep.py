"""Commands that check what is kept, and mend it."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import RUN, Broken, refuse, stores_of


@click.command()
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


@click.command()
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
