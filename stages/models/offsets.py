"""Which token holds which characters of a text: from character positions and spans to token positions, and back.

Positions are characters of a Python string (code points), as `tokenizers` gives them; candle-mi's are bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import ModelError

OTHER = "other"
"""The label of a token that lies in no labelled span."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWithOffset:
    """One token of a text: its position, id and text, and the characters [start, end) it stands for, None for a special
    token that is not in the text."""

    position: int
    token_id: int
    token: str
    chars: tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionConversion:
    """The token that a character lies in, or else (`exact` is False) the one whose middle is nearest."""

    char: int
    position: int
    token: str
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingWithOffsets:
    """A text and its tokens, with the characters that each stands for. Made by `ModelTokenizer.encode`.

    `token_ids`, `tokens` (their texts) and `offsets` have one entry a token, special tokens put before the text
    included, whose offset is None. An offset is the half-open range of characters. Tokens of one character that is
    split into bytes all have its range, and a token that stands for no character has an empty one. Whether a range
    includes the space before a word is up to the model's tokenizer.
    """

    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    offsets: tuple[tuple[int, int] | None, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    def token_with_offset(self, position: int) -> TokenWithOffset:
        """Give one token; negative positions count from the end. Raises ModelError for one that is not there."""
        if not -len(self) <= position < len(self):
            raise ModelError(f"there is no token {position}: the text has {len(self)} tokens")
        at = position % len(self)
        return TokenWithOffset(position=at, token_id=self.token_ids[at], token=self.tokens[at], chars=self.offsets[at])

    def tokens_with_offsets(self) -> tuple[TokenWithOffset, ...]:
        """Give all tokens."""
        return tuple(self.token_with_offset(position) for position in range(len(self)))

    def token_to_chars(self, position: int) -> tuple[int, int] | None:
        """Give the characters [start, end) of one token, None for a special token that is not in the text."""
        return self.token_with_offset(position).chars

    def char_to_token(self, char: int) -> int | None:
        """Give the position of the first token that holds a character; None where none does."""
        return next((at for at, start, end in self._spans() if start <= char < end), None)

    def nearest_token(self, char: int) -> int | None:
        """Give the position of the token that holds a character, else of the one whose middle (rounded down) is
        nearest, the first of equally near ones; None only where no token stands for any character."""
        held = self.char_to_token(char)
        if held is not None:
            return held
        distances = ((abs((start + end) // 2 - char), at) for at, start, end in self._spans())
        return min(distances, default=(0, None))[1]

    def first_token_from(self, char: int) -> int | None:
        """Give the position of the first token that starts at a character or after it; None where none does."""
        return next((at for at, start, _ in self._spans() if start >= char), None)

    def tokens_of_span(self, start: int, end: int) -> tuple[int, ...]:
        """Give the positions of the tokens that hold at least one of the characters [start, end), in order."""
        return tuple(at for at, first, last in self._spans() if first < end and last > start)

    def label_spans(self, spans: Mapping[str, tuple[int, int] | str]) -> dict[str, tuple[int, ...]]:
        """Give the token positions of labelled spans of the text.

        A span is a range of characters [start, end), or a text that occurs exactly once: `{"subject": "Eiffel Tower"}`.
        The last position of a subject is the last entry of its tuple. Raises ModelError for a text that is absent or
        occurs several times, for a range that is empty or leaves the text, and for a span that no token holds.
        """
        found: dict[str, tuple[int, ...]] = {}
        for label, span in spans.items():
            start, end = self._locate(label, span) if isinstance(span, str) else span
            if not 0 <= start < end <= len(self.text):
                raise ModelError(
                    f"span {label!r} goes from {start} to {end}, which is no range of characters of a text of "
                    f"{len(self.text)}"
                )
            found[label] = self.tokens_of_span(start, end)
            if not found[label]:
                raise ModelError(f"span {label!r}, {self.text[start:end]!r}, is held by no token")
        return found

    def token_labels(self, spans: Mapping[str, tuple[int, int] | str]) -> tuple[str, ...]:
        """Give one label a token: the first of the labelled spans (see `label_spans`) that it lies in, else "other";
        the last token of each label NAME is called `NAME_final`."""
        labels = [OTHER] * len(self)
        for label, positions in reversed(self.label_spans(spans).items()):
            for at in positions:
                labels[at] = label
        last = {label: at for at, label in enumerate(labels) if label != OTHER}
        return tuple(f"{label}_final" if last.get(label) == at else label for at, label in enumerate(labels))

    def _spans(self) -> Iterable[tuple[int, int, int]]:
        """The tokens that stand for characters: position, start, end."""
        return ((at, *chars) for at, chars in enumerate(self.offsets) if chars is not None and chars[0] < chars[1])

    def _locate(self, label: str, piece: str) -> tuple[int, int]:
        starts = [at for at in range(len(self.text)) if piece and self.text.startswith(piece, at)]
        if len(starts) != 1:
            where = f"occurs {len(starts)} times, at {', '.join(map(str, starts))}" if starts else "does not occur"
            raise ModelError(f"span {label!r}: {piece!r} {where} in the text; give its range of characters")
        return starts[0], starts[0] + len(piece)


def convert_positions(encoding: EncodingWithOffsets, chars: Iterable[int]) -> tuple[PositionConversion, ...]:
    """Give the tokens that characters lie in, with the nearest token for a character that lies in none, such as a
    space that the tokenizer leaves out of its offsets. Raises ModelError where no token stands for any character."""
    converted = []
    for char in chars:
        exact = encoding.char_to_token(char)
        position = encoding.nearest_token(char)
        if position is None:
            raise ModelError(f"no token stands for a character of {encoding.text!r}, so position {char} has none")
        token = encoding.tokens[position]
        converted.append(PositionConversion(char=char, position=position, token=token, exact=exact is not None))
    return tuple(converted)
