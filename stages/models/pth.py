"""A checkpoint as a .pth file: how RWKV's authors publish their models.

Such a file is a pickle. It is read with torch's `weights_only`, which builds tensors and plain containers and runs
nothing that the file names.
"""

import pickle
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint, Vocabulary
from .errors import ModelError
from .families.layout import match_tensors
from .families.rwkv import published

if TYPE_CHECKING:
    import torch


def open_pth(path: Path, source: str) -> Checkpoint:
    """Open a .pth file of RWKV-6 or RWKV-7; its tensors are mapped into memory, not read.

    Raises ModelError for a file that is damaged, that holds anything but tensors by name, and for whatever in it would
    not be honoured.
    """
    tensors = _tensors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    spec, layout = published(shapes, str(path))
    parts = match_tensors(spec, layout, shapes, where=str(path))

    def read(name: str) -> "torch.Tensor":
        return parts[name].take(tensors[parts[name].tensor])

    def vocabulary() -> Vocabulary:
        raise ModelError(f"{path} has no tokenizer")

    return Checkpoint(source=source, revision=None, files=(path,), spec=spec, reader=read, vocabulary=vocabulary)


def _tensors(path: Path) -> "dict[str, torch.Tensor]":
    import torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"{path} cannot be read without running code from it, or is damaged: {error}") from error
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise ModelError(f"{path} holds something other than tensors by name, so it is no checkpoint of RWKV")
    return held
