"""The run report: what is in a run folder is on the page, and the page needs nothing else."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Browser, Page

from helpers.run_folder import HOSTILE, write_json, write_run
from sa3train.reports import audio
from sa3train.reports.run_files import read_run
from sa3train.reports.run_report import write_report


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its report, for tests that only read."""
    return write_report(write_run(tmp_path_factory.mktemp("reports") / "style-1")).parent


def test_everything_of_the_folder_is_on_the_page(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    for wanted in (
        "ab12cd34", "finished", "resumed 1 time<", "Generalization gap", "base model", "t = 0.95", "clip-11",
        "Score 0.30", "clip-7", "dora-rows, rank 4", "12,345", "self-attention", "data/latents", "18", "warm pads",
        "# Card of &lt;data&gt;", "1 × CPU", "off by 3 %", "Steps per second", "note: &lt;b&gt;", "-12.0 LUFS",
        "400 Hz",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert text.count("<audio") == text.count('alt="mel spectrogram') == 5
    assert not list(reported.glob(".report*"))
    assert HOSTILE not in text, "text from outside is only text"
    assert "&lt;script&gt;alert(" in text


def test_the_newest_step_is_open_and_earlier_ones_are_folded(reported: Path) -> None:
    text = (reported / "report.html").read_text()
    assert text.index("<h3>Step 20</h3>") < text.index("<summary>Step 10</summary>")
    assert "<summary>Step 0</summary>" not in text, "the base is next to the adapter in the newest step's rows"
    embedded = re.findall(r'src="data:audio/flac;base64,([^"]+)"', text)
    heard = [soundfile.read(io.BytesIO(base64.b64decode(sound)), dtype="int16")[0] for sound in embedded]
    files = ["00000000/nano-base-prompt0-0", "00000020/nano-base-prompt0-0.5", "00000020/nano-base-prompt0-1"]
    for name, sound in zip(files, heard, strict=False):
        np.testing.assert_array_equal(sound, soundfile.read(reported / f"demos/step-{name}.wav", dtype="int16")[0])


def test_a_page_has_a_limit_and_names_what_is_beyond(reported: Path) -> None:
    whole = (reported / "report.html").stat().st_size
    text = audio.embed_demos(reported, read_run(reported).demos, 0.4 * whole / 2**20)
    assert 0 < text.count("<audio") < 5
    assert "older files are only in the run folder" in text
    assert "step-00000010/nano-base-prompt0-1.wav" in text


def test_a_damaged_sound_is_named(run: Path) -> None:
    (run / "demos/step-00000020/nano-base-prompt0-1.wav").write_bytes(b"RIFF")
    text = write_report(run).read_text()
    assert "nano-base-prompt0-1.wav is missing or damaged" in text
    assert text.count("<audio") == 4


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"id": "x", "version": "0.1.0", "status": "running"})
    text = write_report(tmp_path).read_text()
    assert "running" in text
    assert "<audio" not in text
    assert "Traceback" not in text


def test_it_is_refreshed(run: Path) -> None:
    write_report(run)
    record = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", record | {"status": "interrupted"})
    assert "interrupted" in write_report(run).read_text()


PROBE = """(async () => {
  const players = [...document.querySelectorAll('audio')];
  await Promise.all(players.map(player => player.readyState > 0 || new Promise((done, failed) => {
    player.addEventListener('loadedmetadata', done);
    player.addEventListener('error', () => failed('a sound is broken'));
  })));
  const boxes = [...document.querySelectorAll('svg, .take')].map(node => node.getBoundingClientRect());
  players[0].currentTime = 0.5;
  await players[0].play(); await players[1].play();
  return {
    durations: players.map(player => player.duration),
    pictures: [...document.querySelectorAll('img')].map(image => image.naturalWidth),
    paused: players[0].paused, position: players[1].currentTime,
    shown: boxes.filter(box => box.width > 100 && box.height > 60).length,
    wider: document.documentElement.scrollWidth > innerWidth,
    paper: getComputedStyle(document.body).backgroundColor,
  };
})()"""


class Visit:
    """A page in Chromium, what it asked for and what went wrong on it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)

    def list_requests_beyond_the_page(self) -> list[str]:
        return [url for url in self.requests if not url.startswith(("file:", "data:", "about:"))]


def test_in_a_browser_it_asks_for_nothing_and_plays(reported: Path, browser: Browser) -> None:
    visit = Visit(browser.new_page(viewport={"width": 1280, "height": 1600}))
    visit.page.goto((reported / "report.html").as_uri())
    facts = visit.page.evaluate(PROBE)
    assert visit.list_requests_beyond_the_page() == []
    assert visit.errors == []
    assert facts["durations"] == pytest.approx([1.0] * 5, abs=0.01)
    assert min(facts["pictures"]) > 0
    assert facts["paused"], "starting one player stops the other"
    assert facts["position"] >= 0.5, "and goes on where the other was"
    assert facts["shown"] >= 15
    assert not facts["wider"]


def test_it_is_dark_if_preferred_and_narrow_on_a_phone(reported: Path, browser: Browser) -> None:
    size = {"width": 390, "height": 800}
    page = browser.new_page(viewport=size, color_scheme="dark", is_mobile=True, device_scale_factor=1)  # type: ignore[arg-type]
    page.goto((reported / "report.html").as_uri())
    facts = page.evaluate(PROBE)
    assert facts["paper"] == "rgb(22, 23, 26)"
    assert not facts["wider"]


def test_the_browser_test_would_notice_a_request(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "page.html"
    page.write_text('<!doctype html><img src="http://127.0.0.1:9/picture.png">')
    visit = Visit(browser.new_page())
    visit.page.goto(page.as_uri())
    assert visit.list_requests_beyond_the_page() == ["http://127.0.0.1:9/picture.png"]
