"""A model at rest, wherever it lies: one way to ask for its architecture, its weights and its tokenizer.

Opening reads headers only. Tensors are read one at a time; safetensors are mapped into memory, the quantised blocks of
a GGUF file become float32. Nothing is unpickled: a checkpoint without safetensors is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .chat import ChatTemplates
from .errors import ModelError, nearest
from .spec import ModelSpec

if TYPE_CHECKING:
    import torch


class Encoding(Protocol):
    """A text's tokens: their ids, the characters [start, end) that each stands for, and how each is written."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def offsets(self) -> list[tuple[int, int]]: ...
    @property
    def tokens(self) -> list[str]: ...


class Tokenizer(Protocol):
    """What is asked of a tokenizer: methods of a `tokenizers.Tokenizer`, by their names and with their meanings.

    Offsets are characters of a Python string; a token that is a part of a character has the whole one's. Encodings of
    `encode_batch_fast` may lack them. With `encode_special_tokens` a special token that is spelt out in a text is text
    like any other.
    """

    @property
    def encode_special_tokens(self) -> bool: ...
    @encode_special_tokens.setter
    def encode_special_tokens(self, value: bool, /) -> None: ...

    def encode(self, sequence: str, /, *, add_special_tokens: bool = True) -> Encoding: ...
    def encode_batch(self, input: Sequence[str], /, *, add_special_tokens: bool = True) -> Sequence[Encoding]: ...
    def encode_batch_fast(self, input: Sequence[str], /, *, add_special_tokens: bool = True) -> Sequence[Encoding]: ...
    def decode(self, ids: Sequence[int], /, *, skip_special_tokens: bool = True) -> str: ...
    def decode_batch(
        self, sequences: Sequence[Sequence[int]], /, *, skip_special_tokens: bool = True
    ) -> Sequence[str]: ...
    def id_to_token(self, id: int, /) -> str | None: ...
    def token_to_id(self, token: str, /) -> int | None: ...
    def get_vocab_size(self, with_added_tokens: bool = True) -> int: ...
    def no_padding(self) -> None: ...
    def no_truncation(self) -> None: ...
    def to_str(self, pretty: bool = False) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Token ids with a meaning of their own; None where the model has none. 0 is an id like any other."""

    bos: int | None = None
    eos: int | None = None
    unk: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A tokenizer at rest: `build` makes it; `add_bos` says whether the model was trained with a beginning-of-sequence
    token before every text. `stops` are all ids that end a text or a turn, `special.eos` first where there is one;
    `chat` the model's chat templates."""

    build: Callable[[], Tokenizer]
    special: SpecialTokens
    add_bos: bool
    stops: tuple[int, ...] = ()
    chat: ChatTemplates = field(default_factory=ChatTemplates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint.

    `source` is what the caller named; `revision` the commit it resolved to on the hub, else None; `files` those that
    determine architecture and weights, for the caller to hash; `spec` the architecture. Made by `open_checkpoint`.
    """

    source: str
    revision: str | None
    files: tuple[Path, ...]
    spec: ModelSpec
    reader: "Callable[[str], torch.Tensor]"
    vocabulary: Callable[[], Vocabulary]

    def read(self, name: str) -> "torch.Tensor":
        """Give one weight by forebay's name (`spec.weight_shapes()` lists them), on the CPU.

        Safetensors: a view of the mapped file in its stored dtype, not to be written to. GGUF: float32, dequantised, a
        tensor of its own. Raises ModelError for a name that the model does not have.
        """
        shapes = self.spec.weight_shapes()
        if name not in shapes:
            raise ModelError(f"{self.source} has no weight {name!r}.{nearest(name, shapes)}")
        return self.reader(name)

    def tokenizer(self) -> Tokenizer:
        """Give the model's tokenizer, a new object at every call, so that settings made on it stay the caller's own.

        By default it turns the text of a special token into that token, as `tokenizers` does; set
        `encode_special_tokens = True` on it where texts are data. Raises ModelError where the checkpoint has none.
        """
        return self.vocabulary().build()

    @property
    def special_tokens(self) -> SpecialTokens:
        """The ids of the special tokens. Raises ModelError where the checkpoint has no tokenizer."""
        return self.vocabulary().special

    @property
    def add_bos(self) -> bool:
        """Whether a beginning-of-sequence token belongs before every text."""
        return self.vocabulary().add_bos
