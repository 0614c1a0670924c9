"""Where a dictionary lies: a folder or a file on this machine, or a folder or a file of a hub repository."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from ..models.errors import nearest
from ..models.hub import hub_refusals
from .errors import DictionaryError

_HUB = re.compile(r"(?:hf://)?(?P<repo>[\w.-]+/[\w.-]+)(?P<inside>(?:/[\w.=+-]+)*)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A folder that holds a dictionary, here or on the hub. `source` is what the user named; `repo` the hub's
    repository, or None; `inside` the path in it, or on this machine the whole path. `file` is the one file that was
    named, where it was a file. `names` lists the files below the folder, `fetch` gives one as a local path. A place
    can be pickled, and fetches wherever it is unpickled.
    """

    source: str
    repo: str | None
    revision: str | None
    inside: PurePosixPath
    file: str | None
    names: tuple[str, ...]
    fetch: Callable[[str], Path]

    def require(self, name: str) -> Path:
        """Fetch a file that must be there. DictionaryError names it and the nearest one."""
        if name not in self.names:
            raise DictionaryError(f"{self.source} has no {name}.{nearest(name, self.names)}")
        return self.fetch(name)

    @property
    def text(self) -> str:
        """Repository and path, or the path on this machine, with forward slashes: for what their names say."""
        return "/".join(part for part in (self.repo, str(self.inside), self.file) if part and part != ".")


def find(source: str | Path, revision: str | None = None) -> Place:
    """The place of a source: an existing folder or file, or `org/repo[/folder or file][@revision]`, also with hf://.

    A hub repository is listed, not fetched; without a network its cached files are what is there. DictionaryError if
    there is no such thing.
    """
    text = str(source)
    path = None if text.startswith("hf://") else _existing(text)
    if path is not None:
        if revision is not None:
            raise DictionaryError(f"{text} is on this machine and has no revisions; {revision!r} was asked for")
        # links are not followed: the hub's cache is made of them, to files whose names say nothing
        return _on_disk(text, Path(os.path.abspath(path)))
    match = _HUB.fullmatch(text)
    if match is None or text.startswith((".", "/")):
        raise DictionaryError(f"there is no file or folder {text!r}, nor is it a hub reference, 'org/repo/folder'")
    if revision is not None and match["revision"] is not None:
        raise DictionaryError(f"{text!r} names a revision, and revision={revision!r} was given besides")
    inside = PurePosixPath(match["inside"].lstrip("/") or ".")
    if ".." in inside.parts:
        raise DictionaryError(f"{text!r} leads out of its repository")
    return _on_hub(text, match["repo"], match["revision"] or revision, inside)


def _existing(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, RuntimeError):  # a name too long for a file, or no such user's home
        return None


def _on_disk(source: str, path: Path) -> Place:
    folder, file = (path.parent, path.name) if path.is_file() else (path, None)
    names = (file,) if file else tuple(_below(folder))
    return Place(
        source=source,
        repo=None,
        revision=None,
        inside=PurePosixPath(folder.as_posix()),
        file=file,
        names=names,
        fetch=partial(Path, folder),
    )


def _on_hub(source: str, repo: str, revision: str | None, inside: PurePosixPath) -> Place:
    names: tuple[str, ...]
    listed, commit = _listing(repo, revision)
    here = "" if str(inside) == "." else f"{inside}/"
    if str(inside) in listed:
        folder, file, names = inside.parent, inside.name, (inside.name,)
    else:
        folder, file = inside, None
        names = tuple(name.removeprefix(here) for name in listed if name.startswith(here))
    if not names:
        folders = {"/".join(name.split("/")[:-1]) for name in listed}
        raise DictionaryError(f"{repo} has no folder or file {str(inside)!r}.{nearest(str(inside), folders)}")
    fetch = partial(_from_hub, repo, commit or revision, folder)
    return Place(source=source, repo=repo, revision=commit, inside=folder, file=file, names=names, fetch=fetch)


def _from_hub(repo: str, revision: str | None, folder: PurePosixPath, name: str) -> Path:
    with hub_refusals(repo, revision, DictionaryError):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo, str(folder / name), revision=revision))


def _listing(repo: str, revision: str | None) -> tuple[tuple[str, ...], str | None]:
    """The files of a repository and its commit; of what is cached, where the hub cannot be reached."""
    with hub_refusals(repo, revision, DictionaryError):
        from huggingface_hub import HfApi, errors, snapshot_download

        try:
            info = HfApi().model_info(repo, revision=revision)
        except errors.HfHubHTTPError:
            raise
        except Exception:  # no connection: each version of huggingface_hub lets another client's error out
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            return tuple(_below(folder)), folder.name
    return tuple(sorted(file.rfilename for file in info.siblings or ())), info.sha


def _below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
