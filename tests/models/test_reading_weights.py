"""Checkpoints of safetensors, in one file or in shards, are read tensor by tensor from mapped files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

INDEX = "model.safetensors.index.json"
MEBIBYTE = 2**20

# Memory that is the process's own: pages of mapped files are the kernel's to take back.
PROGRAM = """
import sys, threading
from pathlib import Path

import safetensors, torch
from forebay.stages.models.load import load_model

def own():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

folder, dtype, before = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
start = peak = own()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, own())

watcher = threading.Thread(target=watch)
watcher.start()
held = [path.read_bytes() for path in folder.glob("*.safetensors")] if before == "all shards" else []
model = load_model(folder, device="cpu", dtype=dtype)
del held
after = own()
done.set()
watcher.join()
assert model.weights.embed.dtype == getattr(torch, dtype)
print(max(peak, after) - start, after - start)
"""


class Memory(NamedTuple):
    """Bytes of its own that a process had at most while it loaded a model, and when it was done."""

    peak: int
    after: int


def measure(folder: Path, dtype: str, before: str = "nothing") -> Memory:
    given = [sys.executable, "-c", PROGRAM, str(folder), dtype, before]
    out = subprocess.run(given, check=True, capture_output=True, text=True)
    return Memory(*map(int, out.stdout.split()))


class Sharded(NamedTuple):
    """A checkpoint in shards: its folder, and the bytes of its weights and of the largest of them in float32."""

    folder: Path
    size: int
    largest: int


def write(folder: Path, n_layers: int, shard: str) -> Sharded:
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=n_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=shard)
    sizes = [4 * weight.numel() for weight in model.parameters()]
    return Sharded(folder, sum(sizes), max(sizes))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    return write(tmp_path_factory.mktemp("small"), 4, "12MB")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    return write(tmp_path_factory.mktemp("large"), 28, "60MB")


linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel what memory is the process's own")


@linux
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpoint", ["small", pytest.param("large", marks=pytest.mark.slow)])
def test_beside_the_model_little_is_held(checkpoint: str, dtype: str, request: pytest.FixtureRequest) -> None:
    folder, size, largest = request.getfixturevalue(checkpoint)
    model = size // (1 if dtype == "float32" else 2)
    memory = measure(folder, dtype)
    print(checkpoint, dtype, model / MEBIBYTE, memory.peak / MEBIBYTE, memory.after / MEBIBYTE)
    assert len(list(folder.glob("*.safetensors"))) >= 5
    assert 0.95 * model < memory.after, "the model lies in mapped files, not in memory of its own"
    assert memory.peak < model + largest + 8 * MEBIBYTE


@linux
def test_that_measurement_sees_shards_that_are_read_first(small: Sharded) -> None:
    folder, size, largest = small
    print(measure(folder, "bfloat16", before="all shards"))
    assert measure(folder, "bfloat16", before="all shards").peak > size + 0.95 * size // 2
