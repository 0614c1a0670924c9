"""A run goes to the hub and comes back bit for bit, checked. The real library speaks to a small hub on loopback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

import forebay
from forebay.pipeline.cli import main
from forebay.stores.errors import (
    CorruptStore,
    DiskFull,
    FingerprintMismatch,
    HubError,
    IncompleteStore,
    SchemaError,
    StoreNotFound,
    UnsafePath,
)

from ..hub_server import OWNER_TOKEN, Hub, Repo, ask, serving
from ..stored import data
from .trained_runs import train_run

NAME = "ada/novels"

# The library's own, where it sends bytes without xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, texts: list[str]) -> Path:
    """A complete run with a trained dictionary, its features and their index."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(texts))
    )
    return train_run(folder, tiny_model, unit_tokens=256)


@pytest.fixture(scope="module")
def run(trained: Path) -> Path:
    """Its tokens and activations alone: half the files."""
    return Path(
        shutil.copytree(trained, trained.parent / "small", ignore=shutil.ignore_patterns("features-*", "dict*"))
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def pushed(run: Path, server: Hub) -> Repo:
    """The repository as one push makes it."""
    server.forget()
    with pytest.MonkeyPatch.context() as patch:
        ask(server, patch)
        forebay.push_to_hub(run, NAME)
    return server.repos[NAME]


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """An empty hub, asked with its owner's token, from a machine that has fetched nothing before."""
    server.forget()
    ask(server, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    return server


@pytest.fixture
def repo(pushed: Repo, hub: Hub) -> Repo:
    """The pushed run, on this test's hub."""
    hub.repos[NAME] = Repo(pushed.private, {sha: dict(files) for sha, files in pushed.commits.items()})
    hub.repos[NAME].branches, hub.repos[NAME].lfs = dict(pushed.branches), set(pushed.lfs)
    return hub.repos[NAME]


def head(repo: Repo, branch: str = "main") -> dict[str, bytes]:
    """The files of a branch."""
    return repo.commits[repo.branches[branch]]


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_run_comes_back_bit_for_bit_and_says_where_it_is_from(hub: Hub, trained: Path, tmp_path: Path) -> None:
    run = trained
    there = forebay.push_to_hub(run, NAME, private=True)
    assert there.commit == hub.repos[NAME].branches["main"]
    assert hub.repos[NAME].private
    assert there.n_sent == there.n_file
    assert there.sent_bytes == there.nbytes
    back = forebay.from_hub(NAME, tmp_path / "back")
    assert (back.commit, back.n_file, back.n_fetched) == (there.commit, there.n_file, there.n_file)
    assert data(back.folder) == data(run)
    assert {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()} - {
        str(p.relative_to(back.folder)) for p in back.folder.rglob("*") if p.is_file()
    } == {"files.json", "dictionaries/sae/checkpoint.safetensors"}
    said = json.loads((back.folder / "pulled.json").read_text())
    assert said == {"commit": there.commit, "endpoint": hub.url, "repository": NAME, "revision": None}
    own, other = forebay.open_run(run), forebay.open_run(back.folder)
    path = "activations/hook_resid_post/value"
    np.testing.assert_array_equal(own[path].values, other[path].values)
    assert other.features("sae").statistics().identical(own.features("sae").statistics())
    assert cli("verify", back.folder).exit_code == 0
    assert there.commit in there._repr_html_()
    assert there.commit in back._repr_html_()


def test_nothing_that_tells_of_the_token_is_sent_or_kept(hub: Hub, run: Path, tmp_path: Path) -> None:
    pushed, pulled = cli("push", run, NAME), cli("pull", NAME, tmp_path / "back")
    assert (pushed.exit_code, pulled.exit_code) == (0, 0), pushed.output + pulled.output
    assert OWNER_TOKEN not in pushed.output + pulled.output
    kept = [path.read_bytes() for path in (tmp_path / "back").rglob("*") if path.is_file()]
    assert not any(OWNER_TOKEN.encode() in one for one in [*kept, *head(hub.repos[NAME]).values()])


def test_a_second_push_sends_what_is_new_only(hub: Hub, repo: Repo, run: Path, tmp_path: Path) -> None:
    again = forebay.push_to_hub(run, NAME)
    assert (again.n_sent, hub.uploaded) == (0, [])
    assert again.commit == repo.branches["main"]
    grown = tmp_path / "run"
    shutil.copytree(run, grown)
    path = grown / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert forebay.push_to_hub(grown, NAME).n_sent == 1
    assert hub.uploaded == ["tokenizer.json", "README.md"]  # which says how many bytes there are
    assert head(repo)["recipe.json"] == (run / "recipe.json").read_bytes()


def test_a_branch_is_made_and_a_commit_pins_what_was_there(hub: Hub, repo: Repo, run: Path, tmp_path: Path) -> None:
    there = forebay.push_to_hub(run, NAME, revision="second")
    assert set(repo.branches) == {"main", "second"}
    repo.commit("main", {"README.md": b"moved on"})
    assert there.commit is not None
    pinned = forebay.from_hub(NAME, tmp_path / "a", revision=there.commit, steps="tokens")
    assert pinned.commit == forebay.from_hub(NAME, tmp_path / "b", revision="second", steps="tokens").commit
    assert data(pinned.folder) == data(tmp_path / "b") == {k: v for k, v in data(run).items() if k[:6] == "tokens"}
    with pytest.raises(SchemaError, match=f"{NAME} holds no run of forebay"):
        forebay.from_hub(NAME, tmp_path / "c")
    with pytest.raises(HubError, match=r"ada/novels has no revision 'third'\. Give a branch"):
        forebay.from_hub(NAME, tmp_path / "c", revision="third")
    assert not (tmp_path / "c").exists()


def test_steps_are_a_part_to_which_another_pull_adds(hub: Hub, repo: Repo, run: Path, tmp_path: Path) -> None:
    part = forebay.from_hub(NAME, tmp_path / "back", steps="tokens")
    assert {path.name for path in part.folder.iterdir()} == {"tokens", "recipe.json", "tokenizer.json", "pulled.json"}
    assert forebay.open_run(part.folder)["tokens"].sizes["token"] > 0
    first = set(hub.downloaded)
    whole = forebay.from_hub(NAME, tmp_path / "back")
    assert data(whole.folder) == data(run)
    assert len(hub.downloaded) == len(first) + whole.n_fetched == len(set(hub.downloaded))
    with pytest.raises(SchemaError, match=r"has no step 'activation'\. Did you mean 'activations'\?"):
        forebay.from_hub(NAME, tmp_path / "more", steps=["activation"])


def test_what_was_damaged_here_is_fetched_again_and_nothing_else(
    hub: Hub, repo: Repo, run: Path, tmp_path: Path
) -> None:
    back = forebay.from_hub(NAME, tmp_path / "back").folder
    hub.downloaded.clear()
    damaged = ["activations/data.zarr/hook_resid_post/value/c/1/1/0", "tokens/data.zarr/documents/start/c/0"]
    for path in damaged:
        changed = bytearray((back / path).read_bytes())
        changed[3] ^= 1
        (back / path).write_bytes(changed)
    gone = "tokens/done/000000.json"
    (back / gone).unlink()
    assert forebay.from_hub(NAME, back).n_fetched == 3
    assert sorted(hub.downloaded) == sorted([*damaged, gone])
    assert data(back) == data(run)


def test_a_killed_pull_goes_on_where_it_was(
    hub: Hub, repo: Repo, run: Path, tmp_path: Path, start_forebay: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, which has its settings from the environment alone. Objects and records come last."""
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    back = tmp_path / "back"
    n_file = forebay.push_to_hub(run, NAME, dry_run=True).n_file
    hub.after = n_file - 8
    process = start_forebay("pull", NAME, back)
    assert hub.held.wait(60), process.communicate()
    process.kill()
    process.wait()
    status = cli("status", back, "--json")
    assert status.exit_code == 0
    assert not json.loads(status.stdout)["complete"]
    assert cli("verify", back).exit_code == 0  # what stands has been checked
    before, hub.after = len(hub.downloaded), None
    assert forebay.from_hub(NAME, back).commit == repo.branches["main"]
    assert len(hub.downloaded) - before <= 16  # what was missing, and what was on its way
    assert data(back) == data(run)
    assert not (back / ".pull").exists()


HOSTILE = [
    "/etc/passwd",
    "../outside",
    "tokens/data.zarr/../../../outside",
    "tokens\\data.zarr\\x",
    "C:/x",
    "tokens/data.zarr/x:stream",
    "tokens/data.zarr/.hidden",
    ".git/config",
    "tokens/data.zarr//c",
    "tokens/data.zarr/a\nb",
    "tokens/data.zarr/\u202ex",
    "tokens/done/0000001.json",
    "activations/done/000000.7.json",
    "claims/train-sae.json",
    "growing.json",
    "pulled.json",
    "evil.py",
    "dictionaries/sae/weights.pt",
    "Tokens/data.zarr/zarr.json",
    "tokens/data.zarr/ZARR.json",
    "tokens/data.zarr/zarr.json/c",
]


def test_a_listing_with_a_name_that_no_run_has_is_refused_before_anything_is_fetched(
    hub: Hub, repo: Repo, tmp_path: Path
) -> None:
    for path in HOSTILE:
        hub.listed_besides[:] = [path]
        with pytest.raises(UnsafePath) as refused:
            forebay.from_hub(NAME, tmp_path / "back")
        assert repr(path) in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    assert hub.downloaded == []


def test_what_lies_beside_a_run_is_passed_over(hub: Hub, repo: Repo, run: Path, tmp_path: Path) -> None:
    head(repo)["LICENSE"] = b"do what you like"
    back = forebay.from_hub(NAME, tmp_path / "back", steps="tokens").folder
    assert not (back / "LICENSE").exists()
    assert not (back / "README.md").exists()
    assert data(back)


def test_bytes_that_are_not_those_that_were_recorded_are_noticed(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    """Whether they change on their way, or whoever owns the repository changed them there."""
    label = "tokens/data.zarr/sequences/start/c/0"
    hub.served[label] = head(repo)[label][:-1] + b"?"
    with pytest.raises(CorruptStore, match=f"{label} of ada/novels came with other bytes than its commit"):
        forebay.from_hub(NAME, tmp_path / "a")
    hub.served.clear()
    shard = "activations/data.zarr/hook_resid_post/value/c/0/0/0"
    head(repo)[shard] = head(repo)[shard][:-1] + b"?"
    with pytest.raises(CorruptStore, match=f"{shard} of ada/novels .* is not what its record says"):
        forebay.from_hub(NAME, tmp_path / "a", steps="activations")
    assert not (tmp_path / "a" / shard).exists()
    assert not (tmp_path / "a/activations/done/000000.json").exists()
    del head(repo)[shard]
    with pytest.raises(CorruptStore, match=f"ada/novels lacks {shard}, which a record there names"):
        forebay.from_hub(NAME, tmp_path / "a", steps="activations")
    head(repo)["activations/done/000099.json"] = b"{}"
    with pytest.raises(CorruptStore, match=r"000099\.json is the record of a unit that activations does not have"):
        forebay.from_hub(NAME, tmp_path / "a", steps="activations")


def test_a_run_that_is_not_whole_there_is_said_to_be_so(hub: Hub, repo: Repo, tmp_path: Path) -> None:
    record = head(repo).pop("activations/done/000001.json")
    with pytest.raises(IncompleteStore, match="is not whole: activations has 2 of 3 units there"):
        forebay.from_hub(NAME, tmp_path / "back", steps="activations")
    head(repo)["activations/done/000001.json"] = record
    assert forebay.from_hub(NAME, tmp_path / "back", steps="activations").n_fetched == 3  # two objects and their record


def test_a_folder_with_something_else_in_it_is_left_alone(hub: Hub, repo: Repo, run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(FingerprintMismatch, match="is not empty and holds no run"):
        forebay.from_hub(NAME, tmp_path / "mine")
    shutil.copytree(run, tmp_path / "other")
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["fingerprints"]["tokens"] = "0" * 64
    (tmp_path / "other/recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(FingerprintMismatch, match="holds another run than ada/novels"):
        forebay.from_hub(NAME, tmp_path / "other")
    assert data(tmp_path / "other") == data(run)
    (tmp_path / "linked").mkdir()
    os.symlink(tmp_path / "mine", tmp_path / "linked/tokens")
    with pytest.raises(UnsafePath, match="is a symbolic link"):
        forebay.from_hub(NAME, tmp_path / "linked")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_a_disk_without_room_is_said_before_anything_is_fetched(
    hub: Hub, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda where: SimpleNamespace(free=10))
    with pytest.raises(DiskFull, match=r"needs [\d,]+ more bytes, and 10 are free\. Choose fewer steps"):
        forebay.from_hub(NAME, tmp_path / "back")
    assert hub.downloaded == []


def test_another_run_is_not_pushed_over_one(hub: Hub, repo: Repo, run: Path) -> None:
    recipe = json.loads(head(repo)["recipe.json"])
    recipe["fingerprints"]["tokens"] = "0" * 64
    head(repo)["recipe.json"] = json.dumps(recipe).encode()
    with pytest.raises(FingerprintMismatch, match="another run lies in ada/novels: nothing was sent"):
        forebay.push_to_hub(run, NAME)
    assert hub.uploaded == []


def test_only_a_whole_and_sound_run_is_pushed(hub: Hub, run: Path, tmp_path: Path) -> None:
    made = tmp_path / "run"
    shutil.copytree(run, made)
    shard = made / "activations/data.zarr/hook_resid_post/value/c/0/0/0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"?")
    with pytest.raises(CorruptStore, match=r"is damaged, and was not pushed:\n.*its bytes have changed"):
        forebay.push_to_hub(made, NAME)
    shard.unlink()
    os.symlink(run / shard.relative_to(made), shard)
    with pytest.raises(UnsafePath, match=r"is a symbolic link, and nothing behind one is published"):
        forebay.push_to_hub(made, NAME)
    shard.unlink()
    shard.write_bytes(whole)
    (made / "activations/done/000002.json").unlink()
    with pytest.raises(IncompleteStore, match=r"is not finished: activations has 2 of 3 units"):
        forebay.push_to_hub(made, NAME)
    with pytest.raises(StoreNotFound, match=r"is no run: it has no recipe\.json"):
        forebay.push_to_hub(tmp_path, NAME)
    with pytest.raises(HubError, match=r"'novels' has no owner: write OWNER/NAME"):
        forebay.push_to_hub(run, "novels")
    assert hub.repos == {}
    assert not hub.requests


def test_a_dry_run_says_what_would_go_there_and_asks_nobody(hub: Hub, run: Path) -> None:
    result = cli("push", run, NAME, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["commit"] is None
    assert said["n_file"] > 40
    assert said["n_sent"] == 0
    assert not hub.requests


def test_what_the_hub_refuses_is_said_with_what_to_do(
    hub: Hub, repo: Repo, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    back = tmp_path / "back"
    with pytest.raises(HubError, match=r"ada/novels is there already, and public: nothing was sent"):
        forebay.push_to_hub(run, NAME, private=True)
    with pytest.raises(HubError, match=r"the hub has no dataset ada/novel, or it is private .*HF_TOKEN"):
        forebay.from_hub("ada/novel", back)
    repo.private = True
    monkeypatch.setenv("HF_TOKEN", "hf_somebodyElse")
    with pytest.raises(HubError, match=r"the hub has no dataset ada/novels, or it is private .*HF_TOKEN"):
        forebay.from_hub(NAME, back)
    with pytest.raises(HubError, match="HF_TOKEN"):
        forebay.push_to_hub(run, NAME)
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    hub.refuse_with = 429
    with pytest.raises(HubError, match=r"too many requests .*run the same command again"):
        forebay.from_hub(NAME, back)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE keeps this process off it"):
        forebay.from_hub(NAME, back)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"the hub cannot be reached for ada/novels .*HF_ENDPOINT"):
        forebay.from_hub(NAME, back)
    assert not back.exists()


def test_the_card_shows_names_of_the_run_as_text_and_keeps_one_that_is_not_ours(
    hub: Hub, repo: Repo, run: Path, tmp_path: Path
) -> None:
    made = tmp_path / "run"
    shutil.copytree(run, made)
    recipe = json.loads((made / "recipe.json").read_text())
    recipe["recipe"]["name"] = "a\n---\nlicense: mit\n<script>x</script> [y](http://z) | \x1b"
    recipe["recipe"]["model"]["source"] = "HuggingFaceTB/SmolLM2-135M"
    (made / "recipe.json").write_text(json.dumps(recipe))
    forebay.push_to_hub(made, NAME)
    text = head(repo)["README.md"].decode()
    _, front, body = text.split("---\n", 2)
    about = yaml.safe_load(front)
    assert (about["library_name"], about["base_model"]) == ("forebay", "HuggingFaceTB/SmolLM2-135M")
    assert "forebay" in about["tags"]
    assert "license" not in about
    assert "<script>" not in text
    assert "[y](" not in text
    assert "\x1b" not in text
    assert f'forebay.from_hub("{NAME}"' in body
    head(repo)["README.md"] = b"# My own words\n"
    forebay.push_to_hub(run, NAME)
    assert head(repo)["README.md"] == b"# My own words\n"


@pytest.mark.slow
def test_a_run_that_has_grown_goes_where_it_was_and_is_pulled_anew(
    hub: Hub, repo: Repo, run: Path, tmp_path: Path
) -> None:
    before = forebay.from_hub(NAME, tmp_path / "before").folder
    grown = Path(shutil.copytree(run, tmp_path / "grown"))
    (tmp_path / "more.jsonl").write_text(json.dumps({"id": "more", "text": "It is a truth. " * 40}) + "\n")
    assert forebay.append(grown, [tmp_path / "more.jsonl"], device="cpu").code == 0
    there = forebay.push_to_hub(grown, NAME)
    assert 0 < there.n_sent < there.n_file
    assert data(forebay.from_hub(NAME, tmp_path / "after").folder) == data(grown)
    with pytest.raises(FingerprintMismatch, match="or what that was before it grew"):
        forebay.from_hub(NAME, before)
    assert data(before) == data(run)
    with pytest.raises(FingerprintMismatch, match="another run lies in ada/novels"):
        forebay.push_to_hub(run, NAME)


def test_a_model_of_a_folder_is_named_without_the_folder(repo: Repo, tiny_model: Path) -> None:
    text = head(repo)["README.md"].decode()
    assert tiny_model.name.replace("-", "\\-") in text
    assert str(tiny_model.parent) not in text
