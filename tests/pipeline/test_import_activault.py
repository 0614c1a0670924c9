"""activault's files as runs: the same bits under the hook points that they are of, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import forebay
from forebay.pipeline.audit import audit
from forebay.pipeline.cli import main
from forebay.stages.models.errors import HookError
from forebay.stores.errors import FingerprintMismatch, SchemaError
from forebay.stores.store import Store

from ..stored import data
from .foreign_caches import Ending, uuid, write_activault

ROWS, CONTEXT, WIDTH = (3, 0, 2, 1), 5, 6
"""Sequences of each file: the last one is shorter, one holds nothing."""
JOBS = ("9", "9", "9", "10")
POST, HIGHER, PRE = "models.layers.1.mlp.post", "models.layers.12.mlp.post", "models.layers.1.mlp.pre"
ATTENTION = "models.layers.1.self_attn.pre"


def states(seed: int, dtype: torch.dtype, rows: tuple[int, ...] = ROWS) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(n, CONTEXT, WIDTH, generator=random).to(dtype) for n in rows]


def token_ids(rows: tuple[int, ...] = ROWS) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, 300, (n, CONTEXT), generator=random) for n in rows]


HOOKS = {
    POST: states(1, torch.bfloat16),
    HIGHER: states(2, torch.bfloat16),
    PRE: states(3, torch.float16),
    ATTENTION: states(4, torch.float32),
}
RENAME = {ATTENTION: "blocks.1.hook_resid_pre"}


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_activault(tmp_path_factory.mktemp("vault") / "vault", HOOKS, token_ids(), jobs=JOBS)


@pytest.fixture(scope="module")
def run(vault: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "run"
    tokenizer = tiny_model / "tokenizer.json"
    assert forebay.from_activault(vault, folder, rename=RENAME, tokenizer=tokenizer, unit_tokens=10).code == 0
    return folder


def test_activations_are_those_of_the_files(run: Path) -> None:
    tree = forebay.open_run(run)
    expected = {name: torch.cat(files).reshape(-1, WIDTH) for name, files in HOOKS.items()}
    out = tree["activations/mlp.hook_out/value"]
    assert out.layer.values.tolist() == [1, 12]
    assert out.dims == ("layer", "token", "d_model")
    for found, name in (
        (out.sel(layer=1), POST),
        (out.sel(layer=12), HIGHER),
        (tree["activations/mlp.hook_in/value"].sel(layer=1), PRE),
        (tree["activations/hook_resid_pre/value"].sel(layer=1), ATTENTION),
    ):
        np.testing.assert_array_equal(found.values, expected[name].to(torch.float32).numpy())
        assert found.attrs["dtype"] == str(expected[name].dtype).removeprefix("torch.")
    ids = torch.cat(token_ids()).reshape(-1).numpy()
    np.testing.assert_array_equal(out.token_id, ids)
    np.testing.assert_array_equal(out.position, np.tile(np.arange(CONTEXT), 6))


def test_a_sequence_is_called_after_its_file_and_files_are_in_the_order_of_job_and_number(run: Path) -> None:
    documents = forebay.open_run(run)["documents/id"].values.tolist()
    assert documents == [f"{uuid(n)}:{row}" for n, rows in enumerate(ROWS) for row in range(rows)]


def test_it_works_as_any_run(run: Path, tmp_path: Path) -> None:
    assert audit(run) == []
    for command in (["status", run], ["verify", run], ["export", run, tmp_path / "part", "--layers", "12"]):
        found = CliRunner().invoke(main, list(map(str, command)))
        assert found.exit_code == 0, found.output
    tree = forebay.open_run(run)
    batches = list(tree.batches("blocks.12.mlp.hook_out", batch=8, skip_positions=0, drop_last=False))
    found = np.concatenate([np.asarray(one) for one in batches])
    expected = torch.cat(HOOKS[HIGHER]).reshape(-1, WIDTH).float().numpy()
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, expected.tolist()))
    moments = forebay.moments(tree["activations/mlp.hook_out"], skip_positions=0)
    np.testing.assert_allclose(moments["mean"].sel(layer=12), expected.mean(0, dtype=np.float64), rtol=1e-5, atol=1e-6)
    ids = [int(one) for one in tree["tokens/token_id"].values[:3]]
    assert len(tree.to_str_tokens(ids)) == 3


def test_the_run_says_where_it_comes_from(run: Path, vault: Path) -> None:
    provenance = Store.open(run / "activations").header.provenance
    assert provenance["model"] == {"source": "org/model", "revision": None}
    assert provenance["determines"]["parameters"]["hooks"][ATTENTION] == "blocks.1.hook_resid_pre"
    assert provenance["imported"]["config"]["metadata"][POST]["d_in"] == WIDTH
    files = provenance["determines"]["source"]["files"]
    assert set(files) == {
        path.relative_to(vault).as_posix()
        for path in vault.rglob("*")
        if path.name != "statistics.json" and path.is_file()
    }
    statistics = Store.open(run / "activations").ledger.record(0)["statistics"]["mlp.hook_out"]
    first = HOOKS[HIGHER][0][:2].float()
    assert statistics["abs_max"][1] == first.abs().max()
    assert statistics["square_sum"][1] == pytest.approx(float(first.double().square().sum()), rel=1e-5)


def test_one_sequence_of_one_token_is_a_run(tmp_path: Path) -> None:
    one = torch.arange(3.0).reshape(1, 1, 3)
    vault = write_activault(tmp_path / "vault", {POST: [one]}, [torch.tensor([[7]])])
    assert forebay.from_activault(vault, tmp_path / "run").code == 0
    found = forebay.open_run(tmp_path / "run")["activations/mlp.hook_out/value"]
    assert found.values.tolist() == [[[0.0, 1.0, 2.0]]]
    assert found.token_id.values.tolist() == [7]


def test_an_import_that_ended_goes_on_to_the_same_bytes(
    run: Path, vault: Path, tiny_model: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"rename": RENAME, "tokenizer": tiny_model / "tokenizer.json", "unit_tokens": 10}
    with pytest.raises(KeyboardInterrupt):
        forebay.from_activault(vault, tmp_path / "run", progress=Ending(4), **settings)
    torn = tmp_path / "run/activations/data.zarr/mlp.hook_out/value/c/0/1/0"
    torn.parent.mkdir()
    torn.write_bytes(b"half")
    assert forebay.from_activault(vault, tmp_path / "run", **settings).code == 0
    assert data(tmp_path / "run") == data(run)
    with pytest.raises(FingerprintMismatch, match="imported with other settings"):
        forebay.from_activault(vault, tmp_path / "run", hooks=[POST])


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────

Change = Callable[[Path], object]


def said(hook: str, **values: Any) -> Change:
    """A change of what a hook's metadata.json says."""

    def apply(vault: Path) -> None:
        path = vault / hook / "metadata.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


