"""`save_dictionary`: a dictionary in the format of another library."""

import shutil
import uuid
from pathlib import Path

from .dictionary import Dictionary
from .errors import DictionaryError
from .formats import FORMATS
from .transcoders import TranscoderSet


def save_dictionary(dictionary: Dictionary | TranscoderSet, folder: str | Path, *, format: str = "saelens") -> Path:
    """Write a dictionary into `folder`, which must not exist or be empty, and give its path. All of it is there, or
    nothing.

    Formats that are written: saelens, sparsify, circuit-tracer. Weights keep their dtype, thresholds are float32.
    Raises DictionaryError for a folder that holds something, and for what the format could not reproduce exactly.
    """
    writers = {name: found.write for name, found in FORMATS.items() if found.write is not None}
    if format not in writers:
        raise DictionaryError(f"dictionaries are not written as {format!r}; formats are {', '.join(writers)}")
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DictionaryError(f"{path} is there already; give a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    aside.mkdir()
    try:
        writers[format](dictionary, aside)
        if path.exists():
            path.rmdir()
        aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path
