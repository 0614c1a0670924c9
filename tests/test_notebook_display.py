"""What a notebook shows of an object: a table that says what it is, in which text from anywhere is text and no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import forebay
from forebay import Add, FeatureId, HookSpec, Knockout
from forebay.stages.analyze.decoder_projection import AttributionEdge, AttributionGraph
from forebay.stages.dictionaries.activation import Activation
from forebay.stages.dictionaries.dictionary import Dictionary, Encoder, Provenance
from forebay.stages.dictionaries.transcoders import TranscoderSet
from forebay.stages.models import html as html_of_models
from forebay.stages.models.model import Model
from forebay.stores import html as html_of_stores
from forebay.stores.store import Store

from .stores.small_runs import numbers, write_run

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"
FOLDER = "<script>alert(1)<img src=x onerror=alert(1)>&amp;"
"""What a folder can be called."""
VOID = {"br", "hr", "img", "input", "link", "meta", "use", "path"}


@dataclass
class Page(HTMLParser):
    """The elements of some HTML, and its text; ValueError where an element is not closed in its turn."""

    open: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    styles: list[str] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.styles += [value or "" for name, value in attrs if name == "style"]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            raise ValueError(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def page_of(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def shown(thing: Any) -> Page:
    """What a notebook shows, which is a table as this package makes them."""
    page = page_of(thing._repr_html_())
    assert page.seen <= {"div", "strong", "table", "tr", "th", "td"}
    assert page.attributes <= {"style"}
    assert not any(word in style for style in page.styles for word in ("#", "url", "rgb", "white", "black"))
    return page


def facts(page: Page) -> dict[str, str]:
    return dict(zip(page.cells[::2], page.cells[1::2], strict=False))


def dictionary(**other: Any) -> Dictionary:
    about = Provenance(source=HOSTILE, format="saelens", model=HOSTILE, revision="abc123")
    settings: dict[str, Any] = {
        "W_enc": torch.ones(5, 11),
        "b_enc": torch.zeros(11),
        "W_dec": torch.ones(11, 7),
        "b_dec": torch.zeros(7),
        "activation": Activation(kind="topk", k=3),
        "hook": f"blocks.2.{HOSTILE}",
        "hook_out": "blocks.2.hook_mlp_out",
        "provenance": about,
    }
    return Dictionary(**settings | other)


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("made", [html_of_models, html_of_stores], ids=["models", "stores"])
def test_a_table_shows_every_text_as_text(made: Any) -> None:
    html = made.html_table(HOSTILE, {HOSTILE: HOSTILE, "nothing": None}, (HOSTILE, "b"), [(HOSTILE, 3), (None, 0.5)])
    page = page_of(html)
    assert page.seen == {"div", "strong", "table", "tr", "th", "td"}
    assert page.text.startswith(HOSTILE)
    assert page.cells == [HOSTILE, HOSTILE, HOSTILE, "b", HOSTILE, "3", "None", "0.5"]


@pytest.mark.parametrize("made", [html_of_models, html_of_stores], ids=["models", "stores"])
def test_what_is_long_is_cut_and_what_hides_is_spelt_out(made: Any) -> None:
    rows = [(n, "x" * 1000) for n in range(250)]
    page = page_of(made.html_table("t", {"name": "a\u202eb\x1b[2J\n\ud800"}, ("n", "text"), rows))
    assert page.cells[1] == "a\\u202eb\\x1b[2J\\n\\ud800"
    assert page.cells[2:4] == ["n", "text"]
    assert page.cells[4:6] == ["0", "x" * 300 + " […700 characters]"]
    assert page.cells[-1] == "… 150 more"
    assert len(page.cells) == 2 + 2 + 2 * 100 + 1


def test_both_sides_make_the_same_tables() -> None:
    given = ("t", {"a": 1, HOSTILE: "\x00"}, ("x",), [(n,) for n in range(101)])
    assert html_of_models.html_table(*given) == html_of_stores.html_table(*given)


# ── models, hooks, dictionaries ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return forebay.load_model(str(tiny_model), device="cpu")


def test_a_model_says_what_it_is(model: Model, tiny_model: Path) -> None:
    assert model.checkpoint is not None
    said = facts(shown(replace(model, checkpoint=replace(model.checkpoint, source=HOSTILE))))
    assert said["source"] == HOSTILE
    assert (said["family"], said["layers"], said["d_model"]) == ("llama", "3", "28")
    assert said["heads"] == "4, 2 of keys and values, d_head 10"
    assert said["parameters"] == f"{sum(n.numel() for n in parameters(tiny_model)):,}"
    assert (said["dtype"], said["device"]) == ("float32", "cpu")


def parameters(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").values())


def test_a_hook_spec_lists_captures_and_interventions_without_their_values() -> None:
    def mine(value: torch.Tensor, point: object) -> torch.Tensor:
        return value

    hooks = (
        HookSpec()
        .capture("hook_embed", HOSTILE)
        .capture("blocks.0.rwkv.hook_state", before=True, positions=[0, -1])
        .intervene("blocks.1.hook_resid_post", Add(torch.full((4000,), 7.25)).at(position=-1))
        .intervene(HOSTILE, Knockout([(-1, 0)]))
        .intervene("hook_embed", mine)
    )
    page = shown(hooks)
    assert page.cells == [
        *("what", "at", "how"),
        *("capture", f"hook_embed, {HOSTILE}", ""),
        *("capture", "blocks.0.rwkv.hook_state", "before interventions, after tokens [0, -1]"),
        *("intervene", "blocks.1.hook_resid_post", "Add at position=-1"),
        *("intervene", HOSTILE, "Knockout"),
        *("intervene", "hook_embed", mine.__qualname__),
    ]
    assert "7.25" not in page.text


def test_a_forward_lists_its_captures_with_their_shapes(model: Model) -> None:
    hooks = HookSpec().capture("blocks.1.attn.hook_pattern", "hook_embed")
    page = shown(model.forward([[1, 2, 3], [4, 5]], hooks, logits=False))
    assert facts(page)["tokens"] == "5"
    assert facts(page)["logits"] == "not asked for"
    assert page.cells[6:] == [
        *("captured", "dimensions", "shape", "dtype"),
        *("hook_embed", "sequence, position, d_model", "[2, 3, 28]", "float32"),
        *("blocks.1.attn.hook_pattern", "sequence, head, query, key", "[2, 4, 3, 3]", "float32"),
    ]
    assert page_of(model.forward([[1]])._repr_html_()).cells[4:] == ["logits", f"[1, 1, {model.spec.d_vocab}]"]


def test_a_dictionary_says_what_it_reads_and_writes() -> None:
    said = facts(shown(dictionary()))
    assert said["source"] == said["model"] == HOSTILE
    assert said["reads"] == f"blocks.2.{HOSTILE}"
    assert (said["d_in"], said["features"], said["d_out"]) == ("5", "11", "7")
    assert (said["activation"], said["writes"]) == ("topk, k = 3", "blocks.2.hook_mlp_out")
    assert said["skip connection"] == "none"
    assert facts(shown(dictionary(W_skip=torch.ones(5, 7))))["skip connection"] == "yes"


def test_an_encoder_alone_writes_nothing() -> None:
    whole = dictionary(head=3, input_norm="layer_norm")
    encoder = Encoder(**{name: getattr(whole, name) for name in Encoder.__dataclass_fields__})
    said = facts(shown(encoder))
    assert said["reads"] == f"blocks.2.{HOSTILE}, head 3"
    assert said["input norm"] == "layer_norm"
    assert not {"writes", "d_out", "skip connection"} & set(said)


class Unread:
    """A reader of a set that must not be asked."""

    def encoder(self, layer: int) -> Encoder:
        raise AssertionError("a set was read to be shown")

    def decoder_rows(self, layer: int, target: int, features: object) -> torch.Tensor:
        raise AssertionError("a set was read to be shown")

    def decoder_bias(self, target: int) -> torch.Tensor:
        raise AssertionError("a set was read to be shown")

    def skip(self, layer: int) -> torch.Tensor | None:
        raise AssertionError("a set was read to be shown")


def test_a_set_of_transcoders_lists_its_layers_and_reads_no_weights() -> None:
    made = TranscoderSet(
        reader=Unread(),
        n_features=(1024, 2048),
        d_in=5,
        d_out=7,
        hooks_in=("blocks.0.hook_resid_mid", HOSTILE),
        hooks_out=("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"),
        cross_layer=True,
        provenance=Provenance(source=HOSTILE, format="circuit-tracer"),
    )
    page = shown(made)
    assert facts(page)["source"] == HOSTILE
    assert facts(page)["kind"] == "cross-layer"
    assert page.cells[-8:] == [
        *("0", "1,024", "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"),
        *("1", "2,048", HOSTILE, "blocks.1.hook_mlp_out"),
    ]


def test_an_attribution_graph_lists_its_edges() -> None:
    edges = (AttributionEdge(FeatureId(1, 345), 2.5, 3), AttributionEdge(7, -0.123456, None))
    page = shown(AttributionGraph(3, edges))
    assert page.cells[-6:] == ["L1:345", "2.5", "3", "7", "-0.1235", "None"]


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / FOLDER
    folder.mkdir()
    return write_run(folder, numbers(0, (6, 6, 5, 6), {HOSTILE: 12, "b": 11}))


def test_a_store_lists_its_arrays_and_how_much_is_recorded(run_folder: Path) -> None:
    store = Store.open(run_folder / "activations")
    page = shown(store)
    said = facts(page)
    assert said["folder"] == str(run_folder / "activations")
    assert (said["tokens"], said["units recorded"]) == ("23", "3 of 3")
    at = page.cells.index("hook_resid_post/value")
    assert page.cells[at + 1 : at + 4] == ["layer, token, d_model", "[3, 23, 5]", "bfloat16"]
    (store.ledger.path(1)).unlink()
    assert facts(shown(store))["units recorded"] == "2 of 3"
    store.ledger.complete(1, {})


def test_batches_say_what_they_give(run_folder: Path) -> None:
    tree = forebay.open_run(run_folder)
    page = shown(tree.batches(["hook_embed", "blocks.3.hook_resid_post"], batch=4, seed=8))
    said = facts(page)
    assert said["run"] == str(run_folder)
    assert said["tokens in an epoch"] == "19"
    assert said["batches in an epoch"] == "5 of 4 tokens"
    assert said["order"] == "shuffled with seed 8"
    assert page.cells[-4:] == ["hook_embed", "5", "blocks.3.hook_resid_post", "5"]


def test_features_say_whose_they_are(run_folder: Path) -> None:
    tree = forebay.open_run(run_folder)
    listed = shown(tree.features)
    assert facts(listed)["run"] == str(run_folder)
    assert listed.cells[-3:] == ["sae", "features", "23"]
    said = facts(shown(tree.features("sae")))
    assert (said["name"], said["features"], said["tokens"]) == ("sae", "12", "23")
    assert said["run"] == str(run_folder)


def test_a_tree_of_a_run_shows_hostile_names_as_text(run_folder: Path) -> None:
    """By xarray's own display, which has pictures and folds by style sheets."""
    tree = forebay.open_run(run_folder)
    for thing in (tree, tree["documents"].load(), tree["documents/id"]):
        page = page_of(thing._repr_html_())
        assert "script" not in page.seen
        assert "img" not in page.seen
        assert not any(name.startswith("on") for name in page.attributes)
    assert np.asarray(tree["documents/id"])[0] == HOSTILE
    assert HOSTILE[2:] in page.text


