"""What a format is, and what the modules of formats share: reading tensors safely, checking names and sizes."""

import json
import math
import pickle
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...models.errors import nearest
from ...models.pickles import load_pickled
from ..errors import DictionaryError
from ..place import Place

if TYPE_CHECKING:
    from ..dictionary import Dictionary
    from ..transcoders import TranscoderSet


@dataclass(frozen=True, slots=True)
class Hooks:
    """Where the caller says that a dictionary reads and writes; None: as the format says."""

    hook: str | None = None
    hook_out: str | None = None

    def choose(self, place: Place, found: str | None, found_out: str | None = None) -> tuple[str, str]:
        """The hook points read and written: as the caller says, or as found in the format; an autoencoder's are one.
        DictionaryError where neither says what is read.
        """
        hook = self.hook or found
        if hook is None:
            raise DictionaryError(
                f"{place.source} does not say at which hook point it reads; give it, as in "
                'hook="blocks.12.hook_resid_post"'
            )
        predicted = None if found_out == found else found_out
        return hook, self.hook_out or predicted or hook


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One format on disk: `recognizes` looks at file names only, `read` gives the canonical type on the CPU, in the
    dtype of the file, and `write`, where there is one, puts a dictionary into a folder that exists and is empty.

    Both refuse, with a DictionaryError, what the other side could not reproduce exactly.
    """

    recognizes: Callable[[Place], bool]
    read: "Callable[[Place, Hooks], Dictionary | TranscoderSet]"
    write: "Callable[[Dictionary | TranscoderSet, Path], None] | None" = None


MOST_JSON_BYTES = 2**28
"""Of a configuration, or of statistics beside one."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. DictionaryError if it is damaged or something else."""
    if (size := path.stat().st_size) > MOST_JSON_BYTES:
        raise DictionaryError(f"{path} has {size:,} bytes; at most {MOST_JSON_BYTES:,} are read as a configuration")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DictionaryError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DictionaryError(f"{path} holds {type(value).__name__}; a JSON object was expected")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. DictionaryError if it is damaged or cut off."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise DictionaryError(f"{path} is no safetensors file, or it is damaged or cut off: {error}") from error


def read_pickled(path: Path) -> Any:
    """What a .pt file holds, built of tensors and plain containers only: torch's `weights_only`.

    DictionaryError if it is damaged, or names anything that only running code from the file could make.
    """
    try:
        return load_pickled(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch's reader lets out whatever a damaged pickle makes happen in it
        found = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            raise DictionaryError(
                f"{path} names {found[1]}, which only running code from the file could make; nothing of it was run"
            ) from error
        said = (str(error).strip() or "the file ends too early").splitlines()[0]
        raise DictionaryError(f"{path} is no file of torch's, or it is damaged: {said}") from error


NO_ARRAY = (zipfile.BadZipFile, ValueError, EOFError, TypeError, KeyError, SyntaxError, tokenize.TokenError)
"""What is raised for what is no .npz file; numpy reads an array's header as Python's text, of literals only."""
MOST_NPZ_BYTES = 2**36
MOST_NPZ_RATIO = 100
"""How many times larger an array may be than it is packed, from 64 MiB on: weights hardly pack at all."""


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file, nothing unpickled. DictionaryError if it is damaged, holds objects, or is a bomb: if
    it would unpack to more than the shapes of its arrays take, to more than 64 GiB, or to a hundred times its size.
    """
    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_unpacked(entries, path)
            for entry in entries:
                _check_array(archive, entry)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.asarray(arrays[name], order="C")) for name in arrays.files}
    except (*NO_ARRAY, zlib.error, RuntimeError) as error:
        if isinstance(error, DictionaryError):
            raise
        raise DictionaryError(f"{path} is no .npz file of plain arrays, or it is damaged: {error}") from error


def _check_unpacked(entries: Collection[zipfile.ZipInfo], path: Path) -> None:
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > MOST_NPZ_BYTES:
        raise DictionaryError(f"{path} would unpack to {unpacked:,} bytes; at most {MOST_NPZ_BYTES:,} are read")
    if unpacked > max(2**26, MOST_NPZ_RATIO * path.stat().st_size):
        raise DictionaryError(f"{path} would unpack to {unpacked:,} bytes, {MOST_NPZ_RATIO} times its size and more")


def _check_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """ValueError unless an array, by its header, takes the bytes that are there: numpy makes room for it at once."""
    from numpy.lib import format as npy

    if entry.header_offset < 0:
        raise ValueError(f"{entry.filename} would begin {-entry.header_offset} bytes before the file")
    with archive.open(entry) as file:
        read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"{entry.filename} holds Python's objects")
        if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != entry.file_size - file.tell():
            raise ValueError(f"{entry.filename} of shape {shape} does not take its {entry.file_size:,} bytes")


def exactly(tensors: Collection[str], needed: Collection[str], path: Path, *, optional: Collection[str] = ()) -> None:
    """DictionaryError unless a file holds all the tensors `needed`, and of others only `optional` ones: what is not
    understood would change what the dictionary does.
    """
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise DictionaryError(f"{path} has no {missing[0]}.{nearest(missing[0], tensors)} It has {', '.join(tensors)}")
    unknown = [name for name in tensors if name not in needed and name not in optional]
    if unknown:
        raise DictionaryError(f"{path} has {', '.join(unknown)}, which this format does not know")
