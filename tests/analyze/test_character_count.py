"""Characters since the newline are counted as by hand, and the manifold is NumPy's over all tokens of each count."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.decomposition import PCA

import forebay
from forebay.stages.analyze.character_count import (
    WIDTHS,
    character_count_manifold,
    character_counts,
    characters_since_newline,
    wrap_prose,
)
from forebay.stores.errors import SchemaError

from .laziness import forbidden

PARAGRAPH = """
Emma Woodhouse, handsome, clever, and rich, with a comfortable home and happy disposition, seemed to unite some of the
best blessings of existence; and had lived nearly twenty-one years in the world with very little to distress or vex her.
She was the youngest of the two daughters of a most affectionate, indulgent father; and had, in consequence of her
sister's marriage, been mistress of his house from a very early period.
""".replace("\n", " ").strip()


# ── wrapping and counting ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", WIDTHS)
def test_lines_hold_as_many_words_as_fit(width: int) -> None:
    lines = wrap_prose(PARAGRAPH, width).split("\n")
    assert " ".join(lines) == PARAGRAPH
    assert max(map(len, lines)) <= width
    for line, following in pairwise(lines):
        assert len(line) + 1 + len(following.split()[0]) > width


def test_breaks_are_spaces_first_and_words_stay_whole() -> None:
    assert wrap_prose("one\n\ntwo   well-meant\tunaccountably so", 9) == "one two\nwell-meant\nunaccountably\nso"


def test_counts_start_again_behind_every_newline() -> None:
    text = "ab cde\nfg\n\nh"
    #        2 3  6 7  9 10 11 12: ends, by hand
    assert character_counts(text, [2, 3, 6, 7, 9, 10, 11, 12]).tolist() == [2, 3, 6, 0, 2, 0, 0, 1]
    assert character_counts("", []).tolist() == []


@settings(deadline=None)
@given(text=st.text(alphabet="ab \nä🐟", max_size=40), data=st.data())
def test_a_count_is_the_length_of_what_stands_behind_the_last_newline(text: str, data: st.DataObject) -> None:
    ends = data.draw(st.lists(st.integers(0, len(text)), max_size=10))
    expected = [len(text[:end].rpartition("\n")[2]) for end in ends]
    assert character_counts(text, ends).tolist() == expected


def test_an_end_beyond_the_text_is_refused() -> None:
    with pytest.raises(SchemaError, match="character 7 of document 0, whose text is 6 long"):
        character_counts("abc\nde", [2, 7])


# ── over a store ─────────────────────────────────────────────────────────────────────────────────────────────────────


WRAPPED = [wrap_prose(PARAGRAPH, 20), "", wrap_prose(PARAGRAPH[:400], 35), "🐟 zwölf\nBoxkämpfer"]


@pytest.fixture
def run(run_once: Callable[..., Path]) -> xr.DataTree:
    folder = run_once(
        texts=WRAPPED,
        tokenize={"context": 48},
        capture={"hooks": ["blocks.{0,2}.hook_resid_post"], "unit_tokens": 96},
    )
    return forebay.open_run(folder)


@pytest.mark.parametrize("as_node", [True, False])
def test_every_token_of_a_run_has_its_count_and_separators_have_none(run: xr.DataTree, as_node: bool) -> None:
    tokens = run["tokens"].to_dataset()
    found = characters_since_newline(run["tokens"] if as_node else tokens.chunk({"token": 13}), WRAPPED)
    assert found.dims == ("token",)
    assert found.name == "character_count"
    spans = [tokens[name].values.tolist() for name in ("char_start", "char_end", "document")]
    expected = [
        -1 if begin == end else len(WRAPPED[document][:end].rpartition("\n")[2])
        for begin, end, document in zip(*spans, strict=True)
    ]
    assert found.values.tolist() == expected
    assert expected.count(-1) == len(WRAPPED)
    assert set(range(36)) >= set(expected) - {-1} > set(range(20))


def test_texts_that_are_not_the_tokens_own_are_refused(run: xr.DataTree) -> None:
    with pytest.raises(SchemaError, match="document 3, and 2 texts were given"):
        characters_since_newline(run["tokens"], WRAPPED[:2]).compute()
    with pytest.raises(SchemaError, match="not the texts that the tokens were cut from"):
        characters_since_newline(run["tokens"], ["short"] * 4).compute()
    with pytest.raises(SchemaError, match=r"\['char_start', 'char_end'\]"):
        characters_since_newline(run["activations/hook_resid_post"], WRAPPED)


def centred(node: xr.Dataset, counts: NDArray[np.int64], layer: int, top: int) -> NDArray[np.float64]:
    """The oracle: mean vectors by count, [count, d_model], NaN without tokens, without the mean of those there are."""
    value, position = node["value"].sel(layer=layer).values.astype(np.float64), node["position"].values
    rows = np.full((top, value.shape[1]), np.nan)
    for count in range(1, top + 1):
        if (chosen := (counts == count) & (position > 0)).any():
            rows[count - 1] = value[chosen].mean(0)
    return rows - np.nanmean(rows, 0)


@pytest.mark.parametrize("chunks", [None, {"token": 17, "layer": 1}])
def test_the_manifold_is_numpys_and_scikit_learns(run: xr.DataTree, chunks: dict[str, int] | None) -> None:
    node = run["activations/hook_resid_post"].to_dataset()
    node = node.compute() if chunks is None else node.chunk(chunks)
    counts = characters_since_newline(run["tokens"], WRAPPED)
    found = character_count_manifold(node, counts, max_count=40, n_components=3).compute()
    assert found["character_count"].values.tolist() == list(range(1, 41))
    assert found["projection"].dims == ("layer", "character_count", "component")
    for layer in (0, 2):
        one, rows = found.sel(layer=layer), centred(node, counts.values, layer, 40)
        np.testing.assert_allclose(one["mean"] - one["center"], rows, atol=1e-9)
        there = ~np.isnan(rows).any(-1)
        assert 30 <= there.sum() < 40
        oracle = PCA(3, svd_solver="full").fit(rows[there])
        np.testing.assert_allclose(one["explained_variance_ratio"], oracle.explained_variance_ratio_, rtol=1e-6)
        np.testing.assert_allclose(one["projection"][there], rows[there] @ oracle.components_.T, atol=1e-6)
        np.testing.assert_allclose(one["projection"].sum("character_count", skipna=True), 0, atol=1e-9)
        assert np.isnan(one["projection"][~there]).all()
        unit = rows / np.linalg.norm(rows, axis=1)[:, None]
        np.testing.assert_allclose(one["cosine"], unit @ unit.T, atol=1e-9)
        n, spread = one["n_token"].values[there], one["variance"].values[there]
        spread = np.where(n > 1, spread, np.nansum(spread * (n - 1)) / (n - 1).sum())
        noise = (spread / n).sum() * (1 - 1 / there.sum())
        np.testing.assert_allclose(one["sampling_fraction"], noise / np.nansum(rows**2), rtol=1e-9)
    assert int(found["n_token"].sel(layer=0).sum()) == ((counts > 0) & (node["position"] > 0)).sum()


def test_a_curve_of_counts_in_the_activations_comes_out_as_it_went_in() -> None:
    """A circle in two directions, one turn in 24 characters, beneath a mean and noise a hundred times as large."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 40, 60_000)
    plane = np.linalg.qr(rng.normal(size=(9, 2)))[0]
    angle = 2 * np.pi * counts / 24
    value = np.stack([np.cos(angle), np.sin(angle)], -1) @ plane.T + rng.normal(0, 1, (60_000, 9)) + 100
    node = xr.Dataset(
        {"value": (("token", "d_model"), value.astype(np.float32))}, coords={"position": ("token", np.arange(60_000))}
    )
    found = character_count_manifold(
        node.chunk({"token": 25_000}), xr.DataArray(counts, dims="token"), max_count=24, n_components=3
    ).compute()
    assert float(found["explained_variance_ratio"][:2].sum()) > 0.98
    # Each of 24 means of about 1,500 tokens in 9 dimensions is off by a square of 9 / 1,500; each is 1 from the centre.
    assert float(found["sampling_fraction"]) == pytest.approx(9 / 1500, rel=0.1)
    np.testing.assert_allclose(np.linalg.norm(found["projection"][:, :2], axis=1), 1, atol=0.15)
    apart = found["cosine"].sel(character_count=3)
    assert int(apart.values.argmin()) + 1 in range(13, 18)  # half a turn away
    np.testing.assert_allclose(apart.sel(character_count_2=9), 0, atol=0.2)  # a quarter


