"""Paths in object stores: the part of pathlib's interface that forebay uses, over obstore, and how a store may fail.

A store has objects and no folders: a folder is what names have in common, is there when something lies in it, and needs
neither making nor making durable. An object is put whole or not at all, and a put that has been answered is durable.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from types import ModuleType
from typing import Any, TypeVar

from .errors import ForebayError, SchemaError, StorageError, nearest

SCHEMES = ("s3", "gs", "az", "memory")
TIMEOUT = "FOREBAY_STORAGE_TIMEOUT"
"""Environment variable: seconds after which a request without its whole answer is given up. By default 120."""
RETRY = "FOREBAY_STORAGE_RETRY"
"""Environment variable: seconds for which a request that fails is sent again, with growing pauses. By default 180."""
_SECONDS = {TIMEOUT: 120.0, RETRY: 180.0}
_UNKNOWN = re.compile("credential|169.254|must be specified")
"""What is said where it is not known who asks; 169.254… is where machines in a cloud are told who they are."""
_PAUSE = 0.1
_PASSING = ("timed out", "response body", "connection", "error sending", "status code: 5", "status code: 429")
_OPTIONS = {
    "s3": (
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), AWS_REGION, and for a store that is not "
        "Amazon's AWS_ENDPOINT_URL"
    ),
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_TOKEN",
    "memory": "nothing",
}
_memories: dict[str, Any] = {}
_started: dict[str, int] = {}

T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class ObjectPath:
    """An object, or what objects have in common at the start of their names: `s3://bucket/name`. Picklable: a URL.

    Everything may raise StorageError: the store does not answer, or refuses. FileNotFoundError where there is no such
    object.
    """

    url: str

    def __post_init__(self) -> None:
        scheme, found, rest = self.url.partition("://")
        if not found or scheme not in SCHEMES:
            raise SchemaError(
                f"{self.url} is no address that forebay knows.{nearest(scheme, SCHEMES)} Known: a folder of this "
                f"machine, file:///…, {', '.join(f'{one}://…' for one in SCHEMES)}"
            )
        parts = rest.rstrip("/").split("/")
        if any(part in ("", ".", "..") for part in parts) or "?" in rest or "#" in rest:
            raise SchemaError(f"{self.url} is not of the form {scheme}://NAME/FOLDER/…, with something in each place")
        object.__setattr__(self, "url", f"{scheme}://{'/'.join(parts)}")

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.url}/{name}")

    def __fspath__(self) -> str:
        raise SchemaError(
            f"{self.url} lies in an object store, and this needs a folder of this machine: copy what it is about "
            "there first, or choose another folder"
        )

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def root(self) -> str:
        """The bucket or container, as a URL."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.partition('/')[0]}"

    @property
    def key(self) -> str:
        """The name within the bucket."""
        return self.url[len(self.root) + 1 :]

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return self if self.url == self.root else ObjectPath(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> ObjectPath:
        return self.parent / name

    def resolve(self) -> ObjectPath:
        """Itself: there are no links, and nothing is relative."""
        return self

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: names need no folders."""

    @property
    def bucket(self) -> Any:
        """The obstore of the bucket, one a process. StorageError where obstore is missing or settings do not do."""
        return self._bucket(1000)

    def _bucket(self, retries: int) -> Any:
        times = seconds_of(TIMEOUT), seconds_of(RETRY)
        return _bucket(self.root, os.getpid(), *times, _endpoint(self.scheme), retries)

    def exists(self) -> bool:
        """Whether there is such an object, or any below."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is such an object: one request."""
        try:
            return self.size() >= 0
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        """Whether there is any object below."""
        return self._ask(lambda obstore: bool(obstore.list(self.bucket, self.key or None, chunk_size=1).__next__()), ())

    def iterdir(self) -> Iterator[ObjectPath]:
        """What lies directly below, objects and folders."""
        return (self / name for name in self.names())

    def names(self) -> list[str]:
        """Names of what lies directly below: one listing, a request for every thousand."""
        found = self._ask(lambda obstore: obstore.list_with_delimiter(self.bucket, self.key or None))
        below = [*found["common_prefixes"], *(one["path"] for one in found["objects"])]
        return [path.rpartition("/")[2] for path in below]

    def sizes(self) -> dict[str, int]:
        """Bytes of every object below, by the rest of its name: one listing, a request for every thousand."""
        found = self._ask(lambda obstore: obstore.list(self.bucket, self.key or None).collect())
        start = len(self.key) + 1 if self.key else 0
        return {one["path"][start:]: one["size"] for one in found}

    def size(self) -> int:
        """Bytes of the object."""
        return int(self._ask(lambda obstore: obstore.head(self.bucket, self.key))["size"])

    def changed(self) -> int:
        """When the object was put, in nanoseconds since 1970; stores know whole seconds or milliseconds."""
        found = self._ask(lambda obstore: obstore.head(self.bucket, self.key))
        return int(found["last_modified"].timestamp() * 1e9)

    def read_bytes(self) -> bytes:
        return self._ask(lambda obstore: bytes(obstore.get(self.bucket, self.key).bytes()))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read_range(self, start: int, length: int) -> bytes:
        """Bytes from `start` on; fewer than `length` where the object ends before."""
        return self._ask(
            lambda obstore: bytes(obstore.get_range(self.bucket, self.key, start=start, length=length)), b""
        )

    def read_end(self, length: int) -> bytes:
        """The last bytes of the object; fewer than `length` where it is shorter."""
        if self.scheme == "az":  # which has no such request
            return self.read_range(max(0, self.size() - length), length)
        options = {"range": {"suffix": length}}
        return self._ask(lambda obstore: bytes(obstore.get(self.bucket, self.key, options=options).bytes()), b"")

    def digest(self, new: Callable[[], Any]) -> tuple[int, str]:
        """Bytes and hex digits of the object, by a `new` hash of hashlib's kind; in one request, as it streams by."""

        def read(obstore: ModuleType) -> tuple[int, str]:
            found, size = new(), 0
            for part in obstore.get(self.bucket, self.key).stream(min_chunk_size=2**20):
                found.update(part)
                size += len(part)
            return size, found.hexdigest()

        return self._ask(read)

    def put(self, data: bytes) -> None:
        """Puts the object whole, in one request, over any that is there."""
        self._ask(lambda obstore: obstore.put(self.bucket, self.key, data, use_multipart=False))

    def put_new(self, data: bytes) -> bool:
        """Puts the object unless there is one, and says whether `data` is what is there through this call. Where an
        answer was lost on its way, bytes that are equal are taken for this call's: put something of one's own.

        A store without conditional puts gets a plain one, if nothing is there when it is looked for.
        """
        began = time.monotonic()
        while True:
            try:
                self._ask(lambda obstore: self._put_new(obstore, data))
                return True
            except FileExistsError as error:
                try:
                    return self.read_bytes() == data
                except FileNotFoundError:
                    # S3 refuses both of two puts at the same moment; or it was deleted since.
                    if time.monotonic() - began > seconds_of(RETRY):
                        raise StorageError(f"{self.url} is neither there nor can be put: {error}") from None
                    time.sleep(_PAUSE)

    def _put_new(self, obstore: ModuleType, data: bytes) -> None:
        """One conditional put. It is not sent again here: a store that has none answers by an error of the server."""
        try:
            obstore.put(self._bucket(0), self.key, data, mode="create")
        except Exception as error:
            if "NotSupported" not in type(error).__name__ and "status code: 501" not in str(error):
                raise
            if self.is_file():
                raise FileExistsError(self.url) from error
            self.put(data)

    def unlink(self, missing_ok: bool = False) -> None:
        """Deletes the object. Without `missing_ok` it costs a look for it first, for stores do not say."""
        if not missing_ok:
            self.size()
        try:
            self._ask(lambda obstore: obstore.delete(self.bucket, self.key))
        except FileNotFoundError:
            return

    def delete_below(self) -> None:
        """Deletes every object below, a request for every thousand."""
        keys = [f"{self.key}/{name}" for name in self.sizes()]
        if keys:
            self._ask(lambda obstore: obstore.delete(self.bucket, keys))

    def _ask(self, ask: Callable[[ModuleType], T], past_the_end: Any = None) -> T:
        """The answer to a request; `past_the_end`, if given, where it is about bytes or names behind the last one."""
        obstore, began, pause = _obstore(self.url), time.monotonic(), _PAUSE
        while True:
            try:
                return ask(obstore)
            except StopIteration:
                return False  # type: ignore[return-value]
            except (ForebayError, FileExistsError):
                raise
            except Exception as error:
                if past_the_end is not None and self.ends_before(error):
                    return past_the_end  # type: ignore[no-any-return]
                failed = self.failure(error)
                if not _passes(error) or time.monotonic() - began > seconds_of(RETRY):
                    raise failed from None
                time.sleep(pause)
                pause = min(2 * pause, 15.0, seconds_of(RETRY) / 4)

    def ends_before(self, error: Exception) -> bool:
        """Whether what went wrong is that a range was asked for behind the last byte."""
        said = str(error)
        if "status code: 416" in said or "Wanted range starting at" in said:
            return True
        return "non-partial response" in said and self.size() == 0  # as some servers answer for an empty object

    def failure(self, error: Exception) -> Exception:
        """What an error of obstore is to forebay: FileNotFoundError, FileExistsError, or StorageError with advice."""
        said = " ".join(str(error).partition("\n\nDebug source")[0].split())
        said = re.sub(r"\?\S+", "", said)  # what follows an address may be a signature that opens it
        kind = type(error).__name__
        if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in said:
            return FileNotFoundError(f"{self.url} is not there")
        if kind == "AlreadyExistsError":
            return FileExistsError(f"{self.url} is there already")
        if "NoSuchBucket" in said or "BucketNotFound" in said or "ContainerNotFound" in said:
            advice = f"There is no {self.root}: make it first, or correct the name"
        elif kind in ("PermissionDeniedError", "UnauthenticatedError") or _UNKNOWN.search(said):
            advice = f"Look at the credentials: {_OPTIONS[self.scheme]}"
        else:
            advice = (
                "What is recorded is safe: run again when the store answers. Requests are given up after "
                f"{seconds_of(TIMEOUT):g} s and repeated for {seconds_of(RETRY):g} s ({TIMEOUT}, {RETRY}); settings of "
                f"the store are {_OPTIONS[self.scheme]}"
            )
        return StorageError(f"{self.url}: {said[:400]}. {advice}")


def seconds_of(name: str) -> float:
    """One of the two times, from the environment or by default. StorageError for what is no time."""
    text = os.environ.get(name, "")
    try:
        seconds = float(text) if text else _SECONDS[name]
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise StorageError(f"{name} = {text!r} is not a number of seconds, as in {name}=60")
    return seconds


def _passes(error: Exception) -> bool:
    """Whether a failure that obstore does not repeat by itself may pass: of a body on its way, or of a conditional put,
    which must not be sent twice by one who does not look what is there then.
    """
    said = str(error).lower()
    return type(error).__name__ == "GenericError" and any(word in said for word in _PASSING)


def _obstore(url: str) -> ModuleType:
    try:
        import obstore
    except ImportError as error:
        raise StorageError(f"{url} needs the package obstore: pip install 'forebay[cloud]'") from error
    return obstore


def _endpoint(scheme: str) -> str:
    """The address of the server, where it is not the usual one: a process may speak to several in turn."""
    if scheme != "s3":
        return ""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if endpoint.startswith("http://") and not _allows_http():
        raise StorageError(
            f"{endpoint} is not encrypted: anyone on the way may read and change what is sent. Set AWS_ALLOW_HTTP=true "
            "to use it nevertheless, as for a server on this machine"
        )
    return endpoint


def _allows_http() -> bool:
    return os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")


@lru_cache(maxsize=16)
def _bucket(root: str, pid: int, timeout: float, retry: float, endpoint: str, retries: int) -> Any:
    if _started.setdefault("pid", pid) != pid:
        raise StorageError(
            f"{root} was used before this process was forked, which object stores do not survive: start processes by "
            "multiprocessing's 'spawn' or 'forkserver', or use the store in them only"
        )
    store = _obstore(root).store
    if root.startswith("memory://"):
        return _memories.setdefault(root, store.MemoryStore())
    pauses = {"max_backoff": timedelta(seconds=min(15.0, retry / 4))}
    settings: dict[str, Any] = {
        "client_options": {"timeout": f"{timeout:g}s", "connect_timeout": f"{min(10.0, timeout):g}s"},
        "retry_config": {"max_retries": retries, "retry_timeout": timedelta(seconds=retry), "backoff": pauses},
    }
    if _allows_http():
        settings["client_options"]["allow_http"] = True
    if endpoint:
        settings["endpoint"] = endpoint
    try:
        return store.from_url(root, **settings)
    except Exception as error:
        raise ObjectPath(root).failure(error) from None
