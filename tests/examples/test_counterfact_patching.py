"""The example writes what the library call gives, a figure, and the shares by block and by kind of token."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from click.testing import CliRunner

import forebay
from forebay.stages.analyze.block_patching import block_patching

SCRIPT = Path(__file__).parents[2] / "docs/examples/counterfact_patching.py"
PAIRS = [("Mr. Bennet is in want of", "Netherfield Park is in want of", "1", "2"), ("the man", "the wife", "3", "4")]
KEYS = ("original", "counterfactual", "original_target", "counterfactual_target")
QUESTION = ": {} or {}?"


@pytest.fixture
def example(tmp_path: Path) -> dict[str, Any]:
    lines = [json.dumps(dict(zip(KEYS, pair, strict=True))) for pair in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("question", [True, False])
def test_what_is_written_is_what_the_call_gives(
    question: bool, example: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    example["main"].callback.__globals__["QUESTION"] = QUESTION  # the protocol's own is longer than the tiny context
    arguments = ["--model", str(tiny_model), "--output", str(tmp_path), "--data", str(tmp_path / "pairs.jsonl")]
    arguments += ["--block-size", "2", "--question" if question else "--no-question"]
    ran = CliRunner().invoke(example["main"], arguments, catch_exceptions=False)
    assert ran.exit_code == 0
    asked = [": 1 or 2?", ": 3 or 4?"] if question else ["", ""]
    facts = ["Mr. Bennet is in want of", "the man"] if question else ["Mr. Bennet", "the man"]
    model = forebay.load_model(tiny_model)
    expected = block_patching(
        model,
        [pair[0] + after for pair, after in zip(PAIRS, asked, strict=True)],
        [pair[1] + after for pair, after in zip(PAIRS, asked, strict=True)],
        spans=[{"fact": (0, len(fact))} for fact in facts],
        block_size=2,
    )
    with xr.open_zarr(tmp_path / "counterfact_patching.zarr", consolidated=False) as written:
        xr.testing.assert_allclose(written.load().drop_vars("fact"), expected, atol=1e-6)
        assert written["fact"].values.tolist() == [pair[0] for pair in PAIRS]
    assert (tmp_path / "counterfact_patching.png").stat().st_size > 5_000
    for block, layers in ((0, "0–1"), (1, "2–2")):
        share = 100 * float(expected["changed"].sel(block=block).mean())
        (row,) = [line for line in ran.output.splitlines() if layers in line]
        assert f"{share:.1f} %" in row
    assert ran.output.count("→") == 2 * len(PAIRS)


def test_the_end_that_prompts_share_is_made_of_whole_words(example: dict[str, Any]) -> None:
    shared_end = example["shared_end"]
    assert shared_end("The capital of France is", "The capital of Poland is") == len(" is")
    assert shared_end("a big cat sat", "a tomcat sat") == len(" sat")
    assert shared_end("one", "two") == 0
