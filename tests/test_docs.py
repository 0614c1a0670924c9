"""The documentation says what the code does: generated tables are up to date, and what it shows can be run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .models.rwkv_models import write_pth

DOCS = Path(__file__).parents[1] / "docs"


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "scripts/docs", "--check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_generated_tables_are_those_of_the_code() -> None:
    found = check(DOCS.parent)
    assert found.returncode == 0, found.stderr


def test_a_table_that_has_drifted_is_noticed(tmp_path: Path) -> None:
    for folder in ("docs", "scripts"):
        shutil.copytree(DOCS.parent / folder, tmp_path / folder)
    path = tmp_path / "docs/hooks.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("| `hook_embed` | sequence", "| `hook_embed` | position"), encoding="utf-8")
    found = check(tmp_path)
    assert found.returncode == 1
    assert "docs/hooks.md is out of date: run scripts/docs" in found.stderr


@pytest.mark.parametrize("name", ["hooks.md", "models.md", "rwkv.md"])
def test_examples_run(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pth(tmp_path / "RWKV-x070-World-0.1B.pth", 7, d_vocab=2**16, n_layers=4)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec"), {})  # noqa: S102 - our own text
    assert capsys.readouterr().out.strip()
