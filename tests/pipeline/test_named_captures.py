"""A layer or a hook point that is asked for later is computed alone, and read with those that were there as one."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr

import forebay
from forebay.pipeline.plan import plan
from forebay.pipeline.recipe import Recipe, parse, read_recipe
from forebay.stores.errors import FingerprintMismatch, IncompleteStore, RecipeError, SchemaError
from forebay.stores.ledger import Ledger
from forebay.stores.store import Store

FIRST = ["blocks.{0,2}.hook_resid_post", "blocks.1.attn.hook_pattern", "hook_embed"]
LATE = {"hooks": ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z"], "unit_tokens": 32}
LATER = {"hooks": ["blocks.{0,2}.attn.hook_pattern"], "unit_tokens": 64}
CHUNKS = pytest.mark.parametrize("chunks", ["auto", None])

Make = Callable[..., Path]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder: its bytes, and when it was changed, which a copy keeps."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def grown(make_recipe: Make, shared: Path) -> Path:
    """A run that captured some hook points, and others later, twice. Beside it what it held and did in between."""
    folder, said = shared / "grown", {}
    for tables in ({}, {"late": LATE}, {"late": LATE, "later": LATER}) if not folder.exists() else ():
        recipe = make_recipe("grown", capture={"hooks": FIRST, "threads": 1, **tables})
        outcome = forebay.run(recipe, folder, device="cpu")
        assert outcome.code == 0
        said = {step.name: step.tokens for step in outcome.steps}
        (shared / f"said-{len(tables)}.json").write_text(json.dumps(said))
        shutil.copytree(folder, shared / f"after-{len(tables)}")
    return folder


# ── what is computed ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_table_that_is_added_is_computed_and_nothing_else_is_touched(grown: Path, shared: Path) -> None:
    n_token = Store.open(grown / "tokens").schema.n_token
    assert json.loads((shared / "said-1.json").read_text()) == {
        "tokens": 0, "activations": 0, "activations-late": n_token
    }  # fmt: skip
    assert json.loads((shared / "said-2.json").read_text()) == {
        "tokens": 0, "activations": 0, "activations-late": 0, "activations-later": n_token
    }  # fmt: skip
    for n, steps in enumerate([["tokens", "activations"], ["tokens", "activations", "activations-late"]]):
        for step in steps:
            assert contents(shared / f"after-{n}" / step) == contents(grown / step)
    late = Store.open(grown / "activations-late")
    assert set(late.schema.arrays) == {"hook_resid_post/value", "attn.hook_z/value"}
    assert late.labels["hook_resid_post/layer"][1].tolist() == [1]


def test_a_name_determines_no_value(make_recipe: Make, tmp_path: Path) -> None:
    keys = {"hooks": ["blocks.1.hook_resid_post"]}
    alone = plan(make_recipe(capture=keys), tmp_path / "a", device="cpu")
    both = make_recipe(capture={"hooks": ["hook_embed"], "late": {**keys, "unit_tokens": 64}})
    named = plan(both, tmp_path / "b", device="cpu")
    assert named.step("activations-late").fingerprint == alone.step("activations").fingerprint
    assert set(alone.step("activations").payload["parameters"]) == {
        "hooks", "dtype", "store_dtype", "batch", "unit_tokens", "compile", "compression"
    }  # fmt: skip


def test_named_captures_need_no_other(make_recipe: Make, tmp_path: Path) -> None:
    path = make_recipe(capture=None)
    path.write_text(path.read_text() + '[capture.early]\nhooks = ["blocks.0.hook_resid_post"]\nunit_tokens = 64\n')
    assert forebay.run(path, tmp_path / "run", device="cpu").code == 0
    run = forebay.open_run(tmp_path / "run")
    xr.testing.assert_equal(
        run["activations/hook_resid_post"].to_dataset(), run["activations-early/hook_resid_post"].to_dataset()
    )


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


def stored(run: Path, kind: str) -> dict[int, Any]:
    """The layers of a kind in any capture of a run, as Zarr gives them."""
    found = {}
    for folder in sorted(run.glob("activations*")):
        store = Store.open(folder)
        if f"{kind}/value" in store.schema.arrays:
            layers = store.labels[f"{kind}/layer"][1].tolist()
            found.update(zip(layers, store.array(f"{kind}/value")[:], strict=True))
    return found


@CHUNKS
def test_all_captures_read_as_one(grown: Path, chunks: Any) -> None:
    run = forebay.open_run(grown, chunks=chunks)
    assert set(run["activations"].children) == {"hook_resid_post", "attn.hook_pattern", "hook_embed", "attn.hook_z"}
    for kind in ("hook_resid_post", "attn.hook_pattern"):
        node, layers = run[f"activations/{kind}"].to_dataset(), stored(grown, kind)
        assert node.layer.values.tolist() == sorted(layers) == [0, 1, 2]
        np.testing.assert_array_equal(node["value"].values, [layers[layer] for layer in sorted(layers)])
        first = run[f"activations-late/{kind}" if kind == "hook_resid_post" else f"activations-later/{kind}"]
        xr.testing.assert_equal(node.drop_vars(["value", "layer"]), first.to_dataset().drop_vars(["value", "layer"]))
        assert node["value"].attrs == {"dtype": "float32"}
    for name, kind in (("activations", "hook_embed"), ("activations-late", "attn.hook_z")):
        alone = Store.open(grown / name).array(f"{kind}/value")[:]
        np.testing.assert_array_equal(run[f"activations/{kind}/value"].values, alone)
    resid = run["activations/hook_resid_post/value"]
    token = np.flatnonzero((resid.document.values == 3) & (resid.position.values >= 1) & (resid.position.values <= 4))
    chosen = resid.sel(layer=1, document=3, position=slice(1, 4))
    np.testing.assert_array_equal(chosen.values, stored(grown, "hook_resid_post")[1][token])


@CHUNKS
def test_any_selection_is_that_of_numpy(grown: Path, chunks: Any) -> None:
    value = forebay.open_run(grown, chunks=chunks)["activations/hook_resid_post/value"].variable
    layers = stored(grown, "hook_resid_post")
    expected = np.stack([layers[layer] for layer in sorted(layers)])
    n = expected.shape[1]
    for layer in (0, -1, slice(None), slice(1, None), slice(None, None, -1), slice(2, 0, -2), [2, 0], [1, 1, 0], []):
        for token in (5, slice(30, 70), slice(70, 10, -7), np.array([3, 200, 64, 3])):
            for width in (slice(None), 4, [3, 1]) if layer in (-1, [2, 0]) else (slice(None),):
                found = value.isel(layer=layer, token=token, d_model=width).values
                ordered = expected[layer if not isinstance(layer, list) else np.array(layer, dtype=int)]
                ordered = ordered.take(np.arange(n)[token], axis=ordered.ndim - 2)
                np.testing.assert_array_equal(found, ordered[..., width])


@CHUNKS
def test_opening_and_selecting_computes_nothing(grown: Path, chunks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was computed")

    monkeypatch.setattr(Store, "array", refuse)
    with dask.config.set(scheduler=refuse):
        run = forebay.open_run(grown, chunks=chunks)
        for kind in run["activations"].children:
            value = run[f"activations/{kind}/value"]
            assert (value.chunks is None) == (chunks is None)
            assert value.isel(token=slice(3, 40)).size if "token" in value.dims else value.size
    if chunks == "auto":
        assert run["activations/hook_resid_post/value"].chunksizes["token"][0] == 64  # shards of 64 and of 32
        assert run["activations/hook_resid_post/value"].chunksizes["layer"] == (1, 1, 1)


def test_a_layer_reads_its_own_store_only(grown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    check = Store.check_array

    def noted(store: Store, path: str) -> None:
        seen.append(store.name)
        check(store, path)

    monkeypatch.setattr(Store, "check_array", noted)
    value = forebay.open_run(grown, chunks=None)["activations/hook_resid_post/value"].drop_vars("token_id")
    value.sel(layer=1).isel(token=slice(0, 4)).load()
    assert set(seen) == {"activations-late"}
    value.sel(layer=[0, 2]).isel(token=slice(0, 4)).load()
    assert seen.count("activations") == 1


def test_the_view_travels_to_other_processes(grown: Path) -> None:
    value = forebay.open_run(grown, chunks=None)["activations/hook_resid_post/value"]
    again = pickle.loads(pickle.dumps(value.isel(token=slice(60, 70))))  # noqa: S301  what was pickled just now
    np.testing.assert_array_equal(again.values, value.values[:, 60:70])


def test_what_is_stored_stands_beside_the_view(grown: Path) -> None:
    run = forebay.open_run(grown)
    assert run["activations-late/hook_resid_post/value"].layer.values.tolist() == [1]
    assert set(run["activations-late"].children) == {"hook_resid_post", "attn.hook_z"}
    said = {name: Store.open(grown / name).fingerprint for name in ("activations", "activations-late")}
    assert run["activations/hook_resid_post"].attrs["captures"].items() >= said.items()
    assert run["activations-late"].attrs["fingerprint"] == said["activations-late"]


def test_tokens_are_done_where_every_capture_is(grown: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(grown, tmp_path / "run")
    Ledger(folder / "activations").drop(2)
    Ledger(folder / "activations-late").drop(1)
    with pytest.raises(IncompleteStore):
        forebay.open_run(folder)
    for chunks in ("auto", None):
        done = forebay.open_run(folder, partial=True, chunks=chunks)["activations/hook_resid_post"]["done"]
        token = np.arange(done.size)
        np.testing.assert_array_equal(done.values, (token // 64 != 2) & (token // 32 != 1))


# ── what reads captures ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_dictionaries_are_trained_and_encode_whatever_capture_keeps_their_hooks(
    make_recipe: Make, tmp_path: Path
) -> None:
    """One step encodes hook points of two captures; a run that captured all at once has the same features."""
    hooks = {"old": "blocks.0.hook_resid_post", "new": "blocks.1.hook_resid_post"}
    settings = {"n_feature": 40, "k": 4, "batch": 64, "n_batch": 2}
    train = {name: {"hook": hook, **settings} for name, hook in hooks.items()}
    captures = {
        "apart": {"hooks": [hooks["old"]], "threads": 1, "late": {"hooks": [hooks["new"]], "unit_tokens": 64}},
        "together": {"hooks": list(hooks.values()), "threads": 1},
    }
    values: dict[str, Any] = {}
    for name, capture in captures.items():
        folder = tmp_path / name
        assert forebay.run(make_recipe(name, capture=capture, train=train), folder, device="cpu").code == 0
        both = {one: str(folder / "dictionaries" / one) for one in hooks}
        encode = {**{one: {"dictionary": path} for one, path in both.items()}, "both": {"dictionary": both}}
        recipe = make_recipe(name, capture=capture, train=train, encode=encode)
        assert forebay.run(recipe, folder, device="cpu").code == 0
        run = forebay.open_run(folder)
        values[name] = {one: run.features(one).rows(0, 500) for one in ("old", "new", "both/old", "both/new")}
    for one, rows in values["apart"].items():
        for column in ("count", "feature", "value"):
            np.testing.assert_array_equal(getattr(rows, column), getattr(values["together"][one], column))
    np.testing.assert_array_equal(values["apart"]["both/new"].value, values["apart"]["new"].value)
    sources = {
        step: Store.open(tmp_path / "apart" / step).header.provenance["determines"]["source"]
        for step in ("features-old", "features-new", "features-both")
    }
    kept = {name: Store.open(tmp_path / "apart" / name).fingerprint for name in ("activations", "activations-late")}
    assert sources["features-old"] == kept["activations"]
    assert sources["features-new"] == kept["activations-late"]
    assert sources["features-both"] == kept


def test_a_later_capture_changes_no_features(make_recipe: Make, tmp_path: Path) -> None:
    train = {"sae": {"hook": "blocks.0.hook_resid_post", "n_feature": 40, "k": 4, "batch": 64, "n_batch": 2}}
    capture = {"hooks": ["blocks.0.hook_resid_post"]}
    tables = {"train": train, "encode": {"sae": {}}}
    folder = tmp_path / "run"
    assert forebay.run(make_recipe(capture=capture, **tables), folder, device="cpu").code == 0
    before = contents(folder / "features-sae")
    recipe = make_recipe(capture={**capture, "late": {"hooks": ["blocks.*.hook_mlp_out"]}}, **tables)
    assert forebay.run(recipe, folder, device="cpu").code == 0
    assert contents(folder / "features-sae") == before


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_hook_point_that_two_captures_keep_is_refused(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(capture={"late": {"hooks": ["blocks.[1-2].hook_resid_post"]}})
    with pytest.raises(SchemaError, match=r"\[capture\] and \[capture\.late\] both keep blocks\.1\.hook_resid_post"):
        plan(recipe, tmp_path / "run", device="cpu")


def test_a_capture_that_is_edited_is_refused_with_the_table_to_add(make_recipe: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = make_recipe(capture={"hooks": ["blocks.0.hook_resid_post"]})
    former = first.read_text()
    assert forebay.run(first, folder, device="cpu").code == 0
    edited = make_recipe(capture={"hooks": ["blocks.[0-2].hook_resid_post", "blocks.1.attn.hook_pattern"]})
    with pytest.raises(FingerprintMismatch) as refused:
        plan(edited, folder, device="cpu")
    message = str(refused.value)
    assert 'with [capture] hooks = ["blocks.0.hook_resid_post"] as before' in message
    advice = re.search(r"(\[capture\.added\])\n\s*(hooks = .*)\n", message)
    assert advice is not None
    assert json.loads(advice[2].removeprefix("hooks = ")) == [
        "blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.1.attn.hook_pattern"
    ]  # fmt: skip
    first.write_text(f"{former}\n{advice[1]}\n{advice[2]}\n")
    before = contents(folder / "activations")
    assert forebay.run(first, folder, device="cpu").code == 0
    assert contents(folder / "activations") == before
    assert forebay.open_run(folder)["activations/hook_resid_post/value"].layer.values.tolist() == [0, 1, 2]


def test_no_table_is_advised_where_more_has_changed(make_recipe: Make, grown: Path) -> None:
    for change in ({"store_dtype": "bfloat16"}, {"batch": 3}):
        keys = {"hooks": [*FIRST, "blocks.1.hook_resid_post"], "threads": 1}
        for more, advised in (({}, True), (change, False)):
            with pytest.raises(FingerprintMismatch) as refused:
                plan(make_recipe("grown", capture={**keys, **more}), grown, device="cpu")
            assert ("[capture.added]" in str(refused.value)) == advised


def test_training_on_what_no_capture_keeps_is_refused(make_recipe: Make, tmp_path: Path) -> None:
    train = {"sae": {"hook": "blocks.2.hook_mlp_out", "n_feature": 40}}
    recipe = make_recipe(capture={"late": {"hooks": ["blocks.1.hook_mlp_out"]}}, train=train)
    with pytest.raises(SchemaError, match=r"Did you mean 'blocks\.1\.hook_mlp_out'.*\[capture\.NAME\]"):
        plan(recipe, tmp_path / "run", device="cpu")


TABLES: dict[str, Any] = {
    "corpus": {"files": ["a.jsonl"]},
    "model": {"source": "org/name"},
    "tokenize": {"context": 16},
}


def recipe_of(capture: dict[str, Any]) -> Recipe:
    return parse({**TABLES, "capture": capture}, name="r", folder=Path("/no"), file="r.toml")


def test_the_json_of_a_recipe_keeps_its_named_captures() -> None:
    for own in ({}, {"hooks": ["hook_embed"], "batch": 3}):
        recipe = recipe_of({**own, "late": {"hooks": ["a"]}, "x-1": {"hooks": ["b"], "store_dtype": "bfloat16"}})
        assert [stage.store for stage in recipe.stages] == [
            "tokens", *(["activations"] if own else []), "activations-late", "activations-x-1"
        ]  # fmt: skip
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize(
    ("capture", "said"),
    [
        ({"hooks": ["a"], "late": {}}, r"\[capture\.late\] is not usable:\n  hooks: Field required"),
        ({"late": {"hooks": ["a"], "bach": 3}}, r"\[capture\.late\] has no key 'bach'\. Did you mean 'batch'"),
        ({"late": {"hooks": ["a"], "name": "b"}}, r"\[capture\.late\] has no key 'name'"),
        ({"hooks": {"hooks": ["a"]}}, r"\[capture\] is not usable:\n  hooks"),
        ({"../up": {"hooks": ["a"]}}, r"\[capture\.\.\./up\]: a name consists of letters, digits, _ and -"),
        ({"hook": ["a"]}, r"\[capture\] has no key 'hook'\. Did you mean 'hooks'"),
        ({}, r"\[capture\] is not usable:\n  hooks: Field required"),
    ],
)
def test_tables_that_make_no_capture_are_refused(capture: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_of(capture)


def test_a_named_capture_alone_serves_what_reads_activations(tmp_path: Path) -> None:
    tables = {**TABLES, "capture": {"late": {"hooks": ["a"]}}, "encode": {"sae": {"dictionary": "x"}}}
    assert len(parse(tables, name="r", folder=tmp_path, file="r.toml").stages) == 3
    with pytest.raises(RecipeError, match=r"there is no \[capture\]"):
        parse({k: v for k, v in tables.items() if k != "capture"}, name="r", folder=tmp_path, file="r.toml")


def test_a_recipe_is_read_with_its_named_captures(make_recipe: Make) -> None:
    stages = read_recipe(make_recipe(capture={"late": LATE})).stages
    assert [stage.store for stage in stages] == ["tokens", "activations", "activations-late"]
