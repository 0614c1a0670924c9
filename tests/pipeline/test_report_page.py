"""The report of a run: its numbers are those of the analyses, and the page holds everything and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import forebay
from forebay.pipeline.cli import main
from forebay.pipeline.page.features import details
from forebay.pipeline.page.page import ASSETS, page
from forebay.pipeline.page.report import Report, check_out, report_values
from forebay.pipeline.page.values import TokenSet, as_json, number, table
from forebay.pipeline.report.features import telling
from forebay.stores.errors import CorruptStore

from ..report_runs import HOOK, write_run

ASSET_FOLDER = Path(str(resources.files("forebay.pipeline.page"))) / "assets"


@pytest.fixture(scope="module")
def run(tiny_model: Path, texts: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tiny_model, texts, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def values(run: Path) -> dict[str, Any]:
    return report_values(run, Report(sequences=2, tokens=200, features=7))


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def near(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.array(found, dtype=float), np.asarray(expected), rtol=1e-4, atol=1e-7)


def shown(values: dict[str, Any], hook: str) -> dict[str, Any]:
    [one] = [kind for kind in values["norms"]["shown"] if kind["hook"] == hook]
    return one


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_overview_tells_every_step_and_how_far_it_is(values: dict[str, Any], tiny_model: Path) -> None:
    said = values["overview"]
    assert said["complete"] is True
    assert [step["name"] for step in said["steps"]] == ["tokens", "activations", "features-sae"]
    assert all(step["units_done"] == step["units"] and step["left"] == 0 for step in said["steps"])
    assert said["steps"][1]["model"] == {"source": str(tiny_model)}
    assert said["steps"][1]["versions"]["forebay"] == forebay.__version__
    digest = hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()
    assert digest in said["steps"][1]["files"].values()
    assert said["recipe"]["capture"]["store_dtype"] == "bfloat16"


def test_norms_are_those_of_the_first_tokens(values: dict[str, Any], run: Path) -> None:
    node = forebay.open_run(run)["activations/hook_resid_post"].to_dataset().isel(token=slice(0, 200))
    norm = np.linalg.norm(node["value"].values.astype(np.float64), axis=-1)[:, node["position"].values > 0]
    found = shown(values, "hook_resid_post")
    assert found["layers"] == [0, 1, 2]
    assert found["n_token"] == norm.shape[1]
    near(found["mean_norm"], norm.mean(1))
    near(found["std_norm"], norm.std(1, ddof=1))
    near(found["min_norm"], norm.min(1))
    near(found["max_norm"], norm.max(1))
    quantiles = np.quantile(norm, found["quantiles"], axis=1, method="inverted_cdf").T
    np.testing.assert_allclose(np.array(found["quantile_norm"]), quantiles, rtol=1.1e-3)


def test_the_largest_values_are_named_with_their_places(values: dict[str, Any], run: Path) -> None:
    node = forebay.open_run(run)["activations/hook_resid_post"].to_dataset().isel(token=slice(0, 200))
    for layer, told in enumerate(shown(values, "hook_resid_post")["largest"]):
        value = node["value"].values[layer]
        token, channel = np.unravel_index(np.abs(value).argmax(), value.shape)
        near(told[0]["value"], value[token, channel])
        places = {name: int(node[name].values[token]) for name in ("sequence", "position", "token_id")}
        assert {key: told[0][key] for key in ("channel", *places)} == {"channel": channel, **places}


@pytest.mark.parametrize("hook", ["hook_resid_post", "attn.hook_z"])
def test_what_records_tell_is_of_all_tokens(values: dict[str, Any], run: Path, hook: str) -> None:
    """Of the stored values, which differ from those that were measured by bfloat16's rounding."""
    value = forebay.open_run(run)[f"activations/{hook}"]["value"].values.astype(np.float64)
    value = value.reshape(*value.shape[:2], -1)
    told = shown(values, hook)["recorded"]
    assert told["n_token"] == value.shape[1]
    np.testing.assert_allclose(told["rms_norm"], np.sqrt((value**2).sum(-1).mean(-1)), rtol=2e-3)
    np.testing.assert_allclose(told["abs_max"], np.abs(value).max((1, 2)), rtol=4e-3)
    assert all(1e-4 < error < 3e-3 for error in told["relative_error"])


