"""Labelled tokens are text again by the tokenizer that their run keeps, whatever was selected from it or computed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import forebay
from forebay.stages import token_text
from forebay.stores.errors import SchemaError

END = "<|endoftext|>"


@pytest.fixture
def run_folder(make_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """A document a sequence, of up to 64 tokens; each as the corpus has it."""
    recipe = make_recipe("words", tokenize={"context": 64, "layout": "documents", "long_documents": "truncate"})
    assert forebay.run(recipe, tmp_path / "run", device="cpu").code == 0
    return tmp_path / "run"


def singles(folder: Path, ids: Any) -> list[str]:
    """The text of every id alone, by `tokenizers`, for a tokenizer that puts no space before a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.decode([int(one)], skip_special_tokens=False) for one in ids]


def test_the_text_of_a_document_is_that_of_the_corpus_and_of_each_token_that_of_the_tokenizer(
    run_folder: Path, texts: list[str]
) -> None:
    run = forebay.open_run(run_folder)
    node = run["activations/hook_resid_post"]
    n_checked = 0
    for document, text in enumerate(texts):
        for chosen in (run["tokens"].to_dataset(), node.to_dataset(), node["value"]):
            if document not in np.asarray(chosen["document"]):
                assert text == ""
                continue
            of_it = chosen.sel(document=document)
            whole = of_it.forebay.text()
            assert whole == text if of_it.sizes["token"] < 64 else text.startswith(whole)
            pieces = of_it.forebay.tokens_as_text()
            assert pieces.dims == ("token",)
            assert pieces.values.tolist() == singles(run_folder, of_it["token_id"].values)
            assert pieces["position"].values.tolist() == list(range(of_it.sizes["token"]))
            n_checked += 1
    assert n_checked > 30


def test_a_character_of_several_tokens_is_whole_in_a_text_and_broken_token_by_token(run_folder: Path) -> None:
    fish = forebay.open_run(run_folder)["tokens"].to_dataset().sel(document=1)
    assert fish.forebay.text() == "zwölf 🐟"
    pieces = fish.forebay.tokens_as_text().values
    assert pieces[0] == "z"
    assert "\ufffd" in "".join(pieces)
    assert "\ufffd" in fish.isel(token=slice(-2, None)).forebay.text()


def test_text_is_that_of_what_was_selected_and_computed(run_folder: Path) -> None:
    run = forebay.open_run(run_folder)
    value = run["activations/hook_resid_post/value"].sel(document=2)
    ids = value["token_id"].values
    some = value.isel(token=[5, 2, 3])
    assert some.forebay.tokens_as_text().values.tolist() == singles(run_folder, ids[[5, 2, 3]])
    assert some.forebay.text() == "".join(singles(run_folder, ids[[5, 2, 3]]))
    norms = ((some**2).sum("d_model") ** 0.5 * 2).sel(layer=1)
    assert norms.forebay.text() == some.forebay.text()
    assert norms.compute().forebay.text() == some.forebay.text()
    one = value.isel(token=4)
    assert one.forebay.text() == one.forebay.tokens_as_text().item() == singles(run_folder, ids[4:5])[0]
    labelled = norms.assign_coords(token_text=some.forebay.tokens_as_text())
    assert labelled["token_text"].values.tolist() == singles(run_folder, ids[[5, 2, 3]])
    assert value.isel(token=slice(0, 0)).forebay.text() == ""
    assert pickle.loads(pickle.dumps(norms)).forebay.text() == some.forebay.text()  # noqa: S301 - our own


def test_a_tree_is_asked_as_its_tokens_are(run_folder: Path, texts: list[str]) -> None:
    run = forebay.open_run(run_folder)
    whole = run.forebay.text()
    assert whole.startswith(texts[0] + texts[1])
    assert whole == run["tokens"].forebay.text() == run["activations/hook_resid_post"].forebay.text()
    assert run["tokens/token_id"].forebay.text() == whole
    assert forebay.open_store(run_folder / "tokens").forebay.text() == whole
    eager = forebay.open_run(run_folder, chunks=None)
    assert eager["activations/hook_resid_post"].forebay.text() == whole


