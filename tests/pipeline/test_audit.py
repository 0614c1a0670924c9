"""Rows in are rows out: the records of a run cover every token and sequence once, or the run says that they do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import forebay
from forebay.pipeline.audit import audit, require_whole
from forebay.stores.batches import Batches
from forebay.stores.errors import CorruptStore, IncompleteStore
from forebay.stores.ledger import Ledger
from forebay.stores.store import Store

Record = dict[str, Any]
HOOK = "blocks.1.hook_resid_post"


def change(folder: Path, unit: int, how: Callable[[Record], Any], step: str = "activations") -> None:
    """Rewrites the record of a unit."""
    path = Ledger(folder / step).path(unit)
    record = json.loads(path.read_text())
    how(record)
    path.write_text(json.dumps(record))


def lines(folder: Path, **options: bool) -> list[str]:
    return list(map(str, audit(folder, **options)))


def test_the_records_of_a_finished_run_cover_every_row_once(whole_run: Path) -> None:
    assert audit(whole_run) == []
    require_whole(whole_run)
    for step in ("tokens", "activations"):
        # By hand, from nothing but the files.
        records = [json.loads(path.read_text()) for path in sorted((whole_run / step / "done").iterdir())]
        for dim, length in (("token", "n_token"), ("sequence", "n_sequence")):
            rows = [row for record in records for row in range(*record["rows"][dim])]
            tree = forebay.open_run(whole_run)
            due = {"n_token": tree["tokens"].sizes["token"], "n_sequence": tree["sequences"].sizes["sequence"]}
            assert rows == list(range(due[length]))


def test_a_unit_without_a_record_is_a_finding_unless_the_run_may_be_partial(own_run: Path) -> None:
    Ledger(own_run / "activations").drop(3)
    assert lines(own_run) == ["activations: unit 3: it is not recorded"]
    assert lines(own_run, partial=True) == []
    with pytest.raises(
        CorruptStore, match=r"rows that are recorded are not the rows of the corpus:\n  activations: un"
    ):
        require_whole(own_run)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            lambda r: r["rows"].update(token=[192, 255]),
            "it says that it has token [192, 255]; the unit owns [192, 256]",
        ),
        (
            lambda r: r["rows"].update(token=[191, 256]),
            "it says that it has token [191, 256]; the unit owns [192, 256]",
        ),
        (lambda r: r["rows"].pop("token"), "it says that it has token None; the unit owns [192, 256]"),
        (lambda r: r.update(unit=4), "it is the record of unit 4"),
        (lambda r: r.update(fingerprint="ab" * 32), "its fingerprint " + "ab" * 32 + " is not the store's "),
        (lambda r: r["objects"].popitem(), ": not in the record of unit 3"),
        (
            lambda r: r["objects"].update({"x/c/0": {"bytes": 1, "blake3": ""}}),
            "x/c/0: in the record of unit 3, which do",
        ),
        (lambda r: r["objects"].update({min(r["objects"]): {}}), ": its size or checksum is not recorded"),
        (lambda r: r.update(bytes=r["bytes"] + 1), "bytes; its objects have "),
        (lambda r: r.pop("objects"), "it names no rows or no objects"),
    ],
)
def test_a_record_that_does_not_say_what_its_unit_owns_is_named(
    own_run: Path, how: Callable[[Record], Any], said: str
) -> None:
    change(own_run, 3, how)
    (line,) = lines(own_run)
    assert line.startswith(f"activations: unit 3: {own_run / 'activations' / 'done' / '000003.json'}")
    assert said in line
    assert lines(own_run, partial=True) == [line]


def test_a_record_that_names_no_sequences_leaves_them_uncovered(own_run: Path) -> None:
    change(own_run, 10, lambda record: record["rows"].pop("sequence"))
    assert lines(own_run)[0] == "activations: unit 10: its record does not say which sequences it has"


def test_two_units_that_exchanged_their_records_are_found(own_run: Path) -> None:
    done = own_run / "activations" / "done"
    one, other = (done / f"{unit:06d}.json" for unit in (1, 2))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert [line.rpartition(": ")[2] for line in lines(own_run)] == [
        "it is the record of unit 2",
        "it is the record of unit 1",
    ]


def test_an_unreadable_record_and_one_of_no_unit_are_named(own_run: Path) -> None:
    done = own_run / "activations" / "done"
    shutil.copy(done / "000001.json", done / "000099.json")
    (done / "000002.json").write_bytes(b"{")
    unreadable, stray = lines(own_run)
    assert f"unit 2: {done / '000002.json'} is not readable as JSON" in unreadable
    assert f"unit 99: {done / '000099.json'}: there are " in stray
    assert len(Store.open(own_run / "activations").done()) == len(Store.open(own_run / "activations").schema.grid)


def test_a_record_that_is_too_many_does_not_make_an_incomplete_store_complete(own_run: Path) -> None:
    ledger = Ledger(own_run / "activations")
    shutil.copy(ledger.path(1), ledger.path(99))
    ledger.drop(1)
    assert not Store.open(own_run / "activations").complete
    with pytest.raises(IncompleteStore, match="10 of 11 units are recorded"):
        forebay.open_run(own_run)


def test_a_step_that_is_gone_or_of_another_recipe_is_named(own_run: Path) -> None:
    said = json.loads((own_run / "recipe.json").read_text())
    said["fingerprints"]["tokens"] = "cd" * 32
    (own_run / "recipe.json").write_text(json.dumps(said))
    shutil.rmtree(own_run / "activations")
    assert [line.split(",")[0].split(";")[0] for line in lines(own_run)] == [
        "activations: the run's recipe.json names this step",
        f"tokens: its fingerprint is {Store.open(own_run / 'tokens').fingerprint[:12]}",
    ]


def test_labels_that_changed_in_one_store_are_told_from_those_of_the_other(own_run: Path) -> None:
    starts: Any = zarr.open_group(str(own_run / "activations" / "data.zarr"), mode="r+")["documents/start"]
    values = starts[...]
    values[3] += 1
    starts[...] = np.sort(values)
    assert "activations: its documents/start is not that of tokens" in lines(own_run)


def test_features_must_have_counted_every_token_that_they_do_not_skip(
    make_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"hook": HOOK, "n_feature": 36, "k": 5, "batch": 32, "n_batch": 2}
    recipe = make_recipe(capture={"hooks": [HOOK]}, train={"sae": training}, encode={"sae": {}})
    folder = forebay.run(recipe, tmp_path / "run").folder
    assert audit(folder) == []
    change(folder, 2, lambda r: r["statistics"]["sae"].update(token_sum=[1]), "features-sae")
    n_token = sum(size - 1 for size in forebay.open_run(folder)["sequences/n_token"].values.tolist())
    record = Ledger(folder / "features-sae").record
    found = sum(record(unit)["statistics"]["sae"]["token_sum"][0] for unit in Ledger(folder / "features-sae").done())
    assert found < n_token
    assert lines(folder) == [
        f"features-sae: sae has counted {found:,} tokens; there are {n_token:,} beyond the first 1 of sequences"
    ]


@pytest.mark.parametrize("unit", [0, 4, 10])
def test_an_incomplete_run_says_so_however_it_is_opened_and_offers_the_mask(own_run: Path, unit: int) -> None:
    Ledger(own_run / "activations").drop(unit)
    for opened in (
        lambda: forebay.open_run(own_run),
        lambda: forebay.open_store(own_run / "activations"),
        lambda: Batches(run=own_run, hooks=HOOK),
        lambda: Batches(run=own_run / "activations", hooks=HOOK),
    ):
        with pytest.raises(
            IncompleteStore, match=r"10 of 11 units are recorded\. Run its recipe again .* partial=True"
        ):
            opened()
    done = forebay.open_run(own_run, partial=True)["activations/hook_resid_post"].done.values
    assert (np.flatnonzero(~done) // 64 == unit).all()
    assert (~done).any()
