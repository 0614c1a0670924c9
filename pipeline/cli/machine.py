"""Commands about this machine: whether forebay can run here, and how the shell completes its commands."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..exit_codes import FAILED
from .manual import Command
from .shared import JSON, print_json, refuse

if TYPE_CHECKING:
    from ..doctor import Check

SHELLS = ("bash", "zsh", "fish")
_COLOURS = {"ok": "green", "note": "yellow", "problem": "red"}


@click.command(
    cls=Command,
    short_help="Check the installation, devices, disk and access to models",
    examples=(
        "forebay doctor",
        "forebay doctor /scratch --model google/gemma-2-2b",
        "forebay doctor --json",
    ),
)
@click.argument("folder", type=click.Path(path_type=Path), default=".")
@click.option("--model", help="Also say whether this model can be read, or reached on the hub; fetches no weights.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@JSON
@refuse
def doctor(folder: Path, model: str | None, revision: str | None, as_json: bool) -> None:
    """Check this machine: Python and packages, devices and memory, room and speed of FOLDER (by default the current
    one), and where models come from.

    Each line is ok, a note, or a problem with what to do. Writes a few MiB to FOLDER and removes them again. The
    network is asked for the --model only. Exit code 0 if there is no problem, 1 otherwise.
    """
    from ..doctor import examine

    if revision is not None and model is None:
        raise click.UsageError("--revision is of a model: name it with --model")
    checks: list[Check] = []
    for check in examine(folder, model, revision):
        if not as_json:
            _say(check, new=not checks or checks[-1].area != check.area)
        checks.append(check)
    problems = sum(check.state == "problem" for check in checks)
    if as_json:
        print_json({"ok": not problems, "checks": [asdict(check) for check in checks]})
    else:
        click.echo(f"\n{problems} problem{'s' * (problems != 1)}" if problems else "\nno problem")
    sys.exit(FAILED if problems else 0)


def _say(check: Check, new: bool) -> None:
    """One line of a check, and one of what to do; before the first of an area its name. Without rich, which may be
    what is missing.
    """
    from ..report.printable import printable

    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    state = click.style(f"{check.state:<8}", fg=_COLOURS[check.state])
    lines = [check.area] if new else []
    lines.append(f"  {state}{printable(check.name):<20} {printable(check.said)}")
    if check.todo:
        lines.append(f"{'':<10}→ {printable(check.todo)}")
    for line in lines:
        click.echo(line, color=False if plain else None)


@click.command(
    cls=Command,
    short_help="Print the script that lets a shell complete commands",
    examples=(
        "forebay completion bash >> ~/.bashrc",
        "forebay completion zsh >> ~/.zshrc",
        "forebay completion fish > ~/.config/fish/completions/forebay.fish",
    ),
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script by which SHELL completes commands, options, and names in a run: its steps, dictionaries and hook
    points.
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # they are click's own
    root = click.get_current_context().find_root()
    found = kind(root.command, {}, "forebay", "_FOREBAY_COMPLETE")
    # What `source` of some shells does besides is to ask which version of it is installed.
    click.echo(found.source_template % found.source_vars())
