"""A recipe is its file, one to one: what it says is kept, what it cannot mean is refused by file, table and key."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.pipeline.recipe import Recipe, parse, read_recipe
from forebay.stages.capture import Capture
from forebay.stages.tokenize import Tokenize
from forebay.stores.errors import RecipeError

WHOLE = """
[corpus]
files = ["a.jsonl", "more/*.jsonl.zst"]
text_key = "body"
id_key = "name"

[model]
source = "org/name"
revision = "main"

[tokenize]
context = 128
layout = "documents"
long_documents = "split"
prepend_bos = true
separator = "<|end|>"
parse_special = true
unit_tokens = 1024

[capture]
hooks = ["hook_embed", "blocks.{0,2}.hook_resid_post"]
dtype = "bfloat16"
store_dtype = "float16"
batch = 3
state_positions = [0, -1]
unit_tokens = 512
threads = 4
compile = true
compression = "zstd"
"""
LEAST = """
[corpus]
files = ["a.jsonl"]
[model]
source = "org/name"
[tokenize]
context = 128
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "my-recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: Path) -> str:
    """The message of the refusal, which begins with the file as it was named."""
    with pytest.raises(RecipeError) as refused:
        read_recipe(path)
    assert str(path) in str(refused.value)
    return str(refused.value)


# ── what a recipe says ───────────────────────────────────────────────────────────────────────────────────────────────


def test_every_key_of_the_file_is_the_field_of_that_name(write: Callable[[str], Path], tmp_path: Path) -> None:
    recipe, said = read_recipe(write(WHOLE)), tomllib.loads(WHOLE)
    assert recipe.name == "my-recipe"
    tokenize, capture = recipe.stages
    assert isinstance(tokenize, Tokenize)
    assert isinstance(capture, Capture)
    specs = {"corpus": recipe.corpus, "model": recipe.model, "tokenize": tokenize, "capture": capture}
    for table, keys in said.items():
        for key, value in keys.items():
            found = getattr(specs[table], key)
            assert found == (tuple(value) if isinstance(value, list) else value), f"{table}.{key}"
            assert type(found) is type(value) or isinstance(value, list)
    assert tokenize.model == capture.model == recipe.model
    assert recipe.corpus.root == str(tmp_path)


def test_the_file_above_has_every_key_there_is(write: Callable[[str], Path]) -> None:
    said = read_recipe(write(WHOLE)).to_json()
    del said["name"], said["corpus"]["root"]
    assert said == tomllib.loads(WHOLE)


def test_tables_may_stand_in_any_order_and_steps_run_in_theirs(write: Callable[[str], Path]) -> None:
    turned = "\n".join(reversed(WHOLE.strip().split("\n\n")))
    assert list(tomllib.loads(turned)) == ["capture", "tokenize", "model", "corpus"]
    assert read_recipe(write(turned)) == read_recipe(write(WHOLE))


@pytest.mark.parametrize("text", [WHOLE, LEAST, LEAST + '[capture]\nhooks = ["hook_embed"]\n'])
def test_the_json_of_a_recipe_gives_the_recipe_back(write: Callable[[str], Path], text: str) -> None:
    recipe = read_recipe(write(text))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_the_json_of_a_recipe_is_complete(write: Callable[[str], Path]) -> None:
    """Defaults of today stand in it, so that those of tomorrow cannot change what an old run means."""
    said = read_recipe(write(LEAST + '[capture]\nhooks = ["hook_embed"]\n')).to_json()
    whole = read_recipe(write(WHOLE)).to_json()
    assert {table: set(keys) for table, keys in said.items() if table != "name"} == {
        table: set(keys) for table, keys in whole.items() if table != "name"
    }


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
COUNT = st.integers(1, 10**6)
TABLES = st.fixed_dictionaries(
    {
        "corpus": st.fixed_dictionaries(
            {"files": st.lists(TEXT, max_size=3)}, optional={"text_key": TEXT, "id_key": TEXT}
        ),
        "model": st.fixed_dictionaries({"source": TEXT.map(lambda text: f"no/{text}")}, optional={"revision": TEXT}),
        "tokenize": st.fixed_dictionaries(
            {"context": COUNT},
            optional={
                "layout": st.sampled_from(["packed", "documents"]),
                "long_documents": st.sampled_from(["refuse", "split", "truncate"]),
                "prepend_bos": st.sampled_from([True, False, "auto"]),
                "separator": TEXT,
                "parse_special": st.booleans(),
                "unit_tokens": COUNT,
            },
        ),
    },
    optional={
        "capture": st.fixed_dictionaries(
            {"hooks": st.lists(TEXT, max_size=3)},
            optional={
                "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
                "store_dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
                "batch": COUNT,
                "threads": st.integers(1, 4096),
                "unit_tokens": COUNT,
                "compression": st.sampled_from(["none", "zstd"]),
            },
        )
    },
)


@given(TABLES)
def test_any_recipe_survives_its_json_with_every_value_it_named(tables: dict[str, dict[str, Any]]) -> None:
    recipe = parse(tables, name="any", folder=Path("/nowhere"), file="any.toml")
    said = recipe.to_json()
    assert Recipe.from_json(json.loads(json.dumps(said))) == recipe
    for table, keys in tables.items():
        assert {key: said[table][key] for key in keys} == keys


