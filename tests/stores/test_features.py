"""Features read by token and by feature are those that were stored, whatever the layout, and read only when asked."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from forebay.stages.accessors import Decoder
from forebay.stores import contexts, feature_views
from forebay.stores.errors import CorruptStore, FingerprintMismatch, IncompleteStore, SchemaError
from forebay.stores.feature_rows import FeatureRows
from forebay.stores.features import Features
from forebay.stores.index_builder import Build, Geometry
from forebay.stores.postings import BINS
from forebay.stores.store import Store
from forebay.stores.tree import open_run, open_store

from .feature_stores import Sparse, labels_of, postings_of, random_sparse, write_features, write_tokens

LENGTHS = (9, 1, 30, 5, 17, 2, 40)
N_TOKEN, UNIT = sum(LENGTHS), 12
LABELS = labels_of(LENGTHS)
WORDS = ["the", "cat", "sat", "on", "mat", "Ünïcode"]


def sparse_of(dtype: str, signed: bool = False) -> Sparse:
    return random_sparse(3, 37, LENGTHS, most=7, dtype=dtype, levels=4, signed=signed)


LAYOUTS: dict[str, dict[str, Any]] = {
    "ragged": {"rank": None, "dtype": "float32"},
    "counted": {"rank": 7, "dtype": "bfloat16"},
    "half": {"rank": None, "dtype": "float16"},
}
SPARSE = {"ragged": sparse_of("float32"), "counted": sparse_of("bfloat16", signed=True), "half": sparse_of("float16")}
TOKEN_ID = np.random.default_rng(0).integers(0, 7, N_TOKEN).astype(np.uint32)


def write_tokenizer(path: Path) -> None:
    """Seven tokens, of which 0 is one like any other; words are separated by spaces, as SentencePiece does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {f"▁{word}": i for i, word in enumerate(WORDS)} | {"a": 6, "<unk>": 7}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for every layout, with an index of many objects."""
    folder = tmp_path_factory.mktemp("runs")
    for name, layout in LAYOUTS.items():
        store = write_features(folder / name / "features-sae", {"sae": SPARSE[name]}, UNIT, **layout)
        write_tokens(folder / name / "tokens", LENGTHS, TOKEN_ID, 32)
        write_tokenizer(folder / name / "tokenizer.json")
        Build(FeatureRows.open(store, "sae"), 1, Geometry(run=50, chunk=8, shard=64)).run()
    return folder


@pytest.fixture(params=[*LAYOUTS])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sparse(layout: str) -> Sparse:
    return SPARSE[layout]


@pytest.fixture
def features(runs: Path, layout: str) -> Features:
    return open_run(runs / layout).features("sae")  # type: ignore[no-any-return, operator]


@pytest.fixture
def nothing_computed() -> Iterator[None]:
    """Dask may build graphs here, and compute none."""

    def refuse(graph: Any, keys: Any, **options: Any) -> Any:
        raise AssertionError("something was computed")

    with dask.config.set(scheduler=refuse):
        yield


def assert_table(found: xr.Dataset, expected: pd.DataFrame) -> None:
    """Columns of the same values, labels included."""
    table = pd.DataFrame({name: found[name].to_numpy() for name in expected})
    pd.testing.assert_frame_equal(table, expected.reset_index(drop=True), check_dtype=False)


# ── by token ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("span", [(0, N_TOKEN), (0, 0), (5, 6), (11, 13), (12, 24), (7, 50), (N_TOKEN, N_TOKEN)])
def test_rows_are_those_that_were_stored(features: Features, sparse: Sparse, span: tuple[int, int]) -> None:
    rows = features.rows(*span)
    own = (span[0] <= sparse.token) & (sparse.token < span[1])
    token = np.repeat(np.arange(*span), rows.count)
    order = np.lexsort([rows.feature, token])
    np.testing.assert_array_equal(token, sparse.token[own])
    np.testing.assert_array_equal(rows.feature[order], sparse.feature[own])
    np.testing.assert_array_equal(rows.value[order], sparse.value[own])
    assert len(rows.count) == span[1] - span[0]


@pytest.mark.parametrize(
    ("asked", "query"),
    [
        ({"token": 5}, "token == 5"),
        ({"token": slice(10, 40)}, "10 <= token < 40"),
        ({"token": [3, 70, 71]}, "token in [3, 70, 71]"),
        ({"sequence": 2}, "sequence == 2"),
        ({"document": 4, "position": slice(0, 3)}, "document == 4 and position <= 3"),
        ({"position": 0}, "position == 0"),
        ({"sequence": slice(1, 3)}, "1 <= sequence <= 3"),
    ],
)
def test_features_of_chosen_tokens_carry_their_labels(
    features: Features, sparse: Sparse, asked: dict[str, Any], query: str
) -> None:
    found = features.of_tokens(**asked)
    expected = sparse.table.query(query)
    assert found["value"].dims == ("nonzero",)
    assert_table(found, expected)


def test_tokens_come_in_the_order_asked_for_and_as_often(features: Features, sparse: Sparse) -> None:
    found = features.of_tokens([70, 3, 70, -1])
    parts = [sparse.table.query("token == @t") for t in (70, 3, 70, N_TOKEN - 1)]
    assert found["token"].values.tolist() == pd.concat(parts)["token"].tolist()
    np.testing.assert_array_equal(found["value"], pd.concat(parts)["value"])


def test_selected_features_can_be_selected_again(features: Features, sparse: Sparse) -> None:
    found = features.of_tokens(slice(None)).sel(document=4, position=[1, 2])
    expected = sparse.table.query("document == 4 and position in [1, 2]")
    assert sorted(found["value"].values.tolist()) == sorted(expected["value"].tolist())


def test_tokens_far_apart_are_read_alone(features: Features, sparse: Sparse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forebay.stores.feature_rows.FAR", 1)
    found = features.of_tokens([1, 4, 5, 90])
    np.testing.assert_array_equal(found["value"], sparse.table.query("token in [1, 4, 5, 90]")["value"])


@pytest.mark.parametrize("asked", [{}, {"token": 1, "document": 0}])
def test_tokens_are_asked_for_in_one_way(features: Features, asked: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match="either `token`, or some of"):
        features.of_tokens(**asked)


def test_tokens_that_are_not_there_are_refused(features: Features) -> None:
    with pytest.raises(IndexError, match=str(N_TOKEN)):
        features.of_tokens(N_TOKEN)
    with pytest.raises(KeyError, match="document=1 is an empty document"):
        features.of_tokens(document=1)
    with pytest.raises(SchemaError, match="tokens 3 to 999 are not all there"):
        features.rows(3, 999)


# ── dense ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("nothing_computed")
def test_asking_for_dense_columns_counts_or_statistics_computes_nothing(features: Features) -> None:
    dense = features.dense([4, 0, 36])
    assert dense.dims == ("token", "feature")
    assert dense.chunksizes["token"] == (*[UNIT] * (N_TOKEN // UNIT), N_TOKEN % UNIT)
    assert features.dense(3).sel(document=4).dims == ("token",)
    assert features.cooccurrence([0, 3]).dims == ("feature", "other")
    assert features.statistics()["firing_rate"].dims == ("feature",)


def test_dense_columns_are_the_stored_values_and_zero_elsewhere(features: Features, sparse: Sparse) -> None:
    chosen = [4, 0, 36, 11]
    dense = features.dense(chosen)
    np.testing.assert_array_equal(dense, sparse.dense[:, chosen])
    assert dense.dtype == features.by_token.read_dtype
    np.testing.assert_array_equal(features.dense(11), sparse.dense[:, 11])
    np.testing.assert_array_equal(dense.sel(feature=0, sequence=2), sparse.dense[LABELS["sequence"] == 2, 0])
    np.testing.assert_array_equal(dense.isel(token=[90, 3, 3], feature=[2, 0]), sparse.dense[[90, 3, 3]][:, [36, 4]])
    np.testing.assert_array_equal(dense[::-5, 1].values, sparse.dense[::-5, 0])
    np.testing.assert_array_equal(dense.max("token"), sparse.dense[:, chosen].max(axis=0))


@pytest.mark.parametrize("how", ["pairs", "product"])
@pytest.mark.parametrize("skip_positions", [None, 0, 3])
def test_cooccurrence_counts_tokens_at_which_both_fire(
    features: Features, sparse: Sparse, monkeypatch: pytest.MonkeyPatch, how: str, skip_positions: int | None
) -> None:
    monkeypatch.setattr(feature_views, "PRODUCT", 0 if how == "pairs" else 1e9)
    monkeypatch.setattr(feature_views, "PAIRS", 5)
    monkeypatch.setattr(feature_views, "PIECE", 7)
    chosen = [5, 0, 36, 11, 2, 30, 9]
    fires = np.zeros((N_TOKEN, 37), np.int64)
    fires[sparse.token, sparse.feature] = 1
    fires = fires[LABELS["position"] >= (1 if skip_positions is None else skip_positions)][:, chosen]
    found = features.cooccurrence(chosen, skip_positions)
    np.testing.assert_array_equal(found, fires.T @ fires)
    np.testing.assert_array_equal(found.sel(feature=36, other=[2, 5]), (fires.T @ fires)[2, [4, 0]])
    assert found.dtype == np.int64
    if skip_positions is None:
        np.testing.assert_array_equal(np.diag(found), features.statistics()["n_active"][chosen])


# ── by feature ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_statistics_are_of_all_tokens_but_the_first_positions(features: Features, sparse: Sparse) -> None:
    statistics = features.statistics(dense=0.25).compute()
    table = postings_of(sparse, 1)
    n_counted = int((LABELS["position"] >= 1).sum())
    values = table.astype({"value": float}).groupby("feature")["value"]
    n_active = values.size().reindex(range(37), fill_value=0)
    np.testing.assert_array_equal(statistics["n_active"], n_active)
    np.testing.assert_array_equal(statistics["firing_rate"], n_active / n_counted)
    np.testing.assert_array_equal(statistics["dead"], n_active == 0)
    np.testing.assert_array_equal(statistics["dense"], n_active / n_counted > 0.25)
    assert 0 < statistics["dead"].sum() < statistics.sizes["feature"]
    assert 0 < statistics["dense"].sum() < statistics.sizes["feature"]
    np.testing.assert_allclose(statistics["mean_active"], values.mean().reindex(range(37)), rtol=1e-12)
    np.testing.assert_array_equal(statistics["max"], values.max().reindex(range(37)))
    np.testing.assert_array_equal(statistics["histogram"].sum("bin"), n_active)
    assert statistics.attrs["n_token"] == n_counted
    feature = int(n_active.argmax())
    edges = statistics["histogram_edge"].sel(feature=feature).to_numpy()
    expected = table["value"][table["feature"] == feature]
    assert edges[0] == min(0, expected.min())
    assert edges[-1] == max(0, expected.max())
    assert len(edges) == BINS + 1
    for bin_, count in enumerate(statistics["histogram"].sel(feature=feature).values):
        # an edge that is computed may lie a hair beside a value
        within = expected.between(edges[bin_] - 1e-6, edges[bin_ + 1] + 1e-6)
        assert count <= within.sum()


def test_activations_of_a_feature_are_found_everywhere(features: Features, sparse: Sparse) -> None:
    for feature in (0, int(sparse.feature[-1]), *range(8, 12)):
        found = features.activations(feature)
        expected = sparse.table.query("feature == @feature and position >= 1").drop(columns="feature")
        assert found.dims == ("token",)
        assert_table(found.to_dataset(), expected)
        if len(expected):
            where = int(expected["sequence"].iloc[0])
            assert found.sel(sequence=where).sizes["token"] == (expected["sequence"] == where).sum()
            assert found.sel(token=int(expected["token"].iloc[0])) == expected["value"].iloc[0]


def window_of(token: int, before: int, after: int) -> list[int]:
    """The tokens around one, by their labels; −1 beyond its sequence."""
    around = range(token - before, token + after + 1)
    own = LABELS["sequence"][token]
    return [t if 0 <= t < N_TOKEN and LABELS["sequence"][t] == own else -1 for t in around]


@pytest.mark.parametrize("source", ["postings", "many postings", "rows"])
@pytest.mark.parametrize("window", [0, 3, (2, 5), (40, 1)])
def test_top_contexts_are_the_strongest_tokens_and_what_stands_around(
    features: Features, sparse: Sparse, monkeypatch: pytest.MonkeyPatch, source: str, window: int | tuple[int, int]
) -> None:
    monkeypatch.setattr(contexts, "LONG", 0 if source == "rows" else 2**22)
    monkeypatch.setattr(contexts, "COARSE_BITS", 4 if source == "many postings" else 20)
    before, after = (window, window) if isinstance(window, int) else window
    table = postings_of(sparse, 1)
    for feature in (0, int(table["feature"].value_counts().index[0]), 17):
        found = features.top_contexts(feature, n=6, window=window, text=False)
        best = table.query("feature == @feature").head(6)
        for name in ("token", "sequence", "position", "document", "value"):
            np.testing.assert_array_equal(found[name], best[name])
        assert found["activation"].dims == ("context", "offset")
        assert found["offset"].values.tolist() == list(range(-before, after + 1))
        for context, token in enumerate(best["token"]):
            tokens = window_of(token, before, after)
            counted = [t >= 0 and LABELS["position"][t] >= 1 for t in tokens]
            activation = np.where(counted, sparse.dense[tokens, feature], np.nan)
            np.testing.assert_array_equal(found["activation"][context], activation)
            np.testing.assert_array_equal(found["token_id"][context], [TOKEN_ID[t] if t >= 0 else -1 for t in tokens])


def test_top_contexts_of_several_features_are_those_of_each(features: Features, sparse: Sparse) -> None:
    counts = postings_of(sparse, 1)["feature"].value_counts()
    rare, often, never = int(counts.index[-1]), int(counts.index[0]), int(np.setdiff1d(np.arange(37), counts.index)[0])
    found = features.top_contexts([often, never, rare], n=5, window=2)
    assert found["value"].dims == ("feature", "context")
    for i, feature in enumerate((often, never, rare)):
        alone = features.top_contexts(feature, n=5, window=2)
        n = alone.sizes["context"]
        assert n == min(5, counts.get(feature, 0))
        xr.testing.assert_equal(found.isel(feature=i, context=slice(0, n)), alone)
        rest = found.isel(feature=i, context=slice(n, None))
        assert (rest["token"] == -1).all()
        assert (rest["token_id"] == -1).all()
        assert rest["value"].isnull().all()
        assert rest["activation"].isnull().all()
        assert (rest["text"] == "").all()


def test_contexts_read_as_text(features: Features) -> None:
    found = features.top_contexts(int(SPARSE["ragged"].feature[-1]), n=4, window=(3, 2))
    words = [f" {word}" for word in WORDS] + ["a"]
    text = {id_: words[id_] for id_ in range(7)} | {-1: ""}
    for context in range(found.sizes["context"]):
        ids = found["token_id"][context].values.tolist()
        assert found["text_before"][context] == "".join(text[i] for i in ids[:3])
        assert found["text"][context] == text[ids[3]]
        assert found["text_after"][context] == "".join(text[i] for i in ids[4:])
    assert 0 in found["token_id"]


def test_zero_is_a_feature_and_a_token(runs: Path) -> None:
    features = open_run(runs / "ragged").features("sae")  # type: ignore[operator]
    assert SPARSE["ragged"].table.query("feature == 0 and position >= 1").shape[0] > 0
    assert features.activations(0).sizes["token"] == features.top_contexts(0, n=999).sizes["context"] > 0


def test_ties_go_to_the_earlier_token(tmp_path: Path) -> None:
    value = np.full(30, 2.5, np.float32)
    same = Sparse(n_feature=2, lengths=(30,), token=np.arange(30), feature=np.ones(30, int), value=value)
    store = write_features(tmp_path / "features-sae", {"sae": same}, 4)
    Build(FeatureRows.open(store, "sae"), 0, Geometry(run=3, chunk=2, shard=4)).run()
    found = Features.open(store, "sae").top_contexts(1, n=7, text=False)
    assert found["token"].values.tolist() == list(range(7))


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_features_are_opened_by_name_once(tmp_path: Path) -> None:
    layers = {f"clt/layer_{layer}": random_sparse(layer, 5 + layer, LENGTHS, most=3) for layer in (0, 3)}
    write_features(tmp_path / "features-clt", layers, UNIT)
    write_features(tmp_path / "features-sae", {"sae": SPARSE["ragged"]}, UNIT)
    write_tokens(tmp_path / "tokens", LENGTHS, TOKEN_ID, 32)
    accessor: Any = open_run(tmp_path).features
    assert accessor.names == ["clt/layer_0", "clt/layer_3", "sae"]
    assert accessor("clt/layer_3") is accessor("clt/layer_3")
    assert accessor("clt/layer_3").n_feature == 8
    assert accessor("clt/layer_3").hook == "blocks.1.clt/layer_3"
    with pytest.raises(SchemaError, match=r"no features 'clt/layer_2'\. Did you mean 'clt/layer_\d'\? It holds clt/"):
        accessor("clt/layer_2")
    with pytest.raises(SchemaError, match=r"no tokenizer\.json, to make text of; ask with text=False"):
        accessor("sae").top_contexts(0)


def test_a_tree_that_is_no_runs_is_told_so() -> None:
    with pytest.raises(SchemaError, match="what `open_run` gives"):
        xr.DataTree().features("sae")  # type: ignore[operator]


def test_a_run_without_features_says_how_to_have_some(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", LENGTHS, TOKEN_ID, 32)
    with pytest.raises(SchemaError, match=r"It holds none: add \[encode\.NAME\]"):
        open_run(tmp_path).features("sae")  # type: ignore[operator]
    with pytest.raises(SchemaError, match="holds tokens, not features"):
        Features.open(Store.open(tmp_path / "tokens"), "sae")


def test_features_without_their_tokens_have_contexts_without_ids(runs: Path) -> None:
    features = Features.open(Store.open(runs / "ragged" / "features-sae"), "sae")
    found = features.top_contexts(0, text=False)
    assert "token_id" not in found
    assert "activation" in found
    with pytest.raises(SchemaError, match="ask with text=False"):
        features.top_contexts(0)


def test_tokens_of_another_run_are_refused(runs: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", (3, 4), TOKEN_ID[:7], 32)
    with pytest.raises(SchemaError, match="not of one run"):
        Features.open(Store.open(runs / "ragged" / "features-sae"), "sae", tokens)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (37, "sae has no feature 37: it has 37, numbered from 0 to 36"),
        (-1, "sae has no feature -1"),
        ([3, 99], "sae has no feature 99"),
        ([], "at least one"),
        ([3, 3], "more than once"),
        (1.5, "an integer or a list of them"),
        ([[1]], "an integer or a list of them"),
    ],
)
def test_features_that_do_not_exist_are_refused_by_every_question(features: Features, asked: Any, message: str) -> None:
    for question in (features.dense, features.cooccurrence, features.top_contexts, features.activations):
        with pytest.raises(SchemaError, match=message):
            question(asked)


def test_contexts_need_a_number_and_a_window(features: Features) -> None:
    for settings in ({"n": 0}, {"window": -1}, {"window": (2, -1)}):
        with pytest.raises(SchemaError, match="must be at least 1"):
            features.top_contexts(0, **settings)  # type: ignore[arg-type]


def test_an_incomplete_store_is_refused(tmp_path: Path) -> None:
    write_features(tmp_path / "features-sae", {"sae": SPARSE["ragged"]}, UNIT, units=[0, 3])
    with pytest.raises(IncompleteStore, match=r"2 of 9 units are recorded\. Run its recipe again"):
        open_run(tmp_path, partial=True).features("sae")  # type: ignore[operator]


def test_what_needs_no_index_works_without(tmp_path: Path) -> None:
    store = write_features(tmp_path / "features-sae", {"sae": SPARSE["ragged"]}, UNIT)
    features = Features.open(store, "sae")
    np.testing.assert_array_equal(features.dense(3), SPARSE["ragged"].dense[:, 3])
    assert features.of_tokens(4).sizes["nonzero"] == (SPARSE["ragged"].token == 4).sum()
    assert features.cooccurrence([1, 2]).shape == (2, 2)
    for question in (
        features.statistics,
        lambda: features.activations(0),
        lambda: features.top_contexts(0, text=False),
    ):
        with pytest.raises(IncompleteStore, match=r"no index of 'sae'\. Build it with `forebay index .* sae`"):
            question()


def test_an_index_that_is_built_anew_is_opened_again(runs: Path, tmp_path: Path) -> None:
    """Else places in the old one would be looked up in the new one."""
    shutil.copytree(runs / "ragged", tmp_path / "run")
    features = open_run(tmp_path / "run").features("sae")  # type: ignore[operator]
    before = features.top_contexts(0, n=99)
    Build(features.by_token, 4, Geometry(run=50, chunk=8, shard=64)).run()
    after = features.top_contexts(0, n=99)
    assert before["position"].min() < 4 <= after["position"].min()
    np.testing.assert_array_equal(after["value"], before["value"][before["position"] >= 4])


def test_an_index_of_other_features_is_refused(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features-sae"
    shutil.copytree(runs / "ragged" / "features-sae" / "index", folder / "index")
    store = write_features(folder, {"sae": SPARSE["half"]}, UNIT, fingerprint="a" * 64)
    with pytest.raises(FingerprintMismatch, match=r"forebay index .* sae. again"):
        Features.open(store, "sae").statistics()


def test_damaged_rows_are_refused(runs: Path, layout: str, tmp_path: Path) -> None:
    shutil.copytree(runs / layout, tmp_path / "run")
    features = open_run(tmp_path / "run").features("sae")  # type: ignore[operator]
    path = max((tmp_path / "run/features-sae/data.zarr/sae/value/c").rglob("*"), key=lambda path: path.is_file())
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptStore, match=r"sae/value/c/.*checksum is wrong.*forebay verify"):
        features.of_tokens(slice(None))


def test_features_travel_to_other_processes(features: Features, sparse: Sparse) -> None:
    features.top_contexts(0)  # everything is open
    again = pickle.loads(pickle.dumps(features))  # noqa: S301  our own
    assert len(pickle.dumps(features)) < 10_000
    xr.testing.assert_equal(again.top_contexts(0), features.top_contexts(0))
    with dask.config.set(scheduler="processes", num_workers=1):
        np.testing.assert_array_equal(again.dense([2]).isel(token=slice(0, 20)), sparse.dense[:20, [2]])


def test_the_tree_of_a_run_stays_as_it_is(runs: Path) -> None:
    """Ragged arrays have no axis that a label fits; regular ones are shown like any array."""
    assert "sae" in open_store(runs / "counted" / "features-sae")
    assert isinstance(Decoder(runs / "ragged" / "tokenizer.json")([[0, 1], []]), list)
