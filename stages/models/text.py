"""Text and token ids: a model's tokenizer with the model's own conventions.

Names and meanings are TransformerLens' (`to_tokens`, `to_string`, `to_str_tokens`, `to_single_token`), with two
differences: nothing is padded, and whether a beginning-of-sequence token is put before a text is up to the model
unless said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from .checkpoint import Tokenizer, Vocabulary
from .errors import ModelError
from .offsets import EncodingWithOffsets

Ids: TypeAlias = Tensor | Sequence[int]
"""Token ids of one text: integers [position], or [1, position] as `to_tokens` gives them."""


def tokenizer_of(vocabulary: Vocabulary, *, parse_special: bool = True) -> "ModelTokenizer":
    """Make the tokenizer of a model, from `checkpoint.vocabulary()`.

    With `parse_special` a special token that is spelt out in a text is that token; without, it is text like any other
    (tokens that the model's makers declare ordinary, such as Gemma's runs of spaces, are taken whole either way).
    """
    tokenizer = vocabulary.build()
    tokenizer.encode_special_tokens = not parse_special
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return ModelTokenizer(tokenizer=tokenizer, vocabulary=vocabulary)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelTokenizer:
    """A model's tokenizer with the model's own conventions. Made by `tokenizer_of`."""

    tokenizer: Tokenizer = field(repr=False)
    vocabulary: Vocabulary = field(repr=False)

    @overload
    def to_tokens(self, text: str, prepend_bos: bool | None = None) -> Tensor: ...
    @overload
    def to_tokens(self, text: Sequence[str], prepend_bos: bool | None = None) -> Tensor | list[Tensor]: ...
    def to_tokens(self, text: str | Sequence[str], prepend_bos: bool | None = None) -> Tensor | list[Tensor]:
        """Give the token ids of a text, int64 [sequence = 1, position]; of several texts [sequence, position] where all
        are equally long, else a list of [position], which `Model.forward` takes as well.

        `prepend_bos` puts the beginning-of-sequence token first, unless the text begins with it already; None does as
        the model's own tokenizer does. Raises ModelError where there is to be one and the model has none.
        """
        if isinstance(text, str):
            return torch.tensor([self._ids(text, prepend_bos)], dtype=torch.int64)
        rows = [torch.tensor(self._ids(one, prepend_bos), dtype=torch.int64) for one in text]
        if not rows:
            raise ModelError("there is no text to tokenise: the list is empty")
        return torch.stack(rows) if len({len(row) for row in rows}) == 1 else rows

    def to_string(self, ids: Ids, *, continues: bool = False) -> str:
        """Give the text of token ids, special tokens spelt out. Bytes that are no UTF-8 become U+FFFD.

        A model that puts a space before every text takes one off again here, as its own tokenizer does, unless the ids
        are said to continue a text: then what is given is what they add to it. Raises ModelError for an id that is no
        token's.
        """
        checked = self._checked(ids)
        if continues:
            return self._added([checked])[0]
        return self.tokenizer.decode(checked, skip_special_tokens=False)

    def to_str_tokens(self, text: str | Ids, prepend_bos: bool | None = None) -> list[str]:
        """Give the text of every token, of a text (see `to_tokens`) or of token ids: `["<|endoftext|>", "The",
        " Eiffel"]`. A token that is only a part of a character shows as U+FFFD.

        Raises ModelError as `to_tokens` and `to_string` do.
        """
        ids = self._ids(text, prepend_bos) if isinstance(text, str) else self._checked(text)
        return self._added([[id_] for id_ in ids])

    def to_single_token(self, text: str) -> int:
        """Give the id of a text that is one token. Raises ModelError with the tokens of one that is not."""
        ids = self._ids(text, False)
        if len(ids) != 1:
            raise ModelError(f"{text!r} is not one token but {len(ids)}: {self.to_str_tokens(ids)}")
        return ids[0]

    def find_token_id(self, word: str, *, last: bool = False) -> int:
        """Give the id of a word: of `" word"` if that is one token, else of `"word"` if that is.

        For a word of several tokens `last` takes the last one of `" word"`, which is where a model has read it to the
        end; without it the word is refused. Raises ModelError with the tokens of the word.
        """
        spaced, bare = self._ids(f" {word}", False), self._ids(word, False)
        for ids in (spaced, bare):
            if len(ids) == 1:
                return ids[0]
        if last:
            return spaced[-1]
        raise ModelError(
            f"neither {f' {word}'!r} nor {word!r} is one token: {self.to_str_tokens(spaced)} and "
            f"{self.to_str_tokens(bare)}. last=True takes the last token of the first"
        )

    def encode(self, text: str, prepend_bos: bool | None = None) -> EncodingWithOffsets:
        """Give the tokens of a text, those of `to_tokens`, with the characters that each stands for."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        first = self._first(found.ids, prepend_bos)
        ids = (*first, *found.ids)
        tokens = tuple(self.to_str_tokens(ids))
        # To the space that a model puts before every text `tokenizers` gives the first character, the next token's.
        following = [*(start for start, _ in found.offsets), len(text)][1:]
        offsets = [
            (start, start) if token == " " and beyond < end else (start, end)
            for token, (start, end), beyond in zip(tokens[len(first) :], found.offsets, following, strict=True)
        ]
        return EncodingWithOffsets(text=text, token_ids=ids, tokens=tokens, offsets=(*(None for _ in first), *offsets))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Give the text of a conversation by the model's chat template; see `ChatTemplates.render`."""
        return self.vocabulary.chat.render(
            messages, add_generation_prompt=add_generation_prompt, template=template, **variables
        )

    def chat_to_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> Tensor:
        """Give the token ids of a conversation, int64 [sequence = 1, position]: those of `chat`'s text. Templates write
        the beginning-of-sequence token themselves where there is to be one.

        Raises ModelError as `ChatTemplates.render` does, and where this tokenizer takes special tokens for text.
        """
        if self.tokenizer.encode_special_tokens:
            raise ModelError("a conversation is held together by special tokens, which this tokenizer takes for text")
        text = self.chat(messages, add_generation_prompt=add_generation_prompt, template=template, **variables)
        return self.to_tokens(text, prepend_bos=False)

    def _added(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of rows of ids behind another token: some decoders take the space off the first token of a text."""
        before = self.tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        prefix = self.tokenizer.decode(before, skip_special_tokens=False)
        texts = self.tokenizer.decode_batch([[*before, *row] for row in rows], skip_special_tokens=False)
        return [text.removeprefix(prefix) for text in texts]

    def _ids(self, text: str, prepend_bos: bool | None) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [*self._first(ids, prepend_bos), *ids]

    def _first(self, ids: Sequence[int], prepend_bos: bool | None) -> tuple[int, ...]:
        """The beginning-of-sequence token that is to be put before a text, or nothing."""
        if not (self.vocabulary.add_bos if prepend_bos is None else prepend_bos):
            return ()
        bos = self.vocabulary.special.bos
        if bos is None:
            raise ModelError("this model has no beginning-of-sequence token to put before a text")
        return () if ids and ids[0] == bos else (bos,)

    def _checked(self, ids: Ids) -> list[int]:
        row = ids[0] if isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == 1 else ids
        try:
            values = [index(value) for value in (row.tolist() if isinstance(row, Tensor) else row)]
        except TypeError as error:
            raise ModelError(f"token ids of one text are integers [position]: {error}") from error
        for value in values:
            if not 0 <= value < 2**32 or self.tokenizer.id_to_token(value) is None:
                last = self.tokenizer.get_vocab_size() - 1
                raise ModelError(f"there is no token {value}: the tokenizer's ids go from 0 to {last}")
        return values
