"""The recurrence of RWKV's time mixing over a sequence: one token after another, and many at once. They agree.

A head's state S is a matrix [key channel, value channel]. With receptance r, key k, value v and decay d of a token
(vectors of the head, d over key channels), version 6 (Peng et al. 2024, arXiv:2404.05892) reads, then writes:

    y_t = r_tᵀ S_{t−1}                          S_t = diag(d_t) S_{t−1} + k_t v_tᵀ

and version 7 (Peng et al. 2025, arXiv:2503.14456) removes something along the way, writes, then reads:

    S_t = diag(d_t) S_{t−1} − (κ_t ⊙ a_t) (κ_tᵀ S_{t−1}) + k_t v_tᵀ          y_t = r_tᵀ S_t

The bonus of the token at hand, which both versions have, is no part of this.

Legend: B sequence, T position, H head, K key channel, V value channel; n chunk, x sequences and heads together, C
position in a chunk.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wkv:
    """What drives the recurrence: `r`, `k` [B, T, H, K], `v` [B, T, H, V] and `log_decay` [B, T, H, K], in any dtype.

    Version 7 has `removal`, κ, and `rate`, a, [B, T, H, K] as well; without them it is version 6.
    """

    r: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    removal: Tensor | None = None
    rate: Tensor | None = None

    def part(self, first: int, beyond: int) -> "Wkv":
        """The same for positions `first` to `beyond` − 1 alone."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[:, first:beyond] for name, value in given.items() if value is not None})


_FEW_TOKENS = 4  # which steps take through faster than chunks do
_AT_ONCE = 2**21  # channels of all tokens in chunks at a time: about 180 MB, by the estimate in `memory`


