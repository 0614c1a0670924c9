"""Runs laid end to end read as one run: every value and every label, and nothing before it is asked for."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from xarray.core import indexing

import forebay
from forebay.stores.captures import joined_schema, read_captures
from forebay.stores.concat import concat
from forebay.stores.copies import Copy
from forebay.stores.cuts import Cut
from forebay.stores.errors import IncompleteStore, SchemaError, StoreNotFound
from forebay.stores.joined import Joined, Part
from forebay.stores.ledger import Ledger
from forebay.stores.store import Store
from forebay.stores.tree import KeptArray, open_run

from .small_runs import CONTEXT, LAYERS, RUNS, Numbers, laid, numbers, provenance_of, write_run, write_step

CHUNKS = pytest.mark.parametrize("chunks", ["auto", None])
STEPS = ("tokens", "activations", "features-sae", "features-top")
UNITS = (8, 12, 8)
WHOLE = laid(RUNS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / f"run-{n}", run, unit, steps=STEPS)
        for n, (run, unit) in enumerate(zip(RUNS, UNITS, strict=True))
    ]


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was computed")


# ── values and labels ────────────────────────────────────────────────────────────────────────────────────────────────


@CHUNKS
def test_every_value_is_that_of_the_runs_end_to_end(runs: list[Path], chunks: Any) -> None:
    tree = concat(runs, chunks=chunks)
    for path, expected in WHOLE.values.items():
        if path.startswith("features"):
            continue
        found = tree[path if path.startswith("tokens") else f"{path}/value"]
        np.testing.assert_array_equal(found.values, expected)
        assert (found.chunks is None) == (chunks is None)
    np.testing.assert_array_equal(tree["features-sae/sae/count"].values, WHOLE.fires.sum(1))
    top = np.concatenate([open_run(run)["features-top/top/value"].values for run in runs])
    np.testing.assert_array_equal(tree["features-top/top/value"].values, top)


@CHUNKS
def test_sequences_and_documents_are_numbered_through(runs: list[Path], chunks: Any) -> None:
    tree, table = concat(runs, chunks=chunks), WHOLE.table
    node = tree["activations/hook_resid_post"]
    for name in ("sequence", "position", "document"):
        np.testing.assert_array_equal(node[name].values, table[name])
    np.testing.assert_array_equal(node["token_id"].values, WHOLE.values["tokens/token_id"])
    assert node["layer"].values.tolist() == LAYERS
    np.testing.assert_array_equal(tree["documents/n_token"].values, list(WHOLE.documents.values()))
    assert tree["documents/id"].values.tolist() == [name.partition("/")[2] for name in WHOLE.documents]
    np.testing.assert_array_equal(tree["sequences/n_token"].values, WHOLE.sequences)
    first = table.groupby("sequence")["document"].first()
    np.testing.assert_array_equal(tree["sequences/document"].values, first)
    pattern = tree["activations/attn.hook_pattern"]
    np.testing.assert_array_equal(pattern["document"].values, first)
    np.testing.assert_array_equal(pattern["sequence"].values, first.index)
    for key in ({"document": 5}, {"sequence": [8, 2]}, {"document": slice(2, 6), "position": 0}):
        expected = table.assign(row=range(len(table)))
        for name, value in key.items():
            if isinstance(value, slice):
                expected = expected[expected[name].between(value.start, value.stop)]
            else:
                expected = expected[expected[name].isin(np.atleast_1d(value))]
                if isinstance(value, list):
                    expected = expected.sort_values(name, key=lambda one: one.map(value.index), kind="stable")
        found = node["value"].sel(layer=7, **key).values
        np.testing.assert_array_equal(found, WHOLE.values["activations/hook_resid_post"][2][expected["row"]])


def test_it_says_which_run_a_row_is_of(runs: list[Path]) -> None:
    said = concat([runs[0], open_run(runs[1]), str(runs[2])]).attrs["runs"]
    assert [one["run"] for one in said] == [str(run) for run in runs]
    edges = np.cumsum([0, *(run.n_token for run in RUNS)]).tolist()
    assert [one["token"] for one in said] == [edges[n : n + 2] for n in range(3)]
    assert [one["sequence"] for one in said] == [[0, 3], [3, 9], [9, 10]]
    assert [one["document"] for one in said] == [[0, 4], [4, 8], [8, 9]]


def test_attributes_are_what_all_runs_say(runs: list[Path]) -> None:
    tree = concat(runs)
    attrs = tree["activations/hook_resid_post"].attrs
    assert attrs["model"] == {"source": "org/name", "revision": None}
    assert attrs["determines"]["files"] == [["model.safetensors", "ab" * 32]]
    assert "source" not in attrs["determines"]
    assert "fingerprint" not in attrs
    assert tree.attrs["recipe"]["tokenize"] == {"context": CONTEXT}
    assert "files" not in tree.attrs["corpus"]


def test_steps_may_be_chosen(runs: list[Path], tmp_path: Path) -> None:
    only = write_run(tmp_path / "only", numbers(9, (6, 3), {"x": 9}), steps=("tokens", "activations"))
    assert set(concat([runs[0], only], steps=["activations"]).children) == {"activations", "sequences", "documents"}
    with pytest.raises(SchemaError, match=r"only has no features-sae, which .*run-0 has.* steps="):
        concat([runs[0], only])
    with pytest.raises(SchemaError, match=r"run-0 has features-sae, features-top, which .*only has not"):
        concat([only, runs[0]])
    with pytest.raises(SchemaError, match=r"has no activation\. Did you mean 'activations'"):
        concat([only, runs[0]], steps=["activation"])


def test_a_run_with_one_capture_says_nothing_of_captures(runs: list[Path]) -> None:
    assert "captures" not in open_run(runs[0])["activations"].attrs


def test_captures_of_a_run_are_one_in_the_whole_as_well(runs: list[Path], tmp_path: Path) -> None:
    """Layers of two captures, tokens of two runs; and read by a step, a span at a time."""
    folders = []
    for n, run in enumerate(runs[:2]):
        cut = Cut.whole(Store.open(run / "activations"))
        parts = {
            "activations": {"hook_resid_post": [0, 7]},
            "activations-late": {"hook_resid_post": [3], "hook_embed": None},
        }
        for name, kept in parts.items():
            copy = Copy(tmp_path / str(n) / name, (cut,), kept)
            store = copy.open()
            for unit in store.todo():
                copy.write(store, unit)
        folders.append(tmp_path / str(n))
    expected = laid(RUNS[:2]).values["activations/hook_resid_post"]
    for chunks in ("auto", None):
        tree = concat(folders, chunks=chunks)
        found = tree["activations/hook_resid_post/value"]
        assert found.layer.values.tolist() == LAYERS
        np.testing.assert_array_equal(found.values, expected)
        embed = laid(RUNS[:2]).values["activations/hook_embed"]
        np.testing.assert_array_equal(tree["activations/hook_embed/value"].values, embed)
    stores = [Store.open(folders[1] / name) for name in ("activations", "activations-late")]
    block = read_captures(stores, slice(5, 20))
    assert block["hook_resid_post/layer"].values.tolist() == LAYERS
    np.testing.assert_array_equal(block["token"], range(5, 20))
    np.testing.assert_array_equal(
        block["hook_resid_post/value"], RUNS[1].values["activations/hook_resid_post"][:, 5:20]
    )
    np.testing.assert_array_equal(block["hook_embed/value"], RUNS[1].values["activations/hook_embed"][5:20])
    schema = joined_schema([store.schema_with_labels for store in stores])
    assert schema.arrays["hook_resid_post/value"].shape == (3, 31, 5)
    assert schema.labels["hook_resid_post/layer"][1].tolist() == LAYERS
    other = Store.open(folders[0] / "activations-late").schema_with_labels
    with pytest.raises(SchemaError, match="captures of 31 and of 14 tokens"):
        joined_schema([schema, other])


# ── analyses ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_analyses_are_those_of_the_whole(tmp_path: Path) -> None:
    """Against numpy on everything loaded."""
    parts = [numbers(n, (6, 6, 5), {"a": 9, "b": 8}) for n in (5, 6, 7)]
    for part in parts:
        part.values["activations/hook_resid_post"][1, 0] = 1.5  # no statistic is one of NaN
    folders = [write_run(tmp_path / str(n), part, steps=("tokens", "activations")) for n, part in enumerate(parts)]
    node = concat(folders)["activations/hook_resid_post"].to_dataset()
    whole = laid(parts)
    values, counted = whole.values["activations/hook_resid_post"].astype(float), whole.table["position"].to_numpy() >= 1
    np.testing.assert_allclose(node["value"].mean("token").values, values.mean(1), rtol=1e-5, atol=1e-6)
    norms = np.linalg.norm(values, axis=-1)[:, counted]
    np.testing.assert_allclose(forebay.norm_statistics(node)["mean_norm"].values, norms.mean(1), rtol=1e-5)
    by_document = forebay.mean_by(node, "document", 6)["mean"]
    for document in range(6):
        expected = values[:, (whole.table["document"] == document) & counted].mean(1)
        np.testing.assert_allclose(by_document.sel(document=document).values, expected, rtol=1e-4, atol=1e-5)
    found = forebay.pca(node.sel(layer=3), n_components=2)
    centred = values[1, counted] - values[1, counted].mean(0)
    variance = np.linalg.svd(centred, compute_uv=False)[:2] ** 2 / (counted.sum() - 1)
    np.testing.assert_allclose(found["explained_variance"].values, variance, rtol=1e-4)


# ── laziness ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Run and array of every array that is opened."""
    seen: list[tuple[str, str]] = []
    check = Store.check_array

    def noted(store: Store, path: str) -> None:
        seen.append((store.path.parent.parent.name, path))
        check(store, path)

    monkeypatch.setattr(Store, "check_array", noted)
    return seen