def test_a_plan_and_its_outcome_say_what_was_done(make_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe, folder = make_recipe("x<script>alert(1)"), tmp_path / FOLDER
    plan = forebay.plan(recipe, folder, device="cpu")
    page = shown(plan)
    said = facts(page)
    assert (said["recipe"], said["folder"], said["device"]) == ("x<script>alert(1)", str(folder), "cpu")
    n_token, n_unit = plan.steps[1].schema.n_token, len(plan.steps[1].schema.grid)
    at = page.cells.index("activations")
    assert page.cells[at + 1 : at + 3] == [f"{n_token:,}", f"0 of {n_unit}"]
    outcome = forebay.run(recipe, folder, device="cpu")
    assert f"{n_unit} of {n_unit}" in shown(plan).cells
    page = shown(outcome)
    assert facts(page)["outcome"] == "complete"
    at = page.cells.index("activations")
    assert page.cells[at + 1 : at + 3] == [f"{n_token:,}", "0"]
    assert page.cells[at + 5] == "none"
    assert facts(shown(replace(outcome, interrupted=True)))["outcome"] == "stopped early: run again"
    outcome.steps[1].failed[3] = folder
    failed = shown(outcome)
    assert facts(failed)["outcome"] == "units failed"
    assert failed.cells[failed.cells.index("activations") + 5] == "3"
