"""Loading picks the one format that a place is of and casts its weights as asked; saving takes a new folder.

The formats here are small ones of the tests' own: what is asked of every format is what these two functions do around
it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from forebay.stages.dictionaries import load as loading
from forebay.stages.dictionaries import save as saving
from forebay.stages.dictionaries.dictionary import Dictionary
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.formats import FORMATS
from forebay.stages.dictionaries.formats.format import Format, Hooks, read_safetensors
from forebay.stages.dictionaries.load import load_dictionary
from forebay.stages.dictionaries.place import Place
from forebay.stages.dictionaries.save import save_dictionary
from forebay.stages.dictionaries.transcoders import TranscoderSet
from forebay.stages.models.errors import ModelError

from .feature_models import dictionary_of, set_of

D_IN = 11


def tensors(seed: int) -> dict[str, torch.Tensor]:
    one = dictionary_of("blocks.0.hook_embed", D_IN, kind="jumprelu", seed=seed, dtype=torch.bfloat16)
    threshold = one.activation.threshold
    assert threshold is not None
    return {"W_enc": one.W_enc, "b_enc": one.b_enc, "W_dec": one.W_dec, "b_dec": one.b_dec, "threshold": threshold}


def read_one(place: Place, hooks: Hooks) -> Dictionary:
    """A dictionary in bfloat16, whose hook points are the caller's, or else those of layer 4."""
    held = read_safetensors(place.require("one.safetensors"))
    hook, hook_out = hooks.choose(place, "blocks.4.hook_resid_post")
    like = dictionary_of(hook, D_IN, kind="jumprelu", hook_out=hook_out, b_in=None, dtype=torch.bfloat16)
    parts = {name: getattr(like, name) for name in Dictionary.__dataclass_fields__}
    threshold = type(like.activation)(kind="jumprelu", threshold=held.pop("threshold"))
    return Dictionary(**{**parts, **held, "activation": threshold})


def read_set(place: Place, hooks: Hooks) -> TranscoderSet:
    return set_of(D_IN, [5, 6, 7], cross_layer=True)


def write_one(dictionary: Dictionary | TranscoderSet, folder: Path) -> None:
    assert isinstance(dictionary, Dictionary)
    save_file({"W_enc": dictionary.W_enc.contiguous()}, folder / "written.safetensors")


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "one": Format(recognizes=lambda place: "one.safetensors" in place.names, read=read_one, write=write_one),
        "many": Format(recognizes=lambda place: "many.txt" in place.names, read=read_set),
    }
    monkeypatch.setattr(loading, "FORMATS", known)
    monkeypatch.setattr(saving, "FORMATS", known)


@pytest.fixture
def folder(formats: None, tmp_path: Path) -> Path:
    path = tmp_path / "dictionary"
    path.mkdir()
    save_file(tensors(seed=3), path / "one.safetensors")
    return path


# ── loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dictionary_is_read_by_the_names_of_its_files_and_cast(folder: Path) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        dictionary = load_dictionary(folder, dtype=dtype)
        assert isinstance(dictionary, Dictionary)
        expected = tensors(seed=3)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            assert torch.equal(getattr(dictionary, name), expected[name].to(dtype))
        assert dictionary.activation.threshold is not None
        assert dictionary.activation.threshold.dtype == torch.float32
        assert torch.equal(dictionary.activation.threshold, expected["threshold"])


def test_a_dictionary_is_float32_on_the_cpu_unless_it_is_asked_for_otherwise(folder: Path) -> None:
    dictionary = load_dictionary(str(folder / "one.safetensors"))
    assert isinstance(dictionary, Dictionary)
    assert (dictionary.dtype, dictionary.device) == (torch.float32, torch.device("cpu"))


def test_the_caller_may_say_where_a_dictionary_reads_and_writes(folder: Path) -> None:
    said: dict[str, tuple[dict[str, str], tuple[str, str]]] = {
        "nothing": ({}, ("blocks.4.hook_resid_post", "blocks.4.hook_resid_post")),
        "where it reads": ({"hook": "blocks.2.hook_resid_mid"}, ("blocks.2.hook_resid_mid", "blocks.2.hook_resid_mid")),
        "where it writes": (
            {"hook_out": "blocks.5.mlp.hook_out"},
            ("blocks.4.hook_resid_post", "blocks.5.mlp.hook_out"),
        ),
        "both": (
            {"hook": "blocks.2.hook_resid_mid", "hook_out": "blocks.2.mlp.hook_out"},
            ("blocks.2.hook_resid_mid", "blocks.2.mlp.hook_out"),
        ),
    }
    for given, expected in said.values():
        dictionary = load_dictionary(folder, **given)  # type: ignore[arg-type]
        assert isinstance(dictionary, Dictionary)
        assert (dictionary.hook, dictionary.hook_out) == expected


