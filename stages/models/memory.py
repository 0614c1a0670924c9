"""How much memory there is, and how much a forward would take, before it is run."""

import ctypes
import math
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .points import EFFECTIVE_ATTN, STATE, HookPoint
from .rwkv.states import state_bytes
from .rwkv.wkv import positions_at_once
from .spec import ModelSpec

_FLOAT32 = 4
_BOOL = 1
_IN_FLOAT32 = frozenset({"rwkv.hook_decay", "rwkv.hook_wkv", STATE, EFFECTIVE_ATTN})


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
    resident, peak = _resident()
    if device is None or device.type != "cuda":
        return MemoryInUse(resident=resident, peak_resident=peak)
    return MemoryInUse(
        resident=resident,
        peak_resident=peak,
        allocated=torch.cuda.memory_allocated(device),
        reserved=torch.cuda.memory_reserved(device),
        total=torch.cuda.get_device_properties(device).total_memory,
    )


def _resident() -> tuple[int, int]:
    """Bytes that this process has on the host, and the most that it ever had."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak
    # Linux's getrusage would begin with what the parent had when it started this process.
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    resident, peak = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return resident, peak


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
    n_states: int = 1,
) -> ForwardMemory:
    """Estimate what a forward of `n_sequences` of `n_positions` takes, from the architecture alone. `n_states` is the
    number of positions after which recurrent states are captured, where they are."""
    of_tokens = dict.fromkeys(("position", "query", "key"), n_positions)
    sizes = {**spec.sizes, **of_tokens, "sequence": n_sequences, "state_position": n_states}
    item = dtype.itemsize

    def bytes_of(point: HookPoint) -> int:
        wide = _FLOAT32 if point.kind.endswith("hook_scale") or point.kind in _IN_FLOAT32 else item
        return math.prod(sizes[dim] for dim in point.dims) * wide

    tokens = n_sequences * n_positions
    out = tokens * spec.d_vocab * item if logits else 0
    kinds = {point.kind for point in captured}
    if spec.rwkv is not None:
        working = _recurrent(spec, spec.rwkv.version, n_sequences, n_positions, dtype, EFFECTIVE_ATTN in kinds)
        working += n_states * n_sequences * spec.n_heads * spec.d_head**2 * _FLOAT32 if STATE in kinds else 0
    else:
        working = tokens * item * _widest(spec)
        if kinds & {"attn.hook_attn_scores", "attn.hook_pattern"} or spec.attn_softcap is not None:
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


@dataclass(frozen=True, slots=True)
class _Recurrence:
    """What one version of RWKV holds at once, as numbers of tensors: what the token shift makes, of stream width; what
    drives the recurrence, of the width of all heads; in chunks of `size` positions tensors of that width in the dtype
    in which quotients are taken and in float32, and matrices between the positions of a chunk; and matrices of
    effective attention."""

    shifted: int
    driving: int
    size: int
    wide_bytes: int
    wide: int
    narrow: int
    between: int
    attended: int


# Decays of version 7 are so slow that its quotients are taken in float32.
_RECURRENCES: Mapping[int, _Recurrence] = {
    6: _Recurrence(shifted=15, driving=5, size=16, wide_bytes=8, wide=7, narrow=7, between=2, attended=4),
    7: _Recurrence(shifted=6, driving=8, size=32, wide_bytes=4, wide=10, narrow=8, between=6, attended=6),
}


def _recurrent(
    spec: ModelSpec, version: int, n_sequences: int, n_positions: int, dtype: torch.dtype, attended: bool
) -> int:
    """Bytes that RWKV works with at the fullest moment: in the token shift, the recurrence or channel mixing; and the
    states that it keeps."""
    held, item, tokens = _RECURRENCES[version], dtype.itemsize, n_sequences * n_positions
    heads = spec.n_heads * spec.d_head
    in_chunks = -(-n_positions // held.size) * held.size
    at_once = n_sequences * min(in_chunks, positions_at_once(n_sequences * heads))
    driving = tokens * (held.driving * heads * item + 2 * heads * _FLOAT32)
    of_a_chunk = heads * (held.wide * held.wide_bytes + held.narrow * _FLOAT32)
    of_a_chunk += spec.n_heads * held.size * held.between * max(held.wide_bytes, _FLOAT32)
    recurrence = driving + at_once * of_a_chunk
    if attended:
        recurrence += held.attended * n_sequences * spec.n_heads * n_positions * in_chunks * _FLOAT32
    shift = tokens * held.shifted * spec.d_model * item + driving
    channel_mixing = tokens * item * (4 * spec.d_model + 3 * spec.d_mlp)
    stream = tokens * 3 * spec.d_model * item
    states = state_bytes(spec, n_sequences, dtype) + 2 * n_sequences * heads * spec.d_head * _FLOAT32
    return states + stream + max(recurrence, shift, channel_mixing)
