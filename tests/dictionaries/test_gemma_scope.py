"""Gemma Scope's archives are read as SAELens reads them, at the place that folders tell, and bombs are refused."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forebay.stages.dictionaries.dictionary import Dictionary
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.formats.format import read_npz
from forebay.stages.dictionaries.load import load_dictionary

from .saelens_files import GOLDEN, agree, said_by_saelens

ROOT = GOLDEN / "gemma_scope"
FOLDERS = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.rglob("params.npz"))
EMBEDDING = next(folder for folder in FOLDERS if "embedding" in folder)


def load(source: Path, **options: Any) -> Dictionary:
    found = load_dictionary(source, **options)
    assert isinstance(found, Dictionary)
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_features_and_reconstructions_are_those_of_saelens(folder: str) -> None:
    dictionary = load(ROOT / folder)
    values, _ = said_by_saelens(ROOT / folder)
    features = dictionary.encode(values["x"])
    assert torch.equal(features != 0, values["features"] != 0)
    agree(features, values["features"])
    expected = values["reconstruction"]
    if folder == EMBEDDING:  # SAELens leaves the bias where the weights are multiplied
        root = dictionary.d_in**0.5
        expected = expected + dictionary.b_dec * (1 - 1 / root)
    agree(dictionary.reconstruct(values["x"]), expected)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_place_is_told_by_repository_and_folder(folder: str) -> None:
    dictionary = load(ROOT / folder)
    _, said = said_by_saelens(ROOT / folder)
    assert dictionary.hook == said["hook"]
    assert dictionary.hook_out == (said["hook_out"] or said["hook"])
    assert dictionary.denormalize == (dictionary.hook == dictionary.hook_out)
    assert dictionary.provenance.model == f"google/{said['model']}"
    assert load(ROOT / folder / "params.npz").hook == said["hook"]


def test_the_sites_are_those_of_the_paper() -> None:
    found = {folder.split("/")[0].split("-", 4)[-1]: load(ROOT / folder) for folder in FOLDERS if folder != EMBEDDING}
    assert (found["mlp"].hook, found["att"].hook) == ("blocks.0.hook_mlp_out", "blocks.25.attn.hook_z")
    assert (found["transcoders"].hook, found["transcoders"].hook_out) == (
        "blocks.7.ln2.hook_normalized",
        "blocks.7.hook_mlp_out",
    )
    assert load(ROOT / EMBEDDING).hook == "hook_embed"


def test_an_autoencoder_of_embeddings_is_the_same_one_behind_gemmas_multiplier() -> None:
    dictionary = load(ROOT / EMBEDDING)
    with np.load(ROOT / EMBEDDING / "params.npz") as said:
        weights = {name: said[name].astype(np.float64) for name in said.files}
    x = np.random.default_rng(4).normal(size=(11, dictionary.d_in))
    h = x @ weights["W_enc"] + weights["b_enc"]
    features = np.where(h > weights["threshold"], np.maximum(h, 0), 0)
    decoded = features @ weights["W_dec"] + weights["b_dec"]
    multiplied = torch.from_numpy(x) * dictionary.d_in**0.5
    agree(dictionary.encode(multiplied), torch.from_numpy(features))
    agree(dictionary.reconstruct(multiplied), torch.from_numpy(decoded) * dictionary.d_in**0.5)


def test_the_caller_says_the_place_that_no_folder_tells(tmp_path: Path) -> None:
    shutil.copy(ROOT / FOLDERS[1] / "params.npz", tmp_path / "mine.npz")
    with pytest.raises(DictionaryError, match="does not say at which hook point it reads"):
        load(tmp_path / "mine.npz")
    dictionary = load(tmp_path / "mine.npz", hook="blocks.4.hook_resid_pre")
    assert (dictionary.hook, dictionary.hook_out, dictionary.denormalize) == (*["blocks.4.hook_resid_pre"] * 2, True)
    other = load(tmp_path / "mine.npz", hook="blocks.4.mlp.hook_in", hook_out="blocks.4.hook_mlp_out")
    assert (other.hook_out, other.denormalize) == ("blocks.4.hook_mlp_out", False)


def test_weights_of_either_spelling_are_the_same_and_both_at_once_are_refused(tmp_path: Path) -> None:
    small = next(folder for folder in FOLDERS if "9b-it" in folder)
    with np.load(ROOT / small / "params.npz") as said:
        arrays = {name: said[name] for name in said.files}
    assert "w_enc" in arrays
    assert torch.equal(load(ROOT / small).W_enc, torch.from_numpy(arrays["w_enc"]))
    np.savez(tmp_path / "params.npz", W_enc=arrays["w_enc"], **arrays)
    with pytest.raises(DictionaryError, match="the same tensor in two spellings"):
        load(tmp_path, hook="blocks.0.hook_resid_post")


ARRAYS = {
    "W_enc": np.ones((7, 24), np.float32),
    "W_dec": np.ones((24, 7), np.float32),
    "b_enc": np.ones(24, np.float32),
    "b_dec": np.ones(7, np.float32),
    "threshold": np.ones(24, np.float32),
}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"threshold": None}, "has no threshold"),
        ({"W_enc": None}, r"has no W_enc\. Did you mean 'b_enc'"),
        ({"scaling_factor": np.ones(24)}, "has scaling_factor, which this format does not know"),
        ({"W_dec": np.ones((24, 8), np.float32)}, r"b_dec has shape \(7,\); \(8,\) was expected"),
        ({"b_enc": np.ones(23, np.float32)}, r"b_enc has shape \(23,\)"),
        ({"threshold": np.ones((), np.float32)}, r"threshold has shape \(\)"),
        ({"W_enc": np.full((7, 24), np.nan, np.float32)}, "W_enc has 168 values that are NaN"),
        ({"W_enc": np.ones((7, 24), np.int64)}, r"W_enc is torch\.int64"),
        ({"b_dec": np.array(["a"] * 7)}, "no .npz file of plain arrays"),
        ({"b_dec": np.array([object()] * 7)}, "b_dec.npy holds Python's objects"),
        ({"b_dec": np.ones(7, ">f4")}, "no .npz file of plain arrays"),
    ],
)
def test_archives_of_other_arrays_are_refused_by_name(tmp_path: Path, change: Any, match: str) -> None:
    arrays = {name: array for name, array in (ARRAYS | change).items() if array is not None}
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(DictionaryError, match=match):
        load(tmp_path, hook="blocks.0.hook_resid_post")


def test_float64_arrays_stay_what_they_are_until_they_are_cast(tmp_path: Path) -> None:
    arrays = {name: array.astype(np.float64) / 3 for name, array in ARRAYS.items()}
    np.savez(tmp_path / "params.npz", **arrays)
    found = load(tmp_path, hook="blocks.0.hook_resid_post", dtype=torch.float64)
    assert torch.equal(found.W_enc, torch.from_numpy(arrays["W_enc"]))


def _npy(shape: tuple[int, ...], data: bytes) -> bytes:
    """An array file whose header claims a shape, whatever follows it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": "<f4"})
    return file.getvalue() + data


