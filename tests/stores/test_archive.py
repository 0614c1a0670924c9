"""Stores of every format that was ever written are read as on the day on which they were made.

The runs were made by scripts/archive, and what they must hold by transformers and numpy, from the same texts.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray

import forebay
from forebay.stores.schema import FORMAT
from forebay.stores.store import Store

ARCHIVE = Path(__file__).parent / "archive"
STEPS = ("tokens", "activations", "features-top", "features-jump")


@dataclass(frozen=True)
class Kept:
    """A run that was archived, unpacked, with what it must hold."""

    folder: Path
    expected: Mapping[str, NDArray[Any]]
    about: Mapping[str, Any]

    @property
    def bfloat16(self) -> bool:
        return Store.open(self.folder / "activations").schema.arrays["hook_resid_post/value"].dtype == "bfloat16"


FOUND = sorted(ARCHIVE.glob("format-*/*.tar.xz"))


@pytest.fixture(scope="module", params=FOUND, ids=[f"{one.parent.name}-{one.name[:-7]}" for one in FOUND])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    packed: Path = request.param
    folder = tmp_path_factory.mktemp("archived") / "run"
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    beside = packed.name.removesuffix(".tar.xz")
    with np.load(packed.with_name(f"{beside}.npz")) as values:
        return Kept(folder, dict(values), json.loads(packed.with_name(f"{beside}.json").read_text()))


def same(found: NDArray[Any], expected: NDArray[Any], share: float = 1e-5) -> bool:
    """Whether values agree to a share of the largest, NaN where NaN is due."""
    return found.shape == expected.shape and np.allclose(
        found, expected, 0, share * np.nanmax(expected), equal_nan=True
    )


def test_every_format_that_was_written_is_here() -> None:
    """A format is archived by scripts/archive before it is released."""
    for number in range(1, FORMAT + 1):
        assert [one for one in FOUND if one.parent.name == f"format-{number}"], f"no archive of format {number}"


def test_what_is_recorded_is_whole(kept: Kept) -> None:
    for step in STEPS:
        store = Store.open(kept.folder / step)
        assert store.complete
        assert len(store.schema.grid) > 1
        assert store.verify() == {}
        assert forebay.open_store(kept.folder / step).name == step


def test_checksums_of_another_kind_find_damage_all_the_same(kept: Kept) -> None:
    """Records hold the checksum of their day; those of the first archive hold SHA-256."""
    store = Store.open(kept.folder / "activations")
    (key, entry), *_ = store.ledger.record(0)["objects"].items()
    [kind] = set(entry) - {"bytes"}
    assert kind == "sha256" or kept.about["format"] > 1
    path = kept.folder / "activations/data.zarr" / key
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    [(unit, [line])] = store.verify().items()
    path.write_bytes(before)
    assert unit == 0
    assert f"its bytes have changed since they were recorded ({kind} " in line
    assert store.verify() == {}


def test_open_run_gives_tokens_where_they_belong_and_activations(kept: Kept) -> None:
    run, expected = forebay.open_run(kept.folder), kept.expected
    assert run["tokens/token_id"].values.tolist() == expected["token_id"].tolist()
    assert run["sequences/start"].values.tolist() == expected["sequence_start"].tolist()
    assert run["documents/start"].values.tolist() == expected["document_start"].tolist()
    assert run["documents/id"].values.tolist() == kept.about["documents"]
    value = run["activations/hook_resid_post/value"]
    assert same(value.values, expected["resid_post"], 2**-8 if kept.bfloat16 else 1e-5)
    assert value.layer.values.tolist() == [0, 1]
    number = np.arange(len(expected["token_id"]))
    sequence = np.searchsorted(expected["sequence_start"], number, "right") - 1
    assert value.sequence.values.tolist() == sequence.tolist()
    assert value.position.values.tolist() == (number - expected["sequence_start"][sequence]).tolist()
    pattern = run["activations/attn.hook_pattern/value"].sel(layer=1).values
    assert same(pattern, expected["pattern"], 2**-8 if kept.bfloat16 else 1e-5)


def test_offsets_cut_the_tokens_out_of_the_texts(kept: Kept) -> None:
    run = forebay.open_run(kept.folder)
    for number, text in enumerate(kept.about["texts"]):
        tokens = run["tokens"].to_dataset()
        own = tokens.isel(token=np.flatnonzero(tokens.document.values == number))
        # Tokens that are parts of one character have all of it.
        spans = dict.fromkeys(zip(own.char_start.values.tolist(), own.char_end.values.tolist(), strict=True))
        assert "".join(text[first:last] for first, last in spans) == text


@pytest.mark.parametrize("name", ["top", "jump"])
def test_features_and_their_index(kept: Kept, name: str) -> None:
    features, expected = forebay.open_run(kept.folder).features(name), kept.expected[name]
    share = 0.02 if kept.bfloat16 else 1e-5
    found = features.dense(range(expected.shape[1])).values
    assert same(found, expected, share)
    first = kept.expected["sequence_start"]
    counted = np.delete(expected, first, axis=0)  # what `skip_positions` leaves in
    statistics = features.statistics()
    assert statistics.n_active.values.tolist() == (np.delete(found, first, axis=0) > 0).sum(0).tolist()
    assert same(statistics["max"].fillna(0).values, counted.max(0), share)
    strongest = int(counted.max(0).argmax())
    contexts = features.top_contexts(strongest, n=2, window=1)
    assert same(contexts.value.values, np.sort(counted[:, strongest])[::-1][:2], share)
    token = int(contexts.token[0])
    text = kept.about["texts"][int(contexts.document[0])]
    assert contexts.text.values[0] in text or contexts.text.values[0] == "<|endoftext|>"
    assert contexts.token_id.sel(offset=0).values[0] == kept.expected["token_id"][token]


def test_xarray_alone_reads_it_as_the_format_says(kept: Kept) -> None:
    data, expected = kept.folder / "activations/data.zarr", kept.expected
    stored = xr.open_zarr(data, group="hook_resid_post").value
    value = stored.values
    if stored.attrs["dtype"] == "bfloat16":
        value = (value.astype(np.uint32) << 16).view(np.float32)
    assert same(value, expected["resid_post"], 2**-8 if kept.bfloat16 else 1e-5)
    start = xr.open_zarr(data, group="sequences").start.values
    assert start.tolist() == expected["sequence_start"].tolist()
    assert xr.open_zarr(data, group="documents").id.values.tolist() == kept.about["documents"]
    tokens = xr.open_zarr(kept.folder / "tokens/data.zarr")
    assert tokens.token_id.values.tolist() == expected["token_id"].tolist()
    top = xr.open_zarr(kept.folder / "features-top/data.zarr", group="top")
    found = np.zeros_like(expected["top"])
    for token, (names, values) in enumerate(zip(top.feature.values, top.value.values, strict=True)):
        found[token, names[names >= 0]] = values[names >= 0]
    assert same(found, expected["top"], 0.02 if kept.bfloat16 else 1e-5)
    header = tokens.attrs["forebay"]
    assert header["schema"]["format"] == kept.about["format"]


def test_a_run_that_was_appended_to_remembers_what_it_was(kept: Kept) -> None:
    store = Store.open(kept.folder / "activations")
    recorded = {store.ledger.record(unit)["fingerprint"] for unit in store.done()}
    before = {one["fingerprint"]: one["n_unit"] for one in store.header.grown_from}
    assert recorded == {store.fingerprint, *before}
    assert bool(before) == kept.about["appended"]
    assert all(n_unit > 0 for n_unit in before.values())
