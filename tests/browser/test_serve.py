"""The live page in a real browser: it asks for what is looked at, takes a text, tells what fails, and runs no text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import uvicorn

from forebay.pipeline.serve.app import application
from forebay.pipeline.serve.reads import Reads
from forebay.pipeline.serve.typed import Typed

from ..report_runs import HOSTILE, TABS, WINDOWS, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

N_FEATURE = 10_000

Show = Callable[..., Any]


@pytest.fixture(scope="module")
def run(tiny_model: Path, texts: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ten thousand features, hardly trained, over a corpus that would be markup if it could."""
    folder = tmp_path_factory.mktemp("live")
    return write_run(tiny_model, [HOSTILE * 3, *texts], folder, n_feature=N_FEATURE, n_batch=1)


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    reads = Reads(run, tokens=300)
    config = uvicorn.Config(application(reads, Typed(reads, "cpu")), port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    own = config.bind_socket()
    thread = Thread(target=server.run, kwargs={"sockets": [own]})
    thread.start()
    yield f"http://127.0.0.1:{own.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture
def show(browser: Any, address: str) -> Iterator[Show]:
    """Opens the page. Whatever it logs, or asks of any other server, is an error."""
    wrong: list[str] = []
    opened = []

    def open_page(width: int = 1280, scheme: str = "light", part: str = "") -> Any:
        opened.append(browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme))
        shown = opened[-1]
        shown.on("console", lambda message: wrong.append(f"console: {message.text}"))
        shown.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        shown.on("request", lambda asked: None if asked.url.startswith(address) else wrong.append(asked.url))
        shown.goto(f"{address}#{part}")
        return shown

    yield open_page
    for one in opened:
        one.close()
    assert wrong == []


def listed(page: Any) -> list[str]:
    return [str(text)[1:] for text in page.locator("#features li > span:first-child").all_inner_texts()]


def settled(page: Any, title: str) -> None:
    """Waits for a feature's card."""
    playwright.expect(page.locator("#features article h2").first).to_have_text(title)


@WINDOWS
def test_every_part_fits_its_window_in_light_and_dark(show: Show, width: int, scheme: str) -> None:
    page = show(width, scheme)
    for tab in TABS:
        page.click(f"#tab-{tab}")
        page.wait_for_selector(f"#{tab} :is(table, canvas, article h3)")
        assert page.locator(f"#{tab} :is(.absent, .failed)").count() == 0
        assert "[object" not in page.locator(f"#{tab}").inner_text()
        beyond = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(beyond) == 0, tab
    assert page.locator("#state").inner_text() == "complete"


def test_nothing_is_asked_for_that_was_not_looked_at(show: Show, browser: Any, address: str) -> None:
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url.removeprefix(address)))
    page.goto(address)
    page.wait_for_selector("#overview table")
    assert [one for one in asked if one != "favicon.ico"] == ["", "api/overview?"]
    page.close()


def test_ten_thousand_features_can_be_used_at_once(show: Show) -> None:
    page = show(part="features")
    page.wait_for_selector("#features article h3")
    took = page.evaluate("performance.now()")
    print(f"interactive after {took:.0f} ms")
    assert 0 < took < 20_000  # milliseconds, on the slowest of machines; below two seconds is usual
    assert page.locator("#features [role=status]").inner_text() == "1–25 of 10,000"


def test_features_are_sorted_searched_and_walked(show: Show) -> None:
    page = show()
    page.keyboard.press("/")
    page.wait_for_selector("#features article h3")
    page.locator("#features select").select_option(label="number")
    settled(page, "Feature 0")
    assert listed(page) == [str(id) for id in range(25)]
    page.locator("#features [role=listbox]").focus()
    page.keyboard.press("PageDown")
    settled(page, "Feature 25")
    page.keyboard.press("ArrowUp")
    settled(page, "Feature 24")
    page.keyboard.press("End")
    settled(page, "Feature 9999")
    assert page.locator("#features li[aria-selected=true]").count() == 1
    search = page.locator("#features input[type=search]")
    search.fill("4321")
    settled(page, "Feature 4321")
    search.fill("no such text anywhere")
    playwright.expect(page.locator("#features [role=status]")).to_have_text("Nothing found.")
    search.fill("script")
    page.wait_for_selector("#features article .contexts")
    playwright.expect(page.locator("#features .contexts > div").first).to_contain_text("script")


def test_a_typed_text_is_read_and_coloured(show: Show) -> None:
    page = show(part="features")
    page.wait_for_selector("#features article h3")
    page.fill("#features textarea", "A truth <img src=x>")
    page.click("#features button[type=submit]")
    page.wait_for_selector("#features .own-text")
    assert page.locator("#features .own-text").inner_text().startswith("A truth <img src=x>")
    assert re.match(
        r"\d+ tokens; the \d+ features that fire strongest", page.locator("#features form .small").inner_text()
    )
    assert page.locator("#features .own-text .tok[title]").count() > 1
    second = listed(page)[1]
    page.locator("#features li").nth(1).click()
    settled(page, f"Feature {second}")
    assert page.locator("#features .own-text").count() == 1
    page.click("text=All features")
    playwright.expect(page.locator("#features [role=status]")).to_have_text("1–25 of 10,000")
    playwright.expect(page.locator("#features .own-text")).to_have_count(0)


def test_what_is_refused_is_told_in_its_place(show: Show) -> None:
    page = show(part="features")
    page.wait_for_selector("#features article h3")
    broken = """new Response('{"error": "It <b>broke</b>."}', {status: 500})"""
    page.evaluate(f"() => {{ window.kept = window.fetch; window.fetch = async () => {broken}; }}")
    page.locator("#features li").nth(2).click()
    page.wait_for_selector("#features article .failed")
    assert page.locator("#features article .failed p").inner_text() == "It <b>broke</b>."
    page.evaluate("() => { window.fetch = window.kept; }")
    page.click("#features article .failed button")
    page.wait_for_selector("#features article h3")
    assert page.locator("#features .failed").count() == 0


def test_sequences_are_chosen_by_number_and_by_how_they_begin(show: Show) -> None:
    page = show(part="lens")
    page.wait_for_selector("#lens td")
    before = page.locator("#lens thead").inner_text()
    page.fill("#lens input[type=number]", "30")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#lens thead")).not_to_have_text(before, use_inner_text=True)
    assert page.locator("#lens select").input_value() == "30"
    assert page.locator("#lens option:checked").inner_text().startswith("30: ")


def test_texts_of_tokens_stay_texts(show: Show) -> None:
    page = show(part="lens")
    page.wait_for_selector("#lens td")
    page.click("#tab-attention")
    page.wait_for_selector("#attention canvas")
    page.click("#tab-features")
    page.fill("#features input[type=search]", "window")
    playwright.expect(page.locator("#features .contexts > div").first).to_contain_text("hacked")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