def test_the_lens_is_the_logit_lens_of_the_first_sequences(values: dict[str, Any], run: Path, tiny_model: Path) -> None:
    assert [one["sequence"] for one in values["lens"]["shown"]] == [0, 1]
    node = forebay.open_run(run)["activations/hook_resid_post"].to_dataset().sel(sequence=1)
    lens = forebay.logit_lens(node, forebay.load_unembedding(tiny_model, device="cpu"), top=5).compute()
    found = values["lens"]["shown"][1]
    assert found["top"] == lens["top_token_id"].values.tolist()
    near(found["probability"], lens["top_probability"].values)
    assert found["tokens"] == node["token_id"].values.tolist()
    assert found["next"] == [*found["tokens"][1:], -1]
    assert [row[-1] for row in found["rank"]] == [None] * 3
    near([row[:-1] for row in found["rank"]], lens["next_rank"].values[:, :-1])


def test_attention_weights_are_the_stored_patterns(values: dict[str, Any], run: Path) -> None:
    pattern = forebay.open_run(run)["activations/attn.hook_pattern"]["value"]
    assert values["attention"]["layers"] == [0, 2]
    for one in values["attention"]["shown"]:
        n = len(one["tokens"])
        for layer, head in np.ndindex(2, 4):
            packed = np.frombuffer(base64.b64decode(one["weights"][layer][head]), "<u2")
            weights = np.zeros((n, n))
            weights[np.tril_indices(n)] = packed / 65535
            expected = pattern.isel(layer=layer, sequence=one["sequence"], head=head).values[:n, :n]
            np.testing.assert_allclose(weights, expected, atol=1e-5)


def test_features_are_told_as_the_store_gives_them(values: dict[str, Any], run: Path) -> None:
    [sae] = values["features"]["shown"]
    opened = forebay.open_run(run)
    features = opened.features("sae")
    statistics = features.statistics().compute()
    assert (sae["n_feature"], sae["dead"]) == (45, int(statistics["dead"].sum()))
    assert sum(sae["rates"]["counts"]) == 45 - sae["dead"]
    assert len(sae["features"]) == min(7, 45 - sae["dead"])
    ids = opened["tokens/token_id"].values
    for told in sae["features"]:
        own = statistics.sel(feature=told["id"])
        near([told["rate"], told["max"], told["mean"]], [float(own[n]) for n in ("firing_rate", "max", "mean_active")])
        assert sum(told["histogram"]) == told["n_active"] == int(own["n_active"])
        found = features.top_contexts(told["id"], n=10, text=False)
        assert len(told["contexts"]) == found.sizes["context"]
        for context, token in zip(told["contexts"], found["token"].values.tolist(), strict=True):
            start = token - context["at"]
            assert context["tokens"] == ids[start : start + len(context["tokens"])].tolist()
            near(context["values"][context["at"]], float(found["value"].sel(context=context_of(found, token))))


def context_of(found: Any, token: int) -> int:
    return int(np.flatnonzero(found["token"].values == token)[0])


def test_features_that_fire_together_are_counted_where_a_feature_fires(values: dict[str, Any], run: Path) -> None:
    opened = forebay.open_run(run)
    features = opened.features("sae")
    dense = (features.dense(range(45)).values != 0)[opened["activations/hook_resid_post"]["position"].values > 0]
    for told in values["features"]["shown"][0]["features"]:
        counts = dense[dense[:, told["id"]]].sum(0)
        counts[told["id"]] = 0
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda other: (-counts[other], other))
        assert told["together"] == [[other, int(counts[other])] for other in order[:8]]
        assert told["together_of"] == told["n_active"]


