"""A small hub on loopback: the requests that huggingface_hub makes for dataset repositories, over bytes in memory.

The forms are those of the library's own source: repositories, NDJSON commits, the LFS batch, trees in pages, files with
their ETags. Every commit keeps its whole tree, so that old revisions can be read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pytest
from flask import Flask, Response, jsonify, request
from werkzeug.serving import WSGIRequestHandler, make_server

OWNER_TOKEN = "hf_ownersTokenOfTheStandIn"
PAGE = 40


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class Hub:
    """The hub's state. Tests read it, and change what an owner or a thief could."""

    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    uploaded: list[str] = field(default_factory=list)
    downloaded: list[str] = field(default_factory=list)
    listed_besides: list[str] = field(default_factory=list)
    """Paths that every listing has besides, as a hostile repository would."""
    served: dict[str, bytes] = field(default_factory=dict)
    """Bytes that are served in place of those that are listed."""
    refuse_with: int | None = None
    """Status of every answer about a repository."""
    after: int | None = None
    """Files that are served; after so many, a request for one is never answered."""
    held: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def forget(self) -> None:
        """Takes everything away but the address."""
        self.__dict__.update(Hub(url=self.url).__dict__)

    def entry(self, repo: Repo, path: str, data: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_sha(data)}
        if path in repo.lfs:
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found


def refusal(status: int, code: str | None = None, said: str = "no") -> Response:
    headers = {"X-Error-Message": said} | ({"X-Error-Code": code} if code else {})
    return Response(json.dumps({"error": said}), status, headers, mimetype="application/json")


def may(write: bool = False, private: bool = False) -> bool:
    return not (write or private) or request.headers.get("Authorization") == f"Bearer {OWNER_TOKEN}"


