"""The World tokenizer of RWKV: 65,529 tokens of bytes, a text cut greedily into the longest ones.

Vocabulary and rules are those of RWKV's authors: https://github.com/BlinkDL/RWKV-LM, file rwkv_vocab_v20230424.txt,
which their package `rwkv` carries. No byte stands for id 0, which ends a text.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from .checkpoint import SpecialTokens, Vocabulary
from .errors import ModelError
from .longest_match import LongestMatch
from .world_files import WORLD_IDS, read_world_file, world_file_of_package

END_OF_TEXT = "<|endoftext|>"
KIND = "RWKV World"
"""The `type` of a tokenizer.json that holds a World tokenizer."""

_END = 0
WORLD_SPECIAL = SpecialTokens(eos=_END)
WORLD_STOPS = (_END,)


class WorldTokens:
    """The tokens of a vocabulary by id, with what is made of them once: shared by all tokenizers that have them.

    Raises ModelError where not every byte is a token. `where` is the vocabulary's file, for messages.
    """

    def __init__(self, by_id: Mapping[int, bytes], where: str) -> None:
        self.by_id = by_id
        self.where = where
        self.longest_match = LongestMatch(by_id, where)

    @functools.cached_property
    def names(self) -> dict[int, str]:
        """Id → how it is written: as its text, or, where its bytes are none, as Python and the vocabulary's file write
        bytes, b'\\xe4\\xbd'."""
        return {token_id: _text_of(token) or repr(token) for token_id, token in self.by_id.items()}

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """How a token is written → its id."""
        return {name: token_id for token_id, name in self.names.items()}


@dataclass(frozen=True, eq=False)
class WorldEncoding:
    """A text and its tokens; offsets and names are worked out when asked for."""

    text: str = field(repr=False)
    ids: list[int]
    tokenizer: "WorldTokenizer" = field(repr=False)

    @functools.cached_property
    def offsets(self) -> list[tuple[int, int]]:
        """The characters [start, end) that each token stands for; of a token that is a part of a character, that
        character."""
        ends = list(accumulate(map(len, self.tokenizer.spelling(self.ids))))
        starts = [0, *ends[:-1]]
        if self.text.isascii():
            return list(zip(starts, ends, strict=False))
        import numpy as np

        at = np.frombuffer(self.text.encode(), np.uint8)
        char = np.cumsum((at & 0xC0) != 0x80, dtype=np.int64) - 1  # of each byte; those that go on one are 10xxxxxx
        return list(zip(char[starts].tolist(), (char[np.array(ends) - 1] + 1).tolist(), strict=True))

    @property
    def tokens(self) -> list[str]:
        """The tokens as `WorldTokenizer.id_to_token` writes them."""
        return [self.tokenizer.id_to_token(token_id) or "" for token_id in self.ids]


class WorldTokenizer:
    """A World tokenizer with the methods of a `tokenizers.Tokenizer`: see `checkpoint.Tokenizer`.

    `n_ids` is how many ids the model has; those that the vocabulary does not reach stand for no bytes. `end` is how id
    0 is spelt, in texts too unless `encode_special_tokens` is set. Nothing is put before or behind a text. Raises
    ModelError for a vocabulary with ids beyond the model's.
    """

    def __init__(self, tokens: WorldTokens, *, n_ids: int = WORLD_IDS, end: str = END_OF_TEXT) -> None:
        if (last := max(tokens.by_id)) >= n_ids:
            raise ModelError(f"{tokens.where} has ids up to {last}, and the model has only {n_ids}")
        if not end:
            raise ModelError(f"the end of a text, id {_END} of {tokens.where}, has to be spelt in some way")
        self.encode_special_tokens = False
        self._tokens = tokens
        self._n_ids = n_ids
        self._end = end
        self._spelt = {**dict.fromkeys(range(n_ids), b""), **tokens.by_id, _END: end.encode()}

    def encode_bytes(self, source: bytes) -> list[int]:
        """Give the token ids of any bytes, UTF-8 or not. `decode_bytes` gives the bytes back."""
        return self._tokens.longest_match.encode(source)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Give the bytes that token ids stand for: none for id 0 and for ids beyond the vocabulary. Raises ModelError
        for an id that the model does not have."""
        return b"".join(self.spelling([token_id for token_id in ids if token_id != _END]))

    def spelling(self, ids: Sequence[int]) -> list[bytes]:
        """Give the bytes of each of several tokens, id 0 spelt out. Raises ModelError as `decode_bytes` does."""
        try:
            return [self._spelt[token_id] for token_id in ids]
        except KeyError as error:
            raise ModelError(
                f"there is no token {error.args[0]}: the tokenizer's ids go from 0 to {self._n_ids - 1}"
            ) from error

    def encode(self, sequence: str, /, *, add_special_tokens: bool = True) -> WorldEncoding:
        """Give the tokens of a text. Raises ModelError for one with half a surrogate pair, which has no UTF-8."""
        parts = [sequence] if self.encode_special_tokens else sequence.split(self._end)
        try:
            ids = self.encode_bytes(parts[0].encode())
            for part in parts[1:]:
                ids.append(_END)
                ids += self.encode_bytes(part.encode())
        except UnicodeEncodeError as error:
            at = next(at for at, char in enumerate(sequence) if "\ud800" <= char <= "\udfff")
            raise ModelError(
                f"character {at} of a text is U+{ord(sequence[at]):04X}, half a surrogate pair, so it has no UTF-8"
            ) from error
        return WorldEncoding(sequence, ids, self)

    def encode_batch(self, input: Sequence[str], /, *, add_special_tokens: bool = True) -> list[WorldEncoding]:
        """Give the tokens of each of several texts."""
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in input]

    def encode_batch_fast(self, input: Sequence[str], /, *, add_special_tokens: bool = True) -> list[WorldEncoding]:
        """Give the tokens of each of several texts; as `encode_batch`, whose offsets cost nothing until asked for."""
        return self.encode_batch(input, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], /, *, skip_special_tokens: bool = True) -> str:
        """Give the text of token ids, id 0 spelt out or left out. Bytes that are no UTF-8 become U+FFFD."""
        made = self.decode_bytes(ids) if skip_special_tokens else b"".join(self.spelling(ids))
        return made.decode(errors="replace")

    def decode_batch(self, sequences: Sequence[Sequence[int]], /, *, skip_special_tokens: bool = True) -> list[str]:
        """Give the text of each of several rows of token ids; see `decode`."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in sequences]

    def id_to_token(self, id: int, /) -> str | None:
        """Give how a token is written, uniquely: its text, or b'…' where its bytes are none; an id that stands for
        nothing as llama.cpp writes it, [PAD65530]. None for an id that the model does not have."""
        if id == _END:
            return self._end
        return self._tokens.names.get(id) or (f"[PAD{id}]" if id in self._spelt else None)

    def token_to_id(self, token: str, /) -> int | None:
        """Give the id of a token that is written as `id_to_token` does; None where there is none."""
        if token == self._end:
            return _END
        unused = (token_id for token_id, made in self._spelt.items() if not made and token == f"[PAD{token_id}]")
        return self._tokens.ids.get(token) or next(unused, None)

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """Give how many ids the model has."""
        return self._n_ids

    def no_padding(self) -> None:
        """Nothing is ever padded."""

    def no_truncation(self) -> None:
        """Nothing is ever truncated."""

    def to_str(self, pretty: bool = False) -> str:
        """Give the tokenizer as JSON, the whole vocabulary in it: `read_tokenizer` makes it again."""
        texts = {token_id: _text_of(token) for token_id, token in sorted(self._tokens.by_id.items())}
        said = {
            "type": KIND,
            "n_ids": self._n_ids,
            "end": self._end,
            "texts": {str(token_id): text for token_id, text in texts.items() if text is not None},
            "bytes": {str(i): self._tokens.by_id[i].hex() for i, text in texts.items() if text is None},
        }
        return json.dumps(said, ensure_ascii=False, indent=2 if pretty else None)


def load_world_tokenizer(
    path: str | Path | None = None, *, n_ids: int = WORLD_IDS, end: str = END_OF_TEXT
) -> WorldTokenizer:
    """Load the World tokenizer from a vocabulary's file; by default from the one that the installed package `rwkv`
    carries, which is found and not imported. `n_ids` and `end`: see `WorldTokenizer`.

    Raises ModelError where there is no such file, with the number of the line where it is damaged, where not every byte
    is a token, and where there are ids beyond the model's.
    """
    file = world_file_of_package() if path is None else Path(path).expanduser()
    try:
        state = file.stat()
    except OSError as error:
        raise ModelError(f"there is no vocabulary {file}: {error.strerror}") from error
    return WorldTokenizer(_tokens(file.absolute(), state.st_mtime_ns, state.st_size), n_ids=n_ids, end=end)


@functools.lru_cache(maxsize=4)
def _tokens(path: Path, changed: int, size: int) -> WorldTokens:
    """The tokens of a file, read once as long as it stays as it is."""
    return WorldTokens(read_world_file(path), str(path))


def world_tokenizer_of(values: Mapping[str, Any], where: str) -> WorldTokenizer:
    """Make the tokenizer again that `to_str` gave as JSON, from what the JSON holds. Raises ModelError where that is
    something else."""
    try:
        tokens = {int(token_id): text.encode() for token_id, text in values["texts"].items()}
        tokens |= {int(token_id): bytes.fromhex(digits) for token_id, digits in values["bytes"].items()}
        n_ids, end = int(values["n_ids"]), str(values["end"])
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{where} holds a damaged World tokenizer: {error!r}") from error
    if min(tokens, default=1) < 1 or not all(tokens.values()) or len({*tokens.values()}) != len(tokens):
        raise ModelError(f"{where} holds a damaged World tokenizer: ids go from 1, and every token stands there once")
    return WorldTokenizer(WorldTokens(tokens, where), n_ids=n_ids, end=end)


def world_vocabulary(path: Path, n_ids: int) -> Vocabulary:
    """Give the World tokenizer of a vocabulary's file as that of a model. Raises ModelError as `load_world_tokenizer`
    does."""
    build = functools.partial(load_world_tokenizer, path, n_ids=n_ids)
    build()
    return Vocabulary(build=build, special=WORLD_SPECIAL, add_bos=False, stops=WORLD_STOPS)


def _text_of(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None
