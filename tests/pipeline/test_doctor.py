"""`forebay doctor` says what is lacking and what to do, changes nothing, and asks the network for --model only."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from forebay.pipeline.cli import main
from forebay.pipeline.doctor import Check, devices, disk, extras, hub, model_access, packages, python_version


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def by_name(checks: Iterator[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_machine_that_can_run_forebay_has_no_problem_and_keeps_no_trace(tmp_path: Path) -> None:
    result = cli("doctor", tmp_path)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[-1] == "no problem"
    assert [line for line in lines if line and line[0] != " "][:-1] == ["installation", "devices", "disk", "models"]
    assert any(line.split()[:3] == ["ok", "torch", metadata.version("torch")] for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_object_with_the_same_checks(tmp_path: Path) -> None:
    found = json.loads(cli("doctor", tmp_path, "--json").output)
    assert set(found) == {"ok", "checks"}
    assert found["ok"] is True
    assert all(set(check) == {"area", "name", "state", "said", "todo"} for check in found["checks"])
    assert {check["state"] for check in found["checks"]} <= {"ok", "note"}
    assert all(check["todo"] for check in found["checks"] if check["state"] != "ok")


def test_a_problem_is_named_with_what_to_do_and_ends_with_1(tmp_path: Path) -> None:
    result = cli("doctor", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "problem folder" in " ".join(result.output.split())
    assert f"→ mkdir -p '{tmp_path / 'nowhere'}'" in result.output.replace("\n", "")
    assert result.output.endswith("\n1 problem\n")
    found = cli("doctor", tmp_path / "nowhere", "--model", tmp_path / "gone", "--json")
    assert (found.exit_code, json.loads(found.stdout)["ok"]) == (1, False)
    assert [check["state"] for check in json.loads(found.stdout)["checks"]].count("problem") == 2


def test_a_revision_without_a_model_is_refused(tmp_path: Path) -> None:
    result = cli("doctor", tmp_path, "--revision", "main")
    assert result.exit_code == 2
    assert "name it with --model" in result.output


# ── installation ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_python_that_is_too_old_is_a_problem() -> None:
    assert python_version("3.10.14", ">=3.11").state == "problem"
    assert python_version("3.14.0rc1", ">=3.11").state == "ok"
    assert python_version(platform.python_version(), metadata.metadata("forebay")["Requires-Python"]).state == "ok"


def test_a_package_that_is_missing_or_out_of_bounds_is_a_problem_with_the_command_that_mends_it() -> None:
    click = metadata.version("click")
    needed = ["click>=8", "click<1", "no-such-package-at-all>=2", "torch", "numpy>=99; extra == 'other'"]
    right, old, missing, free = packages([*needed, "nothing; python_version < '3'"])
    assert (right.state, right.said) == ("ok", f"{click} (>=8)")
    assert (old.state, old.said, old.todo) == ("problem", f"{click} (<1)", "pip install 'click<1'")
    assert (missing.state, missing.said) == ("problem", "is not installed (>=2 is needed)")
    assert missing.todo == "pip install 'no-such-package-at-all>=2'"
    assert (free.state, free.said) == ("ok", metadata.version("torch"))


def test_the_packages_that_are_checked_are_those_that_the_distribution_needs() -> None:
    requires = metadata.requires("forebay") or []
    always = [one.partition(";")[0] for one in requires if "extra ==" not in one]
    found = list(packages(requires))
    assert len(found) == len(always) > 15
    assert all(line.startswith(check.name) for line, check in zip(always, found, strict=True))


def test_an_extra_that_is_missing_is_a_note_and_that_of_the_tests_is_passed_over() -> None:
    requires = ["click", "numpy>=1; extra == 'here'", "numpy>=1; extra == 'gone'", "no-such-x>=3; extra == 'gone'"]
    here, gone = extras([*requires, "pytest; extra == 'test'"], ["here", "gone", "test"])
    assert (here.name, here.state) == ("forebay[here]", "ok")
    assert (gone.name, gone.state) == ("forebay[gone]", "note")
    assert gone.said == f"numpy {metadata.version('numpy')} (>=1), no-such-x is not installed (>=3 is needed)"
    assert gone.todo == "pip install 'forebay[gone]', if you need it"


def test_what_is_missing_is_told_also_where_almost_everything_is_missing(tmp_path: Path) -> None:
    """The doctor itself needs click and packaging, and says so where even that is not there."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1].split()))\n"  # None makes an import fail
        "from forebay.pipeline.cli import main; main(['doctor', sys.argv[2], '--model', 'org/name'])"
    )
    gone = ["torch", "numpy", "xarray", "zarr", "rich", "pydantic", "safetensors", "huggingface_hub", "dask"]
    for missing, said in (
        (gone, "problem torch cannot be imported"),
        ([*gone, "packaging"], "problem packaging is not"),
    ):
        command = [sys.executable, "-c", code, " ".join(missing), str(tmp_path)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (found.returncode, found.stderr) == (1, "")
        assert said in " ".join(found.stdout.split())
        assert "problem org/name " in " ".join(found.stdout.split())


# ── devices ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_devices_are_those_that_torch_has() -> None:
    found = by_name(devices())
    cpu = found["cpu"]
    assert f"threads of torch: {torch.get_num_threads()}" in cpu.said
    assert "GB" in found["memory"].said
    assert ("cuda:0" in found) == torch.cuda.is_available()
    assert ("mps" in found) == torch.backends.mps.is_available()


def test_a_torch_that_cannot_be_imported_is_a_problem_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # which makes its import fail
    found = by_name(devices())
    assert list(found) == ["memory", "torch"]
    assert found["torch"].state == "problem"
    assert found["torch"].said.startswith("cannot be imported: ")


# ── disk ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_disk_is_measured_by_what_is_removed_again(tmp_path: Path) -> None:
    found = by_name(disk(tmp_path))
    assert found["space"].said.endswith(f"GB free in {tmp_path.resolve()}")
    assert "MB/s with fsync" in found["writing"].said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_a_problem() -> None:
    where = Path("/proc/self")  # where not even root makes files
    if not where.is_dir():
        pytest.skip("there is no /proc here")
    writing = by_name(disk(where))["writing"]
    assert writing.state == "problem"
    assert writing.said.startswith(f"{where} cannot be written to: ")


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_token_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    for options in ([], ["--json"]):
        result = cli("doctor", tmp_path, *options)
        assert "HF_TOKEN is set" in result.output
        assert "SECRET" not in result.output


def test_where_models_are_kept_and_whether_the_hub_is_asked_follow_the_environment(tmp_path: Path) -> None:
    kept = tmp_path / "models"
    bare = by_name(hub({}, tmp_path))
    assert bare["cache"].said == f"{tmp_path}/.cache/huggingface (HF_HOME is not set), made at the first download"
    assert [bare[name].state for name in ("token", "network")] == ["note", "ok"]
    kept.mkdir()
    (kept / "token").write_text("hf_SECRET")
    found = by_name(hub({"HF_HOME": str(kept), "HF_HUB_OFFLINE": "1"}, tmp_path))
    assert found["cache"].said == f"{kept} (HF_HOME)"
    assert (found["token"].state, found["token"].said) == ("ok", f"there is one in {kept / 'token'}")
    assert found["network"].state == "note"


def test_a_model_on_this_machine_is_opened(tiny_model: Path, tmp_path: Path) -> None:
    found = model_access(str(tiny_model), None)
    assert (found.state, found.said) == ("ok", f"read from {tiny_model}")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "bert"}')
    assert model_access(str(broken), None).state == "problem"
    gone = model_access("nobody/no-such-model", None)  # the tests are offline
    assert gone.state == "problem"
    assert "is not in the local cache and the hub cannot be reached" in gone.said