# ── paths ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_that_lies_beside_the_recipe_is_that_folder_wherever_one_stands(
    write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = read_recipe(write(LEAST.replace("org/name", "models/tiny")))
    assert recipe.model.source == str(tmp_path / "models" / "tiny")
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_paths_are_the_recipes_own_when_it_is_named_by_a_relative_path(
    write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    write(LEAST.replace("org/name", "tiny"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = read_recipe("../my-recipe.toml")
    assert recipe.corpus.root == str(tmp_path)
    assert [path.read_text() for path in recipe.corpus.paths()] == ['{"text": "x"}\n']
    assert Path(recipe.model.source).samefile(tmp_path / "tiny")


def test_what_is_not_beside_the_recipe_stays_a_hub_id(write: Callable[[str], Path]) -> None:
    assert read_recipe(write(LEAST)).model.source == "org/name"


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LEAST + "[captrue]\nbatch = 3\n", "[captrue] is not a table of a recipe. Did you mean 'capture'?"),
        (LEAST + "[zebra]\n", "[zebra] is not a table of a recipe. Known: corpus, model, tokenize, capture"),
        (LEAST + "contxt = 3\n", "[tokenize] has no key 'contxt'. Did you mean 'context'?"),
        (LEAST + "zebra = 3\n", "[tokenize] has no key 'zebra'. Known: context, layout, long_documents"),
        (LEAST + '[capture]\nhook = ["a"]\n', "[capture] has no key 'hook'. Did you mean 'hooks'?"),
        (LEAST.replace("files", "flies"), "[corpus] has no key 'flies'. Did you mean 'files'?"),
        (LEAST.replace("source", "name"), "[model] has no key 'name'. Known: source, revision"),
    ],
)
def test_an_unknown_table_or_key_is_refused_with_the_nearest(
    write: Callable[[str], Path], text: str, said: str
) -> None:
    assert said in refusal(write(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LEAST + 'model = "another"\n', "[tokenize] has no key 'model'"),
        (LEAST + '[capture]\nhooks = []\nmodel = "another"\n', "[capture] has no key 'model'"),
        (LEAST.replace("[model]", 'root = "/"\n[model]'), "[corpus] has no key 'root'"),
    ],
)
def test_a_field_that_the_recipe_fills_in_itself_is_no_key(write: Callable[[str], Path], text: str, said: str) -> None:
    """Else it would be passed over in silence, or mean something that the file does not show."""
    message = refusal(write(text))
    assert said in message
    assert message.split("Known:")[1].split(", ").count(said.split("'")[1]) == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('context = "128"', "context: Input should be a valid integer, not '128'"),
        ("context = 128.0", "context: Input should be a valid integer, not 128.0"),
        ("context = true", "context: Input should be a valid integer, not True"),
        ("context = nan", "context: Input should be a valid integer, not nan"),
        ("context = [128]", "context: Input should be a valid integer, not [128]"),
        ("context = 2024-02-29", "[tokenize] holds a value that a recipe cannot"),
        ('context = 8\nlayout = "pack"', "layout: Input should be 'packed' or 'documents', not 'pack'"),
        ('context = 8\nprepend_bos = "yes"', "Input should be 'auto', not 'yes'"),
        ("context = 8\nprepend_bos = 1", "Input should be a valid boolean, not 1"),
        ('context = 8\n[capture]\nhooks = "hook_embed"', "hooks: Input should be a valid array, not 'hook_embed'"),
        ("context = 8\n[capture]\nhooks = [1]", "hooks.0: Input should be a valid string, not 1"),
        ('context = 8\n[capture]\nhooks = []\nstore_dtype = "float8"', "store_dtype: Input should be 'float32', 'bf"),
        ("context = 8\n[capture]\nhooks = []\nbatch = 2.5", "batch: Input should be a valid integer, not 2.5"),
        ("", "context: Field required"),
    ],
)
def test_a_value_of_another_type_is_refused_and_never_converted(
    write: Callable[[str], Path], line: str, said: str
) -> None:
    message = refusal(write(LEAST.replace("context = 128", line)))
    assert said in message
    assert "[capture]" in message if "capture" in line else "[tokenize]" in message


def test_all_that_is_wrong_with_a_table_is_said_at_once(write: Callable[[str], Path]) -> None:
    message = refusal(write(LEAST.replace("context = 128", 'context = "a"\nlayout = "b"\nparse_special = "c"')))
    assert all(f"  {key}: " in message for key in ("context", "layout", "parse_special"))


@pytest.mark.parametrize("table", ["corpus", "model", "tokenize"])
def test_a_missing_table_is_named(write: Callable[[str], Path], table: str) -> None:
    whole = tomllib.loads(LEAST)
    text = "\n".join(
        f"[{name}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in keys.items())
        for name, keys in whole.items()
        if name != table
    )
    assert f"has no table [{table}]. A recipe needs [corpus], [model] and [tokenize]" in refusal(write(text))


def test_a_key_where_a_table_belongs_says_how_a_table_is_written(write: Callable[[str], Path]) -> None:
    assert "capture is a table: write [capture] and its keys below" in refusal(write("capture = 3\n" + LEAST))


def test_what_is_not_toml_is_refused_with_the_place(write: Callable[[str], Path]) -> None:
    message = refusal(write(LEAST + "broken =\n"))
    assert "is not valid TOML" in message
    assert f"line {len(LEAST.splitlines()) + 1}" in message


def test_what_is_not_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(LEAST.encode() + "# é".encode("latin-1"))
    assert f"is not UTF-8 at byte {len(LEAST.encode()) + 2}" in refusal(path)


def test_a_file_that_is_not_there_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    assert "there is no recipe at" in refusal(tmp_path / "none.toml")
    assert "is a folder; a recipe is a TOML file" in refusal(tmp_path)
