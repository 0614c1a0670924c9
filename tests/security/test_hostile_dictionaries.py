"""Dictionaries, models and tokenizers from a stranger are numbers: nothing they name is run, fetched or believed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from forebay.stages.algzoo.load import load_algzoo
from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.formats.circuit_tracer import _read_yaml
from forebay.stages.dictionaries.formats.format import read_json, read_npz, read_pickled, read_safetensors
from forebay.stages.dictionaries.formats.stored import npz_headers, safetensors_headers
from forebay.stages.dictionaries.load import load_dictionary
from forebay.stages.models.chat import ChatTemplates
from forebay.stages.models.errors import ModelError, nearest
from forebay.stages.models.folder import open_folder, tensor_shapes
from forebay.stages.models.gguf_container import read_container
from forebay.stages.models.source import open_checkpoint
from forebay.stages.models.tokenizer_json import read_tokenizer

from .watching import MARK, contents, watched

# ── pickles ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Runs:
    """A pickle of this runs a command when it is unpickled as Python does."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.made = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.made


PAYLOADS = {
    "a command": Runs(os.system, f"touch {MARK}"),
    "Python's text": Runs(eval, f"open({MARK!r}, 'w')"),
    "more text": Runs(exec, f"open({MARK!r}, 'w')"),
    "an import": Runs(__import__, "antigravity"),
    "an attribute": Runs(getattr, "x", "upper"),
    "a file": Runs(open, MARK, "w"),
    "arrays of objects": np.array([Runs(os.system, "x")], dtype=object),
}


