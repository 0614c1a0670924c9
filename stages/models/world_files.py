"""The file of a World tokenizer's vocabulary: one token a line, `<id> <Python literal> <number of bytes>`.

A literal is '…' or "…" for a text, in UTF-8, and b'…' or b"…" for bytes.
"""

import ast
import importlib.util
import re
from pathlib import Path

from .errors import ModelError, nearest

PACKAGE = "rwkv"
NAME = "rwkv_vocab_v20230424.txt"
PATTERN = "rwkv_vocab*.txt"
WORLD_IDS = 65_536
"""The ids that models of the World series have: 0, those of the 65,529 tokens, and some that stand for nothing."""

_SIZES = {NAME: 65_529}  # a file that is cut off between two lines does not show it
_LINE = re.compile(r"""(\d+) (b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*") (\d+)""")
_TO_DO = f"put {NAME} beside the model, or pip install {PACKAGE}, which carries it"


def read_world_file(path: Path) -> dict[int, bytes]:
    """Read a vocabulary: id → bytes.

    Raises ModelError for a file that cannot be read or is cut off, and with its number for a line that is damaged, that
    has an id or a token for a second time, or an id less than 1.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: tokens hold other ends of lines
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as a vocabulary: {error}") from error
    if not lines[-1]:
        lines.pop()
    tokens: dict[int, bytes] = {}
    seen: set[bytes] = set()
    for number, line in enumerate(lines, start=1):
        try:
            token_id, token = _token(line)
        except (ValueError, SyntaxError) as error:
            raise ModelError(f"line {number} of {path} is damaged: {error}") from error
        if token_id < 1 or token_id in tokens or token in seen:
            raise ModelError(
                f"line {number} of {path} gives {token!r} the id {token_id}, but ids go from 1, and every id and token "
                "stands there once"
            )
        tokens[token_id] = token
        seen.add(token)
    if len(tokens) != _SIZES.get(path.name, len(tokens)):
        raise ModelError(f"{path} has {len(tokens):,} tokens instead of {_SIZES[path.name]:,}: fetch it again")
    return tokens


def _token(line: str) -> tuple[int, bytes]:
    found = _LINE.fullmatch(line)
    if not found:
        raise ValueError(f"{line[:80]!r} is not of the form <id> <Python literal> <number of bytes>")
    literal = found[2]
    value = ast.literal_eval(literal) if "\\" in literal or literal[0] == "b" else literal[1:-1]
    token: bytes = value if isinstance(value, bytes) else value.encode()
    if not token or len(token) != int(found[3]):
        raise ValueError(f"{literal} has {len(token)} bytes, and {found[3]} are promised")
    return int(found[1]), token


def world_file_beside(folder: Path) -> Path | None:
    """Give the vocabulary in a folder, rwkv_vocab_v20230424.txt or the one other rwkv_vocab*.txt; None where there is
    none. Raises ModelError where several others leave it open."""
    paths = sorted(folder.glob(PATTERN))
    if len(paths) > 1 and folder / NAME not in paths:
        raise ModelError(f"{folder} holds several vocabularies, and none is {NAME}: {', '.join(p.name for p in paths)}")
    return folder / NAME if folder / NAME in paths else next(iter(paths), None)


def world_file_of_package() -> Path:
    """Give the vocabulary that the installed package `rwkv` carries; the package is found, not imported. Raises
    ModelError where it is not installed or carries none."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise ModelError(f"the Python package {PACKAGE!r} is not installed: {_TO_DO}")
    places = [Path(place) for place in found.submodule_search_locations or ()]
    path = next((place / NAME for place in places if (place / NAME).is_file()), None)
    if path is None:
        held = [file.name for place in places for file in place.glob("*.txt")]
        raise ModelError(f"the Python package {PACKAGE!r} holds no {NAME}.{nearest(NAME, held)}")
    return path


def world_file_of(folder: Path, n_ids: int, source: str) -> Path:
    """Give the vocabulary of a model of RWKV, named `source`, that lies in a folder and has `n_ids` ids: the one
    beside it, else, for a model of the World series, the one of the installed package `rwkv`.

    Raises ModelError where there is none.
    """
    beside = world_file_beside(folder)
    if beside is not None:
        return beside
    if n_ids != WORLD_IDS:
        raise ModelError(
            f"{source} has no tokenizer: there is no {PATTERN} beside it, and its {n_ids:,} ids are not the "
            f"{WORLD_IDS:,} of RWKV's World models; token ids can still be run"
        )
    try:
        return world_file_of_package()
    except ModelError as error:
        raise ModelError(f"{source} has no vocabulary: {_TO_DO}; token ids can still be run") from error
