"""What a run says while it works suits where it goes: a bar that stands still on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from forebay.pipeline.progress import Lines, Terminal, progress_for

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d|10\d)(?:;\d+)*m")
WORK = """
from forebay.pipeline.progress import progress_for
from forebay.pipeline.report.tables import console
with progress_for(console(err=True)) as progress:
    progress.start("tokens", 1000, 0)
    progress.advance(400)
    progress.working("training", 5, 5, "all of it")
"""
"""A run's events, in a process of its own."""


def environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    return {**kept, "TERM": "xterm-256color", **settings}


def on_a_terminal(**settings: str) -> str:
    """What the work shows in a terminal of its own, whose settings are added to the environment."""
    outer, inner = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", WORK], stdout=inner, stderr=inner, env=environment(**settings))
    os.close(inner)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(outer, 4096):
            shown += part
    os.close(outer)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_a_terminal_gets_colours_and_a_bar_that_is_drawn_over() -> None:
    text = on_a_terminal()
    assert COLOUR.search(text)
    assert "━" in text
    assert "\x1b[1A" in text or "\x1b[2K" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is shown again"


def test_no_color_takes_the_colours_away_and_leaves_the_bar() -> None:
    text = on_a_terminal(NO_COLOR="1")
    assert not COLOUR.search(text)
    assert "━" in text


def test_a_dumb_terminal_gets_plain_lines() -> None:
    text = on_a_terminal(TERM="dumb")
    assert text.splitlines() == ["tokens: 0 of 1,000 tokens are done", "training: 5 of 5, all of it"]


@pytest.mark.parametrize("settings", [{}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_a_log_gets_plain_lines_also_where_colours_are_asked_for(settings: dict[str, str]) -> None:
    command, asked = [sys.executable, "-c", WORK], environment(**settings)
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=asked)
    assert found.stdout == ""
    assert found.stderr == "tokens: 0 of 1,000 tokens are done\ntraining: 5 of 5, all of it\n"


def test_what_is_no_terminal_gets_lines_even_if_it_is_taken_for_one() -> None:
    assert isinstance(progress_for(Console(file=io.StringIO(), force_terminal=True)), Lines)
    assert isinstance(progress_for(Console(file=io.StringIO())), Lines)


def test_the_bar_keeps_its_length_while_its_figures_change() -> None:
    """A bar that grows and shrinks as a rate gains and loses digits is seen as flicker."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard")
    progress = Terminal(console)
    progress.start("activations", 12_345_678, 0)
    frames = []
    for rate in (1, 123, 45_678, 9_876_543):
        progress.bars.update(progress.bars.task_ids[0], completed=rate, rate=f"tokens  {rate:,.0f}/s")
        with console.capture() as captured:
            console.print(progress.bars.get_renderable())
        frames.append(re.sub(r"\x1b\[[\d;]*m", "", captured.get()))
    assert len(set(frames)) == 4
    lengths = {len(re.sub(r"[^━╸╺]", "", frame)) for frame in frames}
    assert len(lengths) == 1
    assert lengths.pop() > 10
    assert all(len(frame.splitlines()) == 1 for frame in frames)
