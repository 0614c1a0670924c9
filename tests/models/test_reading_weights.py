"""Checkpoints of safetensors, in one file or in shards, are read tensor by tensor from mapped files."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from forebay.stages.models.errors import ModelError
from forebay.stages.models.load import load_model
from forebay.stages.models.source import open_checkpoint

from .gguf_writing import write_gguf

INDEX = "model.safetensors.index.json"
NOISE = 6 * 2**20

# Memory that is the process's own: pages of mapped files are the kernel's to take back.
PROGRAM = """
import sys, threading
from pathlib import Path

import gguf.quants, safetensors, torch
from forebay.stages.models.load import load_model
from forebay.stages.models.memory import release_freed_memory

source = Path(sys.argv[1])
torch.set_num_threads(1)

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

def watch(seen, done):
    while not done.wait(0.001):
        seen.append(own())

def load(dtype, read_first):
    held = [path.read_bytes() for path in source.glob("*.safetensors")] if read_first else []
    model = load_model(source, device="cpu", dtype=dtype)
    assert model.weights.embed.dtype == getattr(torch, dtype)
    return model

for how in sys.argv[2:]:
    start, seen, done = own(), [0], threading.Event()
    watcher = threading.Thread(target=watch, args=(seen, done))
    watcher.start()
    model = load(how.removesuffix("!"), how.endswith("!"))
    after = own()
    done.set()
    watcher.join()
    del model
    release_freed_memory()
    print(max(*seen, after) - start, after - start)
