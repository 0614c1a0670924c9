"""`load_dictionary`: any known format, from the hub or this machine, as the canonical type."""

from dataclasses import replace
from pathlib import Path

import torch

from ..models.devices import resolve_device, resolve_dtype
from .dictionary import Dictionary
from .errors import DictionaryError
from .formats import FORMATS
from .formats.format import Hooks
from .place import Place, find
from .transcoders import TranscoderSet


def load_dictionary(
    source: str | Path,
    *,
    revision: str | None = None,
    format: str | None = None,
    hook: str | None = None,
    hook_out: str | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
) -> Dictionary | TranscoderSet:
    """The dictionary of a folder, a file or a hub reference, `org/repo[/folder or file][@revision]`.

    The format is told by the names of the files unless `format` says it (a key of `forebay.stages.dictionaries.formats.
    FORMATS`). `hook` and `hook_out` take the place of what the format says about where the dictionary reads and writes,
    or does not say. Weights come on `device` in `dtype`, a name or torch's (thresholds always float32); a set of
    transcoders of many layers is opened lazily, whatever its size. Nothing is unpickled but tensors, and no code of a
    repository runs.

    Raises DictionaryError for what is not there, is damaged, is of no known format, or could not be reproduced exactly.
    """
    on = str(resolve_device(device))
    as_ = dtype if isinstance(dtype, torch.dtype) else resolve_dtype(dtype)
    place = find(source, revision)
    chosen = FORMATS[_name_of(place, format)]
    loaded = chosen.read(place, Hooks(hook, hook_out))
    if isinstance(loaded, TranscoderSet):
        return replace(loaded, device=on, dtype=as_)
    return loaded.to(on, as_)


def _name_of(place: Place, asked: str | None) -> str:
    if asked is not None:
        if asked not in FORMATS:
            raise DictionaryError(f"format {asked!r} is not known; known are {', '.join(FORMATS)}")
        return asked
    found = [name for name, format in FORMATS.items() if format.recognizes(place)]
    if len(found) == 1:
        return found[0]
    if found:
        raise DictionaryError(f"{place.source} may be {' or '.join(found)}: say which with format=")
    held = ", ".join(place.names[:8]) + (", …" if len(place.names) > 8 else "") or "no files"
    raise DictionaryError(
        f"{place.source} is of no known format; it holds {held}. Name the folder of one dictionary, or say which of "
        f"{', '.join(FORMATS)} it is with format="
    )
