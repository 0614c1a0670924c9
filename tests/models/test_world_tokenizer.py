"""RWKV's World tokenizer gives the ids of its authors' package, and is used like any other tokenizer."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
from tokenizers import Tokenizer

import forebay
from forebay.pipeline.report.lens import TokenTexts, lens_of_run
from forebay.stages.models import longest_match, source, world_files
from forebay.stages.models.checkpoint import SpecialTokens, Vocabulary
from forebay.stages.models.errors import ModelError
from forebay.stages.models.longest_match import LongestMatch
from forebay.stages.models.text import ModelTokenizer, tokenizer_of
from forebay.stages.models.tokenizer_json import read_tokenizer
from forebay.stages.models.world import WorldTokenizer, load_world_tokenizer, world_vocabulary
from forebay.stages.tokenize import ModelSource, Tokenize

from .rwkv_models import write_pth

MakeRecipe = Callable[..., Path]
NOVELS = Path(__file__).parents[2] / "docs" / "examples" / "novels.jsonl"

TEXTS = {
    "accents": "Où l'été naïf s'achève, señor — Größe, Łódź, İstanbul, Žižkov, ﬁancé.",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю. Ђорђе, Їжак.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ἄνθρωπος",
    "arabic": "أَبْجَد هَوَّز، ١٢٣٤؟ لا إله إلّا",
    "hebrew": "דג סקרן שט בים מאוכזב; שָׁלוֹם",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा — १२३",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "chinese": "天地玄黃，宇宙洪荒。日月盈昃，辰宿列张。𠀋𪚥",
    "japanese": "いろはにほへと ちりぬるを、ワガヨタレソ。ｶﾀｶﾅ",
    "korean": "키스의 고유조건은 입술끼리 만나야 하고 ᄒᆞᆫ글",
    "emoji": "🐟👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇫🇷🫠 ☕︎",
    "combining": "é é̂̃ Z̷̢̛̺a̵͉͝l̴̰̈́g̶͓̀o̷͇͛ ẹ́",
    "control": "\x00\x01\x07\x08\t\x0b\x0c\r\n\r\r\n\x1b[0m\x7f\x80\x85\xa0\u2028\u2029\ufeff\ufffd",
    "code": "def f(x: int = 0) -> str:\n\treturn f'{x!r}'  # <|im_start|>\r\n}\n\n\n\n    });\n\n        ====>>>>\n",
    "spaces": " " * 1000 + "a" + " " * 127 + "\t" * 67 + "\n" * 33 + " \n" * 40 + "-" * 500 + "=" * 81,
    "planes": "\ud7ff\ue000\uffff\U00010000\U0002f800\U000e0041\U0010ffff",
}


# Functions, since hypothesis writes out the fixtures that a test takes.
@functools.cache
def theirs() -> Any:
    return TRIE_TOKENIZER(str(world_files.world_file_of_package()))


@functools.cache
def world() -> WorldTokenizer:
    return load_world_tokenizer()


def data() -> WorldTokenizer:
    """One that takes the spelling of a special token for text."""
    made = load_world_tokenizer()
    made.encode_special_tokens = True
    return made


@functools.cache
def novels() -> list[str]:
    return [json.loads(line)["text"] for line in NOVELS.read_text().splitlines()]


def spans_by_hand(text: str, ids: list[int]) -> list[tuple[int, int]]:
    """The characters of each token, from the bytes that the package has for it."""
    owner = [i for i, char in enumerate(text) for _ in char.encode()]
    spans, at = [], 0
    for token_id in ids:
        beyond = at + len(theirs().idx2token[token_id])
        spans.append((owner[at], owner[beyond - 1] + 1))
        at = beyond
    assert at == len(owner)
    return spans


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
    found = world().encode(text)
    assert found.ids == theirs().encode(text)
    assert found.offsets == spans_by_hand(text, found.ids)
    assert world().decode(found.ids) == text


@settings(max_examples=200, deadline=None)
@given(source=st.binary(max_size=80))
def test_any_bytes_have_the_ids_of_the_package_and_come_back(source: bytes) -> None:
    ids = world().encode_bytes(source)
    assert ids == theirs().encodeBytes(source)
    assert world().decode_bytes(ids) == source


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
    for block, kept in ((1, 1), (2, 3), (7, 5), (64, 2**16)):
        monkeypatch.setattr(longest_match, "_BLOCK", block)
        monkeypatch.setattr(longest_match, "_MOST_KEPT", kept)
        made = LongestMatch(theirs().idx2token, "the package's")
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
    model = tokenizer_of(world_vocabulary(world_files.world_file_of_package(), 65_536))
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


# ── at rest ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pretty", [False, True])
def test_its_json_makes_it_again(tmp_path: Path, pretty: bool) -> None:
    made = load_world_tokenizer(n_ids=65_540, end="<s>")
    (tmp_path / "tokenizer.json").write_text(made.to_str(pretty), encoding="utf-8")
    for source in (tmp_path / "tokenizer.json", made.to_str(pretty)):
        again = read_tokenizer(source)
        assert isinstance(again, WorldTokenizer)
        assert again.to_str() == made.to_str()
        assert again.get_vocab_size() == 65_540
        text = "<s>".join(TEXTS.values())
        assert again.encode(text).ids == made.encode(text).ids
        assert again.decode([0, 129, 65_539], skip_special_tokens=False) == "<s>\ufffd"


def test_another_tokenizers_json_is_read_too(tiny_model: Path) -> None:
    path = tiny_model / "tokenizer.json"
    expected = Tokenizer.from_file(str(path)).encode('a "RWKV World"').ids
    assert read_tokenizer(path).encode('a "RWKV World"').ids == expected
    assert read_tokenizer(path.read_text()).encode('a "RWKV World"').ids == expected


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"type": "RWKV World"',
        '{"type": "RWKV World"}',
        '{"type": "RWKV World", "n_ids": 300, "end": "e", "texts": {"0": "a"}, "bytes": {}}',
        '{"type": "RWKV World", "n_ids": 300, "end": "e", "texts": {"1": "a"}, "bytes": {"2": "6"}}',
        '{"type": "RWKV World", "n_ids": 300, "end": "e", "texts": {"1": "a", "2": "a"}, "bytes": {}}',
        '{"type": "RWKV World", "n_ids": 300, "end": "e", "texts": {"1": "a"}, "bytes": {}}',
    ],
)
def test_a_damaged_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer\.json (cannot be read|holds a damaged|has no token)"):
        read_tokenizer(tmp_path / "tokenizer.json")


def small() -> list[str]:
    """The lines of a vocabulary of 260 tokens."""
    lines = [f"{byte + 1} {bytes([byte]) if byte > 127 else chr(byte)!r} 1" for byte in range(256)]
    return [*lines, "257 'é' 2", '258 "it\'s" 4', r"259 b'\xe4\xbd' 2", r"""260 b"'\xff" 2"""]


def write_vocabulary(folder: Path, lines: list[str], name: str = "rwkv_vocab_small.txt") -> Path:
    (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder / name


def test_a_vocabulary_of_ones_own_is_read(tmp_path: Path) -> None:
    tokenizer = load_world_tokenizer(write_vocabulary(tmp_path, small()), n_ids=261)
    assert tokenizer.encode("it's é").ids == [258, 33, 257]
    assert tokenizer.encode_bytes(b"\xe4\xbd'\xff'") == [259, 260, 40]
    with pytest.raises(ModelError, match="has ids up to 260, and the model has only 260"):
        load_world_tokenizer(tmp_path / "rwkv_vocab_small.txt", n_ids=260)


def test_a_vocabulary_that_has_changed_is_read_again(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path, small())
    assert load_world_tokenizer(path).encode("it's").ids == [258]
    write_vocabulary(tmp_path, [*small(), "261 'it' 2", "262 's' 1"][:-1])
    assert load_world_tokenizer(path).encode("it").ids == [261]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("257", "not of the form"),
        ("257 'é'", "not of the form"),
        ("257 é 2", "not of the form"),
        ("257 'é 2", "not of the form"),
        ("257 'a' 'b' 2", "not of the form"),
        ("257 ['é'] 2", "not of the form"),
        ("257 __import__('os').getcwd() 2", "not of the form"),
        ("x57 'é' 2", "not of the form"),
        ("-257 'é' 2", "not of the form"),
        ("", "not of the form"),
        ("257 'é' 1", "'é' has 2 bytes, and 1 are promised"),
        ("257 '' 0", "has 0 bytes"),
        (r"257 b'\xe4\xbd' 3", "has 2 bytes, and 3 are promised"),
        (r"257 b'\xe' 1", "damaged"),
        (r"257 '\ud800' 3", "damaged"),
        ("257 b'é' 2", "damaged"),
        ("256 'é' 2", "every id and token stands there once"),
        ("257 'a' 1", "every id and token stands there once"),
        ("0 'é' 2", "ids go from 1"),
    ],
)
def test_a_damaged_line_is_refused_by_its_number(tmp_path: Path, line: str, reason: str) -> None:
    lines = small()
    lines[256] = line
    with pytest.raises(ModelError, match=rf"line 257 of {tmp_path}.*{reason}"):
        load_world_tokenizer(write_vocabulary(tmp_path, lines))


def test_a_vocabulary_that_is_cut_off_or_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no token for 1 of the 256 bytes, the first of them 0x61"):
        load_world_tokenizer(write_vocabulary(tmp_path, [line for line in small() if "'a'" not in line]))
    whole = world_files.world_file_of_package().read_bytes().splitlines(keepends=True)
    path = tmp_path / world_files.NAME
    path.write_bytes(b"".join(whole[:-1]))
    with pytest.raises(ModelError, match=r"has 65,528 tokens instead of 65,529"):
        load_world_tokenizer(path)
    path.write_bytes(b"\xff\xfe" + b"".join(whole))
    with pytest.raises(ModelError, match="cannot be read as a vocabulary"):
        load_world_tokenizer(path)
    with pytest.raises(ModelError, match="there is no vocabulary"):
        load_world_tokenizer(tmp_path / "nowhere.txt")


# ── where a model's comes from ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def pth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of as many ids as those of the World series."""
    folder = tmp_path_factory.mktemp("world")
    return write_pth(folder / "x070.pth", 7, d_vocab=65_536, d_model=16, n_heads=2, d_head=8, n_layers=2, d_mlp=24)


