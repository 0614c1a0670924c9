"""The documentation says what the code does: generated tables are up to date, and names are there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import forebay

DOCS = Path(__file__).parents[1] / "docs"


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "scripts/docs", "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_generated_tables_are_those_of_the_code() -> None:
    found = check(DOCS.parent)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_a_table_that_has_drifted_is_noticed(tmp_path: Path) -> None:
    for folder in ("docs", "scripts"):
        shutil.copytree(DOCS.parent / folder, tmp_path / folder)
    path = tmp_path / "docs/hooks.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("| `hook_embed` | sequence", "| `hook_embed` | position"), encoding="utf-8")
    found = check(tmp_path)
    assert found.returncode == 1
    assert "docs/hooks.md is out of date: run scripts/docs" in found.stderr


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_names_that_pages_speak_of_are_there(name: str) -> None:
    """`forebay.NAME` of any page is a name of the package, or a module of it."""
    text = (DOCS / name).read_text(encoding="utf-8")
    spoken = set(re.findall(r"(?<![\w./-])forebay\.([A-Za-z_]\w*)", text))
    modules = {"stages", "stores", "pipeline"}
    assert spoken - modules - {*forebay.__all__} == set()
