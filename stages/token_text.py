"""The text of labelled tokens, by the tokenizer that their run keeps: `selection.forebay.text()`, and token by token.
Importing this module registers the accessor with xarray.
"""

from __future__ import annotations

import ast
import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from ..stores.errors import SchemaError
from ..stores.places import Place, changed_at, place
from ..stores.tree import TOKEN_ID

if TYPE_CHECKING:
    from .models.checkpoint import Tokenizer


@xr.register_datatree_accessor("forebay")  # type: ignore[no-untyped-call]
@xr.register_dataset_accessor("forebay")  # type: ignore[no-untyped-call]
@xr.register_dataarray_accessor("forebay")  # type: ignore[no-untyped-call]
class TokenText:
    """`selection.forebay`: the text of the tokens of a tree, dataset or array that comes from a run, however it was
    selected or computed, as long as it has the coordinate `token_id`.

    Asked of the tree of a whole run, it is the text of the run's tokens. The tokenizer is the run's own, read when the
    first text is asked for. SchemaError where there are no token ids, where they do not come from a run (as after
    `as_run`: a model's tokenizer has `to_string`), and where the run keeps no tokenizer.
    """

    def __init__(self, data: xr.DataTree | xr.Dataset | xr.DataArray) -> None:
        self._data = data

    def tokens_as_text(self) -> xr.DataArray:
        """The text of each token, laid out and labelled as `token_id`, which is a coordinate of it. Lazy: decoded where
        it is looked at. Dtype object, of `str`; "" where `token_id` is −1.

        A token that is only a part of a character reads as U+FFFD; `text` puts the parts together.
        """
        token_id = self._token_id()
        lazy = indexing.LazilyIndexedArray(_Texts(token_id.variable, self._decoder(token_id)))
        found = xr.DataArray(xr.Variable(token_id.dims, lazy), coords=token_id.coords, name="token_text")
        return found.assign_coords(token_id=token_id.variable)

    def text(self) -> str:
        """The text of all tokens in their order, as it reads behind another text, special tokens spelt out. Characters
        of which parts were left out, and bytes that are no UTF-8, become U+FFFD.

        Reads all token ids. SchemaError where they have more than one dimension: select one sequence.
        """
        token_id = self._token_id()
        if token_id.ndim > 1:
            raise SchemaError(
                f"a text is of tokens in a row, and these lie along {', '.join(map(str, token_id.dims))}: select along "
                f"all but one of them, or ask for tokens_as_text()"
            )
        ids = np.atleast_1d(token_id.values)
        return self._decoder(token_id)([ids[ids >= 0].tolist()])[0]

    def _token_id(self) -> xr.DataArray:
        data = self._data
        if isinstance(data, xr.DataTree):
            whole = TOKEN_ID not in data.variables and "tokens" in data.children
            data = (data.children["tokens"] if whole else data).to_dataset()
        if isinstance(data, xr.DataArray) and data.name == TOKEN_ID:
            return data
        if TOKEN_ID in (data.coords if isinstance(data, xr.DataArray) else data.variables):
            return data[TOKEN_ID]
        raise SchemaError(
            "text is made of token ids, and there is no coordinate `token_id` here: ask a node of what `open_run` "
            'gives, such as run["activations/hook_resid_post"], or what was selected from it'
        )

    @staticmethod
    def _decoder(token_id: xr.DataArray) -> Decoder:
        source = token_id.encoding.get("source")
        if source is None:
            raise SchemaError(
                "these token ids do not say which run they are of: ask what `open_run` gives, or a selection of it. "
                "The ids of a forward are text by model.tokenizer.to_string(ids)"
            )
        return decoder_of(place(source))


def decoder_of(run: Place) -> Decoder:
    """What makes text of a run's token ids. SchemaError for a run that keeps no tokenizer."""
    path = run / "tokenizer.json"
    if not path.is_file():
        raise SchemaError(f"token ids become text by a run's tokenizer.json, and {run} has none")
    return Decoder(path)


class _Texts(BackendArray):
    """The texts of token ids, of those only that are indexed."""

    def __init__(self, token_id: xr.Variable, decode: Decoder) -> None:
        self.token_id, self.decode = token_id, decode
        self.shape, self.dtype = token_id.shape, np.dtype(object)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        ids = np.asarray(self.token_id[key].values)
        known, where = np.unique(ids.ravel(), return_inverse=True)
        texts = self.decode([[int(one)] if one >= 0 else [] for one in known])
        return np.array([*texts, None], dtype=object)[:-1][where].reshape(ids.shape)


@dataclass(frozen=True, slots=True)
class Decoder:
    """Token ids into text by a run's tokenizer.json, which is read when the first text is asked for. Picklable."""

    path: Place

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row as it reads behind another token: some decoders take the space off the first token of a
        text. Bytes that are no UTF-8 become U+FFFD.
        """
        tokenizer, before = _tokenizer(self.path, changed_at(self.path))
        prefix = tokenizer.decode(before, skip_special_tokens=False)
        texts = tokenizer.decode_batch([[*before, *row] for row in rows], skip_special_tokens=False)
        return [text.removeprefix(prefix) for text in texts]

    def alone(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself. Where a token is a part of a character, or bytes that are no UTF-8, these
        bytes are told: ‹E2 82›. They read as U+FFFD with a tokenizer that does not tell the bytes of its tokens.
        """
        tokenizer, _ = _tokenizer(self.path, changed_at(self.path))
        texts = self([[one] for one in token_ids])
        return [
            _spelt(tokenizer.id_to_token(one), text) if "\ufffd" in text else text
            for one, text in zip(token_ids, texts, strict=True)
        ]


def _spelt(name: str | None, text: str) -> str:
    """What a token stands for by its name in the vocabulary, bytes that are no text by their numbers; `text` where the
    name does not tell bytes.
    """
    found = token_bytes(name or "")
    return text if found is None else found.decode(errors=_TOLD)


def token_bytes(name: str) -> bytes | None:
    """The bytes of a token by its name in a vocabulary: `<0xE2>` of byte fallback, `b'…'` of the World tokenizer, or
    in the alphabet of byte-level vocabularies, which has a character for each byte. None for a name in none of them.
    """
    if fallback := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(fallback[1])
    if re.fullmatch("b'.*'|b\".*\"", name):
        told = ast.literal_eval(name)
        return told if isinstance(told, bytes) else None
    alphabet = _alphabet()
    return bytes(alphabet[one] for one in name) if name and all(one in alphabet for one in name) else None


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies: printable ones for themselves, the others, in
    their order, U+0100 and on (Radford et al. 2019, `bytes_to_unicode` of GPT-2).
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _numbered(error: UnicodeError) -> tuple[str, int]:
    """A handler of decoding errors: the bytes that are no text, by their numbers."""
    assert isinstance(error, UnicodeDecodeError)
    return f"‹{error.object[error.start : error.end].hex(' ').upper()}›", error.end


_TOLD = "forebay.bytes"
codecs.register_error(_TOLD, _numbered)


@lru_cache(maxsize=4)
def _tokenizer(path: Place, changed: int) -> tuple[Tokenizer, list[int]]:
    """A tokenizer, and the last token of a text for others to stand behind. Vocabularies take a while to read."""
    from .models.tokenizer_json import read_tokenizer

    tokenizer = read_tokenizer(path if isinstance(path, Path) else path.read_text())
    return tokenizer, list(tokenizer.encode("a", add_special_tokens=False).ids[-1:])
