"""The file of what is promised, beside the tests, and what to say where the code differs from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "tests" / "public_api.txt"

HOW = """
If this is not on purpose, undo it. If it is, write the file anew with `scripts/docs --public-api`. It means:

* New names and new optional arguments go into a minor version, with a line in CHANGELOG.md.
* A name that is renamed or goes, an argument that is renamed, goes or becomes needed: users' code breaks. The old
  spelling stays for two minor versions and warns (`stores.deprecation`), and CHANGELOG.md says so.
* Another default, type or order of arguments is a break as well unless all calls that were right stay right.
"""


def promised() -> list[str]:
    """The lines of the file."""
    return FILE.read_text(encoding="utf-8").splitlines()


def write(lines: Sequence[str]) -> None:
    FILE.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def difference(before: Sequence[str], now: Sequence[str]) -> str:
    """What is no longer as promised and what is new, line by line, and how to go on; "" where nothing differs."""
    if list(before) == list(now):
        return ""
    gone = [f"- {line}" for line in before if line not in now]
    new = [f"+ {line}" for line in now if line not in before]
    return "\n".join(
        ["The public API is not what tests/public_api.txt says:", *(gone + new or ["the order differs"]), HOW]
    )
