"""The tokenizer inside a GGUF file: embedded vocabulary, made into a `tokenizers.Tokenizer`.

Two kinds (`tokenizer.ggml.model`) are read, and what a file leaves unsaid is what llama.cpp's `llama-vocab.cpp` takes:

* `gpt2`, byte-level BPE: the file holds the merges, and names its way of cutting text before them
  (`tokenizer.ggml.pre`) and nothing else about it.
* `llama`, SentencePiece's BPE: the file holds scores. Of all neighbours that are together a token, those with the
  highest score are joined first, the leftmost of equal ones; what is no token in the end becomes its UTF-8 bytes.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat import DEFAULT, ChatTemplates
from .checkpoint import SpecialTokens, Vocabulary
from .errors import ModelError, nearest

if TYPE_CHECKING:
    import tokenizers

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # of tokenizer.ggml.token_type

_NEVER_MERGED = (_UNKNOWN, _CONTROL, _BYTE)

# How SentencePiece writes a space, and the bytes of a character that is no token.
_SPACE = "▁"
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN_REST = r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


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


_WORDS = _PreTokenizer(cuts=(_GPT2_WORDS,))
_DIGITS_ALONE = _PreTokenizer(cuts=(r"\p{N}", _GPT2_WORDS))
_LLAMA3 = _PreTokenizer(cuts=(_ANY_CASE + r"\p{N}{1,3}" + _LINES,), whole_words=True, add_bos=True)
_PRE_TOKENIZERS: Mapping[str, _PreTokenizer] = {
    "default": _PreTokenizer(cuts=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _WORDS,
    "phi-2": _WORDS,
    "smollm": _DIGITS_ALONE,
    "starcoder": _DIGITS_ALONE,
    "refact": _DIGITS_ALONE,
    "command-r": _DIGITS_ALONE,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _PreTokenizer(cuts=_LLAMA3.cuts),
    "tekken": _PreTokenizer(cuts=(_TEKKEN_WORDS + _TEKKEN_REST,), whole_words=True, add_bos=True),
    "qwen2": _PreTokenizer(cuts=(_ANY_CASE + r"\p{N}" + _LINES,), nfc=True),
    "deepseek-r1-qwen": _PreTokenizer(cuts=(_ANY_CASE + r"\p{N}" + _LINES,)),
}


# Special tokens in the file's keys, `tokenizer.ggml.NAME_token_id`: those that chat templates know, with the name that
# they know them by, and those that end a turn.
_TEMPLATE_NAMES: Mapping[str, str] = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",  # as the format spells it
    "padding": "pad_token",
    "mask": "mask_token",
}
_TURN_ENDS = ("eot", "eom")
# Control tokens that end a text or a turn under these texts in every model; a file may name one of those it has only.
_ENDS = frozenset(
    (
        *("</s>", "<eos>", "[EOS]", "<EOT>", "[EOT]", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<end_of_turn>", "<turn|>"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """One kind of tokenizer: the arrays that it cannot do without, what holds where the file does not say, and the
    function that makes it, special tokens left out."""

    needs: tuple[str, ...]
    add_bos: "Callable[[Mapping[str, Any], Path], bool]"
    ids: Mapping[str, int]
    build: "Callable[[Mapping[str, Any]], tokenizers.Tokenizer]"


def read_vocabulary(metadata: Mapping[str, Any], path: Path) -> Vocabulary:
    """Read the tokenizer of a GGUF file from its metadata; nothing is built before `build` is called.

    Raises ModelError for a file without a vocabulary or with a damaged one, for a kind of tokenizer other than
    byte-level BPE and SentencePiece's BPE, and for an unknown way of cutting text.
    """
    name = metadata.get("tokenizer.ggml.model")
    kind = _KINDS.get(str(name))
    if kind is None:
        raise ModelError(
            f"{path} has a tokenizer of the kind {name!r}; only 'gpt2', byte-level BPE, and 'llama', SentencePiece's "
            "BPE, can be read"
        )
    add_bos = kind.add_bos(metadata, path)
    _check_arrays(metadata, kind, path)
    ids = _special_ids(metadata, kind, path)
    first = _affix(metadata, "bos", ids, add_bos, path)
    last = _affix(metadata, "eos", ids, False, path)
    tokens = metadata["tokenizer.ggml.tokens"]
    return Vocabulary(
        build=functools.partial(_build, kind, metadata, first, last),
        special=SpecialTokens(bos=ids.get("bos"), eos=ids.get("eos"), unk=ids.get("unknown")),
        add_bos=first is not None,
        stops=_stops(metadata, ids),
        chat=ChatTemplates(
            templates=_templates(metadata),
            special={key: tokens[ids[name]] for name, key in _TEMPLATE_NAMES.items() if name in ids},
            source=str(path),
        ),
    )


def _pre_tokenizer(metadata: Mapping[str, Any], path: Path) -> _PreTokenizer:
    name = str(metadata.get("tokenizer.ggml.pre"))
    if name not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ModelError(
            f"{path} cuts text in the way {name!r} (tokenizer.ggml.pre); known ones: {known}."
            f"{nearest(name, _PRE_TOKENIZERS)}"
        )
    return _PRE_TOKENIZERS[name]


def _check_arrays(metadata: Mapping[str, Any], kind: _Kind, path: Path) -> None:
    missing = [key for key in kind.needs if f"tokenizer.ggml.{key}" not in metadata]
    if missing:
        raise ModelError(f"{path} has no tokenizer.ggml.{missing[0]}, so texts cannot be tokenised")
    tokens = metadata["tokenizer.ggml.tokens"]
    for key in ("token_type", "scores"):
        if key in kind.needs and (length := len(metadata[f"tokenizer.ggml.{key}"])) != len(tokens):
            raise ModelError(f"{path} has {len(tokens)} tokens and {length} values in tokenizer.ggml.{key}")
    known = set(tokens)
    if len(known) < len(tokens):
        [(token, count)] = Counter(tokens).most_common(1)
        raise ModelError(f"{path} has the token {token!r} {count} times in its vocabulary")
    if "scores" in kind.needs:
        _check_alphabet(metadata, known, path)


def _check_alphabet(metadata: Mapping[str, Any], known: set[str], path: Path) -> None:
    """Every byte must be a token, and every character of a token that is put together from its parts."""
    if absent := [byte for byte in _BYTES if byte not in known]:
        raise ModelError(f"{path} has no token {absent[0]!r}, so some texts could not be written in its vocabulary")
    columns = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    merged = [token for token, kind in columns if kind not in (*_NEVER_MERGED, _USER_DEFINED) and len(token) > 1]
    if alone := set("".join(merged)) - known:
        char = min(alone)
        token = next(token for token in merged if char in token)
        raise ModelError(f"{path} has the token {token!r}, but {char!r} is none, and only tokens can be joined here")


def _special_ids(metadata: Mapping[str, Any], kind: _Kind, path: Path) -> dict[str, int]:
    """Give the ids of special tokens by the format's names; those that the file does not have are not there."""
    n_tokens = len(metadata["tokenizer.ggml.tokens"])
    ids = {name: id_ for name, id_ in kind.ids.items() if id_ < n_tokens}
    for name in (*_TEMPLATE_NAMES, *_TURN_ENDS):
        if (id_ := metadata.get(key := f"tokenizer.ggml.{name}_token_id")) is not None:
            if id_ >= n_tokens:
                raise ModelError(f"{path} says {key} = {id_}, but has {n_tokens} tokens")
            ids[name] = id_
    return ids


