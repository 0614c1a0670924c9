"""Commands that check what is kept, and mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .manual import Command
from .shared import DEVICE, JSON, RUN, Broken, print_json, refuse, stores_of

if TYPE_CHECKING:
    from ...stores.ledger import Ledger
    from ..audit import Finding
    from ..recompute import Difference


@click.command(
    cls=Command,
    short_help="Read everything a run has recorded again, and check it",
    examples=(
        "forebay verify runs/recipe",
        "forebay verify runs/recipe --recompute 3",
        "forebay verify runs/recipe --json",
    ),
)
@RUN
@click.option(
    "--recompute", type=click.IntRange(min=0), default=0, metavar="K", help="Also compute K units of each step again."
)
@click.option("--seed", default=0, show_default=True, help="Chooses the units that are computed again.")
@DEVICE
@JSON
@refuse
def verify(run: Path, recompute: int, seed: int, device: str, as_json: bool) -> None:
    """Read everything RUN has recorded again and compare checksums; check that rows in are rows out. Exit code 1 if
    anything is wrong.

    With --recompute K, computes K random units of each step again, in memory, and compares them bit for bit. That needs
    the model and the corpus, and the kind of device, libraries and threads of the run.
    """
    said = _Findings(quiet=as_json)
    steps, wrong = _damaged(run, said)
    wrong += _miscounted(run, wrong, said)
    again, different = _different(run, recompute, device, seed, said) if recompute and not wrong else ([], [])
    if as_json:
        every: list[Finding | Difference] = [*wrong, *different]
        findings = [{"step": one.step, "unit": one.unit, "said": str(one)} for one in every]
        print_json({"run": str(run), "whole": not findings, "steps": steps, "recomputed": again, "findings": findings})
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


@dataclass(frozen=True, slots=True)
class _Findings:
    """Says what is found as it is found, or nothing where it is printed as one object in the end."""

    quiet: bool

    def count(self, line: str) -> None:
        if not self.quiet:
            click.echo(line)

    def wrong(self, lines: Iterable[str]) -> None:
        if not self.quiet:
            _say(lines)


def _damaged(run: Path, said: _Findings) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Of every step how many units there are, are recorded and are whole; and what is wrong with the objects of
    recorded units, against their checksums.
    """
    from ..audit import Finding

    steps, found = [], []
    for store in stores_of(run):
        wrong = store.verify()
        done, units = len(store.ledger.done()), len(store.schema.grid)
        said.count(f"{store.name}: {done - len(wrong)} of {done} recorded units are whole ({units} in all)")
        steps.append({"name": store.name, "units": units, "recorded": done, "whole": done - len(wrong)})
        for unit, lines in wrong.items():
            found += [Finding(store.name, unit, line) for line in lines]
            said.wrong(f"unit {unit}: {line}" for line in lines)
    return steps, found


def _miscounted(run: Path, known: list[Finding], said: _Findings) -> list[Finding]:
    """What is wrong with the records, taken together, beside what is known."""
    from ..audit import audit

    found = [one for one in audit(run, partial=True) if one not in known]
    if not found and not known:
        said.count("rows in are rows out: the records cover what they should, once")
    said.wrong(map(str, found))
    return found


def _different(
    run: Path, n_unit: int, device: str, seed: int, said: _Findings
) -> tuple[list[dict[str, Any]], list[Difference]]:
    """Of every step how many units were computed again and came to the same bits; and the differences."""
    from ..plan import resolve_device
    from ..recompute import recompute

    looked: list[str] = []
    found = list(recompute(run, n_unit, resolve_device(device), seed, lambda step, unit: looked.append(step)))
    steps = []
    for step in dict.fromkeys(looked):
        n_unit, wrong = looked.count(step), len({one.unit for one in found if one.step == step})
        said.count(f"{step}: {n_unit - wrong} of {n_unit} units came to the same bits again")
        steps.append({"name": step, "units": n_unit, "same": n_unit - wrong})
    said.wrong(map(str, found))
    return steps, found


@click.command(
    cls=Command,
    short_help="Drop the records of what is damaged, so that a run heals it",
    examples=(
        "forebay repair runs/recipe",
        "forebay repair runs/recipe --failed",
    ),
)
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
