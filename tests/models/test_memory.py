"""What a forward would take is known before it is run: never less than what its tensors then held, and not far more."""

from __future__ import annotations

import platform
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from forebay.stages.models.cache import KeyValueCache, cache_bytes
from forebay.stages.models.errors import HookError
from forebay.stages.models.memory import memory_in_use
from forebay.stages.models.model import Model
from forebay.stages.models.taps import HookSpec

from .families import AS_IT_IS, SIZES


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, from their birth to their garbage collection."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self._alive:
                    self._alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, storage._cdata, None)
                    self.peak = max(self.peak, sum(self._alive.values()))
        return result


ASKED = {
    "bare": HookSpec(),
    "residual streams": HookSpec().capture("blocks.*.hook_resid_post", "ln_final.hook_scale"),
    "patterns": HookSpec().capture("blocks.[0,2].attn.hook_{pattern,attn_scores}"),
    "everything": HookSpec().capture("*", "blocks.*.attn.hook_result"),
}


@pytest.mark.parametrize(
    ("asked", "logits"), [(asked, logits) for asked in ASKED for logits in (True, False) if logits or asked != "bare"]
)
@pytest.mark.parametrize("variant", [f"{family}: {AS_IT_IS}" for family in SIZES], indirect=True)
def test_the_estimate_bounds_what_is_held(ours: Model, asked: str, logits: bool) -> None:
    hooks = ASKED[asked]
    tokens = torch.randint(0, 101, (3, 16), generator=torch.Generator().manual_seed(0))
    estimate = ours.forward_memory(3, 16, hooks, logits=logits)
    with Held() as held:
        out = ours.forward(tokens, hooks, logits=logits)
    captured = sum(value.numel() * value.element_size() for value in out.captures.values())
    assert estimate.captures == captured
    assert estimate.logits == (0 if out.logits is None else out.logits.numel() * out.logits.element_size())
    assert estimate.weights == ours.spec.n_parameters * 4
    small = 24_000  # tables of angles, masks
    assert held.peak <= estimate.total - estimate.weights + small
    assert estimate.total - estimate.weights <= 2.5 * held.peak + small


def test_patterns_of_an_estimate_are_checked(tiny: Model) -> None:
    with pytest.raises(HookError, match="names layer 3"):
        tiny.forward_memory(1, 8, HookSpec().capture("blocks.3.hook_resid_post"))


def test_a_cache_is_as_large_as_it_says(tiny: Model) -> None:
    cache = KeyValueCache(tiny.spec, 2, 17, tiny.device, tiny.dtype)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == cache_bytes(tiny.spec, 2, 17, tiny.dtype)


def test_memory_in_use_grows_with_what_is_held() -> None:
    before = memory_in_use(torch.device("cpu"))
    kept = torch.ones(40_000_000)
    after = memory_in_use()
    assert after.resident - before.resident > 0.9 * kept.nbytes
    assert after.peak_resident >= after.resident - 2**20
    assert after.allocated is None


def test_the_peak_is_of_this_process_and_not_of_the_one_that_began_it() -> None:
    kept = torch.ones(500_000_000, dtype=torch.int16)
    program = "from forebay.stages.models.memory import memory_in_use; print(memory_in_use().peak_resident)"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(said) < kept.nbytes


KEEPING = """
import torch
from forebay.stages.models.memory import keep_freed_memory, memory_in_use, release_freed_memory
print(keep_freed_memory())
before = memory_in_use().resident
blocks = [torch.ones(10_000_000) for _ in range(10)]
held = memory_in_use().resident
del blocks
kept = memory_in_use().resident
print(release_freed_memory())
released = memory_in_use().resident
print(*((value - before) // 1_000_000 for value in (held, kept, released)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_until_it_is_released() -> None:
    said = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True, check=True).stdout.split()
    assert said[:2] == ["True", "True"]
    held, kept, released = map(int, said[2:])
    assert held >= kept > 390
    assert released < 100


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say what of a file is in memory")
def test_a_gguf_file_is_not_in_memory_beside_its_model(smollm2: Model) -> None:
    assert smollm2.checkpoint is not None
    (file,) = smollm2.checkpoint.files
    smollm2.checkpoint.read("blocks.3.mlp.gate.weight")
    lines = Path("/proc/self/smaps").read_text().splitlines()
    begin = [n for n, line in enumerate(lines) if line.endswith(str(file))]
    resident = [int(line.split()[1]) * 1024 for n in begin for line in lines[n : n + 8] if line.startswith("Rss:")]
    assert len(resident) == len(begin) > 0
    assert sum(resident) < file.stat().st_size / 10 * len(begin)