@CHUNKS
def test_nothing_is_computed_before_it_is_asked_for(
    runs: list[Path], chunks: Any, counted_reads: list[tuple[str, str]]
) -> None:
    with dask.config.set(scheduler=refuse):
        node = concat(runs, chunks=chunks)["activations/hook_resid_post"]
        chosen = node["value"].isel(layer=0, token=slice(16, 18)).drop_vars("token_id")
    assert counted_reads == []
    chosen.load()
    assert set(counted_reads) == {("run-1", "hook_resid_post/value")}


def test_chunks_are_whole_shards_of_one_run(runs: list[Path]) -> None:
    value = concat(runs)["activations/hook_resid_post/value"]
    assert value.chunksizes["token"] == (8, 6, 12, 12, 7, 4)
    assert value.chunksizes["layer"] == (1, 1, 1)


@pytest.mark.slow
def test_a_hundred_runs_are_one(tmp_path: Path) -> None:
    part = numbers(4, (6, 4), {"a": 10})
    first = write_run(tmp_path / "0", part, steps=("activations",))
    folders = [first, *(shutil.copytree(first, tmp_path / str(n)) for n in range(1, 100))]
    with dask.config.set(scheduler=refuse):
        tree = concat(folders)
    value = tree["activations/hook_resid_post/value"]
    assert value.sizes["token"] == 1000
    chosen = value.sel(document=[3, 98], position=5)
    np.testing.assert_array_equal(chosen.values, part.values["activations/hook_resid_post"][:, [5, 5]])
    np.testing.assert_array_equal(
        value.isel(layer=0)[[7, 997]].values, [part.values["activations/hook_resid_post"][0, 7]] * 2
    )