def application(hub: Hub) -> Flask:
    app = Flask("hub")

    def found(name: str, write: bool = False) -> Repo | Response:
        if hub.refuse_with is not None:
            return refusal(hub.refuse_with, said="slow down")
        repo = hub.repos.get(name)
        if repo is None or not may(private=repo.private):
            return refusal(401 if request.headers.get("Authorization") is None else 404, "RepoNotFound")
        return repo if may(write=write) else refusal(403, said="you may not write here")

    @app.before_request
    def count() -> None:
        hub.requests[f"{request.method} {request.path.split('/')[1]}"] += 1

    @app.post("/api/repos/create")
    def create() -> Any:
        if not may(write=True):
            return refusal(401, said="Invalid username or password.")
        said = request.get_json()
        name = f"{said['organization']}/{said['name']}"
        assert said["type"] == "dataset"
        if name in hub.repos:
            return jsonify({"url": f"{hub.url}/datasets/{name}", "error": "there"}), 409
        private = said.get("visibility") == "private" or bool(said.get("private"))
        hub.repos[name] = Repo(private)
        hub.repos[name].commit("main", {".gitattributes": b"*.zarr filter=lfs\n"})
        return jsonify({"url": f"{hub.url}/datasets/{name}"})

    @app.post("/api/validate-yaml")
    def validate() -> Any:
        return jsonify({"errors": [], "warnings": []})

    @app.post("/api/datasets/<owner>/<name>/branch/<path:branch>")
    def branch(owner: str, name: str, branch: str) -> Any:
        repo = found(f"{owner}/{name}", write=True)
        if isinstance(repo, Response):
            return repo
        if branch in repo.branches:
            return refusal(409)
        repo.branches[branch] = repo.branches["main"]
        return jsonify({})

    @app.get("/api/datasets/<owner>/<name>")
    @app.get("/api/datasets/<owner>/<name>/revision/<path:revision>")
    def about(owner: str, name: str, revision: str = "main") -> Any:
        repo = found(f"{owner}/{name}")
        if isinstance(repo, Response):
            return repo
        sha = repo.at(revision)
        if sha is None:
            return refusal(404, "RevisionNotFound")
        return jsonify({"id": f"{owner}/{name}", "sha": sha, "private": repo.private, "tags": [], "siblings": []})

    @app.get("/api/datasets/<owner>/<name>/tree/<revision>")
    def tree(owner: str, name: str, revision: str) -> Any:
        repo = found(f"{owner}/{name}")
        if isinstance(repo, Response):
            return repo
        sha = repo.at(unquote(revision))
        if sha is None:
            return refusal(404, "RevisionNotFound")
        files = [hub.entry(repo, path, data) for path, data in sorted(repo.commits[sha].items())]
        files += [{"type": "file", "path": path, "size": 1, "oid": git_sha(b"x")} for path in hub.listed_besides]
        at = int(request.args.get("cursor", 0))
        answer = jsonify(files[at : at + PAGE])
        if at + PAGE < len(files):
            link = f"{hub.url}{request.path}?recursive=true&cursor={at + PAGE}"
            answer.headers["Link"] = f'<{link}>; rel="next"'
        return answer

    @app.post("/api/datasets/<owner>/<name>/preupload/<revision>")
    def preupload(owner: str, name: str, revision: str) -> Any:
        repo = found(f"{owner}/{name}", write=True)
        if isinstance(repo, Response):
            return repo
        modes = []
        for one in request.get_json()["files"]:
            text = one["path"].endswith((".json", ".jsonl", ".md"))
            modes.append({"path": one["path"], "uploadMode": "regular" if text else "lfs", "shouldIgnore": False})
        return jsonify({"files": modes})

    @app.post("/datasets/<owner>/<name>.git/info/lfs/objects/batch")
    def batch(owner: str, name: str) -> Any:
        repo = found(f"{owner}/{name}", write=True)
        if isinstance(repo, Response):
            return repo
        objects = []
        for one in request.get_json()["objects"]:
            if one["oid"] not in hub.blobs:
                one["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
            objects.append(one)
        return jsonify({"transfer": "basic", "objects": objects})

    @app.put("/lfs/<oid>")
    def upload(oid: str) -> Any:
        data = request.get_data()
        assert hashlib.sha256(data).hexdigest() == oid
        hub.blobs[oid] = data
        return jsonify({})

    @app.post("/api/datasets/<owner>/<name>/commit/<path:revision>")
    def commit(owner: str, name: str, revision: str) -> Any:
        repo = found(f"{owner}/{name}", write=True)
        if isinstance(repo, Response):
            return repo
        files = dict(repo.commits[repo.branches[revision]])
        for line in request.get_data().splitlines():
            said = json.loads(line)
            value = said["value"]
            if said["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                repo.lfs.discard(value["path"])
            elif said["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
                repo.lfs.add(value["path"])
            if said["key"] != "header":
                hub.uploaded.append(value["path"])
        sha = repo.commit(revision, files)
        return jsonify({"commitUrl": f"{hub.url}/datasets/{owner}/{name}/commit/{sha}", "commitOid": sha})

    @app.get("/datasets/<owner>/<name>/resolve/<revision>/<path:path>")  # and HEAD
    def resolve(owner: str, name: str, revision: str, path: str) -> Any:
        repo = found(f"{owner}/{name}")
        if isinstance(repo, Response):
            return repo
        sha = repo.at(revision)
        if sha is None or path not in repo.commits[sha]:
            return refusal(404, "EntryNotFound")
        listed, data = repo.commits[sha][path], hub.served.get(path, repo.commits[sha][path])
        etag = hashlib.sha256(listed).hexdigest() if path in repo.lfs else git_sha(listed)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if request.method == "GET":
            if hub.after is not None and len(hub.downloaded) >= hub.after:
                hub.held.set()
                threading.Event().wait(60)
            hub.downloaded.append(path)
        return Response(data, 200, headers, mimetype="application/octet-stream")

    return app


class Silent(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as the hub keeps them

    def log_request(self, *args: Any, **kwargs: Any) -> None: ...


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at `hub.url` for the length of the block."""
    hub = Hub()
    server = make_server("127.0.0.1", 0, application(hub), threaded=True, request_handler=Silent)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    """Has huggingface_hub ask this hub, as its owner. What HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET say is
    read once, when the library is imported: it is set where the library keeps it. HF_TOKEN is read each time.
    """
    from huggingface_hub import constants

    settings = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in settings.items():
        patch.setattr(constants, name, value)
    patch.setenv("HF_TOKEN", OWNER_TOKEN)
