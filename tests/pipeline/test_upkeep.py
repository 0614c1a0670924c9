"""What is kept can be checked against its checksums and against what it came from, and what is damaged be dropped."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from click.testing import CliRunner, Result

import forebay
from forebay.pipeline.cli import main
from forebay.pipeline.recompute import recompute
from forebay.stores.digests import recorded
from forebay.stores.ledger import Ledger
from forebay.stores.store import Store

from ..stored import data

RESID = "hook_resid_post/value"


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def says(result: Result, code: int = 0) -> str:
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == code, result.output
    return result.output


def seal(folder: Path, unit: int) -> None:
    """Makes the record of a unit agree with its objects, whatever they hold: damage from before the checksum."""
    ledger = Ledger(folder)
    record = ledger.record(unit)
    record["objects"] = {key: recorded([(folder / "data.zarr" / key).read_bytes()]) for key in record["objects"]}
    record["bytes"] = sum(entry["bytes"] for entry in record["objects"].values())
    ledger.complete(unit, record)


# ── computed again ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_units_that_are_computed_again_come_to_the_same_bits_and_nothing_is_written(own_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in own_run.rglob("*")}
    text = says(cli("verify", own_run, "--recompute", "3", "--device", "cpu"))
    assert "rows in are rows out" in text
    for step in ("tokens", "activations"):
        assert f"{step}: 3 of 3 units came to the same bits again" in text
    assert {path: path.stat().st_mtime_ns for path in own_run.rglob("*")} == before


def test_a_value_that_was_wrong_before_its_checksum_is_named_with_both_values(own_run: Path) -> None:
    store, unit = Store.open(own_run / "activations"), 4
    kept: Any = zarr.open_group(str(store.path), mode="r+")[RESID]
    token, layer, column = 4 * 64 + 9, 2, 5
    stored = kept[layer, token, column]
    whole = kept[:, 256:320, :]
    whole[layer, 9, column] ^= 1  # the last bit of a bfloat16
    whole[layer, 20, 0] ^= 0x8000  # a sign, further on
    for one in range(3):
        kept[one, 256:320, :] = whole[one]
    seal(own_run / "activations", unit)
    assert store.verify() == {}

    text = says(cli("verify", own_run, "--recompute", "99", "--device", "cpu"), 1)
    n_unit = len(store.schema.grid)
    assert f"activations: {n_unit - 1} of {n_unit} units came to the same bits again" in text
    right, wrong = (np.array([bits << 16], np.uint32).view(np.float32)[0] for bits in (int(stored), int(stored) ^ 1))
    (line,) = [line.strip() for line in text.splitlines() if RESID in line]
    assert line == (
        f"activations: unit 4: {RESID} at layer {layer}, token {token}, d_model {column}: {wrong} is stored, {right} "
        "is computed (2 values differ)"
    )
    assert "1 units came to other values than those that are stored" in text


def test_a_wrong_token_is_found_in_its_own_step(own_run: Path) -> None:
    ids: Any = zarr.open_group(str(own_run / "tokens" / "data.zarr"), mode="r+")["token_id"]
    right = int(ids[130])
    ids[130] = right + 1
    seal(own_run / "tokens", 1)
    found = next(iter(recompute(own_run, 99, "cpu")))
    assert (found.step, found.unit, found.array, found.index) == ("tokens", 1, "token_id", {"token": 130})
    assert (found.stored, found.computed, found.differing) == (right + 1, right, 1)


def test_the_units_are_chosen_by_the_seed(whole_run: Path) -> None:
    def chosen(seed: int) -> list[tuple[str, int]]:
        looked: list[tuple[str, int]] = []
        assert not list(recompute(whole_run, 2, "cpu", seed, lambda step, unit: looked.append((step, unit.index))))
        return looked

    first, again, other = chosen(1), chosen(1), chosen(5)
    assert first == again
    assert first != other
    assert [step for step, _ in first] == ["tokens", "tokens", "activations", "activations"]


def test_without_the_corpus_or_the_model_it_says_what_is_gone(
    make_recipe: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    recipe = make_recipe(model=model)
    folder = forebay.run(recipe, tmp_path / "run", device="cpu").folder
    os.rename(tmp_path / "recipe.jsonl", tmp_path / "elsewhere")
    assert "recipe.jsonl" in says(cli("verify", folder, "--recompute", "1", "--device", "cpu"), 2)
    os.rename(tmp_path / "elsewhere", tmp_path / "recipe.jsonl")
    shutil.rmtree(model)
    assert str(model) in says(cli("verify", folder, "--recompute", "1", "--device", "cpu"), 2)
    assert "rows in are rows out" in says(cli("verify", folder))  # which needs neither


# ── dropped ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(3).randrange(len(content))] ^= 4
    path.write_bytes(content)


def test_repair_drops_what_does_not_verify_and_the_next_run_heals_it_to_the_same_bytes(
    whole_run: Path, whole_recipe: Path, own_run: Path
) -> None:
    step = own_run / "activations"
    done, shards = step / "done", step / "data.zarr" / "hook_resid_post" / "value" / "c"
    os.truncate(shards / "0" / "1" / "0", 1000)
    flip(shards / "1" / "2" / "0")
    (shards / "2" / "3" / "0").unlink()
    (done / "000004.json").write_bytes((done / "000004.json").read_bytes()[:200])
    other = json.loads((done / "000005.json").read_text())
    (done / "000005.json").write_text(json.dumps({**other, "fingerprint": "00" * 32}))
    (done / "000006.json").unlink()
    shutil.copy(done / "000007.json", done / "000077.json")

    wrong = says(cli("verify", own_run), 1)
    for unit, what in (
        (1, "1,000 bytes, "),
        (2, "its bytes have changed since they were recorded"),
        (3, "missing"),
        (4, "is not readable as JSON"),
        (5, f"its fingerprint {'00' * 32} is not the store's"),
        (77, "there are 11 units, numbered from 0"),
    ):
        (line,) = [line for line in wrong.splitlines() if line.strip().startswith(f"unit {unit}: ")]
        assert what in line
    assert "6 units are damaged" in wrong
    text = says(cli("repair", own_run))
    assert "activations: dropped 6 damaged units (1, 2, 3, 4, 5, 77)" in text
    assert "tokens: dropped 0 damaged units" in text
    assert Ledger(step).done() == {0, 7, 8, 9, 10}
    assert forebay.run(whole_recipe, own_run, device="cpu").code == 0
    assert data(own_run) == data(whole_run)
    says(cli("verify", own_run))


def test_repair_clears_failed_attempts_when_it_is_asked_to(own_run: Path) -> None:
    ledger = Ledger(own_run / "activations")
    ledger.drop(2)
    for _ in range(2):
        ledger.fail(2, ValueError("no"), {})
    assert "cleared" not in says(cli("repair", own_run))
    assert ledger.failed() == {2: 2}
    assert "activations: cleared the records of 2 failed attempts" in says(cli("repair", own_run, "--failed"))
    assert ledger.failed() == {}


def test_what_is_wrong_is_shown_and_not_sent_to_the_terminal(own_run: Path) -> None:
    path = Ledger(own_run / "activations").path(1)
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "fingerprint": "\x1b[31m[bold]"}))
    for text in (says(cli("verify", own_run), 1), says(cli("repair", own_run))):
        assert r"\x1b[31m[bold]" in text
        assert "\x1b" not in text