@CHUNKS
def test_it_travels_to_other_processes(runs: list[Path], chunks: Any) -> None:
    value = concat(runs, chunks=chunks)["activations/hook_resid_post/value"]
    again = pickle.loads(pickle.dumps(value))  # noqa: S301  our own bytes
    np.testing.assert_array_equal(again.values, value.values)


def test_any_key_reads_what_numpy_reads(runs: list[Path]) -> None:
    """The array beneath, with parts of parts in any order."""
    stores = [Store.open(run / "activations") for run in runs]
    kept = [KeptArray(store, "hook_resid_post/value", complete=True) for store in stores]
    loaded = [one[indexing.BasicIndexer((slice(None),) * 3)] for one in kept]
    cuts = [(0, 3, 9), (1, 0, 30), (0, 2, 4), (0, 9, 10), (2, 0, 4)]
    joined = Joined([Part(kept[n], start, stop) for n, start, stop in cuts], 1)
    expected = np.concatenate([loaded[n][:, start:stop] for n, start, stop in cuts], axis=1)
    variable, rng = xr.Variable(("a", "b", "c"), indexing.LazilyIndexedArray(joined)), np.random.default_rng(0)
    size = expected.shape[1]
    keys = [0, -1, slice(None), slice(5, 8), slice(40, 3, -1), slice(7, 7), rng.integers(-size, size, 30), [], [6, 5]]
    for layer in (slice(None), 1, [2, 0]):
        for key in keys:
            for width in (slice(1, 3), 0):
                found = variable[layer, key, width].values
                token = np.array(key, dtype=int) if isinstance(key, list) else key
                np.testing.assert_array_equal(found, expected[layer][..., token, :][..., width])


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def changed(**other: Any) -> Callable[[dict[str, Any]], None]:
    return lambda provenance: provenance["determines"].update(other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed(files=[["model.safetensors", "cd" * 32]]), r"files\.0 model\.safetensors: 'abab.*' and 'cdcd"),
        (changed(parameters={"dtype": "bfloat16", "batch": 8}), r"parameters\.dtype: 'float32' and 'bfloat16'"),
        (changed(identity={"tokenizer": "ff"}), r"identity\.tokenizer: nothing and 'ff'"),
        (changed(version=2), r"version: 1 and 2"),
    ],
)
def test_runs_of_another_making_are_refused_by_name(
    runs: list[Path], tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    part, provenance = numbers(9, (6,), {"x": 6}), provenance_of("activations", RUNS[0])
    change(provenance)
    write_step(tmp_path / "activations", part, 8, provenance)
    with pytest.raises(SchemaError, match=rf"run-0.activations and .* cannot be laid end to end:\n  {said}"):
        concat([runs[0], tmp_path], steps=["activations"])


def test_another_batch_or_another_machine_is_not_another_making(runs: list[Path], tmp_path: Path) -> None:
    provenance = provenance_of("activations", RUNS[0])
    provenance["determines"] |= {"parameters": {"dtype": "float32", "batch": 3}, "numerics": {"threads": 7}}
    write_step(tmp_path / "activations", numbers(9, (6,), {"x": 6}), 8, provenance)
    assert concat([runs[0], tmp_path], steps=["activations"])["activations/hook_embed"].sizes["token"] == 20


def test_other_layers_and_hook_points_are_refused(runs: list[Path], tmp_path: Path) -> None:
    source = Store.open(runs[0] / "activations")
    for name, kept, said in (
        ("layers", {"hook_resid_post": [0, 7], "hook_embed": None, "attn.hook_pattern": None}, "0, 3, 7] and .0, 7]"),
        ("hooks", {"hook_resid_post": None, "hook_embed": None}, r"attn\.hook_pattern"),
    ):
        copy = Copy(tmp_path / name / "activations", (Cut.whole(source),), kept)
        store = copy.open()
        for unit in store.todo():
            copy.write(store, unit)
        with pytest.raises(SchemaError, match=said):
            concat([runs[0], tmp_path / name], steps=["activations"])


def test_what_is_incomplete_missing_or_named_twice_is_refused(runs: list[Path], tmp_path: Path) -> None:
    own = shutil.copytree(runs[0], tmp_path / "own")
    Ledger(own / "activations").drop(1)
    with pytest.raises(IncompleteStore, match=r"own.activations is incomplete: 1 of 2"):
        concat([own, runs[1]])
    with pytest.raises(SchemaError, match="run-1 is named twice"):
        concat([runs[1], runs[0], str(runs[1])])
    with pytest.raises(StoreNotFound):
        concat([runs[0], tmp_path / "nothing"])
    with pytest.raises(SchemaError, match="at least one"):
        concat([])
    with pytest.raises(SchemaError, match="does not say where its run lies"):
        concat([xr.DataTree()])


def test_steps_of_other_tokens_are_refused(tmp_path: Path) -> None:
    """Tokens that have grown, and activations that have not yet."""
    run: Numbers = numbers(9, (6,), {"x": 6})
    write_step(tmp_path / "tokens", numbers(9, (6, 6), {"x": 12}), 8)
    write_step(tmp_path / "activations", run, 8)
    with pytest.raises(SchemaError, match=r"tokens has 12 tokens, activations 6"):
        concat([tmp_path])


@pytest.mark.parametrize("ask", ["features", "batches"])
def test_what_needs_one_run_is_refused_with_the_way_out(runs: list[Path], ask: str) -> None:
    tree: Any = forebay.concat(runs)
    with pytest.raises(SchemaError, match=r"several runs.*forebay concat"):
        getattr(tree, ask)("sae" if ask == "features" else "blocks.3.hook_resid_post")