@pytest.mark.parametrize("shape", [(10**12,), (2**40, 2**40), (5,), (-1,)])
def test_an_array_whose_header_claims_other_bytes_than_it_has_is_refused_at_once(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "params.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_enc.npy", _npy(shape, bytes(4 * 7)))
    with pytest.raises(DictionaryError, match=r"W_enc\.npy of shape .* does not take its 156 bytes|damaged"):
        read_npz(path)


def test_an_archive_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("W_enc.npy", "w", force_zip64=True) as member,
    ):
        member.write(_npy((2**24 + 2**18,), b""))
        for _ in range(65):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2**18
    with pytest.raises(DictionaryError, match=r"would unpack to 68,157,568 bytes, 100 times its size and more"):
        read_npz(path)


def test_an_archive_that_claims_more_than_is_ever_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_enc.npy", _npy((7,), bytes(28)))
        archive.infolist()[0].file_size = 2**40
    with pytest.raises(DictionaryError, match="would unpack to 1,099,511,627,776 bytes; at most 68,719,476,736"):
        read_npz(path)


@pytest.mark.parametrize("keep", [0, 3, 400, -30])
def test_an_archive_that_is_cut_off_is_refused(tmp_path: Path, keep: int) -> None:
    np.savez(tmp_path / "params.npz", **ARRAYS)
    path = tmp_path / "params.npz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DictionaryError, match="damaged"):
        load(tmp_path, hook="blocks.0.hook_resid_post")


def test_a_damaged_stream_of_packed_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    np.savez_compressed(path, W_enc=np.random.default_rng(1).normal(size=(70, 240)))
    data = bytearray(path.read_bytes())
    data[3000:3040] = bytes(40)
    path.write_bytes(data)
    with pytest.raises(DictionaryError, match="damaged"):
        read_npz(path)


def test_packed_archives_of_weights_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "params.npz", **ARRAYS)
    assert load(tmp_path, hook="blocks.0.hook_resid_post").W_enc.shape == (7, 24)