def torch_files(folder: Path, payload: object) -> list[Path]:
    """The payload as torch saves it now, as it did before 1.6, and as a bare pickle; beside tensors."""
    held = {"encoder.weight": torch.zeros(2, 2), "x": payload}
    paths = [folder / name for name in ("ae.pt", "old.pt", "bare.pt")]
    torch.save(held, paths[0])
    torch.save(held, paths[1], _use_new_zipfile_serialization=False)
    paths[2].write_bytes(pickle.dumps(payload, protocol=2))
    return paths


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_no_pickle_is_run_by_any_loader(tmp_path: Path, payload: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in torch_files(tmp_path, payload):
        before = contents(tmp_path)
        with watched(), pytest.raises(DictionaryError):
            read_pickled(path)
        for suffix, load in ((".pth", open_checkpoint), (".pkl", lambda p: load_algzoo(p, task="2nd_argmax"))):
            other = path.rename(path.with_suffix(suffix))
            with watched(), pytest.raises(ModelError):
                load(other)
            path = other
        assert {name.split(".")[0] for name in contents(tmp_path)} == {name.split(".")[0] for name in before}
    assert not (tmp_path / MARK).exists()
    assert "antigravity" not in sys.modules


def test_tensors_larger_than_what_is_stored_of_them_are_refused(tmp_path: Path) -> None:
    """A terabyte in a file of a kilobyte: every row is the same four bytes."""
    path = tmp_path / "ae.pt"
    torch.save({"W": torch.zeros(1).expand(2**20, 2**18)}, path)
    assert path.stat().st_size < 4000
    with pytest.raises(DictionaryError, match="not stored value by value"):
        read_pickled(path)
    for other in (torch.zeros(3, 3).to_sparse(), torch.zeros(3, device="meta")):
        torch.save([{"W": (other,)}], path)
        with pytest.raises(DictionaryError):
            read_pickled(path)
    torch.save({"W": torch.arange(6.0).view(2, 3).T, "n": [1, "x", {"y": torch.ones(1)}]}, path)
    assert read_pickled(path)["W"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_packed_pt_file_is_not_unpacked(tmp_path: Path) -> None:
    path, packed = tmp_path / "ae.pt", tmp_path / "packed.pt"
    torch.save({"W": torch.zeros(2**16)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for entry in archive.infolist():
            other.writestr(entry.filename, archive.read(entry))
    assert packed.stat().st_size < path.stat().st_size / 10
    with pytest.raises(DictionaryError, match="compressed"):
        read_pickled(packed)


# ── arrays ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def npy(shape: str, descr: str = "<f4", data: bytes = b"") -> bytes:
    """An array's file with any header."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


ARRAYS = {
    "objects": npy("(1,)", "|O", pickle.dumps([Runs(os.system, "x")])),
    "a shape beyond memory": npy("(1000000000000, 1000000)"),
    "a negative shape": npy("(-1,)"),
    "two negative sizes": npy("(-2, -3)", data=bytes(24)),
    "a shape that is a call": npy("__import__('os').system('x')"),
    "a header that is a call": b"\x93NUMPY\x01\x00\x10\x00{'descr': exit()}",
    "a header without end": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{" * 1000,
    "a structure": npy("(1,)", "V8", bytes(8)),
    "no array": b"nonsense",
}


@pytest.mark.parametrize("data", ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_are_none_are_refused_before_there_is_room_for_them(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "params.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_enc.npy", data)
    for read in (read_npz, npz_headers):
        with watched(), pytest.raises(DictionaryError):
            read(path)


def test_an_archive_that_grows_without_end_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", npy(f"({2**25},)", "<f4", bytes(2**27)))
    with pytest.raises(DictionaryError, match="times its size"):
        read_npz(path)


def header(entries: object) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


SAFETENSORS = {
    "a length beyond the file": struct.pack("<Q", 2**62) + b"{}",
    "a header of gigabytes": struct.pack("<Q", 2**33),
    "nested without end": header(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a shape beyond memory": header({"W": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 4]}}),
    "a negative shape": header({"W": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + bytes(4),
    "offsets before the data": header({"W": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}) + bytes(4),
    "offsets beyond the data": header({"W": {"dtype": "F32", "shape": [1], "data_offsets": [2**50, 2**50 + 4]}}),
    "offsets the wrong way round": header({"W": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}) + bytes(8),
    "shapes in words": header({"W": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 4]}}) + bytes(4),
    "offsets in words": header({"W": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}) + bytes(4),
    "one offset": header({"W": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}) + bytes(4),
    "a tensor that is none": header({"W": 5}),
    "a list": header([1, 2]),
    "no file": b"",
}


@pytest.mark.parametrize("data", SAFETENSORS.values(), ids=SAFETENSORS)
def test_headers_of_safetensors_that_are_none_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    if data == SAFETENSORS["a header of gigabytes"]:
        os.truncate(path, 2**33 + 8)
    for read in (safetensors_headers, read_safetensors):
        with watched(), pytest.raises(DictionaryError):
            read(path)
    if "data_offsets" not in data.decode("latin1"):  # offsets are the library's to check, when the file is mapped
        with watched(), pytest.raises(ModelError):
            tensor_shapes(path)


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
)
YAML = {
    "a call": "!!python/object/apply:os.system ['touch x']",
    "an object": "model_kind: !!python/object:os.path.x {}",
    "a name": "model_kind: !!python/name:os.system",
    "a module": "model_kind: !!python/module:antigravity",
    "a thousand million laughs": LAUGHS + "transcoders: *t\n",
    "nested without end": "[" * 20_000,
    "a number without end": "k: " + "9" * 10_000,
    "a list": "- x",
    "bytes": "\x00\x01",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML)
def test_yaml_is_plain_values_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with watched(), pytest.raises(DictionaryError):
        _read_yaml(path)
    with watched(), pytest.raises(DictionaryError):
        load_dictionary(tmp_path, format="circuit-tracer")


JSON = {"nested without end": "[" * 100_000, "a list": "[1]", "a number without end": '{"k": ' + "9" * 10_000 + "}"}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_json_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cfg.json"
    path.write_text(text)
    with pytest.raises(DictionaryError):
        read_json(path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError):
        open_folder(tmp_path, "x", None)


def test_a_configuration_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 2**34)
    with pytest.raises(DictionaryError, match="at most"):
        read_json(path)
    with pytest.raises(ModelError, match="at most"):
        open_folder(tmp_path, "x", None)


LISTS: list[object] = [
    ["../../secret.safetensors"],
    ["/etc/passwd"],
    [["x"] * 3],
    [5],
    ["hf://../../etc/x"],
    "x",
    [],
    {},
]


@pytest.mark.parametrize("listed", LISTS, ids=range(len(LISTS)))
def test_a_set_of_transcoders_lists_no_file_but_its_own(tmp_path: Path, listed: object) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(save({"W_enc": torch.zeros(1)}))
    said = {"model_kind": "transcoder_set", "transcoders": listed, "feature_input_hook": "hook_resid_mid"}
    (folder / "config.yaml").write_text(json.dumps(said | {"feature_output_hook": "hook_mlp_out"}))
    with watched() as watch, pytest.raises(DictionaryError):
        load_dictionary(folder)
    assert not any(path.endswith(("secret.safetensors", "passwd")) for path in watch.opened)


SOURCES = [
    "../../etc",
    "a/../../../etc",
    "hf://a/../b",
    "org/repo/../../x",
    "org/repo@../../x",
    "https://evil.example/x",
]


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_that_is_no_dictionary_is_refused_and_nothing_is_fetched(source: str) -> None:
    with watched(), pytest.raises(DictionaryError):
        load_dictionary(source)


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_code_beside_a_model_is_not_run(model: Path, tmp_path: Path) -> None:
    code = f"raise SystemExit  # {MARK}"
    for name in (
        "modeling_evil.py",
        "configuration_evil.py",
        "tokenization_evil.py",
        "__init__.py",
        "sitecustomize.py",
    ):
        (model / name).write_text(code)
    maps = {"AutoConfig": "configuration_evil.E", "AutoModelForCausalLM": "modeling_evil.E"}
    change(model / "config.json", auto_map=maps, trust_remote_code=True, custom_pipelines={"x": {"impl": "evil.E"}})
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.E", None]})
    # A setting that is not honoured is refused, which is as well.
    with watched() as watch, contextlib.suppress(ModelError):
        open_checkpoint(model).tokenizer().encode("text")
    assert not any(path.endswith(".py") and str(tmp_path) in path for path in watch.opened)
    assert not any("evil" in name for name in sys.modules)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../x", "..", ""])
def test_weights_are_the_folders_own(model: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(model / "model.safetensors", tmp_path / "secret.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with watched() as watch, pytest.raises(ModelError):
        open_checkpoint(model)
    assert not any(path.endswith(("secret.safetensors", "passwd")) for path in watch.opened)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def gguf(n_tensors: int, n_values: int, body: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + body


KEY = string("general.architecture")
GGUFS = {
    "values without end": gguf(0, 2**60, b""),
    "tensors without end": gguf(2**60, 0, b""),
    "a string without end": gguf(0, 1, struct.pack("<Q", 2**62)),
    "an array without end": gguf(0, 1, KEY + struct.pack("<IIQ", 9, 4, 2**61)),
    "an array of a thousand million": gguf(0, 1, KEY + struct.pack("<IIQ", 9, 0, 2**30) + bytes(64)),
    "arrays in arrays without end": gguf(0, 1, KEY + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20_000),
    "a kind that is none": gguf(0, 1, KEY + struct.pack("<I", 77)),
    "a name that is no text": gguf(0, 1, struct.pack("<Q", 2) + b"\xff\xfe"),
    "a tensor of 2**64 rows": gguf(1, 0, string("x") + struct.pack("<IQQIQ", 2, 2**63, 2**63, 0, 0)),
    "a tensor of many dimensions": gguf(1, 0, string("x") + struct.pack("<I", 2**31)),
    "a tensor beyond the file": gguf(1, 0, string("x") + struct.pack("<IQIQ", 1, 4, 0, 2**62)),
    "an alignment of nothing": gguf(0, 1, string("general.alignment") + struct.pack("<II", 4, 0)),
}


@pytest.mark.parametrize("data", GGUFS.values(), ids=GGUFS)
def test_a_gguf_file_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data + bytes(32))
    with watched(), pytest.raises(ModelError):
        open_checkpoint(path)


def a_gguf() -> bytes:
    body = KEY + struct.pack("<I", 8) + string("llama") + string("llama.block_count") + struct.pack("<II", 4, 1)
    body += string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("b")
    body += string("token_embd.weight") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)
    return gguf(1, 3, body) + bytes(64)


def a_safetensors() -> bytes:
    return save({"W_enc": torch.arange(6.0).view(2, 3), "b_enc": torch.zeros(3)}, {"format": "pt"})


def an_npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, W_enc=np.zeros((2, 3), np.float32), threshold=np.ones(3, np.float32))
    return file.getvalue()


def a_pt() -> bytes:
    file = io.BytesIO()
    torch.save({"encoder.weight": torch.zeros(2, 3), "k": torch.tensor(2)}, file)
    return file.getvalue()


READERS: dict[str, tuple[Callable[[], bytes], list[Callable[[Path], object]], type[Exception]]] = {
    "x.gguf": (a_gguf, [read_container], ModelError),
    "x.safetensors": (a_safetensors, [safetensors_headers, read_safetensors], DictionaryError),
    "x.npz": (an_npz, [npz_headers, read_npz], DictionaryError),
    "x.pt": (a_pt, [read_pickled], DictionaryError),
}


@pytest.mark.parametrize("name", READERS)
def test_files_damaged_anywhere_are_read_or_refused_and_nothing_else(name: str, tmp_path_factory: Any) -> None:
    make, readers, refusal = READERS[name]
    whole, folder = make(), tmp_path_factory.mktemp("damaged")

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=8), st.booleans())
    def damaged(at: int, other: bytes, cut: bool) -> None:
        path = folder / name
        path.write_bytes(whole[:at] if cut else whole[:at] + other + whole[at + len(other) :])
        with watched():
            for read in readers:
                try:
                    read(path)
                except refusal:
                    continue

    damaged()


@pytest.mark.parametrize("read", [npz_headers, read_npz])
def test_arrays_that_would_begin_before_the_file_are_refused(read: Callable[[Path], object], tmp_path: Path) -> None:
    """The directory of an archive says how far from its start it lies: 512 bytes further here."""
    whole, path = an_npz(), tmp_path / "x.npz"
    offset = len(whole) - 6
    path.write_bytes(whole[: offset + 1] + bytes([whole[offset + 1] + 2]) + whole[offset + 2 :])
    with pytest.raises(DictionaryError, match=r"x\.npz is no \.npz file"):
        read(path)


# ── templates and tokenizers ─────────────────────────────────────────────────────────────────────────────────────────

TEMPLATES = {
    "a way to the classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a way by a filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "a way by a format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a way by a map": "{{ ['{0.__class__}']|map('format', messages)|list }}",
    "a way by a function": "{{ raise_exception.__globals__ }}",
    "a way by itself": "{{ self.__init__.__globals__ }}",
    "a way by a namespace": "{% set n = namespace(a=1) %}{{ n.__class__ }}",
    "a way by the loop": "{% for i in [1] %}{{ loop.__class__ }}{% endfor %}",
    "another file": "{% include '/etc/passwd' %}",
    "a change of what was given": "{{ messages.append(1) }}",
    "a string without end": "{{ 'a' * 10000000000 }}",
    "a list without end": "{{ [1] * 10000000000 }}",
    "a number without end": "{{ 10 ** 10000000000 }}",
    "a range without end": "{{ range(10000000000) | list }}",
    "no template": "{% for %}",
}


@pytest.mark.parametrize("text", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_does_not_leave_its_sandbox(text: str) -> None:
    with watched() as watch:
        try:
            shown = ChatTemplates(templates={"default": text}).render([{"role": "user", "content": "x"}])
        except ModelError:
            shown = ""
    assert "class" not in shown
    assert "/etc/passwd" not in watch.opened


def test_products_that_templates_really_ask_for_are_made() -> None:
    text = "{{ '-' * 20 }}{{ 3 * 4 }}{{ 2 ** 10 }}{{ [1] * 2 }}{{ 1.5 * 2 }}"
    shown = ChatTemplates(templates={"default": text}).render([{"role": "user", "content": "x"}])
    assert shown == "-" * 20 + "121024[1, 1]3.0"


@pytest.mark.parametrize("text", ["[" * 200_000, "{}", "5", '{"type": "forebay.World"}', '{"model": {"type": "Evil"}}'])
def test_a_tokenizer_that_is_none_is_refused(text: str) -> None:
    with watched(), pytest.raises(ModelError):
        read_tokenizer(text)


def test_a_word_of_megabytes_is_not_compared_with_anything() -> None:
    from forebay.stores import errors

    for hint in (nearest, errors.nearest):
        assert hint("a" * 10**7, ["a" * 10**7]) == ""
        assert "'capture'" in hint("captur", ["capture"])