def test_a_set_of_transcoders_is_opened_without_being_read(formats: None, tmp_path: Path) -> None:
    (tmp_path / "many.txt").touch()
    transcoders = load_dictionary(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert isinstance(transcoders, TranscoderSet)
    assert transcoders.reader.asked == []  # type: ignore[attr-defined]
    encoder = transcoders.encoder(1)
    assert (encoder.dtype, transcoders.decoder_rows(0, 2).dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(encoder.W_enc, set_of(D_IN, [5, 6, 7], cross_layer=True).encoder(1).W_enc.bfloat16())


def test_where_two_formats_fit_the_caller_says_which(folder: Path) -> None:
    (folder / "many.txt").touch()
    with pytest.raises(DictionaryError, match=r"dictionary may be one or many: say which with format="):
        load_dictionary(folder)
    assert isinstance(load_dictionary(folder, format="one"), Dictionary)
    assert isinstance(load_dictionary(folder, format="many"), TranscoderSet)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.bin", "b.json"], r"is of no known format; it holds a\.bin, b\.json\. Name the folder of one dictionary"),
        ([f"{n}.bin" for n in range(10)], r"it holds 0\.bin, .*7\.bin, …\. Name the folder"),
        ([], r"is of no known format; it holds no files\. Name the folder"),
    ],
    ids=["files of another kind", "many of them", "an empty folder"],
)
def test_what_is_of_no_known_format_is_refused_with_what_is_there(
    names: list[str], message: str, formats: None, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(DictionaryError, match=message):
        load_dictionary(tmp_path)


def test_a_format_that_is_not_known_is_refused_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(DictionaryError, match="format 'sae' is not known; known are one, many"):
        load_dictionary(folder, format="sae")


def test_a_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="there is no meta on this machine"):
        load_dictionary(folder, device="meta")


def test_a_damaged_file_is_refused_by_its_name(folder: Path) -> None:
    whole = (folder / "one.safetensors").read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        (folder / "one.safetensors").write_bytes(whole[:cut])
        with pytest.raises(DictionaryError, match=r"one\.safetensors is no safetensors file, or it is damaged or cut"):
            load_dictionary(folder)


def test_every_format_has_a_name_that_a_user_can_type() -> None:
    assert all(name == name.lower() and " " not in name for name in FORMATS)
    assert {"saelens", "sparsify", "circuit-tracer"} <= set(FORMATS)


# ── saving ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("made", [False, True], ids=["a new folder", "an empty folder"])
def test_a_dictionary_is_written_into_a_folder_of_its_own(made: bool, formats: None, tmp_path: Path) -> None:
    folder = tmp_path / "some" / "where"
    if made:
        folder.mkdir(parents=True)
    dictionary = dictionary_of("blocks.1.hook_resid_post", D_IN)
    assert save_dictionary(dictionary, str(folder), format="one") == folder
    assert torch.equal(read_safetensors(folder / "written.safetensors")["W_enc"], dictionary.W_enc)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder that holds something": (lambda folder: (folder / "notes.txt").write_text("mine"), "is there already"),
    "a file": (lambda folder: (folder.rmdir(), folder.write_text("mine")), "is there already; give a new folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_that_is_there_is_written_over(case: str, formats: None, tmp_path: Path) -> None:
    prepare, message = REFUSED[case]
    folder = tmp_path / "taken"
    folder.mkdir()
    prepare(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(DictionaryError, match=message):
        save_dictionary(dictionary_of("blocks.1.hook_resid_post", D_IN), folder, format="one")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("format", ["many", "pickle"], ids=["one that is only read", "none"])
def test_a_format_that_is_not_written_is_refused_before_a_folder_is_made(
    format: str, formats: None, tmp_path: Path
) -> None:
    with pytest.raises(DictionaryError, match=f"dictionaries are not written as '{format}'; formats are one"):
        save_dictionary(dictionary_of("blocks.1.hook_resid_post", D_IN), tmp_path / "new", format=format)
    assert not (tmp_path / "new").exists()