def test_a_model_of_65_536_ids_has_the_packages_vocabulary(pth: Path) -> None:
    checkpoint = source.open_checkpoint(pth)
    assert checkpoint.tokenizer().to_str() == world().to_str()
    assert (checkpoint.special_tokens, checkpoint.add_bos) == (SpecialTokens(eos=0), False)
    assert checkpoint.vocabulary().stops == (0,)
    first, second = checkpoint.tokenizer(), checkpoint.tokenizer()
    first.encode_special_tokens = True
    assert not second.encode_special_tokens


def test_the_vocabulary_beside_a_model_is_its_own(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "small.pth", 6, d_vocab=270)
    with pytest.raises(ModelError, match=r"no rwkv_vocab\*\.txt beside it, and its 270 ids are not the 65,536"):
        source.open_checkpoint(path).vocabulary()
    write_vocabulary(tmp_path, small())
    tokenizer = source.open_checkpoint(path).tokenizer()
    assert tokenizer.encode("it's é").ids == [258, 33, 257]
    assert tokenizer.get_vocab_size() == 270
    write_vocabulary(tmp_path, small(), "rwkv_vocab_other.txt")
    with pytest.raises(ModelError, match=r"several vocabularies.*rwkv_vocab_other\.txt, rwkv_vocab_small\.txt"):
        source.open_checkpoint(path).vocabulary()
    shutil.copy(world_files.world_file_of_package(), tmp_path)
    with pytest.raises(ModelError, match="has ids up to 65529, and the model has only 270"):
        source.open_checkpoint(path).vocabulary()


