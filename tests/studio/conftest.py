"""A running studio on nano and Debian's Chromium in front of it. Nothing leaves the machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from helpers.audio import tone, write_clip
from helpers.nano_adapters import write_lora_adapters
from helpers.studio_page import open_studio
from sa3train.studio.app import run_studio
from sa3train.studio.server.workspace import Workspace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser's test that fails is run once more, and the report says so: a crowded machine drops frames and clicks.

    Whatever fails twice fails.
    """
    for item in items:
        if Path(__file__).parent in item.path.parents and "page" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with adapters/one and adapters/two for nano, and audio/tone.wav of 2 s.

    Its sources clips and linked belong to the tests of the Data page, and are listed last. All tests share one studio:
    Gradio has one folder of uploads per process.
    """
    root, clips = tmp_path_factory.mktemp("studio"), tmp_path_factory.mktemp("user")
    write_lora_adapters(root / "adapters")
    write_clip(root / "audio" / "tone.wav", tone(2.0))
    (root / "audio" / "words.wav").write_text("no audio at all")
    for name in ("clips", "linked"):
        (clips / name).mkdir()
    folders = [root, clips / "clips", clips / "linked"]
    return Workspace.create(tmp_path_factory.mktemp("workspace"), folders, device="cpu")


@pytest.fixture(scope="session")
def address(workspace: Workspace) -> Iterator[str]:
    """Where the studio in `workspace` listens."""
    with run_studio(workspace, max_upload="2mb") as found:
        yield found


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A fresh page of the studio."""
    with open_studio(browser, address) as found:
        found.wait_for_selector("#play-results .item")
        while found.locator("[data-cancel]").count():  # what a failed test has left behind
            button = found.locator("[data-cancel]").first
            number = button.get_attribute("data-cancel")
            button.click()
            expect(found.locator(f"[data-cancel='{number}']")).to_have_count(0)
        yield found


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    """Where screenshots are kept: $SA3_ARTEFACTS, or the test's own folder."""
    folder = Path(os.environ.get("SA3_ARTEFACTS") or tmp_path) / "studio"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