"""


class Memory(NamedTuple):
    """Bytes of its own that a process had at most while it loaded a model, and when it was done."""

    peak: int
    after: int


def measure(source: Path, *dtypes: str) -> list[Memory]:
    """Load a model in each dtype, one after another; where it ends in "!", with all shards read into memory first."""
    given = [sys.executable, "-c", PROGRAM, source, *dtypes]
    # The C library gives freed tensors back at once, so that the next load starts where the last one did.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    out = subprocess.run(given, check=True, capture_output=True, text=True, env=variables)
    return [Memory(*map(int, line.split())) for line in out.stdout.splitlines()]


class Stored(NamedTuple):
    """A model on disk, with the bytes of its weights, and of the largest of them, in float32."""

    path: Path
    size: int
    largest: int


def make(**settings: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LlamaForCausalLM(LlamaConfig(**sizes, head_dim=64, **settings))


def stored(path: Path, model: LlamaForCausalLM) -> Stored:
    sizes = [4 * weight.numel() for weight in model.parameters()]
    return Stored(path, sum(sizes), max(sizes))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """56 MiB in 6 shards."""
    folder, model = tmp_path_factory.mktemp("small"), make(vocab_size=2000, num_hidden_layers=4)
    model.save_pretrained(folder, max_shard_size="12MB")
    return stored(folder, model)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """344 MiB in 7 shards."""
    folder, model = tmp_path_factory.mktemp("large"), make(vocab_size=2000, num_hidden_layers=28)
    model.save_pretrained(folder, max_shard_size="60MB")
    return stored(folder, model)


linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel what memory is the process's own")


@linux
@pytest.mark.parametrize("checkpoint", ["small", pytest.param("large", marks=pytest.mark.slow)])
def test_beside_the_model_nothing_is_held(checkpoint: str, request: pytest.FixtureRequest) -> None:
    folder, size, largest = request.getfixturevalue(checkpoint)
    *loads, control = measure(folder, "float32", "bfloat16", "bfloat16!")
    for memory, model in zip(loads, (size, size // 2), strict=True):
        assert 0.98 * model < memory.after, "the model lies in mapped files, not in memory of its own"
        assert memory.peak < model + largest + NOISE  # 0.5 MiB more than the model were measured
    assert control.peak > 0.98 * (size // 2 + size), "shards that are read first are not seen"


@linux
def test_of_quantised_blocks_one_tensor_is_held_beside_the_model(tmp_path: Path) -> None:
    model = make(vocab_size=40_000, num_hidden_layers=1, tie_word_embeddings=True)
    path, size, largest = stored(tmp_path / "embedding.gguf", model)
    assert largest > 0.8 * size
    (memory,) = measure(write_gguf(model, path, kind="Q8_0"), "bfloat16")
    assert 0.98 * size / 2 < memory.after < size / 2 + NOISE
    assert memory.peak < size / 2 + largest + NOISE


def test_shards_hold_what_one_file_holds(small: Stored, tmp_path: Path) -> None:
    whole = {name: tensor for shard in shards(small.path) for name, tensor in load_file(shard).items()}
    save_file(whole, tmp_path / "model.safetensors")
    shutil.copy(small.path / "config.json", tmp_path)
    one, many = open_checkpoint(tmp_path), open_checkpoint(small.path)
    assert [path.name for path in one.files] == ["config.json", "model.safetensors"]
    assert [path.name for path in many.files[:2]] == ["config.json", INDEX]
    assert list(many.files[2:]) == shards(small.path)
    assert len(one.spec.weight_shapes()) == len(whole)
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.spec.weight_shapes())


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_cast_once_from_what_is_stored(kept: torch.dtype, dtype: str, tmp_path: Path) -> None:
    model = make(vocab_size=50, num_hidden_layers=1).to(kept)
    model.save_pretrained(tmp_path)
    weights = load_model(tmp_path, device="cpu", dtype=dtype).weights
    expected = model.model.layers[0].mlp.down_proj.weight.to(getattr(torch, dtype))
    assert torch.equal(weights.blocks[0].down, expected)
    assert torch.equal(weights.unembed, model.lm_head.weight.to(getattr(torch, dtype)))


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    """A checkpoint of 80 GB, almost all of it a hole in the file, is opened at once."""
    sizes = {"vocab_size": 100_000, "hidden_size": 200_000, "intermediate_size": 6, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2, "tie_word_embeddings": True}
    config = LlamaConfig(**sizes, **heads)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in LlamaForCausalLM(config).named_parameters()}
    write_holes(tmp_path / "model.safetensors", shapes)
    started = time.monotonic()
    checkpoint = open_checkpoint(tmp_path)
    assert time.monotonic() - started < 2
    assert 4 * checkpoint.spec.n_parameters == sum(4 * math.prod(shape) for shape in shapes.values()) > 80e9


def write_holes(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of float32 zeros that the file system need not store."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


# ── what is damaged ──────────────────────────────────────────────────────────────────────────────────────────────────


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = path.read_bytes()
    beyond = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:beyond])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[beyond:])


def cut_off(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])


def copy_tensor(source: Path, target: Path) -> None:
    """Put the first tensor of one shard into another one as well."""
    name, tensor = next(iter(load_file(source).items()))
    save_file({**load_file(target), name: tensor}, target)


def name_in_index(folder: Path, tensor: str, file: object) -> None:
    edit_index(folder, lambda index: index["weight_map"].update({tensor: file}))


NORM, EXTRA = "model.norm.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"
OTHER = b"This is no shard, but a text that somebody put in its place."

DAMAGES: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "a lost shard": (
        lambda folder: shards(folder)[1].unlink(),
        r"index\.json names model-00002-of-.*, which the folder does not hold",
    ),
    "a shard without its last byte": (
        lambda folder: cut_off(shards(folder)[2], shards(folder)[2].stat().st_size - 1),
        r"model-00003-of-.* is cut off: its header promises \d+ bytes and it has \d+",
    ),
    "a shard cut off in its header": (
        lambda folder: cut_off(shards(folder)[0], 100),
        r"model-00001-of-.* is no safetensors file, or its header is cut off after 100 bytes",
    ),
    "an empty shard": (
        lambda folder: cut_off(shards(folder)[0], 0),
        r"model-00001-of-.* is no safetensors file, or its header is cut off after 0 bytes",
    ),
    "a shard that is something else": (
        lambda folder: shards(folder)[0].write_bytes(OTHER),
        r"model-00001-of-.* is no safetensors file, or its header is cut off after 60 bytes",
    ),
    "a header that is no JSON": (
        lambda folder: shards(folder)[0].write_bytes((len(OTHER)).to_bytes(8, "little") + OTHER),
        r"the header of .*model-00001-of-.* cannot be read",
    ),
    "a tensor in two shards": (
        lambda folder: copy_tensor(shards(folder)[0], shards(folder)[1]),
        r"stands in both model-00001-of-.* and model-00002-of-",
    ),
    "an index with a tensor that no shard holds": (
        lambda folder: name_in_index(folder, EXTRA, shards(folder)[0].name),
        rf"index\.json puts {re.escape(EXTRA)} in model-00001-of-.*, which does not hold it$",
    ),
    "an index with a tensor in another shard": (
        lambda folder: name_in_index(folder, NORM, shards(folder)[0].name),
        r"puts model\.norm\.weight in model-00001-of-.*, which does not hold it; it stands in model-0000\d-of-",
    ),
    "an index with numbers for files": (
        lambda folder: name_in_index(folder, NORM, 3),
        r"index\.json has no weight_map that gives the file of every tensor",
    ),
    "an index with a list": (
        lambda folder: edit_index(folder, lambda index: index.update(weight_map=[NORM])),
        r"index\.json has no weight_map",
    ),
    "an index without its map": (
        lambda folder: edit_index(folder, lambda index: index.pop("weight_map")),
        r"index\.json has no weight_map",
    ),
    "an index that is no JSON": (
        lambda folder: (folder / INDEX).write_bytes(OTHER),
        r"index\.json is not JSON",
    ),
}
"""What is done to a folder with shards, and what is then said when it is opened."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make(vocab_size=50, num_hidden_layers=1).save_pretrained(folder, max_shard_size="2500KB")
    assert len(shards(folder)) >= 4
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_refused_by_name(damage: str, tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "copy")
    open_checkpoint(folder)
    do, message = DAMAGES[damage]
    do(folder)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(folder)


def test_a_tensor_of_other_bytes_than_its_shape_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Its shape is the one that is expected; what it holds is noticed when it is read."""
    folder = shutil.copytree(tiny, tmp_path / "copy")
    path = next(path for path in shards(folder) if NORM in load_file(path))
    edit_header(path, lambda header: header[NORM].update(dtype="F16"))
    with pytest.raises(ModelError, match=rf"{path.name} is damaged: .*invalid shape, data type, or offset"):
        load_model(folder, device="cpu")
