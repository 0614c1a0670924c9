"""The shell completes commands, options, and the names that a run has, from listings and without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

import forebay
from forebay.pipeline.cli import main
from forebay.pipeline.deleting import deletable


def offered(*words: str | Path) -> list[str]:
    """What is offered for the last word, as click's scripts ask for it."""
    *before, last = map(str, words)
    return [item.value for item in ShellComplete(main, {}, "forebay", "_X").get_completions(before, last)]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, texts: list[str], request: pytest.FixtureRequest
) -> Path:
    """A run with two captures of other kinds, a dictionary that it trains, and its features and their index."""
    folder = tmp_path_factory.mktemp("completion")
    (folder / "corpus.txt").write_text("\n".join(texts))
    (folder / "recipe.toml").write_text(
        f"""
        [corpus]
        files = ["corpus.txt"]
        [model]
        source = "{tiny_model}"
        [tokenize]
        context = 16
        [capture]
        hooks = ["blocks.*.hook_resid_post", "hook_embed"]
        [capture.mlp]
        hooks = ["blocks.1.mlp.hook_post"]
        [train.sae]
        hook = "blocks.1.hook_resid_post"
        n_feature = 20
        k = 3
        batch = 32
        n_batch = 3
        [encode.sae]
        """
    )
    assert forebay.run(folder / "recipe.toml", folder / "run", device="cpu").code == 0
    return folder / "run"


def test_commands_and_options_complete() -> None:
    assert offered("ver") == ["verify"]
    assert offered("co") == ["concat", "completion"]
    assert offered("lens", "x", "--la") == ["--layers"]
    assert offered("completion", "") == ["bash", "zsh", "fish"]
    assert offered("run", "r.toml", "--device", "c") == ["cpu", "cuda"]


def test_the_steps_of_runs_complete_also_in_a_list(run: Path) -> None:
    steps = sorted(step.name for step in run.iterdir() if (step / "data.zarr").is_dir())
    assert steps == ["activations", "activations-mlp", "features-sae", "tokens"]
    assert offered("export", run, "out", "--steps", "") == steps
    assert offered("export", run, "out", "--steps", "tokens,act") == ["tokens,activations", "tokens,activations-mlp"]
    assert offered("concat", "out", run, run, "--steps", "tokens,t") == []
    assert offered("concat", "out", run, run, "--steps", "fe") == ["features-sae"]


def test_dictionaries_and_parts_complete_as_the_commands_take_them(run: Path) -> None:
    assert offered("features", run, "") == offered("index", run, "s") == ["sae"]
    assert sorted(offered("delete", run, "")) == sorted(deletable(run))
    assert offered("delete", run, "dict") == ["dictionary-sae"]
    assert offered("train", run.parent / "recipe.toml", "") == ["sae"]


def test_hook_points_of_a_run_and_of_models_complete(run: Path) -> None:
    assert sorted(offered("lens", run, "--hook", "")) == ["hook_embed", "hook_resid_post", "mlp.hook_post"]
    kept = offered("export", run, "out", "--hooks", "blocks.")
    assert sorted(kept) == ["blocks.*.hook_resid_post", "blocks.*.mlp.hook_post"]
    assert offered("export", run, "out", "--hooks", "hook") == ["hook_embed"]
    assert "blocks.*.attn.hook_pattern" in offered("hooks", "model", "blocks.*.attn")
    assert offered("hooks", "model", "hook_log") == ["hook_logits"]


@pytest.mark.parametrize("where", ["nowhere", "s3://bucket/run", "a-file"])
def test_what_is_no_run_on_this_machine_completes_to_nothing(where: str, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("")
    place = where if "://" in where else tmp_path / where
    assert offered("delete", place, "") == []
    assert offered("lens", place, "--hook", "") == []
    assert offered("features", place, "") == []
    assert offered("export", place, "out", "--steps", "") == []
    assert offered("train", place, "") == []


def test_names_that_would_steer_a_terminal_are_not_offered(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "tokens", tmp_path / "tokens")
    for name in ("\x1b[31mtokens", "$(id)", "a;b", "-rf", ".hidden"):
        shutil.copytree(run / "tokens", tmp_path / name)
    assert offered("delete", tmp_path, "") == ["tokens"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_forebay_and_is_valid(
    shell: str, start_forebay: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start_forebay("completion", shell)
    script, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert f"_FOREBAY_COMPLETE={shell}_complete" in script
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([program, "-n", tmp_path / "script"], check=True)


def test_bash_completes_through_the_script(run: Path, tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    (tmp_path / "forebay").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m forebay "$@"\n')
    (tmp_path / "forebay").chmod(0o755)
    ask = (
        'eval "$(forebay completion bash)"; COMP_WORDS=(forebay delete "$1" feat); COMP_CWORD=3; '
        '_forebay_completion forebay; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = [bash, "-c", ask, "bash", str(run)]
    assert subprocess.check_output(command, text=True, env={**os.environ, "PATH": path}) == "features-sae\n"


def test_completing_names_of_a_run_loads_no_torch(run: Path) -> None:
    words = {"COMP_WORDS": f"forebay lens {run} --hook hook", "COMP_CWORD": "4", "_FOREBAY_COMPLETE": "bash_complete"}
    command = [sys.executable, "-X", "importtime", "-m", "forebay"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **words})
    assert sorted(found.stdout.split()) == ["plain,hook_embed", "plain,hook_resid_post"]
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in found.stderr.splitlines() if "|" in line}
    assert not loaded & {"torch", "xarray", "zarr", "dask", "numpy", "pydantic", "rich"}
