"""How much memory there is, and how much a forward would take, before it is run."""

import ctypes
import math
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .points import HookPoint
from .spec import ModelSpec

_FLOAT32 = 4
_BOOL = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryInUse:
    """Bytes in use now: `resident` by this process on the host, `peak_resident` the most it ever had; on a device,
    `allocated` by tensors, `reserved` by torch, `total` on it, all None where there is no CUDA device."""

    resident: int
    peak_resident: int
    allocated: int | None = None
    reserved: int | None = None
    total: int | None = None


def memory_in_use(device: torch.device | None = None) -> MemoryInUse:
    """Give the memory in use by this process, and on a CUDA device where one is named."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    resident = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak
    if device is None or device.type != "cuda":
        return MemoryInUse(resident=resident, peak_resident=peak)
    return MemoryInUse(
        resident=resident,
        peak_resident=peak,
        allocated=torch.cuda.memory_allocated(device),
        reserved=torch.cuda.memory_reserved(device),
        total=torch.cuda.get_device_properties(device).total_memory,
    )


# Of glibc's malloc.h: nothing is trimmed, blocks of up to a GiB lie on the heap, which grows by 64 MiB.
_MALLOPT = {-1: -1, -3: 2**30, -2: 2**26}


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for what is allocated next, instead of giving every large block back to the
    system and taking the faults of fresh pages again: a forward that captures everything would spend more than a third
    of its time on those. For the whole process, on Linux with glibc; gives whether that is so. The process then stays
    as large as it ever was, until `release_freed_memory`.
    """
    mallopt = _of_glibc("mallopt")
    return mallopt is not None and all(mallopt(name, value) for name, value in _MALLOPT.items())


def release_freed_memory() -> bool:
    """Give freed memory back to the system now; gives whether any was. Does nothing but on Linux with glibc."""
    malloc_trim = _of_glibc("malloc_trim")
    return malloc_trim is not None and bool(malloc_trim(0))


def _of_glibc(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return function


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardMemory:
    """Bytes that a forward takes: the model's `weights`, its `captures` where no sink takes them, its `logits`, and
    what it works with besides at the fullest moment. Kernels' own scratch space is not counted."""

    weights: int
    captures: int
    logits: int
    working: int

    @property
    def total(self) -> int:
        """All of it together: an upper bound, as the fullest moment may come before the last capture."""
        return self.weights + self.captures + self.logits + self.working


def forward_memory(
    spec: ModelSpec,
    captured: Sequence[HookPoint],
    *,
    n_sequences: int,
    n_positions: int,
    dtype: torch.dtype,
    logits: bool = True,
) -> ForwardMemory:
    """Estimate what a forward of `n_sequences` of `n_positions` takes, from the architecture alone."""
    sizes = {**spec.sizes, "sequence": n_sequences, "position": n_positions, "query": n_positions, "key": n_positions}
    item = dtype.itemsize

    def bytes_of(point: HookPoint) -> int:
        wide = _FLOAT32 if point.kind.endswith("hook_scale") else item
        return math.prod(sizes[dim] for dim in point.dims) * wide

    explicit = any(point.kind in ("attn.hook_attn_scores", "attn.hook_pattern") for point in captured)
    tokens = n_sequences * n_positions
    out = tokens * spec.d_vocab * item if logits else 0
    working = tokens * item * _widest(spec)
    if explicit or spec.attn_softcap is not None:
        working += n_sequences * spec.n_heads * n_positions**2 * (3 * item + _FLOAT32 + _BOOL)
    if spec.logit_softcap is not None:
        working = max(working, 2 * out)
    return ForwardMemory(
        weights=spec.n_parameters * item,
        captures=sum(bytes_of(point) for point in captured),
        logits=out,
        working=working,
    )


def _widest(spec: ModelSpec) -> int:
    """Channels a token that are held at once, in attention or in the MLP, whichever takes more."""
    queries, keys = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
    stream = 3 * spec.d_model  # what entered the block, what was normalised of it, what is added
    attention = stream + (queries + 2 * keys) + (queries + keys) + 2 * queries
    hidden = (3 if spec.gated else 2) * spec.d_mlp
    return max(attention, stream + spec.d_model + hidden)
