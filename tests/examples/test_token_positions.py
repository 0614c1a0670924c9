"""The example of token positions writes tokens that, put together, are the text, and spans that hold their words."""

from __future__ import annotations

import runpy
from pathlib import Path

import xarray as xr
from click.testing import CliRunner

SCRIPT = Path(__file__).parents[2] / "docs/examples/token_positions.py"
TEXT = "The Eiffel Tower is located in Paris, France."


def test_it_writes_the_tokens_of_the_text_and_of_its_parts(tiny_model: Path, tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    ran = CliRunner().invoke(main, ["--model", str(tiny_model), "--output", str(tmp_path)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    found = xr.open_zarr(tmp_path / "token_positions.zarr", consolidated=False).load()
    starts, ends = found["char_start"].values.tolist(), found["char_end"].values.tolist()
    assert "".join(TEXT[a:b] for a, b in zip(starts, ends, strict=True)) == TEXT
    assert found["token_text"].values.tolist() == [TEXT[a:b] for a, b in zip(starts, ends, strict=True)]
    for span, (start, end) in {"Eiffel Tower": (4, 16), "Paris": (31, 36), "France": (38, 44)}.items():
        here = found.sel(span=span)
        held = [i for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if a < end and b > start]
        assert list(range(int(here["first_token"]), int(here["last_token"]) + 1)) == held
        assert int(here["n_token"]) == len(held)
        assert found["label"].values[held].tolist() == [span] * (len(held) - 1) + [f"{span}_final"]
    assert (tmp_path / "token_positions.png").stat().st_size > 10_000
