"""Labels, contrast and keyboard order, by axe-core and by pressing Tab."""

import json
from pathlib import Path

from playwright.sync_api import Page, expect

from helpers.studio_page import find_serious_violations


def unfold(page: Page) -> None:
    """Show what the Play page hides at first."""
    page.get_by_role("button", name="Add adapter").click()
    page.get_by_label("Inpaint", exact=True).check()
    expect(page.locator(".play-source-box").first).to_be_visible()
    for name in ("More settings", "Compare, same seed", "Load report"):
        page.get_by_role("button", name=name).click()


def test_axe_finds_nothing_serious(page: Page, artefacts: Path) -> None:
    unfold(page)
    found = {}
    for tab in ("Play", "Runs", "Data", "Adapters"):
        page.click(f"#tab-{tab.lower()}-button")
        expect(page.locator(f"#tab-{tab.lower()}")).to_be_visible()
        if tab == "Data":
            expect(page.locator("#captions-count")).to_contain_text("2 clips")
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
            page.wait_for_function("dark => document.body.classList.contains('dark') === dark", arg=theme == "dark")
            broken = find_serious_violations(page)
            page.screenshot(path=artefacts / f"{tab.lower()}-{theme}.png", full_page=True)
            if broken:
                found[f"{tab}, {theme}"] = broken
    assert found == {}, json.dumps(found, indent=1)


def test_the_keyboard_reaches_the_form_in_its_order_and_shows_where_it_is(page: Page) -> None:
    page.locator("#play-model input").focus()
    reached, outlines = [], set()
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id^=play-]')?.id"))
        outlines.add(page.evaluate("getComputedStyle(document.activeElement).outlineStyle"))
    wanted = [
        "play-mode",
        "play-prompt",
        "play-duration",
        "play-seed",
        "play-batch-size",
        "play-rack",
        "play-more",
        "play-generate",
    ]
    assert [name for name in dict.fromkeys(reached) if name in wanted] == wanted
    assert outlines == {"solid"}
