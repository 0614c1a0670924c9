"""The help reads like a manual: every command is on the first page, every example can be typed, every slip is named."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from forebay.pipeline.cli import SECTIONS, main

COMMANDS = {str(command.name): command for command in main.each()}
DOCS = Path(__file__).parents[2] / "docs"


def cli(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


# ── the first page ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_page_groups_every_command_once_with_one_line_each() -> None:
    text = cli("--help").output
    assert list(COMMANDS) == re.findall(r"^  ([a-z]+)  +[A-Z].*$", text, re.MULTILINE)
    assert list(SECTIONS) == re.findall(r"^([A-Z][a-z ]+):$", text.partition("\nOptions:")[0], re.MULTILINE)
    assert set(COMMANDS) == set(main.commands)
    assert len(COMMANDS) == sum(map(len, SECTIONS.values()))


def test_the_first_page_fits_a_narrow_terminal_and_says_what_forebay_is_and_where_to_read_on() -> None:
    lines = cli("--help").output.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].startswith("  Forebay computes a language model's inner activations once")
    assert lines.index("Examples:") > lines.index("Options:")
    for name in re.findall(r"docs/[\w-]+\.md", "\n".join(lines)):
        assert (DOCS.parent / name).is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_one_line_about_a_command_is_an_imperative_of_one_line(name: str) -> None:
    line = COMMANDS[name].short_help
    assert line is not None
    assert len(line) < 68
    assert not line.endswith(".")
    assert not line.split()[0].endswith("s"), "verbs, as one would ask for it"


def test_h_is_help_for_every_command_and_nothing_at_all_shows_the_first_page() -> None:
    for name in COMMANDS:
        assert cli(name, "-h").output == cli(name, "--help").output
    assert cli().output == cli("--help").output


# ── examples ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def examples_of(text: str) -> list[str]:
    found = re.search(r"^Examples:\n((?:  .*\n)+)", text, re.MULTILINE)
    assert found, text
    return [line.strip() for line in found[1].splitlines()]


def parse(line: str) -> click.Context:
    """What the command line would do with a line, short of doing it. A redirection is the shell's."""
    program, name, *arguments = shlex.split(re.split(r"\s>|\s\s+\S", line)[0], comments=True)
    assert program == "forebay"
    return COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_ends_with_examples_that_parse(name: str) -> None:
    text = cli(name, "--help").output
    lines = examples_of(text)
    assert text.endswith(f"  {lines[-1]}\n")
    assert 1 <= len(lines) <= 3
    for line in lines:
        assert parse(line).info_name == name
        assert len(line) <= 92


def test_the_examples_of_the_first_page_parse() -> None:
    lines = examples_of(cli("--help").output)
    assert 2 <= len(lines) <= 3
    assert all(parse(line).info_name in COMMANDS for line in lines)


@pytest.mark.parametrize("line", ["forebay run", "forebay lens runs/x --layer 3", "forebay plan r.toml --workers some"])
def test_an_example_that_does_not_parse_would_be_noticed(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(line)


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_about_the_command_line_has_every_command_with_its_options(name: str) -> None:
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    found = re.search(rf"^### forebay {name}\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    assert found
    options = [one.opts for one in COMMANDS[name].params if isinstance(one, click.Option)]
    assert re.findall(r"^\| `(--?[\w-]+)", found[1], re.MULTILINE) == [opts[0] for opts in options]
    assert all(example in found[1] for example in COMMANDS[name].examples)


def test_the_page_has_no_command_that_is_not_there() -> None:
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    assert re.findall(r"^### forebay (\S+)", page, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize(
    "line", re.findall(r"^forebay .*$", (DOCS / "command-line.md").read_text("utf-8"), re.MULTILINE)
)
def test_the_lines_of_the_page_parse(line: str) -> None:
    assert parse(line.partition(" | ")[0])


# ── slips ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stauts", "runs/x"], "there is no command 'stauts'. Did you mean 'status'?"),
        (["verfiy"], "there is no command 'verfiy'. Did you mean 'verify'?"),
        (["qqq"], "there is no command 'qqq'."),
        (["lens", "runs/x", "--layer", "3"], "--layers"),
        (["--versoin"], "--version"),
        (["completion", "tcsh"], "'bash', 'zsh', 'fish'"),
        (["run"], "Missing argument 'RECIPE'"),
    ],
)
def test_a_slip_is_an_error_with_the_nearest_match_and_no_traceback(arguments: list[str], said: str) -> None:
    result = cli(*arguments)
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert said in line
    assert "Try 'forebay" in result.output
    assert "Traceback" not in result.output


def test_a_command_that_would_steer_the_terminal_is_named_harmlessly() -> None:
    result = cli("\x1b[31mrun")
    assert result.exit_code == 2
    assert r"there is no command '\x1b[31mrun'" in result.output
    assert "\x1b" not in result.output


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────────────

HEAVY = {"torch", "xarray", "zarr", "dask", "numpy", "pandas", "pydantic", "rich", "obstore", "huggingface_hub"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["lens", "--help"], ["completion", "fish"], ["stauts"]], ids=" ".join
)
def test_help_loads_click_and_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "forebay", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in found.stderr.splitlines() if "|" in line}
    assert {"forebay", "click"} <= loaded
    assert not loaded & HEAVY
