"""Text into token ids: documents laid end to end on the `token` axis, cut into sequences, every rule explicit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..stores.errors import SchemaError
from ..stores.fingerprint import fingerprint
from ..stores.grid import Unit
from ..stores.schema import Schema, along_token
from .models.checkpoint import Checkpoint, Encoding, Tokenizer
from .models.source import open_checkpoint
from .stage import Apply, Stage

if TYPE_CHECKING:
    import xarray as xr

UNIT_TOKENS = 2**20
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model comes from: a hub id, a local folder, a .gguf file, or `package:name/file.gguf` in an installed
    package.
    """

    source: str
    revision: str | None = None

    def open(self) -> Checkpoint:
        return open_checkpoint(self.source, self.revision)

    def about(self) -> dict[str, Any]:
        """Its name, and the commit that a hub model's revision stands for."""
        return {"source": self.source, "revision": self.open().revision}


@dataclass(frozen=True, kw_only=True)
class Tokenize(Stage):
    """Documents → tokens.

    `layout="packed"` lays all documents end to end and cuts windows of `context` tokens, so that a window may hold
    several documents; only the last one is shorter. `layout="documents"` makes one sequence a document; one that is
    longer than `context` is refused, split into several sequences, or truncated, as `long_documents` says.

    `prepend_bos` puts the model's beginning-of-sequence token at position 0 of every sequence ("auto": if the model's
    own tokenizer does so). `separator` is the special token put behind every document: its text, "eos" for the model's
    own, "none", or "auto" for "eos" in packed windows and "none" else. Special tokens spelled out in the text are text,
    unless `parse_special` is set.
    """

    verb: ClassVar[str] = "tokenize"
    version: ClassVar[int] = 1

    model: ModelSource
    context: int
    layout: Literal["packed", "documents"] = "packed"
    long_documents: Literal["refuse", "split", "truncate"] = "refuse"
    prepend_bos: bool | Literal["auto"] = "auto"
    separator: str = "auto"
    parse_special: bool = False
    unit_tokens: int | None = None

    @property
    def store(self) -> str:
        return "tokens"

    @property
    def source(self) -> str | None:
        return None

    def check(self) -> None:
        if self.context < 2:
            raise SchemaError(f"tokenize.context = {self.context}: a sequence needs at least 2 tokens")
        if self.unit_tokens is not None and (
            self.unit_tokens < 1 or (self.layout == "packed" and self.unit_tokens % self.context)
        ):
            raise SchemaError(
                f"tokenize.unit_tokens = {self.unit_tokens} must be a multiple of tokenize.context = {self.context}"
            )
        checkpoint = self.model.open()
        longest = checkpoint.spec.n_ctx
        if longest is not None and self.context > longest:
            raise SchemaError(
                f"tokenize.context = {self.context} is longer than the model's context of {longest} tokens"
            )
        self.rules(checkpoint)

    def files(self) -> tuple[Path, ...]:
        return ()

    def identity(self) -> dict[str, Any]:
        """The hash of the tokenizer itself, wherever it comes from."""
        return {"tokenizer": fingerprint(self.tokenizer(self.model.open()).to_str())}

    def about(self) -> dict[str, Any]:
        return {"model": self.model.about()}

    def schema(self, source: Schema) -> Schema:
        """Sizes and labels of the tokens, from the documents' counts. SchemaError names a document that is too long."""
        checkpoint = self.model.open()
        rules = self.rules(checkpoint)
        ids = source.labels["documents/id"][1]
        lengths = self._fit(source.labels["documents/n_token"][1] + len(rules.separator), ids, len(rules.bos))
        document_start, sequence_start = rules.starts(lengths)
        n_token = int(document_start[-1])
        if not n_token:
            raise SchemaError("the corpus makes no tokens: every document is empty")
        unit_tokens = self.unit_tokens or max(1, UNIT_TOKENS // self.context) * self.context
        sizes = {"token": n_token}
        first_document = np.searchsorted(document_start[:-1], sequence_start, "right") - 1
        return Schema(
            kind="tokens",
            n_token=n_token,
            unit_tokens=unit_tokens,
            arrays={
                name: along_token(("token",), sizes, "uint32", unit_tokens)
                for name in ("token_id", "char_start", "char_end")
            },
            labels={
                "sequences/start": (("sequence",), sequence_start),
                "sequences/document": (("sequence",), first_document),
                "documents/start": (("document",), document_start[:-1]),
                "documents/id": (("document",), ids),
            },
        )

    def span(self, unit: Unit, source: Schema, own: Schema) -> slice:
        """The documents that have tokens in the unit."""
        start = own.labels["documents/start"][1]
        return slice(
            int(np.searchsorted(start, unit.start, "right")) - 1, int(np.searchsorted(start, unit.stop, "left"))
        )

    def load(self, device: str, own: Schema) -> Apply:
        """Reads the tokenizer. Pieces hold `token_id`, `char_start` and `char_end` (characters into the document) as
        uint32.
        """
        import pandas as pd
        import xarray as xr

        checkpoint = self.model.open()
        tokenizer, rules = self.tokenizer(checkpoint), self.rules(checkpoint)
        starts = np.append(own.labels["documents/start"][1], own.n_token)

        def apply(block: xr.Dataset, unit: Unit) -> Iterator[xr.DataTree]:
            for document, text, found in _encode(tokenizer, block):
                origin, beyond = int(starts[document]), int(starts[document + 1])
                columns = rules.lay(
                    np.array(found.ids), np.array(found.offsets).reshape(-1, 2), len(text), origin, beyond - origin
                )
                first, last = max(origin, unit.start), min(beyond, unit.stop)
                if first < last:
                    part = {
                        name: (("token",), column[first - origin : last - origin]) for name, column in columns.items()
                    }
                    yield xr.DataTree(xr.Dataset(part, coords={"token": pd.RangeIndex(first, last)}))

        return apply

    def tokenizer(self, checkpoint: Checkpoint) -> Tokenizer:
        """The model's tokenizer, set to treat special tokens in the text as `parse_special` says."""
        tokenizer = checkpoint.tokenizer()
        tokenizer.encode_special_tokens = not self.parse_special
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def counter(self) -> Callable[[Sequence[str]], list[int]]:
        """Loads the tokenizer and gives the function that counts the tokens of texts, special tokens of the layout left
        out.
        """
        tokenizer = self.tokenizer(self.model.open())
        return lambda texts: [len(e.ids) for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def rules(self, checkpoint: Checkpoint) -> Rules:
        """The layout with the model's special tokens looked up. SchemaError if the model has no such token."""
        bos = checkpoint.add_bos if self.prepend_bos == "auto" else self.prepend_bos
        named = checkpoint.special_tokens
        tokenizer = checkpoint.tokenizer()
        if bos and named.bos is None:
            raise SchemaError(
                f"tokenize.prepend_bos is set, but {self.model.source} names no beginning-of-sequence token"
            )
        wanted = self.separator
        if wanted == "auto":
            wanted = "eos" if self.layout == "packed" else "none"
        separator = {"none": None, "eos": named.eos}.get(wanted, tokenizer.token_to_id(wanted))
        if separator is None and wanted != "none":
            raise SchemaError(
                f"tokenize.separator = {wanted!r} is not a token of {self.model.source}. "
                'Give a special token as the model spells it, "eos", or "none"'
            )
        return Rules(
            context=self.context,
            packed=self.layout == "packed",
            bos=() if not bos else (int(named.bos),),  # type: ignore[arg-type]
            separator=() if separator is None else (int(separator),),
        )

    def _fit(self, lengths: Ints, ids: NDArray[Any], n_bos: int) -> Ints:
        room = self.context - n_bos
        long = np.flatnonzero(lengths > room)
        if self.layout == "packed" or not len(long) or self.long_documents == "split":
            return lengths
        if self.long_documents == "truncate":
            return np.minimum(lengths, room)
        raise SchemaError(
            f"{len(long)} of {len(lengths)} documents are longer than tokenize.context = {self.context}; the first is "
            f"{ids[long[0]]!r} with "
            f'{lengths[long[0]]} tokens. Set tokenize.long_documents to "split" or "truncate", use layout = "packed", '
            "or raise the context"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """A layout on the `token` axis with its special tokens as ids: `bos` and `separator` hold one id or none."""

    context: int
    packed: bool
    bos: tuple[int, ...]
    separator: tuple[int, ...]

    def starts(self, lengths: Ints) -> tuple[Ints, Ints]:
        """Where documents and sequences start: `[document + 1]` (the last is the number of tokens) and `[sequence]`.

        `lengths` are tokens a document, separators counted and BOS tokens not.
        """
        room, n_bos = self.context - len(self.bos), len(self.bos)
        if self.packed:
            stream = np.concatenate([[0], np.cumsum(lengths)])
            # A BOS belongs to the document whose token follows it, hence one BOS for every window begun before this
            # token.
            document_start = stream + n_bos * -(-stream // room)
            return document_start, np.arange(0, document_start[-1], self.context)
        n_sequence = -(-lengths // room) if not n_bos else np.maximum(1, -(-lengths // room))
        document_start = np.concatenate([[0], np.cumsum(lengths + n_bos * n_sequence)])
        inside = np.arange(int(n_sequence.sum())) - np.repeat(np.cumsum(n_sequence) - n_sequence, n_sequence)
        return document_start, np.repeat(document_start[:-1], n_sequence) + inside * self.context

    def lay(self, ids: Ints, offsets: Ints, n_char: int, origin: int, size: int) -> dict[str, NDArray[np.uint32]]:
        """The `size` tokens of one document that starts at `origin` on the token axis, with character offsets.

        A BOS has an empty span where the next token starts; the separator has one at the end of the text.
        """
        begins = (np.arange(size) + (origin if self.packed else 0)) % self.context == 0
        is_bos = begins if self.bos else np.zeros(size, dtype=bool)
        n = size - int(is_bos.sum())
        end = np.full((len(self.separator), 2), n_char)
        text_ids = np.concatenate([ids, np.array(self.separator, dtype=np.int64)]).astype(np.int64)[:n]
        spans = np.concatenate([offsets, end]).astype(np.int64)[:n]
        token_id = np.empty(size, dtype=np.uint32)
        chars = np.empty((size, 2), dtype=np.uint32)
        token_id[~is_bos], chars[~is_bos] = text_ids, spans
        if self.bos:
            following = np.append(spans[:, 0], n_char)[np.cumsum(~is_bos)[is_bos]]
            token_id[is_bos], chars[is_bos] = self.bos[0], following[:, None]
        return {"token_id": token_id, "char_start": chars[:, 0], "char_end": chars[:, 1]}


def _encode(tokenizer: Tokenizer, block: xr.Dataset) -> Iterator[tuple[int, str, Encoding]]:
    """Each document's number, text and encoding, some at a time, so that memory stays bounded."""
    numbers, texts = block["document"].values, block["text"].values
    for at in range(0, len(texts), 64):
        batch = list(texts[at : at + 64])
        found = tokenizer.encode_batch(batch, add_special_tokens=False)
        yield from (
            (int(number), text, one) for number, text, one in zip(numbers[at : at + 64], batch, found, strict=True)
        )