@pytest.mark.parametrize("holds", [None, "nothing"])
def test_without_the_package_a_model_says_what_to_do(
    pth: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holds: str | None
) -> None:
    found = None if holds is None else SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(world_files.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ModelError, match=r"put rwkv_vocab_v20230424\.txt beside the model, or pip install rwkv"):
        source.open_checkpoint(pth).vocabulary()
    with pytest.raises(ModelError, match="not installed: .*pip install rwkv" if holds is None else "holds no rwkv_vo"):
        load_world_tokenizer()


def test_a_folder_without_tokenizer_json_has_the_vocabulary_in_it(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json"):
        source.open_checkpoint(folder).vocabulary()
    write_vocabulary(folder, small())
    said = {"added_tokens_decoder": {"0": {"content": "<s>", "special": True}}, "chat_template": "{{ messages }}!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    vocabulary = source.open_checkpoint(folder).vocabulary()
    assert vocabulary.build().encode("it's<s>").ids == [258, 0]
    assert (vocabulary.special, vocabulary.add_bos, vocabulary.stops) == (SpecialTokens(eos=0), False, (0,))
    assert tokenizer_of(vocabulary).chat([], add_generation_prompt=False) == "[]!"
    (tmp_path / "tokenizer.json").rename(folder / "tokenizer.json")
    assert isinstance(source.open_checkpoint(folder).tokenizer(), Tokenizer)


def test_the_hub_is_asked_for_the_vocabulary() -> None:
    assert "rwkv_vocab*.txt" in source._HUB_FILES


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_of_documents_is_found_again_by_its_characters(
    pth: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    texts = [*TEXTS.values(), "", "a <|endoftext|> b"]
    folder = tmp_path / "run"
    tokenize = {"unit_tokens": 64, "separator": "eos"}
    recipe = make_recipe(texts=texts, model=pth, tokenize=tokenize, capture={"hooks": ["blocks.1.hook_resid_post"]})
    forebay.run(recipe, folder, device="cpu")
    run = forebay.open_run(folder)
    tokens = run["tokens"].to_dataset().compute()
    ids, starts, ends = (tokens[name].values.tolist() for name in ("token_id", "char_start", "char_end"))
    bounds = [*run["documents"]["start"].values.tolist(), len(ids)]
    for text, first, beyond in zip(texts, bounds[:-1], bounds[1:], strict=True):
        assert ids[first:beyond] == [*theirs().encode(text), 0]
        spans = list(zip(starts[first:beyond], ends[first:beyond], strict=True))
        assert spans == [*spans_by_hand(text, ids[first : beyond - 1]), (len(text), len(text))]
    read_back = TokenTexts(folder)
    assert read_back.tokenizer.to_str() == data().to_str()
    assert [read_back[i] for i in (0, 129, 33)] == ["<|endoftext|>", "\ufffd", " "]
    lens, shown = lens_of_run(
        folder, document=2, sequence=None, positions=":", layers=None, hook="hook_resid_post", partial=False
    )
    assert "".join(shown[int(i)] for i in lens["token_id"].values) == texts[2]


def test_the_vocabulary_is_part_of_what_determines_the_tokens(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "small.pth", 6, d_vocab=270)
    write_vocabulary(tmp_path, small())
    stage = Tokenize(model=ModelSource(source=str(path)), context=16)
    before = stage.identity()
    assert stage.identity() == before
    write_vocabulary(tmp_path, [*small(), "261 'it' 2"])
    assert stage.identity() != before
