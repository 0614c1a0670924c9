"""The report's page in a real browser, from disk: it shows, moves by keyboard, asks for nothing, and runs no text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from forebay.pipeline.page.page import page as page_of
from forebay.pipeline.page.report import Report, report_values

from ..report_runs import HOSTILE, TABS, WINDOWS, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")


Show = Callable[..., Any]


@pytest.fixture(scope="module")
def values(tiny_model: Path, texts: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = write_run(tiny_model, texts, tmp_path_factory.mktemp("browser"))
    return report_values(run, Report(sequences=2, tokens=300, features=45))


@pytest.fixture
def show(browser: Any, values: dict[str, Any], tmp_path: Path) -> Iterator[Show]:
    """Opens a page of `values`, some of them replaced. Whatever it logs, or asks for beside itself, is an error."""
    wrong: list[str] = []
    opened = []

    def open_page(width: int = 1280, scheme: str = "light", **replaced: Any) -> Any:
        path = tmp_path / "report.html"
        path.write_text(page_of({**values, **replaced}), encoding="utf-8")
        opened.append(browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme))
        shown = opened[-1]
        shown.on("console", lambda message: wrong.append(f"console: {message.text}"))
        shown.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        shown.on("request", lambda request: None if request.url == path.as_uri() else wrong.append(request.url))
        shown.goto(path.as_uri())
        return shown

    yield open_page
    for one in opened:
        one.close()
    assert wrong == []


def listed(page: Any) -> list[str]:
    """The numbers of the features in the list, from the top."""
    return [str(text)[1:] for text in page.locator("#features li > span:first-child").all_inner_texts()]


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.id || document.activeElement.textContent"))


@WINDOWS
def test_every_part_fits_its_window_in_light_and_dark(show: Show, width: int, scheme: str) -> None:
    page = show(width, scheme)
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    for tab in TABS:
        page.click(f"#tab-{tab}")
        assert page.locator("main > section:visible").get_attribute("id") == tab
        assert page.locator(f"#{tab}").inner_text().strip()
        assert page.locator(f"#{tab} .absent").count() == 0
        assert "[object" not in page.locator(f"#{tab}").inner_text()
        beyond = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(beyond) == 0, tab


def test_the_toggle_changes_the_colours_that_the_system_asked_for(show: Show) -> None:
    page = show(scheme="light")
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    page.click("#tab-attention")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate(colour) != before
    page.click("#theme")
    assert page.evaluate(colour) == before


def test_a_part_is_opened_by_its_address_and_its_tab_is_seen(show: Show) -> None:
    page = show(400)
    page.evaluate("location.hash = '#features'")
    page.wait_for_selector("#features:visible")
    box = page.locator("#tab-features").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 400


def test_tabs_are_moved_between_by_arrow_keys(show: Show) -> None:
    page = show()
    page.focus("#tab-overview")
    for key, tab in (
        ("ArrowRight", "norms"),
        ("End", "features"),
        ("ArrowRight", "overview"),
        ("ArrowLeft", "features"),
    ):
        page.keyboard.press(key)
        assert focused(page) == f"tab-{tab}"
        assert page.locator(f"#tab-{tab}").get_attribute("aria-selected") == "true"
        assert page.locator(f"#{tab}").is_visible()


def test_the_lens_is_walked_by_arrow_keys_and_tells_each_cell(show: Show, values: dict[str, Any]) -> None:
    page = show()
    page.click("#tab-lens")
    one = values["lens"]["shown"][0]
    cells = page.locator("#lens td")
    assert cells.count() == 3 * len(one["tokens"])
    page.locator("#lens td[tabindex='0']").focus()
    for key, layer, position in (
        ("ArrowRight", 2, 1),
        ("ArrowDown", 1, 1),
        ("End", 1, len(one["tokens"]) - 1),
        ("ArrowRight", 1, len(one["tokens"]) - 1),
        ("ArrowUp", 2, len(one["tokens"]) - 1),
        ("Home", 2, 0),
    ):
        page.keyboard.press(key)
        assert f"Layer {layer}, position {position}, after" in page.locator("#lens .detail h3").inner_text()
    rank = int(one["rank"][2][0])
    assert f"rank {rank}:" in page.locator("#lens .detail").inner_text()
    assert page.locator("#lens .detail .meter > i").count() == 5
    assert page.locator("#lens td[tabindex='0']").count() == 1


def test_attention_tells_the_weight_under_the_pointer_and_the_keys(show: Show, values: dict[str, Any]) -> None:
    page = show()
    page.click("#tab-attention")
    assert page.locator("#attention canvas").count() == values["attention"]["heads"]
    n = len(values["attention"]["shown"][0]["tokens"])
    canvas = page.locator("#attention canvas").nth(2)
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5 / n, box["y"] + box["height"] * 0.5 / n)
    assert "Head 2" in (said := page.locator("#attention .detail h3").inner_text())
    assert said.endswith("(0) with 1.000")
    canvas.focus()
    page.keyboard.press("ArrowDown")
    assert "(1) looks at" in page.locator("#attention .detail h3").inner_text()


def test_features_are_searched_sorted_and_walked(show: Show, values: dict[str, Any]) -> None:
    page = show()
    features = values["features"]["shown"][0]["features"]
    page.keyboard.press("/")
    assert page.locator("#features").is_visible()
    search = page.locator("#features input[type=search]")
    assert search.evaluate("one => one === document.activeElement")
    page.keyboard.type(str(features[4]["id"]))
    assert str(features[4]["id"]) in listed(page)
    assert len(listed(page)) < 25
    search.fill("no such text anywhere")
    assert page.locator("#features [role=status]").inner_text() == "Nothing found."
    search.fill("")
    page.locator("#features select").last.select_option(label="greatest activation")
    first = max(features, key=lambda one: one["max"])
    assert page.locator("#features article h2").inner_text() == f"Feature {first['id']}"
    page.locator("#features select").last.select_option(label="number")
    in_order = sorted(one["id"] for one in features)
    assert listed(page) == [str(id) for id in in_order[:25]]
    page.locator("#features [role=listbox]").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.locator("#features article h2").inner_text() == f"Feature {in_order[2]}"
    assert page.locator("#features li[aria-selected=true]").count() == 1


def test_texts_of_tokens_and_names_stay_texts(show: Show, values: dict[str, Any]) -> None:
    hostile = dict.fromkeys(values["texts"], HOSTILE) | {next(iter(values["texts"])): "\u202e\x00 \n"}
    page = show(name=HOSTILE, texts=hostile)
    for tab in TABS:
        page.click(f"#tab-{tab}")
    assert page.evaluate("window.hacked") is None
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert HOSTILE in page.locator("#features .contexts .tok").all_inner_texts()


def test_what_has_no_shape_of_its_own_is_named(show: Show, values: dict[str, Any]) -> None:
    first = values["lens"]["shown"][0]["tokens"][0]
    page = show(texts={**values["texts"], str(first): "\u202e\x00 \n"})
    page.click("#tab-lens")
    assert page.locator("#lens thead th").nth(1).inner_text() == "⟨U+202E⟩⟨U+0000⟩·↵"


def test_a_run_that_is_not_complete_says_so_with_its_failures(show: Show, values: dict[str, Any]) -> None:
    failure = {"unit": 2, "attempts": 3, "error": HOSTILE}
    changed = {"units": 9, "left": None, "failed": [2], "failures": [failure], "at_work": 4, "unreadable": 1}
    first, second, *others = values["overview"]["steps"]
    page = show(overview={"complete": False, "steps": [first, {**second, **changed}, *others], "recipe": None})
    assert page.locator("#state").inner_text() == "not complete"
    said = page.locator("#overview").inner_text()
    assert "activations: 4 at work when this was made." in said
    assert "activations: 1 records cannot be read; forebay status names them." in said
    assert HOSTILE in said
    assert page.locator("#overview .bar:not(.whole)").count() == 1


def test_what_is_absent_is_told(show: Show) -> None:
    why = {"absent": "Not <b>kept</b>."}
    page = show(lens=why, attention=why, features=why, norms=why)
    for tab in TABS[1:]:
        page.click(f"#tab-{tab}")
        assert page.locator(f"#{tab}").inner_text() == "Not <b>kept</b>."


def test_ten_thousand_features_are_there_at_once(show: Show, values: dict[str, Any]) -> None:
    [sae] = values["features"]["shown"]
    one = {**sae["features"][0], "contexts": sae["features"][0]["contexts"][:3]}
    many = [{**one, "id": i, "max": float(i % 977)} for i in range(10_000)]
    ids = [sae["logits"]["tokens"][0]] * len(many)
    logits = {**sae["logits"], "tokens": ids, "values": [sae["logits"]["values"][0]] * len(many)}
    page = show(features={"shown": [{**sae, "features": many, "logits": logits}]})
    page.click("#tab-features")
    page.locator("#features input[type=search]").fill("9876")
    page.wait_for_function("document.querySelector('#features article h2')?.textContent === 'Feature 9876'")
    took = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < took < 20_000  # milliseconds, on the slowest of machines; a twentieth of it is usual
