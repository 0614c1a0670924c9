"""RWKV's World tokenizer gives the ids of its authors' package, and is used like any other tokenizer."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from forebay.stages.models import longest_match
from forebay.stages.models.checkpoint import SpecialTokens, Vocabulary
from forebay.stages.models.errors import ModelError
from forebay.stages.models.longest_match import LongestMatch
from forebay.stages.models.text import ModelTokenizer, tokenizer_of
from forebay.stages.models.world import world_vocabulary
from forebay.stages.models.world_files import world_file_of_package

from .world_texts import TEXTS, data, spans_by_hand, theirs, world

NOVELS = Path(__file__).parents[2] / "docs" / "examples" / "novels.jsonl"


@functools.cache
def novels() -> list[str]:
    return [json.loads(line)["text"] for line in NOVELS.read_text().splitlines()]


# ── ids ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("script", TEXTS)
def test_a_text_has_the_ids_and_characters_of_the_package(script: str) -> None:
    text = TEXTS[script]
    found = world().encode(text)
    assert found.ids == theirs().encode(text)
    assert found.offsets == spans_by_hand(text, found.ids)
    assert world().decode(found.ids) == text
    assert b"".join(theirs().idx2token[i] for i in found.ids) == text.encode()


def test_every_document_of_the_example_has_the_ids_and_characters_of_the_package() -> None:
    assert len(novels()) > 50
    for document, found in zip(novels(), world().encode_batch(novels()), strict=True):
        assert found.ids == theirs().encode(document)
        assert found.offsets == spans_by_hand(document, found.ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_has_the_ids_and_characters_of_the_package(text: str) -> None:
    for given_text in (text, 20 * text):  # long ones are cut, short ones are not
        found = world().encode(given_text)
        assert found.ids == theirs().encode(given_text)
        assert found.offsets == spans_by_hand(given_text, found.ids)
        assert world().decode(found.ids) == given_text


@settings(max_examples=200, deadline=None)
@given(source=st.binary(max_size=80))
def test_any_bytes_have_the_ids_of_the_package_and_come_back(source: bytes) -> None:
    for given_bytes in (source, 20 * source):
        ids = world().encode_bytes(given_bytes)
        assert ids == theirs().encodeBytes(given_bytes)
        assert world().decode_bytes(ids) == given_bytes


def runs(name: str) -> bytes:
    chance = random.Random(name)
    if name == "any bytes":
        return chance.randbytes(20_000)
    if name == "no place to cut":
        return b"ab" * 30_000
    tokens = chance.choices(list(theirs().idx2token.values()), k=5_000)
    return b"".join(tokens if name == "whole tokens" else [t[: chance.randint(1, len(t))] for t in tokens])


@pytest.mark.parametrize("name", ["any bytes", "no place to cut", "whole tokens", "beginnings of tokens"])
def test_long_runs_of_bytes_have_the_ids_of_the_package(name: str) -> None:
    source = runs(name)
    ids = world().encode_bytes(source)
    assert ids == theirs().encodeBytes(source)
    assert world().decode_bytes(ids) == source
    assert world().encode_bytes(source) == ids, "what was met before is tokenised otherwise"


@pytest.mark.parametrize("cut", range(1, 8))
def test_bytes_that_cut_characters_have_the_ids_of_the_package(cut: int) -> None:
    source = "日本語🐟é".encode()[cut:-cut] + TEXTS["chinese"].encode()[cut:-cut]
    ids = world().encode_bytes(source)
    assert ids == theirs().encodeBytes(source)
    assert world().decode_bytes(ids) == source
    assert world().decode(ids) == source.decode(errors="replace")


def test_every_byte_and_every_token_alone_is_itself() -> None:
    assert [world().encode_bytes(bytes([byte])) for byte in range(256)] == [[byte + 1] for byte in range(256)]
    tokens: dict[int, bytes] = theirs().idx2token
    assert len(tokens) == 65_529
    assert [world().encode_bytes(token) for token in tokens.values()] == [[token_id] for token_id in tokens]
    assert world().spelling(list(tokens)) == list(tokens.values())


def test_what_is_cut_and_remembered_changes_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of a few bytes and room for a few pieces, every edge and every forgetting is met."""
    source = "".join(TEXTS.values()).encode() + b" " * 300
    expected = theirs().encodeBytes(source)
    made = LongestMatch(theirs().idx2token, "the package's")
    for block, kept in ((1, 1), (2, 3), (7, 5), (64, 2**16)):
        monkeypatch.setattr(longest_match, "_BLOCK", block)
        monkeypatch.setattr(longest_match, "_MOST_KEPT", kept)
        assert made.encode(source) == made.encode(source) == expected
        assert made.encode(b"") == []


# ── the methods of a tokenizer ───────────────────────────────────────────────────────────────────────────────────────


def test_the_end_of_a_text_is_spelt_out_or_is_text() -> None:
    text = "é<|endoftext|>\n\nb <|endoftext|>"
    found = world().encode(text)
    assert [i for i, token_id in enumerate(found.ids) if token_id == 0] == [1, len(found.ids) - 1]
    assert found.offsets[1] == (1, 14)
    assert "".join(text[start:end] for start, end in found.offsets) == text
    assert world().decode(found.ids, skip_special_tokens=False) == text
    assert world().decode(found.ids) == text.replace("<|endoftext|>", "")
    assert world().decode_bytes(found.ids) == text.replace("<|endoftext|>", "").encode()
    as_text = data().encode(text)
    assert as_text.ids == theirs().encode(text)
    assert as_text.offsets == spans_by_hand(text, as_text.ids)
    assert world().encode(text).ids == found.ids, "a setting of one tokenizer is another's"


