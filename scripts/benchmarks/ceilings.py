"""What the machine can do at most: the matrix products of a forward alone, and bytes written to the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from forebay.stages.models.model import Model


def products(model: Model, n_rows: int) -> Callable[[], None]:
    """The linear products of all layers over `n_rows` tokens, with the model's own weights, into memory that is there
    already: no attention, no norms, no unembedding."""
    weights = [w for block in model.weights.blocks for w in (block.qkv, block.out, block.gate_up, block.down)]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        width: torch.randn(n_rows, width, generator=generator).to(model.device, model.dtype)
        for width in {w.shape[1] for w in weights}
    }
    outputs = {width: inputs[weights[0].shape[1]].new_empty(n_rows, width) for width in {w.shape[0] for w in weights}}

    def run() -> None:
        with torch.inference_mode():
            for w in weights:
                torch.mm(inputs[w.shape[1]], w.t(), out=outputs[w.shape[0]])

    return run


def flops(model: Model, n_rows: int) -> int:
    """Multiplications and additions of those products."""
    return sum(
        2 * n_rows * w.numel()
        for block in model.weights.blocks
        for w in (block.qkv, block.out, block.gate_up, block.down)
    )


def attention_flops(model: Model, n_sequences: int, n_positions: int) -> int:
    """Multiplications and additions of scores and of what they weigh, of all pairs of positions, hidden ones too.
    Source: Chowdhery et al. 2022 (PaLM), appendix B, the forward's third."""
    spec = model.spec
    return 4 * spec.n_layers * n_sequences * n_positions**2 * spec.n_heads * spec.d_head


def raw_bytes(path: Path, n_bytes: int) -> None:
    """Write so many bytes to a new file, 4 MiB at a time out of the same memory, and flush them."""
    piece = memoryview(_PIECE)
    path.unlink(missing_ok=True)
    with open(path, "wb", buffering=0) as file:
        for start in range(0, n_bytes, len(piece)):
            file.write(piece[: n_bytes - start])
        os.fsync(file.fileno())


_PIECE = bytes(range(256)) * (2**22 // 256)
