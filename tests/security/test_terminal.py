"""Whatever a stranger's files say is shown as text: it steers no terminal, hides nothing, and is no markup."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import click
import pytest
import xarray as xr
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from forebay.pipeline.cli import main
from forebay.pipeline.cli.shared import Refusal, refuse
from forebay.pipeline.progress import Lines, Terminal
from forebay.pipeline.report.printable import printable
from forebay.pipeline.report.status import StepStatus
from forebay.pipeline.report.tables import lens_table, status_table
from forebay.stores.errors import CorpusError, SchemaError
from forebay.stores.grid import Unit

from .hostile_stores import write_run

HOSTILE = {
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;https://evil.example\x1b\\click\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;b3duZWQ=\x07",
    "cleared screen": "\x1b[2J\x1b[H",
    "one byte CSI": "\x9b31m",
    "bell and backspace": "\x07\x08\x08\x08",
    "carriage return": "done\rfailed",
    "right to left": "\u202etxt.exe\u202c",
    "isolates": "\u2066a\u2069",
    "zero width": "to\u200bken\u2060\ufeff",
    "tags": "\U000e0041\U000e0042",
    "lone surrogate": "a\ud800b",
    "null": "a\0b",
    "line separators": "a\u2028b\u2029c\x85d",
    "delete": "a\x7fb",
}
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def unsafe(text: str, lines: bool = True) -> list[str]:
    """The characters of a text that a terminal does not show as themselves: an oracle by Unicode's categories."""
    return [one for one in text if unicodedata.category(one) in UNSEEN and not (lines and one == "\n")]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_printable_spells_out_what_would_not_be_seen_as_itself(text: str) -> None:
    shown = printable(text)
    assert unsafe(text)
    assert unsafe(shown, lines=False) == []
    shown.encode("utf-8")


@given(st.text(st.characters(exclude_categories=()), max_size=60), st.booleans())
def test_printable_text_is_safe_whatever_it_was_and_stays_what_it_was_if_it_is_safe(text: str, lines: bool) -> None:
    shown = printable(text, lines=lines)
    assert unsafe(shown, lines=lines) == []
    if not unsafe(text, lines=lines):
        assert len(shown) >= len(text)
    if text.isprintable():
        assert shown == text


def test_printable_keeps_ends_of_lines_where_asked_and_cuts_what_is_long() -> None:
    assert printable("a\nb") == "a\\nb"
    assert printable("a\nb", lines=True) == "a\nb"
    shown = printable("x" * 10**7)
    assert len(shown) < 5000
    assert "9,996,000 characters" in shown
    assert printable(ValueError("\x1b")) == "\\x1b"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_errors_of_the_command_line_are_shown_as_text(text: str) -> None:
    @click.command()
    @refuse
    def failing() -> None:
        raise CorpusError(f"{text} is no document\nsecond line")

    found = CliRunner().invoke(failing)
    assert found.exit_code == Refusal.exit_code
    assert unsafe(found.output) == []
    assert "is no document\nsecond line" in found.output


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=200, color_system=None, legacy_windows=False), file


MARKUP = "[red]x[/red][link=https://evil.example]y[/link][/]"


def step(name: str, error: str) -> StepStatus:
    from forebay.pipeline.report.status import Failure

    failure = Failure(unit=0, attempts=1, error=error, record="r")
    return StepStatus(
        name=name, kind="tokens", units=1, units_done=0, n_token=4, tokens_done=0, nbytes=16, tokens_per_second=None,
        workers=(), failed=(0,), failures=(failure,), unreadable=(error,),
    )  # fmt: skip


@pytest.mark.parametrize("text", [*HOSTILE.values(), MARKUP], ids=[*HOSTILE, "markup"])
def test_states_show_names_and_errors_as_text(text: str) -> None:
    console, file = terminal()
    console.print(status_table([step(f"step {text}", text)]))
    assert unsafe(file.getvalue()) == []
    assert "evil.example" not in file.getvalue() or text in file.getvalue() or text == HOSTILE["link"]
    if text == MARKUP:
        assert file.getvalue().count(MARKUP) == 5


@pytest.mark.parametrize("text", [*HOSTILE.values(), MARKUP], ids=[*HOSTILE, "markup"])
def test_tokens_in_a_lens_are_text(text: str) -> None:
    lens = xr.Dataset(
        {
            "top_token_id": (("token", "rank"), [[0]]),
            "top_probability": (("token", "rank"), [[0.5]]),
            "next_rank": ("token", [0.0]),
        },
        coords={key: ("token", [0]) for key in ("sequence", "position", "token_id", "next_token_id")},
    )
    console, file = terminal()
    console.print(lens_table(lens, {0: text}))
    assert unsafe(file.getvalue()) == []
    assert text != MARKUP or file.getvalue().count(MARKUP.replace(" ", "·")) == 3


@pytest.mark.parametrize("text", [*HOSTILE.values(), MARKUP], ids=[*HOSTILE, "markup"])
def test_failures_in_a_run_are_told_as_text(text: str) -> None:
    for kind in (Lines, Terminal):
        file = io.StringIO()
        console = Console(file=file, width=400, force_terminal=False)
        progress: Any = kind(console)
        if kind is Lines:
            progress.start("tokens", 4, 0)
        progress.failed(Unit(0, 0, 4), SchemaError(text), Path("failed/000000.1.json"))
        progress.said(f"another process is at it ({text})")
        assert unsafe(file.getvalue()) == []
        assert "FAILED" in file.getvalue()


def test_file_names_are_told_as_text(tmp_path: Path) -> None:
    """A name on the command line may be one that was unpacked from somewhere."""
    for text in (HOSTILE["colour"], HOSTILE["right to left"], MARKUP):
        for command in (["status"], ["verify"], ["lens"], ["plan"], ["run"]):
            found = CliRunner().invoke(main, [*command, str(tmp_path / text)])
            assert found.exit_code == 2, found.output
            assert unsafe(found.output + found.stderr) == []


def test_what_records_and_folders_say_is_told_as_text(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run)
    failed = run / "activations" / "failed"
    failed.mkdir()
    said = {"error": "".join(HOSTILE.values()) + MARKUP, "traceback": ""}
    (failed / "000001.1.json").write_text(json.dumps(said))
    (run / "activations" / "done" / "000001.json").unlink()
    for command in ("status", "verify", "repair"):
        found = CliRunner().invoke(main, [command, str(run)])
        assert unsafe(found.output + found.stderr) == []
        assert found.exit_code in (0, 1)


@pytest.mark.parametrize("text", [*HOSTILE.values(), "$\\frac{a}{b}$"], ids=[*HOSTILE, "mathematics"])
def test_labels_of_figures_are_text(text: str) -> None:
    from forebay.stages.plots.style import drawable, token_label

    for label in (token_label(text), drawable(text)):
        assert unsafe(label) == []
        assert label.replace("\\$", "").count("$") == 0


def test_the_page_of_a_notebook_shows_attributes_as_text(tmp_path: Path) -> None:
    """xarray writes the page: what a store says of itself comes out escaped."""
    from forebay.stores.tree import open_run

    from .hostile_stores import edit_header

    write_run(tmp_path / "run")
    script = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    edit_header(tmp_path / "run", lambda said: said["provenance"].update(model={"source": script}))
    tree = open_run(tmp_path / "run")
    assert tree["activations/hook_embed"].attrs["model"]["source"] == script
    assert "<script>alert" not in tree._repr_html_()
    assert "<img src=x" not in tree._repr_html_()
