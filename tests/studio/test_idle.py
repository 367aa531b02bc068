"""A page on which nothing happens leaves the browser and the server alone."""

import time

import pytest
from playwright.sync_api import Page, expect

WATCHED = {"Play": 2, "Runs": 2, "Data": 1, "Adapters": 1}
"""Elements that look for changes on each page as it is first shown."""
SECONDS = 6.0


@pytest.mark.parametrize("name", WATCHED)
def test_an_idle_page_asks_for_little_and_starts_no_event(page: Page, name: str) -> None:
    page.click(f"#tab-{name.lower()}-button")
    page.wait_for_timeout(1000 * SECONDS)  # a click makes it look at once, and what it finds is shown
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.partition("/gradio_api/")[2].partition("?")[0]))
    deadline = time.monotonic() + 40
    while True:  # until what the page asks for as it is shown is over
        asked.clear()
        began = time.monotonic()
        page.wait_for_timeout(1000 * SECONDS)
        seconds = time.monotonic() - began  # more than were asked for, on a crowded machine
        if "queue/join" not in asked or time.monotonic() > deadline:
            break
    polls = [url for url in asked if url.startswith("component_server")]
    answers = asked.count("app_id")  # every 4 s: whether the server is still there
    assert answers <= seconds / 4 + 1
    assert len(polls) + answers == len(asked), f"events of an idle page: {asked}"
    # The interval is 2 s; a crowded machine may take longer to answer.
    assert bool(WATCHED[name]) <= len(polls) <= WATCHED[name] * (seconds / 2 + 1)


def test_a_server_that_has_gone_is_told_of_until_it_answers(page: Page) -> None:
    page.route("**/gradio_api/app_id", lambda route: route.abort())
    page.get_by_role("button", name="Reset this page's fields").first.click()
    gone = page.get_by_role("alert").filter(has_text="does not answer")
    expect(gone).to_contain_text("sa3-studio /")
    page.unroute("**/gradio_api/app_id")
    expect(gone).to_have_count(0)
    page.evaluate("window.isOld = true")
    page.route("**/gradio_api/app_id", lambda route: route.fulfill(json={"app_id": "another"}), times=1)
    page.wait_for_function("!window.isOld")
    page.wait_for_selector("#play-generate")
