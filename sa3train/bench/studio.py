"""Load time of the studio's page: a fresh visit of headless Chromium to a running server."""

import os
import shutil
import statistics
import tempfile
from importlib.util import find_spec

from sa3train.bench.figures import Figure, Options
from sa3train.core.errors import ConfigError

PAINT_TARGET = 2.0
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
PAINTED = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
NOW = "() => performance.now()"


def run(options: Options) -> list[Figure]:
    """Measure visits to a studio on nano with an empty history and an empty browser cache.

    Args:
        options: `repeats`.

    Returns:
        Median seconds until the first paint and until the form is usable.

    Raises:
        ConfigError: Gradio, Playwright or Chromium is missing.
    """
    chromium = next((path for name in CHROMIUMS if (path := shutil.which(name))), None)
    if chromium is None or find_spec("playwright") is None or find_spec("gradio") is None:
        raise ConfigError("this benchmark needs Chromium, Gradio and Playwright: bash launch/setup.sh --dev.")
    painted, usable = (statistics.median(times) for times in zip(*_time_visits(chromium, options.repeats), strict=True))
    return [
        Figure("studio: first contentful paint of a fresh visit", painted, "s", PAINT_TARGET),
        Figure("studio: Play page usable", usable, "s"),
    ]


def _time_visits(chromium: str, repeats: int) -> list[tuple[float, float]]:
    """Time (first contentful paint, form usable) of visits, in seconds from their start; the first is not counted."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from playwright.sync_api import sync_playwright

    from sa3train.studio.app import run_studio
    from sa3train.studio.server.workspace import Workspace

    times = []
    with (
        tempfile.TemporaryDirectory() as folder,
        run_studio(Workspace.create(folder)) as address,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(1 + repeats):
            context = browser.new_context(viewport={"width": 1400, "height": 900})
            page = context.new_page()
            page.goto(address, wait_until="commit")
            page.wait_for_selector("#play-generate", state="visible")
            usable = float(page.evaluate(NOW)) / 1000
            page.wait_for_function(PAINTED)
            times.append((float(page.evaluate(PAINTED)) / 1000, usable))
            context.close()
        browser.close()
    return times[1:]