def kept(hook: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """A change of what a hook's first file holds."""

    def apply(vault: Path) -> None:
        path = vault / hook / f"{uuid(0)}--1_0.saved.pt"
        held = torch.load(path, weights_only=True)
        change(held)
        torch.save(held, path)

    return apply


def put(key: str, where: Any, value: float) -> Callable[[dict[str, Any]], None]:
    def apply(held: dict[str, Any]) -> None:
        held[key][where] = value

    return apply


def renamed(vault: Path) -> None:
    path = vault / POST / f"{uuid(0)}--1_0.saved.pt"
    path.rename(path.with_name(f"{uuid(1)}--7_0.saved.pt"))


def hostile(vault: Path) -> None:
    torch.save({"states": print}, vault / POST / f"{uuid(0)}--1_0.saved.pt")


REFUSED: list[tuple[Change, str]] = [
    (lambda vault: (vault / "cfg.json").unlink(), r"cfg\.json is missing"),
    (lambda vault: (vault / "cfg.json").write_text("{}"), r"cfg\.json does not name the model"),
    (lambda vault: (vault / POST / "metadata.json").unlink(), r"metadata\.json is missing"),
    (said(POST, dtype="__import__('os').abort()"), r"dtype is .* known are torch\.bfloat16, torch\.float16"),
    (said(POST, dtype="torch.float16"), r"states are torch\.float32; metadata\.json says torch\.float16"),
    (said(POST, d_in=7), r"states are \[3, 5, 6\] .* they are \[B, 5, 7\]"),
    (said(POST, d_in=True), r"d_in is True; a number from 1 on"),
    (said(PRE, sequence_length=4), r"sequences of .* tokens, .* they are of different runs"),
    (lambda vault: (vault / PRE / f"{uuid(1)}--2_0.saved.pt").unlink(), r"mlp\.pre has no file .* fetch it, or leave"),
    (lambda vault: (vault / POST / "x.saved.pt").write_bytes(b""), r"not named <uuid>--<n>_<job>\.saved\.pt"),
    (renamed, r"have one uuid"),
    (hostile, r"holds more than tensors; nothing in it was run"),
    (lambda vault: (vault / POST / f"{uuid(0)}--1_0.saved.pt").write_bytes(b"PK\x03\x04"), r"damaged"),
    (kept(POST, lambda held: held.pop("input_ids")), r"is no dict of the tensors states and input_ids"),
    (kept(POST, put("states", (2, 3, 1), float("nan"))), r"states of sequence 2 are NaN or infinite at position 3"),
    (kept(PRE, put("input_ids", (1, 1), 9999)), r"other tokens than .* Import each hook into a run of its own"),
    (kept(PRE, put("input_ids", (1, 1), -100)), r"holds -100 among its tokens"),
    (
        kept(PRE, lambda held: held.update(states=held["states"][:1], input_ids=held["input_ids"][:1])),
        r"has not the 1 sequences of",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda case: case if isinstance(case, str) else "")
def test_what_activault_does_not_write_is_refused_by_name(change: Change, message: str, tmp_path: Path) -> None:
    rows = (3, 2)
    hooks = {name: states(1, torch.float32, rows) for name in (POST, PRE)}
    vault = write_activault(tmp_path / "vault", hooks, token_ids(rows))
    change(vault)
    with pytest.raises(SchemaError, match=message) as refused:
        forebay.from_activault(vault, tmp_path / "run")
    assert "models.layers" in str(refused.value) or "cfg.json" in str(refused.value)


def test_names_that_do_not_say_what_they_hold_are_refused_with_the_reason(vault: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SchemaError, match=r"calls its attention by keyword.*--rename models\.layers\.1\.self_attn\.pre="
    ):
        forebay.from_activault(vault, tmp_path / "run")
    old = write_activault(tmp_path / "old", {"blocks.3.hook_resid_post": HOOKS[POST]}, token_ids())
    with pytest.raises(SchemaError, match="after the final norm"):
        forebay.from_activault(old, tmp_path / "run")
    odd = write_activault(tmp_path / "odd", {"embeddings": HOOKS[POST]}, token_ids())
    with pytest.raises(SchemaError, match="'embeddings' does not say which hook point it holds"):
        forebay.from_activault(odd, tmp_path / "run")
    with pytest.raises(SchemaError, match=r"no hook point 'embedings' to rename\. Did you mean 'embeddings'"):
        forebay.from_activault(odd, tmp_path / "run", rename={"embedings": "hook_embed"})
    with pytest.raises(HookError, match=r"Did you mean 'hook_embed'"):
        forebay.from_activault(odd, tmp_path / "run", rename={"embeddings": "hook_embd"})
    with pytest.raises(SchemaError, match="would both be"):
        forebay.from_activault(vault, tmp_path / "run", hooks=[POST, PRE], rename={PRE: "blocks.1.mlp.hook_out"})
    assert not (tmp_path / "run").exists()
    assert forebay.from_activault(odd, tmp_path / "run", rename={"embeddings": "hook_embed"}).code == 0
    assert forebay.open_run(tmp_path / "run")["activations/hook_embed/value"].dims == ("token", "d_model")


def test_hooks_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    wide = [torch.zeros(n, CONTEXT, WIDTH + 1) for n in ROWS]
    vault = write_activault(tmp_path / "vault", {POST: states(1, torch.float32), PRE: wide}, token_ids())
    with pytest.raises(SchemaError, match=r"is 6 wide \(d_in\), models\.layers\.1\.mlp\.pre is 7"):
        forebay.from_activault(vault, tmp_path / "run")
    mixed = {POST: states(1, torch.float32), HIGHER: states(1, torch.float16)}
    vault = write_activault(tmp_path / "mixed", mixed, token_ids())
    with pytest.raises(SchemaError, match=r"is float32, models\.layers\.12\.mlp\.post is float16"):
        forebay.from_activault(vault, tmp_path / "run")


def test_the_command_does_what_the_function_does(vault: Path, run: Path, tmp_path: Path) -> None:
    arguments = ["import", str(vault), str(tmp_path / "run"), "--format", "activault", "--hooks", POST]
    found = CliRunner().invoke(main, [*arguments, "--hooks", ATTENTION, "--json"])
    assert found.exit_code == 2
    renames = ["--hooks", ATTENTION, "--rename", f"{ATTENTION}=blocks.1.hook_resid_pre"]
    found = CliRunner().invoke(main, [*arguments, *renames, "--model", "mine", "--json"])
    assert found.exit_code == 0, found.output
    assert [step["name"] for step in json.loads(found.stdout)["steps"]] == ["tokens", "activations"]
    assert Store.open(tmp_path / "run/activations").header.provenance["model"]["source"] == "mine"
    refused = CliRunner().invoke(main, [*arguments, "--transcode"])
    assert (refused.exit_code, "are for --format delphi" in refused.output) == (2, True)
