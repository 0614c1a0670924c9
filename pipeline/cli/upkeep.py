"""Commands that check what is kept, and mend it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .shared import DEVICE, RUN, Broken, refuse, stores_of

if TYPE_CHECKING:
    from ...stores.ledger import Ledger
    from ..audit import Finding
    from ..recompute import Difference


@click.command()
@RUN
@click.option(
    "--recompute", type=click.IntRange(min=0), default=0, metavar="K", help="Also compute K units of each step again."
)
@click.option("--seed", default=0, show_default=True, help="Chooses the units that are computed again.")
@DEVICE
@refuse
def verify(run: Path, recompute: int, seed: int, device: str) -> None:
    """Read everything RUN has recorded again and compare checksums; check that rows in are rows out. Exit code 1 if
    anything is wrong.

    With --recompute K, computes K random units of each step again, in memory, and compares them bit for bit. That needs
    the model and the corpus, and the kind of device, libraries and threads of the run.
    """
    wrong = _damaged(run)
    wrong += _miscounted(run, wrong)
    different = _different(run, recompute, device, seed) if recompute and not wrong else []
    units = {(one.step, one.unit) for one in wrong if one.unit is not None}
    if units:
        raise Broken(
            f"{len(units)} units are damaged. `forebay repair {run}` drops their records; running the recipe again "
            "computes them anew"
        )
    if wrong:
        raise Broken(f"{run} does not hold what its records say. Delete the steps named above and run again")
    if different:
        raise Broken(
            f"{len({(one.step, one.unit) for one in different})} units came to other values than those that are "
            "stored: they were damaged before their checksums were taken, or this machine computes otherwise"
        )


def _damaged(run: Path) -> list[Finding]:
    """What is wrong with the objects of every recorded unit, against their checksums."""
    from ..audit import Finding

    found = []
    for store in stores_of(run):
        wrong = store.verify()
        done = len(store.ledger.done())
        click.echo(
            f"{store.name}: {done - len(wrong)} of {done} recorded units are whole ({len(store.schema.grid)} in all)"
        )
        for unit, lines in wrong.items():
            found += [Finding(store.name, unit, line) for line in lines]
            _say(f"unit {unit}: {line}" for line in lines)
    return found


def _miscounted(run: Path, known: list[Finding]) -> list[Finding]:
    """What is wrong with the records, taken together, beside what is known."""
    from ..audit import audit

    found = [one for one in audit(run, partial=True) if one not in known]
    if not found and not known:
        click.echo("rows in are rows out: the records cover what they should, once")
    _say(map(str, found))
    return found


def _different(run: Path, n_unit: int, device: str, seed: int) -> list[Difference]:
    from ..plan import resolve_device
    from ..recompute import recompute

    steps: list[str] = []
    found = list(recompute(run, n_unit, resolve_device(device), seed, lambda step, unit: steps.append(step)))
    for step in dict.fromkeys(steps):
        n_unit, wrong = steps.count(step), len({one.unit for one in found if one.step == step})
        click.echo(f"{step}: {n_unit - wrong} of {n_unit} units came to the same bits again")
    _say(map(str, found))
    return found


@click.command()
@RUN
@click.option("--failed", is_flag=True, help="Also clear the records of failed attempts.")
@refuse
def repair(run: Path, failed: bool) -> None:
    """Drop the records of RUN's units that do not verify, so that running the recipe again computes them anew: damaged
    or missing objects, records that cannot be read, of another recipe, or of units that do not exist.
    """
    for store in stores_of(run):
        wrong = store.verify()
        for unit, lines in wrong.items():
            store.ledger.drop(unit)
            _say(f"unit {unit}: {line}" for line in lines)
        click.echo(
            f"{store.name}: dropped {len(wrong)} damaged units" + (f" ({', '.join(map(str, wrong))})" if wrong else "")
        )
        if failed:
            click.echo(f"{store.name}: cleared the records of {_clear_failed(store.ledger)} failed attempts")


def _clear_failed(ledger: Ledger) -> int:
    from ...stores.ledger import FAILED
    from ...stores.places import names
    from ...stores.untrusted import require_no_links

    require_no_links(ledger.folder, ledger.failed_folder)
    held = [name for name in names(ledger.failed_folder) if FAILED.fullmatch(name)]
    for name in held:
        (ledger.failed_folder / name).unlink(missing_ok=True)
    return len(held)


def _say(lines: Iterable[str]) -> None:
    from ..report.printable import printable

    for line in lines:
        click.echo(f"  {printable(line)}", err=True)
