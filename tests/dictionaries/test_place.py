"""A dictionary is found by a folder, a file or a hub reference, and nothing outside of what was named is read."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from forebay.stages.dictionaries.errors import DictionaryError
from forebay.stages.dictionaries.place import find

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = ("README.md", "layer_3/cfg.json", "layer_3/sae.safetensors", "layer_3/width_1k/params.npz", "top.npz")


def write_files(folder: Path) -> Path:
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub as a download leaves it, and no network."""
    repository = tmp_path / "hub" / "models--some.one--saes_1-v2"
    write_files(repository / "snapshots" / COMMIT)
    (repository / "refs" / "refs" / "pr").mkdir(parents=True)
    for name in ("main", "v2", "refs/pr/1"):
        (repository / "refs" / name).write_text(COMMIT)
    listing = {name: {"size": len(name), "blob_id": "0"} for name in FILES}
    (repository / "trees").mkdir()
    (repository / "trees" / f"{COMMIT}.json").write_text(json.dumps({"entries": listing}))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return repository


# ── on this machine ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_is_listed_with_what_lies_below_it(tmp_path: Path) -> None:
    place = find(write_files(tmp_path / "saes"))
    assert (place.repo, place.revision, place.file) == (None, None, None)
    assert place.names == FILES
    assert place.source == str(tmp_path / "saes")
    assert place.require("layer_3/cfg.json").read_text() == "layer_3/cfg.json"
    assert place.text == (tmp_path / "saes").as_posix()


def test_a_file_is_alone_in_its_place(tmp_path: Path) -> None:
    place = find(str(write_files(tmp_path) / "layer_3" / "sae.safetensors"))
    assert (place.file, place.names) == ("sae.safetensors", ("sae.safetensors",))
    assert place.inside == PurePosixPath(tmp_path / "layer_3")
    assert place.require("sae.safetensors").read_text() == "layer_3/sae.safetensors"
    assert place.text == (tmp_path / "layer_3/sae.safetensors").as_posix()
    with pytest.raises(DictionaryError, match=r"has no cfg\.json"):
        place.require("cfg.json")


def test_a_relative_path_stays_where_it_was_when_the_working_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path / "some" / "saes")
    monkeypatch.chdir(tmp_path)
    place = find("some/saes")
    monkeypatch.chdir("/")
    assert place.require("top.npz").read_text() == "top.npz"


def test_a_path_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "saes")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/saes").names == FILES


def test_a_folder_here_goes_before_a_repository_of_the_same_name(hub_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "some.one" / "saes_1-v2").mkdir(parents=True)
    assert find("some.one/saes_1-v2").repo is None
    assert find("hf://some.one/saes_1-v2").repo == "some.one/saes_1-v2"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "there is no file or folder ''"),
        ("./missing", "there is no file or folder './missing', nor is it a hub reference, 'org/repo/folder'"),
        ("../org/missing", "there is no file or folder"),
        ("/no/such/folder", "there is no file or folder '/no/such/folder'"),
        ("missing", "there is no file or folder 'missing'"),
        ("org/repo/a folder", "there is no file or folder 'org/repo/a folder'"),
        ("~no-such-user/saes", "there is no file or folder '~no-such-user/saes'"),
        ("x" * 5000, "there is no file or folder 'xxx"),
        ("hf://org", "there is no file or folder 'hf://org'"),
    ],
)
def test_what_is_not_there_is_said(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DictionaryError, match=message):
        find(source)


def test_what_is_on_this_machine_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match="is on this machine and has no revisions; 'main' was asked for"):
        find(tmp_path, "main")


def test_a_file_that_is_missing_is_named_with_the_nearest(tmp_path: Path) -> None:
    place = find(write_files(tmp_path))
    with pytest.raises(DictionaryError, match=r"has no layer_3/config\.json\. Did you mean 'layer_3/cfg\.json'\?"):
        place.require("layer_3/config.json")


