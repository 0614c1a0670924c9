"""The tokenizer inside a GGUF file: embedded vocabulary and merges, made into a `tokenizers.Tokenizer`.

A file names its way of cutting text before the merges (`tokenizer.ggml.pre`) and nothing else about it; what the names
mean is llama.cpp's `llama-vocab.cpp`. Byte-level BPE (`tokenizer.ggml.model` = gpt2) only.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import SpecialTokens, Vocabulary
from .errors import ModelError, nearest

if TYPE_CHECKING:
    import tokenizers

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True, kw_only=True)
class _PreTokenizer:
    """How text is cut before merges: by each expression in turn, within the pieces that the one before left.

    `whole_words`: a piece that is itself a token is taken without merging. `nfc`: text is composed first, as the
    models' own tokenizers do. `add_bos`: what holds where the file does not say.
    """

    cuts: tuple[str, ...]
    whole_words: bool = False
    nfc: bool = False
    add_bos: bool = False


_DIGITS_ALONE = _PreTokenizer(cuts=(r"\p{N}", _GPT2_WORDS))
_PRE_TOKENIZERS: Mapping[str, _PreTokenizer] = {
    "gpt-2": _PreTokenizer(cuts=(_GPT2_WORDS,)),
    "smollm": _DIGITS_ALONE,
    "starcoder": _DIGITS_ALONE,
    "refact": _DIGITS_ALONE,
    "command-r": _DIGITS_ALONE,
    "llama-bpe": _PreTokenizer(cuts=(_ANY_CASE + r"\p{N}{1,3}" + _LINES,), whole_words=True, add_bos=True),
    "qwen2": _PreTokenizer(cuts=(_ANY_CASE + r"\p{N}" + _LINES,), nfc=True),
}


def read_vocabulary(metadata: Mapping[str, Any], path: Path) -> Vocabulary:
    """Read the tokenizer of a GGUF file from its metadata; nothing is built before `build` is called.

    Raises ModelError for a file without a vocabulary, for a kind of tokenizer other than byte-level BPE and for an
    unknown way of cutting text.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelError(f"{path} has a tokenizer of the kind {kind!r}; only 'gpt2', byte-level BPE, can be read")
    name = str(metadata.get("tokenizer.ggml.pre"))
    if name not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ModelError(
            f"{path} cuts text in the way {name!r} (tokenizer.ggml.pre); known ones: {known}."
            f"{nearest(name, _PRE_TOKENIZERS)}"
        )
    pre = _PRE_TOKENIZERS[name]
    special = SpecialTokens(
        bos=metadata.get("tokenizer.ggml.bos_token_id"),
        eos=metadata.get("tokenizer.ggml.eos_token_id"),
        unk=metadata.get("tokenizer.ggml.unknown_token_id"),
    )
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos))
    if add_bos and special.bos is None:
        raise ModelError(f"{path} asks for a beginning-of-sequence token and does not say which")
    missing = [key for key in ("tokens", "merges", "token_type") if f"tokenizer.ggml.{key}" not in metadata]
    if missing:
        raise ModelError(f"{path} has no tokenizer.ggml.{missing[0]}, so texts cannot be tokenised")
    return Vocabulary(
        build=functools.partial(_build, metadata, pre, special.bos if add_bos else None),
        special=special,
        add_bos=add_bos,
    )


def _build(metadata: Mapping[str, Any], pre: _PreTokenizer, bos: int | None) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=pre.whole_words)
    )
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in pre.cuts]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if bos is not None:
        first = tokens[bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, bos)]
        )
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in added if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in added if k == _USER_DEFINED])
    return tokenizer
