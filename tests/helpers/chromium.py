"""Debian's Chromium for tests of pages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, expect, sync_playwright

PATIENCE_MS = 120_000
"""How long to wait for anything: a quiet machine needs a few seconds, a busy one ten times that."""
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required")


@contextmanager
def launch_chromium() -> Iterator[Browser]:
    """Run a headless Chromium as long as the block lasts."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    assert program is not None, "these tests need Chromium: bash launch/setup.sh --dev installs it"
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE_MS)
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS), timeout=PATIENCE_MS)
        yield browser
        browser.close()
