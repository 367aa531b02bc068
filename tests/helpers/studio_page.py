"""What the tests of the studio do on any of its pages."""

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

AT_REST = """() => document.getAnimations().every(
    one => one.playState !== 'running' || one.effect.getComputedTiming().endTime === Infinity)"""
"""While something fades in, its colors are not final."""


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
