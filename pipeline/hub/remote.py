"""A dataset repository of the hub at one commit: what lies there, and how it is fetched. huggingface_hub does the
talking, so that HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean elsewhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ...stores.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class Listed:
    """A file as a commit of the hub lists it: its bytes, and its sha256 or, of small text, the SHA-1 that git takes."""

    path: str
    nbytes: int
    kind: str
    digest: str

    def agrees(self, file: Path) -> bool:
        """Whether a file of this machine has these very bytes. One of another length is not read."""
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            return False
        if size != self.nbytes:
            return False
        found = hashlib.sha256() if self.kind == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with open(file, "rb") as opened:
            while data := opened.read(1 << 20):
                found.update(data)
        return found.hexdigest() == self.digest


@dataclass(frozen=True)
class Commit:
    """A repository as it was at one commit. `private` is None where the hub does not say."""

    sha: str
    private: bool | None
    files: Mapping[str, Listed]


@dataclass(frozen=True)
class Repository:
    """A dataset repository, `owner/name`. Nothing is asked before a method is called; HubError is every refusal."""

    name: str

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise HubError(f"{self.name!r:.199} is no name of a repository on the hub: {error}") from error
        if "/" not in self.name:
            raise HubError(f"{self.name!r} has no owner: write OWNER/NAME, as on the hub's own pages")

    @cached_property
    def api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(library_name="forebay")

    def url(self, commit: str) -> str:
        """The page of a commit's files."""
        return f"{self.api.endpoint}/datasets/{self.name}/tree/{commit}"

    def at(self, revision: str | None) -> Commit:
        """What lies in the repository at a branch, a tag or a commit; None for its main branch. Paths are as the hub
        gives them, unchecked.
        """
        from huggingface_hub.hf_api import RepoFile

        with refusals(self.name, revision):
            about = self.api.dataset_info(self.name, revision=revision)
            sha = about.sha or ""
            if not re.fullmatch(r"[0-9a-f]{40}", sha):
                raise HubError(f"{self.name}: the hub names {sha!r:.99} as its commit, which is none")
            tree = self.api.list_repo_tree(self.name, recursive=True, revision=sha, repo_type="dataset")
            files = [one for one in tree if isinstance(one, RepoFile)]
        found = {
            one.path: Listed(one.path, one.size, "sha256", one.lfs.sha256)
            if one.lfs is not None
            else Listed(one.path, one.size, "git", one.blob_id)
            for one in files
        }
        return Commit(sha, about.private, found)

    def fetch(self, commit: Commit, path: str, into: Path) -> Path:
        """Fetches a file into a folder, below which it lies by its path, and gives it; a part of it that a killed
        process left there is not fetched again. Its bytes are not checked.
        """
        with refusals(self.name, commit.sha):
            return Path(
                self.api.hf_hub_download(self.name, path, repo_type="dataset", revision=commit.sha, local_dir=into)
            )


@contextmanager
def no_bars() -> Iterator[None]:
    """The library's own progress bars, one a file, are not shown meanwhile."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def refusals(name: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises about a repository into HubError, with what to do."""
    from huggingface_hub import errors

    # What the library's own transport raises where there is no answer at all: httpx's or requests', as it may be.
    unanswered = [base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    known: tuple[type[BaseException], ...] = (OSError, ValueError, RuntimeError, *unanswered)
    try:
        yield
    except HubError:
        raise
    except errors.LocalEntryNotFoundError as error:
        raise HubError(_said(name, revision, error.__cause__ or error)) from error
    except known as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the hub's
        cause = error.__cause__ if type(error) is RuntimeError else None  # "error while uploading", and why
        raise HubError(_said(name, revision, cause or error)) from error


def _said(name: str, revision: str | None, error: BaseException) -> str:
    from huggingface_hub import errors

    reached = f"the hub cannot be reached for {name} ({type(error).__name__}). Check the network and HF_ENDPOINT"
    known: tuple[tuple[type[BaseException], str], ...] = (
        (errors.GatedRepoError, f"{name} is gated: accept its terms on its page on the hub, then {LOGIN}"),
        (errors.RevisionNotFoundError, f"{name} has no revision {revision!r}. Give a branch, a tag or a commit of it"),
        (
            errors.RepositoryNotFoundError,
            f"the hub has no dataset {name}, or it is private and this login may not see it: check the spelling, or "
            f"{LOGIN}",
        ),
        (errors.OfflineModeIsEnabled, f"{name} is on the hub, and HF_HUB_OFFLINE keeps this process off it: unset it"),
    )
    for kind, said in known:
        if isinstance(error, kind):
            return said
    if not isinstance(error, errors.HfHubHTTPError):
        answered = isinstance(error, ValueError | RuntimeError | errors.LocalEntryNotFoundError)
        return f"the hub could not do that for {name}: {error}" if answered else reached
    status = error.response.status_code
    return _STATUS.get(status, "the hub answered {status} about {name}: {error}").format(
        name=name, status=status, error=error.server_message or error, login=LOGIN
    )


_STATUS = {
    401: "the hub does not accept this login for {name}: {login}, with a token that may do this",
    403: "this login may not do that in {name} ({error}): {login}, with a token that may write there",
    409: "{name} was changed by somebody else meanwhile ({error}). Run the same command again",
    412: "{name} was changed by somebody else meanwhile ({error}). Run the same command again",
    429: "the hub has had too many requests from here, and still said so after several tries. Wait some minutes and "
    "run the same command again: what is done is kept. A login raises the limit: {login}",
}
