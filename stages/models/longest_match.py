"""Bytes into tokens by the longest match: at every place the longest token that the bytes go on with.

Two things make this fast in Python, and neither changes a token. Where two neighbouring bytes stand side by side in no
token, no token spans them, so bytes may be cut there and the pieces, such as a word with the space before it, be
tokenised each for itself; and a piece that was met before is looked up. Time is proportional to the number of bytes,
whatever they are.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from .errors import ModelError

if TYPE_CHECKING:
    import numpy as np

_BLOCK = 2**18  # bytes that are cut at a time, so that memory grows with the tokens of a text only
_SHORT = 128  # bytes that are tokenised sooner than cut
_LONGEST_KEPT, _MOST_KEPT = 32, 2**16  # bytes of a piece, and pieces, whose tokens are remembered
_TOKEN = -1


class LongestMatch:
    """Tokenises bytes with the tokens that are given by id, none of them empty. Every single byte has to be a token, so
    that any bytes can be tokenised: ModelError says which is none."""

    def __init__(self, tokens: Mapping[int, bytes], where: str) -> None:
        self._ids = {token: token_id for token_id, token in tokens.items()}
        absent = [byte for byte in range(256) if bytes([byte]) not in self._ids]
        if absent:
            raise ModelError(
                f"{where} has no token for {len(absent)} of the 256 bytes, the first of them 0x{absent[0]:02x}, so "
                "there are texts that it cannot spell"
            )
        self._trie = _trie(self._ids)
        self._apart = _apart(tokens.values())
        self._known: dict[bytes, tuple[int, ...]] = {}

    def encode(self, source: bytes) -> list[int]:
        """Give the ids of the tokens that bytes are made of: joined, the tokens are the bytes."""
        if len(source) <= _SHORT:
            return self._walk(source)
        ids: list[int] = []
        known, start = self._known, 0
        for cuts in self._cuts(source):
            pieces = [source[first:last] for first, last in zip([start, *cuts], cuts, strict=False)]
            ids += chain.from_iterable([known.get(piece) or self._tokens(piece) for piece in pieces])
            start = cuts[-1]
        return ids

    def _cuts(self, source: bytes) -> Iterator[list[int]]:
        """The places that no token spans, the end among them; some at a time, and never none."""
        import numpy as np

        for first in range(0, len(source), _BLOCK):
            at = np.frombuffer(source, np.uint8, min(_BLOCK + 1, len(source) - first), first)
            cuts: list[int] = (np.flatnonzero(self._apart[_pairs(at)]) + (first + 1)).tolist()
            if first + _BLOCK >= len(source):
                cuts.append(len(source))
            if cuts:
                yield cuts

    def _tokens(self, piece: bytes) -> tuple[int, ...]:
        whole = self._ids.get(piece)
        ids = (whole,) if whole is not None else tuple(self._walk(piece))
        if len(piece) <= _LONGEST_KEPT:
            if len(self._known) >= _MOST_KEPT:
                self._known.clear()
            self._known[piece] = ids
        return ids

    def _walk(self, piece: bytes) -> list[int]:
        trie, at, end = self._trie, 0, len(piece)
        ids: list[int] = []
        while at < end:
            node = trie[piece[at]]
            token_id, at = node[_TOKEN], at + 1
            ahead = at
            while ahead < end:
                node = node.get(piece[ahead])
                if node is None:
                    break
                ahead += 1
                if _TOKEN in node:
                    token_id, at = node[_TOKEN], ahead
            ids.append(token_id)
        return ids


def _trie(ids: Mapping[bytes, int]) -> dict[int, Any]:
    """The tokens as a tree: every node has the node of each next byte, and at `_TOKEN` the id of the token that it
    ends, where it ends one."""
    trie: dict[int, Any] = {}
    for token, token_id in ids.items():
        node = trie
        for byte in token:
            node = node.setdefault(byte, {})
        node[_TOKEN] = token_id
    return trie


def _apart(tokens: Iterable[bytes]) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """Whether two bytes stand side by side in no token: bool [first × 256 + second]."""
    import numpy as np

    kept = list(tokens)
    pairs = _pairs(np.frombuffer(b"".join(kept), np.uint8))
    inside = np.ones(len(pairs), dtype=bool)
    inside[np.cumsum([len(token) for token in kept], dtype=np.intp)[:-1] - 1] = False
    apart = np.ones(256 * 256, dtype=bool)
    apart[pairs[inside]] = False
    return apart


def _pairs(at: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> "np.ndarray[tuple[int], np.dtype[np.uint16]]":
    import numpy as np

    return (at[:-1].astype(np.uint16) << np.uint16(8)) | at[1:]
