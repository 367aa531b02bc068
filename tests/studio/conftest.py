"""A running studio on nano and Debian's Chromium in front of it. Nothing leaves the machine."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from helpers.audio import tone, write_clip
from sa3train.adapters.adapter import Adapter, architecture_of
from sa3train.adapters.formats.io import save_adapter
from sa3train.adapters.layer_filter import adaptable_layers
from sa3train.adapters.spec import AdapterSpec
from sa3train.models.checkpoint import load_checkpoint
from sa3train.studio.app import running
from sa3train.studio.server.workspace import Workspace

LONG = 600_000
"""Milliseconds to wait for anything: a quiet machine needs a few seconds, a crowded one much more."""
AT_REST = """() => document.getAnimations().every(
    one => one.playState !== 'running' || one.effect.getComputedTiming().endTime === Infinity)"""
"""While something fades in, its colours are not yet those that it is shown in."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser's test that fails is run once more, and the report says so: a crowded machine drops frames and clicks.

    Whatever fails twice fails.
    """
    for item in items:
        if Path(__file__).parent in item.path.parents and "page" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workplace with adapters/one and adapters/two for nano, and audio/tone.wav of 2 s."""
    root = tmp_path_factory.mktemp("studio")
    model = load_checkpoint("nano-base", parts=("dit", "conditioner"))
    draw = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        tensors = {}
        for path, layer in adaptable_layers(model.adaptable()).items():
            rows, cols = layer.weight.flatten(1).shape
            A, B = torch.randn(2, cols, generator=draw) / cols**0.5, torch.randn(rows, 2, generator=draw) * 0.02
            tensors[path] = {"lora_A": A, "lora_B": B}
        facts = {"base_model": model.name, "base_architecture": architecture_of(model.adaptable())}
        save_adapter(
            root / "adapters" / f"{name}.safetensors", Adapter(AdapterSpec("lora", rank=2), tensors, facts, name)
        )
    write_clip(root / "audio" / "tone.wav", tone(2.0))
    (root / "audio" / "words.wav").write_text("no audio at all")
    return Workspace.at([root], device="cpu")


@pytest.fixture(scope="session")
def address(workspace: Workspace) -> Iterator[str]:
    """Where the studio in `workspace` listens."""
    with running(workspace, largest_upload="2mb") as found:
        yield found


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    if CHROMIUM is None:
        pytest.fail("the studio's tests need chromium: bash launch/setup.sh --dev installs it")
    with sync_playwright() as playwright:
        expect.set_options(timeout=LONG)
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"], timeout=LONG
        )
        yield found
        found.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A fresh page of the studio. Fails when it asks any other host, or a script of it breaks."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, reduced_motion="reduce")
    context.set_default_timeout(LONG)
    found = context.new_page()
    strangers: list[str] = []
    broken: list[str] = []
    found.on("request", lambda request: None if _own(request.url, address) else strangers.append(request.url))
    found.on("pageerror", lambda error: broken.append(str(error)))
    found.goto(address)
    found.wait_for_selector("#play-generate")
    found.wait_for_selector("#play-results .item")
    while found.locator("[data-cancel]").count():  # what a failed test has left behind
        job = found.locator(".job").first
        number = job.locator("[data-cancel]").get_attribute("data-cancel")
        job.locator("[data-cancel]").click()
        expect(found.locator(f"[data-cancel='{number}']")).to_have_count(0)
    yield found
    context.close()
    assert strangers == []
    assert broken == []


@pytest.fixture
def refused() -> Callable[[Page, str], None]:
    """Waits for a message on the page, and closes it."""

    def wait(page: Page, told: str) -> None:
        toasts = page.locator(".toast-body")
        expect(toasts.filter(has_text=told).first).to_be_visible()
        # By script and all at once: a click would wait in vain for one that has gone by itself meanwhile.
        page.evaluate("for (const button of document.querySelectorAll('.toast-close')) button.click()")
        expect(toasts).to_have_count(0)

    return wait


@pytest.fixture
def grave() -> Callable[[Page], list[str]]:
    """Finds what axe-core calls serious or critical on a page at rest."""

    def find(page: Page) -> list[str]:
        page.wait_for_function(AT_REST)
        found = Axe().run(page).response["violations"]
        return [
            f"{rule['id']} ({rule['impact']}): " + "; ".join(node["html"][:200] for node in rule["nodes"][:4])
            for rule in found
            if rule["impact"] in ("serious", "critical")
        ]

    return find


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    """Where screenshots are kept: $SA3_ARTEFACTS, or the test's own folder."""
    folder = Path(os.environ.get("SA3_ARTEFACTS") or tmp_path) / "studio"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _own(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))