def test_special_tokens_are_spelt_out(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = make_recipe("packed", texts=["one", "two"])
    assert forebay.run(recipe, tmp_path / "packed", device="cpu").code == 0
    assert forebay.open_run(tmp_path / "packed").forebay.text() == f"one{END}two{END}"


def test_only_the_tokens_that_are_looked_at_are_decoded(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[list[int]] = []
    decode = token_text.Decoder.__call__

    def counted(self: Any, rows: Any) -> list[str]:
        decoded.extend(rows)
        return decode(self, rows)

    monkeypatch.setattr(token_text.Decoder, "__call__", counted)
    pieces = forebay.open_run(run_folder).forebay.tokens_as_text()
    repr(pieces)
    assert decoded == []
    pieces.isel(token=[3, 4]).load()
    assert decoded == [[one] for one in sorted(set(pieces["token_id"].values[[3, 4]].tolist()))]


def test_tokens_of_several_dimensions_are_text_one_by_one_and_gaps_nothing(run_folder: Path) -> None:
    tokens = forebay.open_run(run_folder)["tokens"].to_dataset()
    ids = tokens["token_id"].isel(token=slice(0, 6)).load()
    table = xr.DataArray(
        np.where(np.arange(6) == 4, -1, ids.values.astype(np.int64)).reshape(2, 3), dims=("sequence", "position")
    )
    table.encoding["source"] = ids.encoding["source"]
    data = xr.Dataset(coords={"token_id": table})
    expected = [*singles(run_folder, ids.values[:4]), "", *singles(run_folder, ids.values[5:])]
    assert data.forebay.tokens_as_text().values.ravel().tolist() == expected
    assert data.isel(sequence=1).forebay.text() == expected[3] + expected[5]
    assert data.forebay.tokens_as_text().isel(position=[2, 0], sequence=1).values.tolist() == [expected[5], expected[3]]
    with pytest.raises(SchemaError, match="these lie along sequence, position: select along all but one"):
        data.forebay.text()


def test_runs_end_to_end_are_text_by_the_tokenizer_that_they_share(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "other")
    both = forebay.concat([run_folder, tmp_path / "other"])
    once = forebay.open_run(run_folder).forebay.text()
    assert both.forebay.text() == both["activations/hook_resid_post"].forebay.text() == once * 2


def test_the_tokenizer_is_the_one_that_lies_in_the_run(run_folder: Path) -> None:
    path = run_folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    run = forebay.open_run(run_folder)
    before = run.forebay.text()
    vocabulary["e"], vocabulary["o"] = vocabulary["o"], vocabulary["e"]
    path.write_text(json.dumps(tokenizer))
    assert run.forebay.text() != before


def test_what_comes_from_no_run_is_refused(run_folder: Path, tiny_model: Path) -> None:
    with pytest.raises(
        SchemaError, match="there is no coordinate `token_id` here: ask a node of what `open_run` gives"
    ):
        xr.Dataset({"value": ("token", np.zeros(3))}).forebay.text()
    model = forebay.load_model(str(tiny_model), device="cpu")
    forward = model.forward([[1, 2, 3]], forebay.HookSpec().capture("hook_embed"))
    node = forebay.as_run(forward)["activations/hook_embed"]
    for ask in (node.forebay.text, node["value"].forebay.tokens_as_text):
        with pytest.raises(SchemaError, match=r"do not say which run they are of.*model\.tokenizer\.to_string\(ids\)"):
            ask()
    run = forebay.open_run(run_folder)
    (run_folder / "tokenizer.json").unlink()
    with pytest.raises(SchemaError, match=r"tokenizer\.json, and .* has none"):
        run.forebay.text()