@pytest.mark.parametrize("name", ["../secret", "layer_3/../../secret", "/etc/hostname"])
def test_nothing_outside_of_the_folder_can_be_required(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    place = find(write_files(tmp_path / "saes"))
    with pytest.raises(DictionaryError, match=f"has no {name}"):
        place.require(name)


# ── on the hub ───────────────────────────────────────────────────────────────────────────────────────────────────────

REFERENCES: dict[str, tuple[str, str | None, str, str | None, tuple[str, ...]]] = {
    "a repository": ("some.one/saes_1-v2", None, ".", None, FILES),
    "with hf": ("hf://some.one/saes_1-v2", None, ".", None, FILES),
    "a folder": (
        "some.one/saes_1-v2/layer_3",
        None,
        "layer_3",
        None,
        ("cfg.json", "sae.safetensors", "width_1k/params.npz"),
    ),
    "a folder in a folder": ("some.one/saes_1-v2/layer_3/width_1k", None, "layer_3/width_1k", None, ("params.npz",)),
    "a file": (
        "some.one/saes_1-v2/layer_3/width_1k/params.npz",
        None,
        "layer_3/width_1k",
        "params.npz",
        ("params.npz",),
    ),
    "a file at the top": ("some.one/saes_1-v2/top.npz", None, ".", "top.npz", ("top.npz",)),
    "a tag": ("hf://some.one/saes_1-v2/top.npz@v2", None, ".", "top.npz", ("top.npz",)),
    "a commit": (f"some.one/saes_1-v2@{COMMIT}", None, ".", None, FILES),
    "a reference": ("some.one/saes_1-v2@refs/pr/1", None, ".", None, FILES),
    "a revision beside it": ("some.one/saes_1-v2", "v2", ".", None, FILES),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_a_hub_reference_is_found_in_the_cache_with_its_commit(case: str, hub_cache: Path) -> None:
    source, revision, inside, file, names = REFERENCES[case]
    place = find(source, revision)
    assert (place.source, place.repo, place.revision) == (source, "some.one/saes_1-v2", COMMIT)
    assert (str(place.inside), place.file, place.names) == (inside, file, names)
    for name in names:
        expected = name if inside == "." else f"{inside}/{name}"
        assert place.require(name).read_text() == expected
    assert place.text == "/".join(part for part in ("some.one/saes_1-v2", inside, file) if part and part != ".")


@pytest.mark.parametrize("where", ["a folder", "hub"])
def test_a_place_can_be_pickled(where: str, hub_cache: Path, tmp_path: Path) -> None:
    found = find("some.one/saes_1-v2/layer_3" if where == "hub" else write_files(tmp_path / "saes") / "layer_3")
    place = pickle.loads(pickle.dumps(found))  # noqa: S301 - it is our own
    assert place.require("cfg.json").read_text() == "layer_3/cfg.json"


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("some.one/saes_1-v2@v2", "main", "names a revision, and revision='main' was given besides"),
        ("some.one/saes_1-v2/../other", None, "leads out of its repository"),
        ("hf://some.one/saes_1-v2/layer_3/../../..", None, "leads out of its repository"),
        ("hf://../saes", None, r"\.\./saes cannot be fetched from the hub"),
        ("hf://some.one/..", None, r"some\.one/\.\. cannot be fetched from the hub"),
        ("some.one/saes_1-v2@v3", None, "some.one/saes_1-v2 at revision v3 is not in the local cache"),
        ("some.one/else", None, "some.one/else is not in the local cache and the hub cannot be reached"),
        ("some.one/saes_1-v2/layer_4", None, "has no folder or file 'layer_4'. Did you mean 'layer_3'?"),
        ("some.one/saes_1-v2/layer", None, "has no folder or file 'layer'"),
    ],
)
def test_references_that_lead_nowhere_are_refused(
    source: str, revision: str | None, message: str, hub_cache: Path
) -> None:
    with pytest.raises(DictionaryError, match=message.replace("?", r"\?")):
        find(source, revision)


def test_a_listing_of_the_hub_is_taken_and_every_file_fetched_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fetched later is of the commit that was listed, whatever has been pushed in between."""
    asked: list[tuple[str, str, str | None]] = []

    def model_info(api: object, repo: str, *, revision: str | None = None) -> Any:
        asked.append(("list", repo, revision))
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in reversed(FILES)])

    def download(repo: str, name: str, *, revision: str | None = None) -> str:
        asked.append((repo, name, revision))
        return os.fspath(Path("/fetched") / name)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    place = find("some.one/saes/layer_3@main")
    assert (place.revision, place.names) == (COMMIT, ("cfg.json", "sae.safetensors", "width_1k/params.npz"))
    assert asked == [("list", "some.one/saes", "main")]
    assert place.require("width_1k/params.npz") == Path("/fetched/layer_3/width_1k/params.npz")
    assert asked[1:] == [("some.one/saes", "layer_3/width_1k/params.npz", COMMIT)]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "GatedRepoError",
            "some.one/else at revision v2 is gated: accept its terms at https://huggingface.co/some.one/else",
        ),
        ("RepositoryNotFoundError", "the hub has no model 'some.one/else', or it is private"),
        ("RevisionNotFoundError", "some.one/else has no revision 'v2' on the hub"),
    ],
)
def test_answers_of_the_hub_are_explained(error: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    kind: type[Exception] = getattr(huggingface_hub.errors, error)

    def refuse(*given: object, **settings: object) -> NoReturn:
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(DictionaryError, match=message):
        find("some.one/else@v2")


def test_without_a_connection_the_cache_is_what_is_there(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the client that the hub's library uses says that there is none."""
    refusals: list[Callable[[], Exception]] = [lambda: OSError("no route"), lambda: RuntimeError("closed")]
    for refusal in refusals:

        def refuse(*given: object, make: Callable[[], Exception] = refusal, **settings: object) -> NoReturn:
            raise make()

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
        assert find("some.one/saes_1-v2").names == FILES
