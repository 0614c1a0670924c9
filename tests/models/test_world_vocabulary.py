"""The World tokenizer at rest: its vocabulary's file, its JSON, the models that have it, and a run with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

import forebay
from forebay.pipeline.report.lens import TokenTexts, lens_of_run
from forebay.stages.models import source, world_files
from forebay.stages.models.checkpoint import SpecialTokens
from forebay.stages.models.errors import ModelError
from forebay.stages.models.text import tokenizer_of
from forebay.stages.models.tokenizer_json import read_tokenizer
from forebay.stages.models.world import WorldTokenizer, load_world_tokenizer
from forebay.stages.tokenize import ModelSource, Tokenize

from .rwkv_models import write_pth
from .world_texts import TEXTS, data, spans_by_hand, theirs, world

MakeRecipe = Callable[..., Path]

# ── at rest ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_its_json_makes_it_again(tmp_path: Path) -> None:
    made = load_world_tokenizer(n_ids=65_540, end="<s>")
    path = tmp_path / "tokenizer.json"
    path.write_text(made.to_str(pretty=True), encoding="utf-8")
    for again in (read_tokenizer(path), read_tokenizer(made.to_str())):
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
    template = "{{ eos_token }}{{ messages[0].content }}!"
    said = {"added_tokens_decoder": {"0": {"content": "<s>", "special": True}}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    vocabulary = source.open_checkpoint(folder).vocabulary()
    assert vocabulary.build().encode("it's<s>").ids == [258, 0]
    assert (vocabulary.special, vocabulary.add_bos, vocabulary.stops) == (SpecialTokens(eos=0), False, (0,))
    assert tokenizer_of(vocabulary).chat([{"role": "user", "content": "é"}]) == "<s>é!"
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
    assert "".join(shown[int(i)] for i in lens["token_id"].values) == texts[2] + "<|endoftext|>"


def test_the_vocabulary_is_part_of_what_determines_the_tokens(tmp_path: Path) -> None:
    path = write_pth(tmp_path / "small.pth", 6, d_vocab=270)
    write_vocabulary(tmp_path, small())
    stage = Tokenize(model=ModelSource(source=str(path)), context=16)
    before = stage.identity()
    assert stage.identity() == before
    write_vocabulary(tmp_path, [*small(), "261 'it' 2"])
    assert stage.identity() != before
