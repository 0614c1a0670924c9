"""A tokenizer as JSON, of either kind: the `tokenizers` package's own format, and that of the World tokenizer."""

import json
from pathlib import Path

from .checkpoint import Tokenizer
from .errors import ModelError
from .world import KIND, world_tokenizer_of


def read_tokenizer(source: str | Path) -> Tokenizer:
    """Make a tokenizer from the path of a tokenizer.json or, a `str`, from the text of one.

    Raises ModelError for what is none, or is damaged.
    """
    where = str(source) if isinstance(source, Path) else "the text of a tokenizer"
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        values = json.loads(text) if f'"{KIND}"' in text else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{where} cannot be read: {error}") from error
    if isinstance(values, dict) and values.get("type") == KIND:
        return world_tokenizer_of(values, where)
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises bare Exception for a text that it cannot parse
        raise ModelError(f"{where} cannot be read: {error}") from error