def test_of_a_feature_that_fires_often_the_strongest_tokens_are_counted(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.pipeline.page.features.FIRING", 3)
    features = forebay.open_run(run).features("sae")
    dense = features.dense(range(45)).values != 0
    tokens = TokenSet()
    chosen = telling(features.statistics().compute(), 20)  # more than are read together
    for told in details(features, features.statistics(), chosen, tokens):
        strongest = features.top_contexts(told["id"], n=3, text=False)["token"].values
        counts = dense[strongest].sum(0)
        assert told["together_of"] == len(strongest)
        assert all(counts[other] == count for other, count in told["together"])
        assert [count for _, count in told["together"]] == sorted(np.delete(counts, told["id"]))[::-1][
            : len(told["together"])
        ]


def test_logit_effects_are_decoder_rows_through_norm_and_unembedding(
    values: dict[str, Any], run: Path, tiny_model: Path
) -> None:
    weights = load_file(tiny_model / "model.safetensors")
    decoder = load_file(run / "dictionaries" / "sae" / "sae_weights.safetensors")["W_dec"]
    [sae] = values["features"]["shown"]
    for i, told in enumerate(sae["features"]):
        logits = weights["lm_head.weight"] @ (decoder[told["id"]] * weights["model.norm.weight"])
        order = torch.argsort(logits, descending=True).tolist()
        assert sae["logits"]["tokens"][i][:10] == order[:10]
        assert sae["logits"]["tokens"][i][10:] == order[::-1][:10]
        near(sae["logits"]["values"][i][:10], logits[order[:10]])


def test_every_token_that_is_shown_has_its_text(values: dict[str, Any], run: Path) -> None:
    ids = {id for one in values["lens"]["shown"] for id in one["tokens"]}
    contexts = [c for f in values["features"]["shown"][0]["features"] for c in f["contexts"]]
    ids |= {id for context in contexts for id in context["tokens"]}
    decoded = dict(zip(sorted(ids), forebay.open_run(run).to_str_tokens(sorted(ids)), strict=True))
    whole = [id for id, text in decoded.items() if "\ufffd" not in text]
    assert {id: values["texts"][str(id)] for id in whole} == {id: decoded[id] for id in whole}
    parts = [values["texts"][str(id)] for id in ids.difference(whole)]
    assert parts
    assert all(re.fullmatch("‹[0-9A-F]{2}( [0-9A-F]{2})*›", text) for text in parts)


# ── what is not there ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_keeps_little_says_what_it_does_not_keep(run: Path, own_run: Path) -> None:
    for step in ("activations", "features-sae"):
        shutil.rmtree(own_run / step)
    values = report_values(own_run, Report())
    assert "keeps no activations" in values["norms"]["absent"]
    assert "keeps no hook_resid_post" in values["lens"]["absent"]
    assert "keeps no attn.hook_pattern" in values["attention"]["absent"]
    assert "keeps no features" in values["features"]["absent"]
    assert json.loads(as_json(values)) == values


def test_a_run_without_tokens_shows_what_needs_none(own_run: Path) -> None:
    shutil.rmtree(own_run / "tokens")
    (own_run / "tokenizer.json").unlink()
    values = report_values(own_run, Report(features=3))
    assert "token_id" in values["norms"]["absent"]
    assert "token_id" in values["lens"]["absent"]
    assert "keeps no tokens" in values["attention"]["absent"]
    assert [one["contexts"] for one in values["features"]["shown"][0]["features"]] == [[], [], []]


def test_where_the_model_is_not_at_hand_lens_and_logits_say_so(own_run: Path) -> None:
    recipe = json.loads((own_run / "recipe.json").read_text())
    recipe["recipe"]["model"]["source"] = "nobody/has-this"
    (own_run / "recipe.json").write_text(json.dumps(recipe))
    values = report_values(own_run, Report(features=2))
    assert "nobody/has-this is not on this machine" in values["lens"]["absent"]
    assert "nobody/has-this is not on this machine" in values["features"]["shown"][0]["logits"]["absent"]
    assert len(values["features"]["shown"][0]["features"]) == 2


def test_a_model_whose_files_have_changed_is_not_taken_for_the_runs_own(own_run: Path, altered_model: Any) -> None:
    def louder(weights: dict[str, Any]) -> None:
        weights["lm_head.weight"] *= 2

    recipe = json.loads((own_run / "recipe.json").read_text())
    recipe["recipe"]["model"]["source"] = str(altered_model(louder))
    (own_run / "recipe.json").write_text(json.dumps(recipe))
    assert "files have changed" in report_values(own_run, Report(features=1))["lens"]["absent"]


def test_a_dictionary_that_has_changed_says_nothing_of_its_logits(own_run: Path) -> None:
    path = own_run / "dictionaries" / "sae" / "sae_weights.safetensors"
    weights = load_file(path)
    save_file({**weights, "W_dec": weights["W_dec"] * 2}, path)
    [sae] = report_values(own_run, Report(features=1))["features"]["shown"]
    assert "have changed" in sae["logits"]["absent"]
    assert len(sae["features"]) == 1


def test_a_run_that_was_moved_still_finds_its_dictionary(own_run: Path, values: dict[str, Any]) -> None:
    moved = Path(shutil.move(own_run, own_run.with_name("moved")))
    [sae] = report_values(moved, Report(features=7, sequences=0))["features"]["shown"]
    assert sae["logits"] == values["features"]["shown"][0]["logits"]


def test_units_that_are_not_done_are_left_out_and_told(own_run: Path) -> None:
    (own_run / "activations" / "done" / "000001.json").unlink()
    (own_run / "features-sae" / "done" / "000000.json").unlink()
    values = report_values(own_run, Report(sequences=4, tokens=150))
    assert values["overview"]["complete"] is False
    assert values["overview"]["steps"][1]["units_done"] == values["overview"]["steps"][1]["units"] - 1
    found = shown(values, "hook_resid_post")
    assert found["nan_fraction"] == [0.0, 0.0, 0.0]
    assert found["n_token"] == sum(1 for token in range(150) if not 57 <= token < 114 and token % 19)
    assert values["lens"]["shown"][3]["top"][0][0] == [-1] * 5
    assert values["lens"]["shown"][2]["top"][0][0] != [-1] * 5
    assert [one["sequence"] for one in values["attention"]["shown"]] == [0, 1, 2]
    assert "features-sae" in values["features"]["shown"][0]["absent"]


@pytest.mark.parametrize("damage", [{"rows": 3}, {"statistics": {"hook_resid_post": {"abs_max": "many"}}}])
def test_a_record_that_is_none_is_named(own_run: Path, damage: dict[str, Any]) -> None:
    path = own_run / "activations" / "done" / "000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(CorruptStore, match=r"000001\.json is not the record of a unit"):
        report_values(own_run, Report(sequences=0, features=0))


def test_features_without_an_index_say_how_to_build_it(own_run: Path) -> None:
    shutil.rmtree(own_run / "features-sae" / "index")
    assert "forebay index" in report_values(own_run, Report())["features"]["shown"][0]["absent"]


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Parsed(HTMLParser):
    """Elements with their attributes, and the texts of scripts and styles, as a browser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.here = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.here = tag in ("script", "style")
        if self.here:
            self.inside.append("")

    def handle_endtag(self, tag: str) -> None:
        self.here = False

    def handle_data(self, data: str) -> None:
        if self.here:
            self.inside[-1] += data


def sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


HOSTILE = {"0": "</script><script>window.hacked = 1</script>", "1": "<!-- <script>", "2": "a\u2028b\u2029&amp;\ud800\0"}


def test_a_page_holds_its_data_and_loads_nothing(values: dict[str, Any]) -> None:
    given = {**values, "name": "<b>run</b> & %%data%%", "texts": {**values["texts"], **HOSTILE}}
    parsed = Parsed(page(given))
    style, data, script = parsed.inside
    assert json.loads(data) == given
    kinds = [attributes.get("type") for tag, attributes in parsed.elements if tag == "script"]
    assert kinds == ["application/json", "module"]
    assert not {"src", "href", "srcset", "action"} & {key for _, attributes in parsed.elements for key in attributes}
    assert not {"link", "img", "iframe", "base", "b"} & {tag for tag, _ in parsed.elements}
    assert "url(" not in style
    assert "@import" not in style
    [policy] = [a["content"] for tag, a in parsed.elements if tag == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.split("; ") == [
        "default-src 'none'",
        f"script-src '{sha256(script)}'",
        f"style-src '{sha256(style)}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]


def test_the_script_never_makes_markup_of_data() -> None:
    script = "".join(path.read_text() for path in ASSET_FOLDER.glob("*.js"))
    assert len(script) > 10_000
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert way not in script


def test_only_the_live_page_can_ask_for_anything(values: dict[str, Any]) -> None:
    asking = ("fetch(", "XMLHttpRequest", "WebSocket", "EventSource", "sendBeacon")
    assert {path.name for path in ASSET_FOLDER.glob("*.js") if any(way in path.read_text() for way in asking)} == {
        "live.js"
    }
    assert "connect-src" not in page(values)
    assert not any(way in Parsed(page(values)).inside[2] for way in asking)


def test_the_page_itself_is_small() -> None:
    assert {path.name for path in ASSET_FOLDER.iterdir()} == ASSETS
    assert sum(path.stat().st_size for path in ASSET_FOLDER.iterdir()) < 60_000


@given(st.text(st.characters(exclude_categories=()), max_size=40))
def test_no_text_leaves_its_script_element(text: str) -> None:
    said = as_json({text: [text]})
    assert said.isascii()
    assert not set("<>&") & set(said)
    assert json.loads(said) == {text: [text]}


def test_numbers_that_json_has_not_are_nothing() -> None:
    assert [number(x) for x in (float("nan"), float("inf"), -float("inf"), 0.1234567, 1e-30)] == [
        *[None] * 3, 0.12346, 1e-30
    ]  # fmt: skip


@pytest.mark.parametrize("said", [None, [1], "text", 3, {"a": {"b": [None]}, "c": "d", "e": None}])
def test_headers_of_any_kind_become_texts(said: object) -> None:
    expected = {"a": '{"b": [null]}', "c": "d"} if isinstance(said, dict) else {}
    assert table(said) == expected


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_writes_a_page_and_replaces_it(own_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("before")
    result = cli("report", own_run, "-o", out, "--features", "3", "--sequences", "1")
    assert result.exit_code == 0, result.output
    assert f"Wrote {out}" in result.output
    data = json.loads(Parsed(out.read_text()).inside[1])
    assert len(data["features"]["shown"][0]["features"]) == 3
    assert len(data["lens"]["shown"]) == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("run/activations/page.html", "lies in a step of the run"),
        ("run/activations/data.zarr/page.html", "lies in a step of the run"),
        ("link/page.html", "lies in a step of the run"),
        ("run/recipe.json", "ends in .html"),
        ("nowhere/page.html", "there is no folder"),
    ],
)
def test_a_page_is_not_written_where_runs_write(own_run: Path, tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "link").symlink_to(own_run / "activations")
    before = sorted(path for path in own_run.rglob("*"))
    result = cli("report", own_run, "-o", tmp_path / out)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert sorted(path for path in own_run.rglob("*")) == before


def test_a_page_may_lie_beside_the_steps_of_its_run(own_run: Path) -> None:
    check_out(own_run, own_run / "report.html")
    (own_run / "report.html").write_text("a page")
    assert cli("verify", own_run).exit_code == 0


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    result = cli("report", tmp_path, "-o", tmp_path / "page.html")
    assert result.exit_code == 2
    assert "is no run" in result.output


def test_the_dictionary_of_the_fixture_reads_where_it_should(values: dict[str, Any]) -> None:
    assert values["features"]["shown"][0]["about"]["hook"] == HOOK
