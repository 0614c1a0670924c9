"""A checkpoint as a .pth file: how RWKV's authors publish their models.

Such a file is a pickle. It is read with torch's `weights_only`, which builds tensors and plain containers and runs
nothing that the file names.
"""

import functools
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint, Vocabulary
from .errors import ModelError
from .families.layout import match_tensors
from .families.rwkv import published
from .pickles import load_pickled
from .world import world_vocabulary
from .world_files import world_file_of

if TYPE_CHECKING:
    import torch


def open_pth(path: Path, source: str) -> Checkpoint:
    """Open a .pth file of RWKV-6 or RWKV-7; its tensors are mapped into memory, not read, unless it is of torch's
    format before 1.6.

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
        return world_vocabulary(world_file_of(path.parent, spec.d_vocab, str(path)), spec.d_vocab)

    return Checkpoint(
        source=source,
        revision=None,
        files=(path,),
        spec=spec,
        reader=read,
        vocabulary=functools.cache(vocabulary),
    )


def _tensors(path: Path) -> "dict[str, torch.Tensor]":
    import torch

    try:
        held = load_pickled(path, mapped=_is_zip(path))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's reader lets out whatever a damaged pickle makes happen in it
        raise ModelError(f"{path} {_reason(error)}") from error
    if not isinstance(held, dict):
        raise ModelError(f"{path} holds a {type(held).__name__}, not tensors by name, so it is no checkpoint of RWKV")
    for name, value in held.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            what = f"{name!r}, of {type(value).__name__}, besides tensors by name"
            raise ModelError(f"{path} holds {what}, so it is no checkpoint of RWKV that can be read")
    return held


def _is_zip(path: Path) -> bool:
    """Whether a file is of the format that can be mapped into memory; the one that torch wrote before 1.6 is no zip
    file, and is read as a whole."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _reason(error: Exception) -> str:
    """Say why a file could not be read. What torch says of pickles ends in advice to run the code in them."""
    if not isinstance(error, pickle.UnpicklingError):
        said = (str(error).strip() or "the file ends too early").splitlines()[0]
        return f"is no .pth file, or it is damaged or cut off: {type(error).__name__}, {said}"
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found is None:
        return "is no .pth file, or it is damaged or cut off: its pickle does more than to name tensors"
    return (
        f"names {found[1]}, which only running code from the file could make; nothing of it was run. A checkpoint of "
        "RWKV holds nothing but tensors by name"
    )
