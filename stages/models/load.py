"""Loading a model by name."""

from pathlib import Path

import torch

from .compiling import require_compilable
from .devices import resolve_device, resolve_dtype
from .memory import keep_freed_memory, release_freed_memory
from .model import Model
from .source import open_checkpoint
from .weights import read_weights


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    compile: bool = False,
) -> Model:
    """Load a model from a hub id, a local folder, a .gguf file or an installed package (see `open_checkpoint`).

    `device`: `auto` takes cuda, then mps, then cpu. `dtype`: float32, bfloat16 or float16; weights are cast from
    whatever they are stored in. Beside the model only one of its tensors is in memory at a time. On a CPU the process
    is told to keep freed memory (`keep_freed_memory`).

    `compile` has torch.compile fuse what lies between matrix products, block by block, for forwards without gradients:
    faster, with other last bits, and slow at the first batch of each shape. Blocks with hooks inside run as they are.

    Raises ModelError for whatever cannot be found, read, honoured or compiled.
    """
    checkpoint = open_checkpoint(source, revision)
    on, as_ = resolve_device(device), resolve_dtype(dtype)
    if compile:
        require_compilable(checkpoint.spec, on)
    model = Model(checkpoint.spec, read_weights(checkpoint, on, as_), on, as_, checkpoint, compile)
    if on.type == "cpu":
        release_freed_memory()  # what reading took besides
        keep_freed_memory()
    return model
