"""A person answers on MLflow's own page, in headless Chromium."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylign.tracking.review_queue import WHICH, Question, ReviewQueue
from tests.mlflow_servers import free_port, mlflow_server

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
LOAD_MS = 600_000
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
TAGS = {"raylign.run": "page", "raylign.round": "1"}
IMAGE = "![x](http://images.invalid/x.png)"
SHORT = Question("a" * 32, "Write a *short* line.", "Good <b>film</b>.", f"```\nA dull film. {IMAGE}", TAGS)
LONG = Question("b" * 32, f"Write a review. {IMAGE}", f"{IMAGE} It was long. " * 90, "It was longer. " * 90, TAGS)


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReviewQueue]:
    with mlflow_server(tmp_path_factory.mktemp("server"), free_port()) as uri:
        opened = ReviewQueue(uri, "people", "page: pairs")
        assert opened.send([SHORT, LONG]) == 2
        yield opened


@pytest.mark.slow
def test_a_choice_on_the_page_comes_back(queue: ReviewQueue, tmp_path: Path) -> None:
    address = queue.address()  # inside, playwright's loop is in the way of other requests
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, headless=True, args=[*FLAGS]
        )
        page = browser.new_page()
        page.set_default_timeout(LOAD_MS)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_role("button", name="Start review").click()
        page.get_by_text("Answer B", exact=True).wait_for()
        page.get_by_text("Good film.").or_(page.get_by_text("Good <b>film</b>.")).first.wait_for()
        page.get_by_text("Why?").first.wait_for()
        shown = page.inner_text("body")
        assert not {"score", "round", "swapped"} & {*shown.lower().split()}, "what might sway a person"
        assert shown.index(WHICH) < shown.index("Why?")
        page.get_by_text("Select an option").click()
        page.get_by_role("option", name="B", exact=True).click()
        page.get_by_role("textbox").first.fill("shorter")
        page.get_by_role("button", name="Submit").click()
        page.get_by_text("1 of 2 reviewed").wait_for()
        page.get_by_text("It was longer. It was longer.").wait_for()  # the next one, cut with a word where the rest is
        page.get_by_text("View full trace").nth(2).wait_for()
        assert page.get_by_text("View full trace").count() == 3
        page.get_by_text("View full trace").first.click()
        page.get_by_text("Answer B", exact=True).nth(1).wait_for()
        page.get_by_text("![x](").first.wait_for()
        browser.close()
    assert asked and [url for url in asked if "images.invalid" in url] == [], "images that a model names"
    (given,) = queue.read([SHORT.id, LONG.id]).given
    assert (given.id, given.choice, given.why) == (SHORT.id, "B", "shorter")