def recur(wkv: Wkv, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Run the recurrence in the form that is quicker here, as much at a time as memory is well spent on. Gives y [B, T,
    H, V] and the state after the last token [B, H, K, V], both in float32."""
    n_sequences, n_positions, n_heads, n_channels = wkv.r.shape
    if n_positions <= _FEW_TOKENS:
        return step_by_step(wkv, state_BHKV)
    at_once = positions_at_once(n_sequences * n_heads * n_channels)
    read: list[Tensor] = []
    for first in range(0, n_positions, at_once):
        y_BTHV, state_BHKV = chunked(wkv.part(first, first + at_once), state_BHKV)
        read.append(y_BTHV)
    return read[0] if len(read) == 1 else torch.cat(read, 1), state_BHKV


def positions_at_once(n_channels: int) -> int:
    """Give how many positions `recur` lays out in chunks at a time, each of this many channels in all sequences."""
    return max(_WHOLE_CHUNKS, _AT_ONCE // n_channels // _WHOLE_CHUNKS * _WHOLE_CHUNKS)


def step_by_step(wkv: Wkv, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Run the recurrence as it is written above, in float32; arguments and results as `recur` has them."""
    decay, state = wkv.log_decay.float().exp(), state_BHKV.float()
    r, k, v = wkv.r.float(), wkv.k.float(), wkv.v.float()
    read: list[Tensor] = []
    for t in range(r.shape[1]):
        before = state
        state = decay[:, t, :, :, None] * before + k[:, t, :, :, None] * v[:, t, :, None]
        if wkv.removal is not None and wkv.rate is not None:
            removal, rate = wkv.removal[:, t].float(), wkv.rate[:, t].float()
            state = state - (removal * rate)[..., None] * (removal[:, :, None] @ before)
        read.append((r[:, t, :, None] @ (before if wkv.removal is None else state)).squeeze(-2))
    return torch.stack(read, 1), state


_WHOLE_CHUNKS = 32  # a multiple of the sizes of chunks
_LEAST_LOG_DECAY = -20.0  # a factor of 2e-9, which float32 does not tell from 0 beside what was written since
_MILD = 20.0  # what the logarithms of a chunk may add up to for float32 to divide by its decays and stay precise


def chunked(wkv: Wkv, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """Run the recurrence on chunks of tokens, in which everything but the step from chunk to chunk is a product of
    matrices; arguments and results as `recur` has them. Gives what `step_by_step` gives, up to rounding.

    The decays of a chunk's tokens up to t multiply to P_t. Its state at t is P_t times the sum of what was there before
    and of every write since, divided by the P of its time. The quotients are taken in float64, unless all decays are
    mild. What version 7 removes depends on what it removed before: a triangular system (Yang et al. 2024,
    arXiv:2406.06484).
    """
    n_sequences, n_positions, n_heads, _ = wkv.r.shape
    size = 16 if wkv.removal is None else 32
    least, most = (float(end) for end in wkv.log_decay.detach().aminmax())
    mild = max(-least, most) * size <= _MILD
    if not mild and wkv.log_decay.device.type == "mps":  # which has no float64
        return step_by_step(wkv, state_BHKV)
    wide = torch.float32 if mild else torch.float64
    log_decay = wkv.log_decay if least >= _LEAST_LOG_DECAY else wkv.log_decay.clamp_min(_LEAST_LOG_DECAY)
    run = _read_then_write if wkv.removal is None else _remove_write_read
    y_nxCV, state_xKV = run(wkv, _in_chunks(log_decay, size, wide), state_BHKV.float().flatten(0, 1))
    y_nBHCV = y_nxCV.unflatten(1, (n_sequences, n_heads))
    return y_nBHCV.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :n_positions], state_xKV.view(state_BHKV.shape)


def _read_then_write(wkv: Wkv, log_decay_nxCK: Tensor, state_xKV: Tensor) -> tuple[Tensor, Tensor]:
    """Version 6: y [n, x, C, V] and the last state."""
    size, wide = log_decay_nxCK.shape[-2], log_decay_nxCK.dtype
    after = log_decay_nxCK.cumsum(-2)  # log P_t
    whole = after[..., -1:, :].exp()
    reads = (after - log_decay_nxCK).exp_() * _in_chunks(wkv.r, size, wide)  # with P_{t−1}
    writes = after.neg().exp_() * _in_chunks(wkv.k, size, wide)
    v = _in_chunks(wkv.v, size, torch.float32)
    y = (reads @ writes.mT).float().tril(-1) @ v
    reads_start, writes_to_end, kept = reads.float(), (writes * whole).float().mT, whole.float().mT
    for n in range(len(y)):
        y[n].baddbmm_(reads_start[n], state_xKV)  # in place, here and below, what no gradient needs: it saves a tenth
        state_xKV = (kept[n] * state_xKV).baddbmm_(writes_to_end[n], v[n])
    return y, state_xKV


def _remove_write_read(wkv: Wkv, log_decay_nxCK: Tensor, state_xKV: Tensor) -> tuple[Tensor, Tensor]:
    """Version 7: y [n, x, C, V] and the last state."""
    assert wkv.removal is not None
    assert wkv.rate is not None
    size, wide = log_decay_nxCK.shape[-2], log_decay_nxCK.dtype
    after = log_decay_nxCK.cumsum(-2)
    here = after.exp()  # P_t
    before, here_inverse, whole = F.pad(here[..., :-1, :], (0, 0, 1, 0), value=1), after.neg().exp_(), here[..., -1:, :]
    v, removal = _in_chunks(wkv.v, size, torch.float32), _in_chunks(wkv.removal, size, wide)
    reads, writes = here * _in_chunks(wkv.r, size, wide), here_inverse * _in_chunks(wkv.k, size, wide)
    sees, takes = before * removal, here_inverse * removal * _in_chunks(wkv.rate, size, wide)
    # What κ sees at t, u_t = κ_tᵀ S_{t−1}, is what it sees of the start and of writes, less what was taken on the way.
    identity = torch.eye(size, device=v.device).expand(*v.shape[:2], -1, -1)
    solution = torch.linalg.solve_triangular((sees @ takes.mT).float(), identity, upper=False, unitriangular=True)
    seen_of_start = solution @ sees.float()
    seen_of_writes = (solution @ (sees @ writes.mT).float().tril(-1)) @ v
    read_of_removal = (reads @ takes.mT).float().tril()
    y = (reads @ writes.mT).float().tril() @ v - read_of_removal @ seen_of_writes
    reads_start = reads.float() - read_of_removal @ seen_of_start
    writes_to_end, takes_to_end = ((part * whole).float().mT for part in (writes, takes))
    kept = whole.float().mT
    for n in range(len(y)):
        y[n].baddbmm_(reads_start[n], state_xKV)
        seen = torch.baddbmm(seen_of_writes[n], seen_of_start[n], state_xKV)
        state_xKV = (kept[n] * state_xKV).baddbmm_(writes_to_end[n], v[n]).baddbmm_(takes_to_end[n], seen, alpha=-1)
    return y, state_xKV


def _in_chunks(x_BTHK: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Lay [B, T, H, K] out as [n, x, C, K]; what fills the last chunk up is 0, which changes no state."""
    missing = -x_BTHK.shape[1] % size
    x = F.pad(x_BTHK, (0, 0, 0, 0, 0, missing)) if missing else x_BTHK
    x_nBHCK = x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4)
    laid_out: Tensor = x_nBHCK.to(dtype, memory_format=torch.contiguous_format)
    return laid_out.flatten(1, 2)
