"""`save_dictionary`: a dictionary in the format of another library."""

from pathlib import Path

from .dictionary import Dictionary
from .errors import DictionaryError
from .formats import FORMATS
from .transcoders import TranscoderSet


def save_dictionary(dictionary: Dictionary | TranscoderSet, folder: str | Path, *, format: str = "saelens") -> Path:
    """Write a dictionary into `folder`, which must not exist or be empty, and give its path.

    Formats that are written: saelens, sparsify, circuit-tracer. Weights keep their dtype, thresholds are float32.
    Raises DictionaryError for a folder that holds something, and for what the format could not reproduce exactly.
    """
    writers = {name: found.write for name, found in FORMATS.items() if found.write is not None}
    if format not in writers:
        raise DictionaryError(f"dictionaries are not written as {format!r}; formats are {', '.join(writers)}")
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DictionaryError(f"{path} is there already; give a new folder")
    path.mkdir(parents=True, exist_ok=True)
    writers[format](dictionary, path)
    return path
