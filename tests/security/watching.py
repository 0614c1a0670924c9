"""Watches what a piece of code does to the machine: calls that start programs or reach the network, writes outside."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MARK = "FOREIGN_TEXT"
"""What hostile inputs hold where they would have something run; it is never compiled."""

NEVER = {
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "subprocess.Popen", "pty.spawn"),
    *("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "ftplib.connect"),
}
CHANGES = {
    *("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod"),
    *("os.chown", "shutil.rmtree", "shutil.move", "shutil.copyfile", "os.utime"),
}
_OWN = {"xarray", "forebay", "numpy", "dask", "pandas", "pathlib", "functools", "collections", "cloudpickle"}
_ARITHMETIC = (
    *("abs", "neg", "pos", "invert", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "matmul", "getitem"),
    *("and_", "or_", "xor", "lshift", "rshift", "eq", "ne", "lt", "le", "gt", "ge", "not_"),
)
_BELOW = {"os.remove", "os.rmdir", "os.mkdir", "os.rename"}
RUNS = {"compile", "exec"}


@dataclass
class Watch:
    """What was seen while it was on: `wrong` calls, one line each, and the paths that were `opened`."""

    allowed: tuple[str, ...]
    wrong: list[str] = field(default_factory=list)
    opened: set[str] = field(default_factory=set)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in NEVER or (event == "pickle.find_class" and not _own(*arguments)):
            self.wrong.append(f"{event} {arguments!r:.300}")
        elif event == "open":
            path, mode, flags = arguments
            self.opened.add(str(path))
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes and not isinstance(path, int) and not self._inside(path):
                self.wrong.append(f"open {path!r} {mode} {flags}")
        elif event in CHANGES:
            if any(not self._inside(path, resolved=True) for path in _paths_of(event, arguments)):
                self.wrong.append(f"{event} {arguments!r:.300}")
        elif event in RUNS and MARK in _text_of(arguments[0]):
            self.wrong.append(f"{event} {arguments!r:.300}")

    def _inside(self, path: Any, resolved: bool = False) -> bool:
        """Whether a path lies in an allowed folder, wherever links in it lead."""
        real = os.fsdecode(path) if resolved else os.path.realpath(os.fsdecode(path))
        return real == os.devnull or any(real == one or real.startswith(one + os.sep) for one in self.allowed)


def _paths_of(event: str, arguments: tuple[Any, ...]) -> Iterator[Path]:
    """What a call names, folders resolved, and not what a link at its end leads to: that is what would be changed."""
    paths = [os.fsdecode(one) for one in arguments if isinstance(one, str | bytes | os.PathLike)]
    folders = [one for one in arguments[len(paths) :] if isinstance(one, int)]
    folders = folders[-1:] if event == "os.mkdir" else folders
    for n, path in enumerate(paths):
        # shutil.rmtree names what it removes below an open folder
        below = folders[n] if event in _BELOW and n < len(folders) else -1
        whole = Path(os.readlink(f"/proc/self/fd/{below}"), path) if below >= 0 else Path(path)
        yield Path(os.path.realpath(whole.parent), whole.name)


def _own(module: str, name: str) -> bool:
    """Whether a class is one that dask looks up where it copies a graph of this very process."""
    plain = {("builtins", "slice"), ("builtins", "range"), *(("_operator", one) for one in _ARITHMETIC)}
    return module.partition(".")[0] in _OWN or (module, name) in plain


def _text_of(code: Any) -> str:
    if isinstance(code, bytes):
        return code.decode("utf-8", "replace")
    return code if isinstance(code, str) else " ".join(map(str, getattr(code, "co_consts", ())))


_watching: list[Watch] = []
_inside = threading.local()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and not getattr(_inside, "on", False):
        _inside.on = True
        try:
            for watch in _watching:
                watch.see(event, arguments)
        finally:
            _inside.on = False


_added: list[bool] = []


@contextmanager
def watched(*allowed: Path) -> Iterator[Watch]:
    """Fails at its end if anything in it, in any thread, started a program, reached for the network, looked up a class
    of a pickle, compiled foreign text, or changed anything outside the folders `allowed`.
    """
    if not _added:  # a hook stays until the process ends; without a watch it does nothing
        sys.addaudithook(_hook)
        _added.append(True)
    watch = Watch(tuple(os.path.realpath(folder) for folder in allowed))
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.remove(watch)
    assert watch.wrong == [], watch.wrong


def contents(folder: Path) -> dict[str, bytes | str]:
    """All that lies in a folder: files with their bytes, links with where they lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }
