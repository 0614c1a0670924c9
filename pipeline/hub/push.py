"""A run goes to the hub: what is new of it, in commits that begin with its recipe and end with its records."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...stores.errors import FingerprintMismatch, HubError
from ...stores.html import html_table
from ...stores.ledger import read_json
from ...stores.places import Place, place
from ..progress import Progress, Quiet
from .card import card, is_ours
from .contents import Contents, contents
from .names import CARD, RECIPE
from .remote import Commit, Listed, Repository, no_bars, refusals

PER_COMMIT = 500
"""Files in one commit: the hub takes no commit of many thousands."""
HASHERS = 4


@dataclass(frozen=True)
class Pushed:
    """What a push did: `n_file` files of `nbytes` are the run, `n_sent` of `sent_bytes` had to be sent for it.

    `commit` is the one that holds the run, by which others may pin it; None where nothing was sent because that was not
    asked for (`dry_run`). `revision` is the branch, None for the main one.
    """

    repository: str
    revision: str | None
    commit: str | None
    url: str | None
    n_file: int
    nbytes: int
    n_sent: int
    sent_bytes: int

    def _repr_html_(self) -> str:
        facts = {
            "repository": self.repository,
            "branch": self.revision,
            "commit": self.commit,
            "page": self.url,
            "files": f"{self.n_file:,}, {self.nbytes:,} bytes",
            "sent": f"{self.n_sent:,}, {self.sent_bytes:,} bytes",
        }
        return html_table("Pushed", facts)


def push_to_hub(
    run: str | os.PathLike[str] | Place,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Publishes a whole run as the dataset repository `owner/name` of the Hugging Face hub, which is made if there is
    none, on the branch `revision` (by default the main one).

    All of the run is read again first. What goes there is its recipe, tokenizer, stores, records, indexes and trained
    dictionaries; only what is new is sent, and nothing is deleted there. A push that was killed goes on. A dataset card
    is written unless there is one of somebody's. With `dry_run` the hub is not asked.

    The login is huggingface_hub's (HF_TOKEN, or `hf auth login`). IncompleteStore for a run that is not finished,
    CorruptStore for one that does not verify, UnsafePath for one with links in it, FingerprintMismatch where another
    run lies in the repository, HubError for what the hub refuses, and for `private` where the repository is public.
    """
    progress, there = progress or Quiet(), Repository(repository)
    with no_bars(), progress:
        found = contents(place(run), progress.said)
        if dry_run:
            return Pushed(repository, revision, None, None, len(found.files), found.nbytes, 0, 0)
        commit = _made(there, private, revision)
        _require_same_run(found, there, commit)
        new = _new(found, commit)
        text = _new_card(found, there, commit)
        sha = _send(there, found, new, text, revision, progress) or commit.sha
        _require_whole(found, there.at(sha), there.name)
    sent = sum(found.files[path] for path in new)
    return Pushed(repository, revision, sha, there.url(sha), len(found.files), found.nbytes, len(new), sent)


def _made(there: Repository, private: bool, revision: str | None) -> Commit:
    """The repository, and the branch of it, made if it is not there."""
    with refusals(there.name, revision):
        there.api.create_repo(there.name, repo_type="dataset", private=private or None, exist_ok=True)
        if revision is not None:
            there.api.create_branch(there.name, branch=revision, repo_type="dataset", exist_ok=True)
    commit = there.at(revision)
    if private and commit.private is False:
        raise HubError(
            f"{there.name} is there already, and public: nothing was sent. Make it private in its settings on the hub, "
            "push to another repository, or leave --private out"
        )
    return commit


def _require_same_run(found: Contents, there: Repository, commit: Commit) -> None:
    """FingerprintMismatch if what lies there is neither this run nor what it was before it grew."""
    if RECIPE not in commit.files:
        return
    standing = _fetched(there, commit, RECIPE)
    own = {
        store.name: {store.fingerprint, *(one["fingerprint"] for one in store.header.grown_from)}
        for store in found.stores
    }
    if any(fingerprint not in own[step] for step, fingerprint in standing.items() if step in own) or not standing:
        raise FingerprintMismatch(
            f"another run lies in {there.name}: nothing was sent. Push to another repository, or to another branch of "
            "it with --revision"
        )


def _fetched(there: Repository, commit: Commit, path: str) -> dict[str, Any]:
    """The fingerprints by step that a recipe on the hub names."""
    with tempfile.TemporaryDirectory() as folder:
        said = read_json(there.fetch(commit, path, Path(folder))).get("fingerprints")
    return said if isinstance(said, dict) else {}


def _new(found: Contents, commit: Commit) -> list[str]:
    """The files that are not there, or otherwise, in the order of `found`."""

    def is_new(path: str) -> bool:
        listed = commit.files.get(path)
        return listed is None or not listed.agrees(found.run / path)

    with ThreadPoolExecutor(HASHERS, "hash") as pool:
        return [path for path, new in zip(found.files, pool.map(is_new, found.files), strict=True) if new]


def _new_card(found: Contents, there: Repository, commit: Commit) -> str | None:
    """The card that is to be put; None where one of somebody's is, or the same."""
    text = card(found, there.name)
    if CARD not in commit.files:
        return text
    with tempfile.TemporaryDirectory() as folder:
        standing = there.fetch(commit, CARD, Path(folder)).read_text(encoding="utf-8", errors="replace")
    return text if is_ours(standing) and standing != text else None


def _send(
    there: Repository,
    found: Contents,
    new: list[str],
    text: str | None,
    revision: str | None,
    progress: Progress,
) -> str | None:
    """Sends files and card, and gives the last commit; None if there was nothing to send."""
    from huggingface_hub import CommitOperationAdd

    sha, done, total = None, 0, sum(found.files[path] for path in new)
    sources: list[tuple[str, str | bytes]] = [(path, str(found.run / path)) for path in new]
    sources += [(CARD, text.encode())] if text is not None else []
    for at in range(0, len(sources), PER_COMMIT):
        batch = sources[at : at + PER_COMMIT]
        progress.working("bytes", done, total, f"to {there.name}")
        with refusals(there.name, revision):
            sha = there.api.create_commit(
                there.name,
                [CommitOperationAdd(path, source) for path, source in batch],
                repo_type="dataset",
                revision=revision,
                commit_message=f"forebay push: {len(batch):,} files",
            ).oid
        done += sum(found.files.get(path, 0) for path, _ in batch)
    return sha


def _require_whole(found: Contents, commit: Commit, name: str) -> None:
    """HubError unless a commit lists every file of the run, with as many bytes."""
    listed: Mapping[str, Listed] = commit.files
    missing = [path for path, size in found.files.items() if path not in listed or listed[path].nbytes != size]
    if missing:
        raise HubError(
            f"{name} lacks {len(missing):,} files of the run after all was sent, {missing[0]} among them. A .gitignore "
            "there keeps files out: take it away, or push again if somebody else pushed meanwhile"
        )