def _affix(metadata: Mapping[str, Any], name: str, ids: Mapping[str, int], default: bool, path: Path) -> int | None:
    """Give the token that stands at one end of every text, None where there is none."""
    if not metadata.get(f"tokenizer.ggml.add_{name}_token", default):
        return None
    if name not in ids:
        raise ModelError(f"{path} says tokenizer.ggml.add_{name}_token, and does not say which token that is")
    return ids[name]


def _stops(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> tuple[int, ...]:
    kinds = metadata["tokenizer.ggml.token_type"]
    named = [ids[name] for name in ("eos", *_TURN_ENDS) if name in ids]
    known = [i for i, token in enumerate(metadata["tokenizer.ggml.tokens"]) if token in _ENDS and kinds[i] == _CONTROL]
    return tuple(dict.fromkeys([*named, *known]))


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    named = {name: metadata.get(f"{key}.{name}") for name in metadata.get("tokenizer.chat_templates", ())}
    return {name: text for name, text in {DEFAULT: metadata.get(key), **named}.items() if text is not None}


def _build(kind: _Kind, metadata: Mapping[str, Any], first: int | None, last: int | None) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, processors

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata["tokenizer.ggml.token_type"]
    tokenizer = kind.build(metadata)
    if first is not None or last is not None:
        ends = {name: id_ for name, id_ in (("first", first), ("last", last)) if id_ is not None}
        single = [piece for piece in ("first", "$A", "last") if piece in ends or piece == "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, *(f"{'$B' if piece == '$A' else piece}:1" for piece in single)],
            special_tokens=[{"id": name, "ids": [id_], "tokens": [tokens[id_]]} for name, id_ in ends.items()],
        )
    for special, of in ((True, (_CONTROL, _UNKNOWN)), (False, (_USER_DEFINED,))):
        found = [token for token, kind_ in zip(tokens, kinds, strict=True) if kind_ in of and token]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(token, special=special, normalized=False) for token in found])
    return tokenizer


def _byte_level(metadata: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in pre.cuts]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(metadata: Mapping[str, Any]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(metadata), byte_fallback=True))
    # Before the text, and again after every token that is cut out of it beforehand, as SentencePiece's users expect.
    leading = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if leading else []), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if leading else []),
        ]
    )
    return tokenizer


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Give the pairs of tokens that make up a token, those with the highest score first.

    Merged in this order, text comes out as if neighbours were compared by score, so long as no two tokens of equal
    score overlap in it. Control tokens never come of text that spells them, as in SentencePiece itself.
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    columns = zip(tokens, metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.token_type"], strict=True)
    known = set(tokens)
    found: list[tuple[float, tuple[str, str]]] = []
    for token, score, kind in columns:
        if kind not in _NEVER_MERGED:
            cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
            found += [(-score, pair) for pair in cuts if pair[0] in known and pair[1] in known]
    found.sort(key=itemgetter(0))
    return [pair for _, pair in found]


_KINDS: Mapping[str, _Kind] = {
    "gpt2": _Kind(
        needs=("tokens", "merges", "token_type"),
        add_bos=lambda metadata, path: _pre_tokenizer(metadata, path).add_bos,
        ids={},
        build=_byte_level,
    ),
    "llama": _Kind(
        needs=("tokens", "scores", "token_type"),
        add_bos=lambda metadata, path: True,
        ids={"bos": 1, "eos": 2, "unknown": 0},
        build=_sentence_piece,
    ),
}