@pytest.mark.parametrize("chunks", [None, {"token": 7}])
def test_noise_alone_has_a_sampling_fraction_of_about_1_however_few_tokens_a_count_has(chunks: Any) -> None:
    counts = np.concatenate([np.arange(1, 151), np.arange(76, 151), np.arange(126, 151)])  # one, two or three of each
    value = np.random.default_rng(2).normal(size=(len(counts), 60))
    coords = {"position": ("token", np.arange(len(counts)) + 1)}
    node = xr.Dataset({"value": (("token", "d_model"), value)}, coords=coords)
    node = node if chunks is None else node.chunk(chunks)
    found = character_count_manifold(node, xr.DataArray(counts, dims="token"), max_count=150, n_components=2)
    assert float(found["sampling_fraction"]) == pytest.approx(1, abs=0.05)
    single = character_count_manifold(
        node.isel(token=slice(150)), xr.DataArray(counts[:150], dims="token"), max_count=150, n_components=2
    )
    assert np.isnan(single["sampling_fraction"])
    one = character_count_manifold(node, xr.ones_like(node["position"]), max_count=3, n_components=1)
    assert np.isnan(one["sampling_fraction"])


def test_of_two_counts_the_sampling_fraction_of_noise_is_1_too() -> None:
    """Where k / (k − 1) is 2; on average over 30 ways of counting, together in one result of 30 layers."""
    value = np.random.default_rng(2).normal(size=(250, 60))
    halves = [np.random.default_rng(seed).permutation(250) % 2 for seed in range(30)]
    # A layer a way: the tokens of the first count first, so that one assignment of counts serves all of them.
    layers = np.stack([np.concatenate([value[half == 0], value[half == 1]]) for half in halves])
    coords = {"position": ("token", np.arange(250) + 1), "layer": np.arange(30)}
    node = xr.Dataset({"value": (("layer", "token", "d_model"), layers)}, coords=coords)
    counts = xr.DataArray(np.repeat([1, 2], 125), dims="token")
    found = character_count_manifold(node, counts, max_count=2, n_components=1)["sampling_fraction"]
    assert float((1 / found).mean()) == pytest.approx(1, abs=0.1)


def test_nothing_is_computed_or_read_before_it_is_asked_for(run: xr.DataTree, monkeypatch: pytest.MonkeyPatch) -> None:
    with dask.config.set(scheduler=forbidden), monkeypatch.context() as reading:
        reading.setattr("forebay.stores.tree.KeptArray._read", forbidden)
        counts = characters_since_newline(run["tokens"], WRAPPED)
        found = character_count_manifold(run["activations/hook_resid_post"].to_dataset(), counts, n_components=2)
        assert counts.chunks is not None
        assert all(found[name].chunks is not None for name in found.data_vars)
        with pytest.raises(AssertionError, match="something was computed"):
            found["projection"].compute()
    assert found.compute()["n_token"].sum() > 100