class Hub(BaseHTTPRequestHandler):
    """A hub with one model whose config.json may be read, and one that is gated; it writes down what it is asked."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"{}")

    def _answer(self, body: bytes) -> None:
        self.asked.append(self.path)
        open_, gated = self.path.startswith("/org/open/"), self.path.startswith("/org/gated/")
        self.send_response(200 if open_ else 403 if gated else 404)
        if not open_:
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", '"etag"')
        self.send_header("Content-Length", "2" if open_ else "0")
        self.end_headers()
        self.wfile.write(body if open_ else b"")

    def log_message(self, format: str, *values: Any) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[str]]]:
    """The address of a hub on this machine, and what it has been asked for."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHub", (Hub,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_model_on_the_hub_is_asked_for_without_its_weights(endpoint: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = endpoint
    code = (
        "from forebay.pipeline.doctor import model_access\n"
        "for name in ('org/open', 'org/gated', 'org/none'):\n"
        "    found = model_access(name, None); print(found.state, found.said)"
    )
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    said = subprocess.check_output([sys.executable, "-c", code], text=True, env={**os.environ, **settings})
    there, gated, none = said.splitlines()
    assert there == "ok the hub gives it"
    assert gated.startswith("problem org/gated is gated: accept its terms")
    assert none.startswith("problem the hub has no model 'org/none'")
    files = [path for path in asked if not path.startswith("/api/")]  # which is the library's own business
    assert set(files) == {f"/org/{name}/resolve/main/config.json" for name in ("open", "gated", "none")}
