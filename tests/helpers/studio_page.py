"""What the tests of the studio do on any of its pages."""

from collections.abc import Iterator
from contextlib import contextmanager

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from helpers.chromium import PATIENCE_MS

AT_REST = """() => document.getAnimations().every(
    one => one.playState !== 'running' || one.effect.getComputedTiming().endTime === Infinity)"""
"""While something fades in, its colors are not final."""


@contextmanager
def open_studio(browser: Browser, address: str) -> Iterator[Page]:
    """Open a fresh page of a studio. Fails when it asks any other host, or a script of it breaks."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, reduced_motion="reduce")
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    strangers: list[str] = []
    broken: list[str] = []
    own = (address, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else strangers.append(request.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#play-generate")
    yield page
    context.close()
    assert strangers == []
    assert broken == []


def close_error(page: Page, text: str) -> None:
    """Wait for an error message with a text, and close it."""
    toasts = page.locator(".toast-body")
    expect(toasts.filter(has_text=text).first).to_be_visible()
    expect(toasts.filter(has_text=text)).to_have_count(1)  # also where several handlers meet the same error
    # By script and all at once: a click would wait in vain for one that has gone by itself meanwhile.
    page.evaluate("for (const button of document.querySelectorAll('.toast-close')) button.click()")
    expect(toasts).to_have_count(0)


def find_serious_violations(page: Page) -> list[str]:
    """Find what axe-core calls serious or critical on a page at rest."""
    page.wait_for_function(AT_REST)
    return [
        f"{rule['id']} ({rule['impact']}): " + "; ".join(node["html"][:200] for node in rule["nodes"][:4])
        for rule in Axe().run(page).response["violations"]
        if rule["impact"] in ("serious", "critical")
    ]
