"""The one place where a pickle is read: tensors and plain containers, never code, and no larger than the file.

`weights_only` builds nothing that a file names beyond tensors. Two things it leaves open are closed here: a zip whose
entries are compressed, which may unpack to anything, and tensors that are far larger than what is stored for them.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_DEPTH = 16


def load_pickled(path: Path, *, mapped: bool = False) -> Any:
    """Give what a file of `torch.save` holds, on the CPU; with `mapped`, tensors are mapped into memory.

    Raises OSError, MemoryError, and for a damaged or hostile file whatever torch's reader lets out, ValueError where it
    would take more room than it has bytes.
    """
    import torch

    if zipfile.is_zipfile(path):
        _check_entries(path)
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    for tensor in _tensors(held, 0):
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise ValueError(f"it holds a tensor of shape {list(tensor.shape)} that is not stored value by value")
    return held


def _check_entries(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    size = path.stat().st_size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise ValueError("its parts are compressed, or lie one over the other, as torch never writes them")


def _tensors(held: Any, depth: int) -> Iterator[Any]:
    import torch

    if depth > MOST_DEPTH:
        raise ValueError(f"what it holds is more than {MOST_DEPTH} deep")
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value, depth + 1)
    elif isinstance(held, list | tuple | set):
        for value in held:
            yield from _tensors(value, depth + 1)
