"""The live page of a run: its API tells what the stores and the ordinary path tell, and takes work from itself only."""

from __future__ import annotations

import json
import re
import shutil
import signal
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

import forebay
from forebay.pipeline.cli import main
from forebay.pipeline.page.report import Report, report_values
from forebay.pipeline.serve.app import MOST_BODY, application
from forebay.pipeline.serve.reads import Reads
from forebay.pipeline.serve.typed import MOST_TOKENS, Typed, strongest
from forebay.stores.feature_rows import Rows

from ..report_runs import HOOK, write_run

HOST = "http://127.0.0.1:8000"
OWN = {"Origin": HOST}
TEXT = "It is a truth that a single woman in Netherfield wants a zwölf 🐟."


def client_of(run: Path) -> TestClient:
    reads = Reads(run, tokens=200)
    return TestClient(application(reads, Typed(reads, "cpu")), base_url=HOST)


@pytest.fixture(scope="module")
def run(tiny_model: Path, texts: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tiny_model, texts, tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[TestClient]:
    with client_of(run) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return report_values(run, Report(sequences=3, tokens=200, features=45))


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def get(client: TestClient, name: str, **asked: Any) -> Any:
    found = client.get(f"/api/{name}", params=asked)
    assert found.status_code == 200, found.text
    return found.json()


def refused(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    return str(answer.json()["error"])


def listed(client: TestClient, **asked: Any) -> list[int]:
    return [one["id"] for one in get(client, "features", dictionary="sae", limit=200, **asked)["shown"]]


# ── what it tells ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_overview_and_norms_are_those_of_the_report(client: TestClient, report: dict[str, Any]) -> None:
    assert {**get(client, "overview"), "steps": None} == {**report["overview"], "steps": None}
    assert get(client, "norms")["shown"] == report["norms"]["shown"]


def test_the_lens_and_the_heads_of_any_sequence_are_those_of_the_report(
    client: TestClient, report: dict[str, Any]
) -> None:
    for i, shown in enumerate(report["lens"]["shown"]):
        assert get(client, "lens", sequence=i)["shown"] == [shown]
    assert len(report["attention"]["shown"]) == 3
    for i, shown in enumerate(report["attention"]["shown"]):
        for layer, weights in enumerate(shown["weights"]):
            found = get(client, "attention", sequence=i, layer=layer)
            assert found["shown"] == [{**shown, "weights": [weights]}]
            assert found["layers"] == report["attention"]["layers"]


def test_every_feature_is_told_as_in_the_report(client: TestClient, report: dict[str, Any]) -> None:
    [sae] = report["features"]["shown"]
    about = get(client, "dictionary", dictionary="sae")
    assert {key: about[key] for key in ("fit", "rates", "dead", "about")} == {
        key: sae[key] for key in ("fit", "rates", "dead", "about")
    }
    for i, told in enumerate(sae["features"][:9]):
        found = get(client, "feature", dictionary="sae", id=told["id"])
        logits = found.pop("logits")
        texts = found.pop("texts")
        assert found == told
        assert logits["tokens"] == [sae["logits"]["tokens"][i]]
        assert all(texts[str(id)] == report["texts"][str(id)] for id in logits["tokens"][0])


def test_sequences_are_paged_with_how_they_begin(client: TestClient, run: Path) -> None:
    opened = forebay.open_run(run)
    starts, ids = opened["sequences/start"].values, opened["tokens/token_id"].values
    found = get(client, "sequences", offset=2, limit=3)
    assert (found["total"], [one["sequence"] for one in found["shown"]]) == (len(starts), [2, 3, 4])
    for one in found["shown"]:
        start = starts[one["sequence"]]
        assert one["tokens"] == ids[start : start + min(16, one["n_token"])].tolist()
    assert get(client, "sequences", offset=10**9)["shown"] == []


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize(("sort", "name"), [("density", "n_active"), ("max", "max"), ("id", None)])
def test_features_are_sorted_as_numpy_sorts_them(
    client: TestClient, run: Path, sort: str, name: str | None, order: str
) -> None:
    statistics = forebay.open_run(run).features("sae").statistics().compute()
    alive = np.flatnonzero(statistics["n_active"].values)
    ids = np.arange(45) if name is None else alive
    key = ids if name is None else statistics[name].values[alive]
    expected = ids[np.argsort(-key if order == "desc" else key, kind="stable")].tolist()
    expected += [] if name is None else sorted(set(range(45)) - set(alive.tolist()))
    assert listed(client, sort=sort, order=order) == expected


def test_the_most_telling_features_come_first_as_in_the_report(client: TestClient, report: dict[str, Any]) -> None:
    assert listed(client)[: 45 - report["features"]["shown"][0]["dead"]] == [
        one["id"] for one in report["features"]["shown"][0]["features"]
    ]


def test_pages_of_features_laid_end_to_end_are_all_of_them(client: TestClient) -> None:
    pages = [
        get(client, "features", dictionary="sae", sort="id", order="asc", offset=at, limit=7) for at in range(0, 50, 7)
    ]
    assert [one["id"] for page in pages for one in page["shown"]] == list(range(45))
    assert {page["total"] for page in pages} == {45}


def test_a_search_finds_numbers_and_the_text_about_the_strongest_activation(client: TestClient, run: Path) -> None:
    features = forebay.open_run(run).features("sae")
    n_active, about = features.statistics().n_active.values, {}
    for id in listed(client, sort="id", order="asc"):
        if n_active[id]:
            found = features.top_contexts(id, n=1)
            about[id] = "".join(str(found[n].values[0]) for n in ("text_before", "text", "text_after")).lower()
    for word in ("bennet", "Truth", "e"):
        expected = [id for id, text in about.items() if word.lower() in text]
        assert listed(client, sort="id", order="asc", search=word) == expected
    assert listed(client, search="7")[0] == 7
    assert listed(client, search="no such text anywhere") == []


# ── a typed text ─────────────────────────────────────────────────────────────────────────────────────────────────────


def typed(client: TestClient, text: object, **headers: str) -> Any:
    return client.post("/api/typed", json={"dictionary": "sae", "text": text}, headers={**OWN, **headers})


def ordinary(run: Path, tiny_model: Path, text: str) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Tokens, and features [token, feature], of a text that is captured in bfloat16 and encoded."""
    model = forebay.load_model(tiny_model, device="cpu")
    ids = model.tokenizer.to_tokens(text)
    out = model.forward(ids, forebay.HookSpec().capture(HOOK))
    dictionary = forebay.load_dictionary(run / "dictionaries" / "sae")
    kept = out[HOOK][0].bfloat16().float()
    return ids[0].tolist(), dictionary.encode(kept).detach().numpy()


def test_a_typed_text_has_the_features_that_the_ordinary_path_gives(
    client: TestClient, run: Path, tiny_model: Path
) -> None:
    ids, dense = ordinary(run, tiny_model, TEXT)
    found = typed(client, TEXT).json()
    assert found["tokens"] == ids
    counted = np.where(np.arange(len(ids))[:, None] >= found["skip_positions"], dense, 0)
    alive = np.flatnonzero(counted.max(0) > 0)
    expected = alive[np.argsort(-counted.max(0)[alive], kind="stable")].tolist()
    assert [one["id"] for one in found["shown"]] == expected
    for one in found["shown"]:
        assert one["values"][: found["skip_positions"]] == [None] * found["skip_positions"]
        own = one["values"][found["skip_positions"] :]
        np.testing.assert_allclose(own, dense[found["skip_positions"] :, one["id"]], rtol=1e-4, atol=1e-6)


def test_a_typed_text_of_the_corpus_has_the_features_in_the_store(client: TestClient, run: Path) -> None:
    opened = forebay.open_run(run)
    ids = opened["tokens/token_id"].values
    n = ids.tolist().index(0)  # where the first document ends
    found = typed(client, opened["tokens"].to_dataset().isel(token=slice(0, n)).forebay.text()).json()
    rows = opened.features("sae").of_tokens(sequence=0)
    stored = {
        (int(token), int(f)): float(v)
        for token, f, v in zip(rows["token"], rows["feature"], rows["value"], strict=True)
    }
    assert found["tokens"] == ids[:n].tolist()
    assert len(found["shown"]) > 4
    for one in found["shown"]:
        for token, value in enumerate(one["values"]):
            if value is not None:
                assert value == pytest.approx(stored.get((token, one["id"]), 0.0), rel=1e-4, abs=1e-5)


def test_of_equal_activations_the_lower_number_comes_first_and_only_some_are_told() -> None:
    rows = Rows(np.array([1, 3, 2]), np.array([9, 5, 2, 7, 2, 5], np.int32), np.array([99, 1, 3, 3, 2, 1], np.float32))
    ids, values = strongest(rows, 1, 2)
    assert ids == [2, 7]
    assert values.tolist() == [[0, 3, 2], [0, 3, 0]]


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [("a " * 300, 422, "tokens; 1 to"), ("", 400, "text is missing"), (3, 400, "text is missing")],
)
def test_a_text_that_cannot_be_read_is_refused_by_name(
    client: TestClient, text: object, status: int, said: str
) -> None:
    assert said in refused(typed(client, text), status)
    assert MOST_TOKENS == 256


def test_a_model_that_has_changed_reads_no_text(own_run: Path, altered_model: Any) -> None:
    recipe = json.loads((own_run / "recipe.json").read_text())
    recipe["recipe"]["model"]["source"] = str(altered_model(lambda weights: weights["lm_head.weight"].mul_(2)))
    (own_run / "recipe.json").write_text(json.dumps(recipe))
    assert "files have changed" in refused(typed(client_of(own_run), "a text"), 409)


# ── whom it serves ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1]", ""])
def test_other_names_for_this_machine_are_refused(client: TestClient, host: str) -> None:
    for address in ("/", "/api/overview"):
        assert client.get(address, headers={"Host": host}).status_code == 400
    assert client.get("/", headers={"Host": "localhost:8000"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": HOST, "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {},
    ],
)
def test_work_is_taken_from_the_page_itself_only(client: TestClient, headers: dict[str, str]) -> None:
    answer = client.post("/api/typed", json={"dictionary": "sae", "text": "a"}, headers=headers)
    refused(answer, 403)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_reads_that_another_page_asks_for_are_refused(client: TestClient) -> None:
    refused(client.get("/api/overview", headers={"Sec-Fetch-Site": "cross-site"}), 403)
    refused(client.get("/api/overview", headers={"Origin": "http://evil.example"}), 403)
    assert client.get("/api/overview", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_a_text_is_json_of_a_bounded_size(client: TestClient) -> None:
    form = {**OWN, "Content-Type": "text/plain"}
    refused(client.post("/api/typed", content=b'{"dictionary":"sae","text":"a"}', headers=form), 415)
    said = {**OWN, "Content-Type": "application/json"}
    for content in (b"{", b"[1]", b"\xff", b"[" * 50_000):
        refused(client.post("/api/typed", content=content, headers=said), 400)
    refused(client.post("/api/typed", content=b" " * (MOST_BODY + 1), headers=said), 413)


@pytest.mark.parametrize(
    "path", ["/api/../recipe.json", "/recipe.json", "/assets/page.js", "/%2e%2e/recipe.json", "/api/", "/api/typed/x"]
)
def test_no_address_leads_to_a_file(client: TestClient, path: str) -> None:
    refused(client.get(path), 404)


def test_nothing_is_written_by_other_methods(client: TestClient) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.request(method, "/api/overview", headers=OWN).status_code == 405
    assert client.get("/api/typed").status_code == 405


def test_every_answer_has_the_headers_that_keep_it_to_itself(client: TestClient) -> None:
    for address in ("/", "/api/overview", "/nothing"):
        headers = client.get(address).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "connect-src 'self'" in headers["content-security-policy"]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
    text = client.get("/").text
    assert re.search(r"<meta http-equiv=\"Content-Security-Policy\" content=\"([^\"]*)\"", text)
    assert len(text) < 80_000


@pytest.mark.parametrize(
    ("name", "asked", "status"),
    [
        ("feature", {"dictionary": "sae", "id": "45"}, 404),
        ("feature", {"dictionary": "sae", "id": "-1"}, 400),
        ("feature", {"dictionary": "sae", "id": "9" * 40}, 400),
        ("feature", {"dictionary": "sea", "id": "4"}, 404),
        ("feature", {"dictionary": "../sae", "id": "4"}, 404),
        ("feature", {"id": "4"}, 400),
        ("features", {"dictionary": "sae", "limit": "201"}, 400),
        ("features", {"dictionary": "sae", "sort": "loudest"}, 400),
        ("features", {"dictionary": "sae", "order": "up"}, 400),
        ("lens", {"sequence": "100000"}, 404),
        ("attention", {"sequence": "²"}, 400),
    ],
)
def test_what_is_not_there_is_refused_by_name(
    client: TestClient, name: str, asked: dict[str, str], status: int
) -> None:
    refused(client.get(f"/api/{name}", params=asked), status)


# ── a run that goes on, and one that lacks things ────────────────────────────────────────────────────────────────────


def test_what_a_run_records_is_seen_at_the_next_question(own_run: Path) -> None:
    record = own_run / "activations" / "done" / "000001.json"
    held = record.read_bytes()
    record.unlink()
    client = client_of(own_run)
    assert get(client, "overview")["complete"] is False
    assert "shown" not in get(client, "attention", sequence=4)
    record.write_bytes(held)
    assert get(client, "overview")["complete"] is True
    assert len(get(client, "attention", sequence=4)["shown"]) == 1


def test_a_run_without_features_or_tokens_says_so(own_run: Path) -> None:
    for step in ("features-sae", "tokens"):
        shutil.rmtree(own_run / step)
    client = client_of(own_run)
    assert "keeps no features" in get(client, "dictionaries")["absent"]
    assert "no tokens" in get(client, "attention", sequence=0)["absent"]
    assert get(client, "sequences")["shown"][0]["tokens"] == []


def test_damage_is_told_and_the_server_goes_on(own_run: Path) -> None:
    (own_run / "features-sae" / "index").rename(own_run / "away")
    client = client_of(own_run)
    assert "forebay index" in refused(client.get("/api/features", params={"dictionary": "sae"}), 409)
    assert get(client, "overview")["complete"] is True


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_command_serves_until_it_is_told_to_stop(run: Path, start_forebay: Callable[..., Any], number: int) -> None:
    process = start_forebay("serve", run, "--port", "0")
    address = process.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    with urllib.request.urlopen(f"{address}api/overview") as answer:
        assert json.load(answer)["complete"] is True
    process.send_signal(number)
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""


def test_what_is_no_run_is_not_served(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert "is no run" in result.output
