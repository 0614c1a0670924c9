"""With --json a command prints one object under stable keys, that says what the library says, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import forebay
from forebay.pipeline.cli import main
from forebay.stores.store import Store
from forebay.stores.tree import run_stores

from .trained_runs import train_run

JSON_COMMANDS = ["plan", "run", "append", "concat", "export", "import", "status", "lens", "features", "verify"]
JSON_COMMANDS += ["push", "pull", "hooks", "doctor"]


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def values(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """The object that a command prints; everything of its standard output, in ASCII, with no number that JSON lacks."""
    result = cli(*arguments, "--json")
    assert result.exit_code == code, result.output
    assert result.stdout.isascii()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(result.stdout, parse_constant=refuse)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, texts: list[str]) -> Path:
    """A complete run with a trained dictionary, whose texts hold what no terminal should be sent."""
    folder = tmp_path_factory.mktemp("json")
    lines = [json.dumps({"id": f"doc-{i}", "text": text}) for i, text in enumerate([*texts, "\x1b[31mred \u202e"])]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return train_run(folder, tiny_model, unit_tokens=64)


def test_the_commands_that_a_script_asks_have_the_option() -> None:
    having = [command.name for command in main.each() if any("--json" in one.opts for one in command.params)]
    assert sorted(map(str, having)) == sorted(JSON_COMMANDS)


def test_commands_that_write_a_run_tell_what_they_did(run: Path, tmp_path: Path) -> None:
    again = values("run", run.parent / "recipe.toml", "--to", run, "--device", "cpu")
    assert again["complete"] is True
    assert {step["name"] for step in again["steps"]} == {"tokens", "activations", "features-sae"}
    assert [(step["tokens"], step["left"], step["failed"]) for step in again["steps"]] == [(0, 0, 0)] * 3
    part = values("export", run, tmp_path / "part", "--steps", "tokens,activations", "--documents", "0:1")
    whole = values("concat", tmp_path / "whole", tmp_path / "part", run, "--steps", "tokens,activations")
    for found, folder in ((part, tmp_path / "part"), (whole, tmp_path / "whole")):
        assert found["run"] == str(folder)
        assert [(step["name"], step["tokens"]) for step in found["steps"]] == [
            (store.name, store.schema.n_token) for store in run_stores(folder)
        ]
        assert all(step["nbytes"] > 0 for step in found["steps"])
    code = cli("export", run, tmp_path / "files", "--format", "safetensors", "--json")
    assert code.exit_code == 2
    assert "--json tells of a run that is written" in code.output


def test_hooks_are_those_of_the_model_with_dims_and_shapes(tiny_model: Path) -> None:
    found = values("hooks", tiny_model)
    assert set(found) == {"model", "family", "hook_points"}
    model = forebay.load_model(tiny_model, device="cpu")
    assert [point["name"] for point in found["hook_points"]] == list(map(str, model.spec.points()))
    names = [point["name"] for point in found["hook_points"]]
    out = model.forward([[1, 2, 3, 4, 5]], forebay.HookSpec().capture(*names))
    for point in found["hook_points"]:
        sizes = dict(zip(point["dims"], out[point["name"]].shape, strict=True))
        assert [sizes[dim] if size else None for dim, size in zip(point["dims"], point["shape"], strict=True)] == (
            point["shape"]
        )
    one = values("hooks", tiny_model, "blocks.2.attn.hook_k")["hook_points"]
    assert one == [
        {
            "name": "blocks.2.attn.hook_k",
            "kind": "attn.hook_k",
            "layer": 2,
            "dims": ["sequence", "position", "kv_head", "d_head"],
            "shape": [None, None, 2, 10],
        }
    ]


def test_lens_is_what_logit_lens_gives_token_by_token(run: Path, tiny_model: Path) -> None:
    found = values("lens", run, "--sequence", "3", "--positions", "9:")
    assert set(found) == {"run", "hook", "tokens"}
    tree = forebay.open_run(run)
    data = tree["activations/hook_resid_post"].to_dataset().sel(sequence=3, position=slice(9, None))
    expected = forebay.logit_lens(data, forebay.load_unembedding(tiny_model, device="cpu"), top=1).compute()
    assert len(found["tokens"]) == expected.sizes["token"] == 7
    for i, token in enumerate(found["tokens"]):
        here = expected.isel(token=i)
        assert token["token_id"] == int(here["token_id"])
        assert [token[name] for name in ("sequence", "position")] == [3, 9 + i]
        assert [one["layer"] for one in token["layers"]] == [0, 1]
        for j, one in enumerate(token["layers"]):
            assert set(one) == {"layer", "top_token_id", "top_token", "top_probability", "next_rank"}
            assert one["top_token_id"] == int(here["top_token_id"][j, 0])
            assert one["top_probability"] == pytest.approx(float(here["top_probability"][j, 0]))
            assert one["next_rank"] == (None if i == 6 else int(here["next_rank"][j]))
    followed = zip(found["tokens"], found["tokens"][1:], strict=False)
    assert all((one["next_token_id"], one["next_token"]) == (two["token_id"], two["token"]) for one, two in followed)
    assert (found["tokens"][-1]["next_token_id"], found["tokens"][-1]["next_token"]) == (None, None)


def test_what_no_unit_has_recorded_is_null_in_a_partial_lens(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    store = Store.open(folder / "activations")
    for key in store.ledger.record(1)["objects"]:
        (store.path / key).unlink()
    store.ledger.drop(1)
    (token,) = values("lens", folder, "--partial", "--sequence", "4", "--positions", "2")["tokens"]
    nothing = {"top_token_id": None, "top_token": None, "top_probability": None, "next_rank": None}
    assert token["layers"] == [{"layer": 0, **nothing}, {"layer": 1, **nothing}]


def test_features_are_those_of_the_library(run: Path) -> None:
    found = values("features", run, "sae", "7", "12", "--contexts", "3")
    assert set(found) == {"run", "dictionary", "fit", "n_feature", "n_dead", "n_dense", "features"}
    sae = forebay.open_run(run).features("sae")
    statistics = sae.statistics().compute()
    assert (found["dictionary"], found["n_feature"]) == ("sae", 30)
    assert found["n_dead"] == int(statistics["dead"].sum())
    assert set(found["fit"]) == {"l0", "fvu", "cosine", "n_token", "n_fit", "skip_positions"}
    assert isinstance(found["fit"]["n_token"], int)
    assert found["fit"]["l0"] <= 4
    assert [one["feature"] for one in found["features"]] == [7, 12]
    for one in found["features"]:
        expected = sae.top_contexts(one["feature"], n=3, window=12)
        assert one["firing_rate"] == pytest.approx(float(statistics["firing_rate"].sel(feature=one["feature"])))
        assert [context["value"] for context in one["contexts"]] == pytest.approx(expected["value"].values.tolist())
        for name in ("token", "document", "position", "text_before", "text", "text_after"):
            assert [context[name] for context in one["contexts"]] == expected[name].values.tolist()


def test_verify_says_what_is_whole_and_what_is_not(run: Path, tmp_path: Path) -> None:
    found = values("verify", run)
    n_unit = len(Store.open(run / "activations").schema.grid)
    assert set(found) == {"run", "whole", "steps", "recomputed", "findings"}
    assert (found["whole"], found["findings"], found["recomputed"]) == (True, [], [])
    assert {"name": "activations", "units": n_unit, "recorded": n_unit, "whole": n_unit} in found["steps"]

    folder = shutil.copytree(run, tmp_path / "run")
    os.truncate(folder / "activations/data.zarr/hook_resid_post/value/c/0/2/0", 100)
    result = cli("verify", folder, "--json")
    assert result.exit_code == 1
    assert "Error: 1 units are damaged" in result.stderr
    damaged = json.loads(result.stdout)
    assert damaged["whole"] is False
    assert {"name": "activations", "units": n_unit, "recorded": n_unit, "whole": n_unit - 1} in damaged["steps"]
    (finding,) = damaged["findings"]
    assert (finding["step"], finding["unit"]) == ("activations", 2)
    assert "hook_resid_post/value/c/0/2/0" in finding["said"]


def test_verify_tells_the_units_that_were_computed_again(run: Path) -> None:
    found = values("verify", run, "--recompute", "1", "--device", "cpu")
    assert {"name": "activations", "units": 1, "same": 1} in found["recomputed"]


def test_status_and_plan_are_one_object_too(run: Path) -> None:
    state = values("status", run)
    assert set(state) == {"run", "complete", "steps"}
    assert state["complete"] is True
    planned = values("plan", run.parent / "recipe.toml", "--to", run, "--device", "cpu")
    assert {"folder", "device", "steps", "profile"} <= set(planned)


@pytest.mark.parametrize("command", ["status", "lens", "features", "verify"])
def test_a_refusal_leaves_standard_output_empty(command: str, tmp_path: Path) -> None:
    result = cli(command, tmp_path, "--json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")


def test_text_of_a_corpus_comes_escaped_and_whole(run: Path) -> None:
    """`values` sees to the escaping; what it stands for is what the tokens say."""
    last = int(np.max(forebay.open_run(run)["tokens"]["document"].values))
    tokens = values("lens", run, "--document", str(last), "--positions", ":")["tokens"]
    assert "\x1b[31mred" in "".join(token["token"] for token in tokens)