def test_nothing_is_put_before_or_behind_a_text() -> None:
    for special in (True, False):
        assert world().encode("", add_special_tokens=special).ids == []
        assert world().encode("a b", add_special_tokens=special).ids == theirs().encode("a b")
        texts = list(TEXTS.values())
        for batch in (world().encode_batch, world().encode_batch_fast):
            assert [one.ids for one in batch(texts, add_special_tokens=special)] == [*map(theirs().encode, texts)]
    assert world().encode("").offsets == []


def test_every_id_is_written_in_a_way_of_its_own_and_found_by_it() -> None:
    tokenizer = world()
    assert tokenizer.get_vocab_size() == 65_536
    written = [tokenizer.id_to_token(token_id) for token_id in range(65_536)]
    assert None not in written
    assert len(set(written)) == 65_536
    for token_id in [0, 1, 11, 33, 129, 256, 257, 65_529, *range(300, 65_530, 997)]:
        assert tokenizer.token_to_id(str(written[token_id])) == token_id
    assert written[0] == "<|endoftext|>"
    assert written[129] == r"b'\x80'"
    assert (written[261], written[65_530], tokenizer.token_to_id("[PAD65530]")) == ("\n\n", "[PAD65530]", 65_530)
    assert tokenizer.id_to_token(65_536) is None
    assert tokenizer.token_to_id("no token at all") is None
    assert tokenizer.encode("日 \u0915").tokens == [tokenizer.id_to_token(i) for i in theirs().encode("日 \u0915")]


def test_an_id_beyond_the_vocabulary_stands_for_nothing_and_one_beyond_the_model_is_refused() -> None:
    assert world().decode([33, 65_530, 65_535, 34], skip_special_tokens=False) == " !"
    assert world().decode_bytes([65_530]) == b""
    for wrong in (-1, 65_536):
        with pytest.raises(ModelError, match=f"no token {wrong}: the tokenizer's ids go from 0 to 65535"):
            world().decode([1, wrong])


def test_bytes_that_are_no_text_show_as_other_byte_level_tokenizers_show_them() -> None:
    """U+FFFD once for every longest part that could have begun a character."""
    from tokenizers import decoders, models

    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    names = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    other = Tokenizer(models.BPE({name: byte for byte, name in names.items()}, []))
    other.decoder = decoders.ByteLevel()
    chance = random.Random(1)
    for _ in range(300):
        source = bytes(chance.choices([0x41, 0x80, 0xBF, 0xC3, 0xE4, 0xBD, 0xED, 0xA0, 0xF0, 0x9F, 0x90, 0xFF], k=9))
        assert world().decode(world().encode_bytes(source)) == other.decode(list(source))


def test_a_text_that_has_no_bytes_is_refused() -> None:
    with pytest.raises(ModelError, match=r"character 2 of a text is U\+D83D, half a surrogate pair"):
        world().encode("a \ud83d b")


def test_a_models_tokenizer_has_its_methods() -> None:
    model = tokenizer_of(world_vocabulary(world_file_of_package(), 65_536))
    ids = theirs().encode("The Eiffel Tower: 日本語 🐟")
    assert model.to_tokens("The Eiffel Tower: 日本語 🐟").tolist() == [ids]
    assert model.to_string(torch.tensor(ids)) == "The Eiffel Tower: 日本語 🐟"
    assert model.to_str_tokens("The Eiffel Tower") == [
        theirs().idx2token[i].decode() for i in theirs().encode("The Eiffel Tower")
    ]
    fish = theirs().encodeBytes("🐟".encode()[:2])
    assert model.to_str_tokens(fish) == ["\ufffd"] * len(fish)
    assert model.to_str_tokens([0, 33, 65_530]) == ["<|endoftext|>", " ", ""]
    assert model.to_single_token(" Paris") == model.find_token_id("Paris") == theirs().encode(" Paris")[0]
    assert model.to_single_token("<|endoftext|>") == 0
    with pytest.raises(ModelError, match="is not one token but"):
        model.to_single_token("Eiffel Tower")
    with pytest.raises(ModelError, match="has no beginning-of-sequence token"):
        model.to_tokens("a", prepend_bos=True)
    assert model.to_tokens(["a", "b c d"])[0].tolist() == theirs().encode("a")
    assert (model.vocabulary.special, model.vocabulary.stops) == (SpecialTokens(eos=0), (0,))


def test_an_encoding_finds_the_tokens_of_characters() -> None:
    model = ModelTokenizer(
        tokenizer=data(), vocabulary=Vocabulary(build=data, special=SpecialTokens(eos=0), add_bos=False)
    )
    text = "naïve 𠀋 日本語 Eiffel Tower, Paris"
    found = model.encode(text)
    assert list(found.token_ids) == theirs().encode(text)
    assert list(found.offsets) == spans_by_hand(text, list(found.token_ids))
    of_tower = found.label_spans({"subject": "Eiffel Tower"})["subject"]
    assert "".join(found.tokens[at] for at in of_tower).strip() == "Eiffel Tower"
    in_parts = found.tokens_of_span(6, 7)
    assert len(in_parts) > 1, "this character is in no parts"
    assert model.to_string([found.token_ids[at] for at in in_parts]).strip() == "𠀋"
