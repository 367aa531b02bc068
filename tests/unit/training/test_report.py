"""The run report: what is in a run folder is on the page, the page needs nothing else, and it says what matters."""

import base64
import io
import json
import os
import re
import select
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from helpers.audio import noise, tone
from sa3train.reports import audio
from sa3train.reports.charts import Line, line_chart, smoothed, thinned, ticks
from sa3train.reports.run_files import change, read_run, reading
from sa3train.reports.run_report import render, write_report

LEVELS = [(number + 0.5) / 10 for number in range(10)]
HOSTILE = '<script>alert("x")</script> & "drums"'


def judgement(step: int, heldout: float, train: float) -> dict[str, Any]:
    parts = {"heldout": heldout, "train": train}
    return {"step": step, **{part: {"loss": loss, "by_level": [loss] * 10} for part, loss in parts.items()}}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def demo(run: Path, step: int, strength: float, seconds: float = 1.0) -> dict[str, Any]:
    stem = f"nano-base-prompt0-{strength:g}"
    folder = run / "demos" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    sound = tone(seconds, 220 + step, peak=0.4) + noise(seconds, peak=0.01, seed=step)
    soundfile.write(folder / f"{stem}.wav", sound, 44100, subtype="PCM_16")
    measures = {"loudness_lufs": -12.0 - step, "true_peak_db": None, "spectral_centroid_hz": 400.0, "stereo_width": 0.1}
    return {
        "file": f"{stem}.wav", "picture": f"{stem}.png", "demo": "prompt0", "mode": "text", "prompt": HOSTILE,
        "model": "nano-base", "strength": strength, "seed": 0, "step": step, "measures": measures,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of 20 steps as its files, without having trained."""
    folder = tmp_path / "style-1"
    write(folder / "run.json", {"id": "ab12cd34", "version": "0.1.0", "started": "2026-01-02T03:04:05+00:00",
          "status": "finished", "resumed": [{"at": "2026-01-02T04:00:00+00:00", "step": 10}]})  # fmt: skip
    (folder / "config.yaml").write_text("adapter:\n  kind: dora-rows\n  note: <b>\n")
    rows = [f"{step},{1 / step},{0.5},{2.0},{1.5}" for step in range(1, 21)]
    (folder / "metrics.csv").write_text(
        "\n".join(["step,train/loss,train/level/0.05,time/steps_per_second,time/peak_memory_gib", *rows]) + "\n"
    )
    items = [{"key": f"clip-{n}", "prompt": HOSTILE, "base": 1.0, "adapter": 0.8 + n / 10} for n in range(12)]
    history = [judgement(0, 1.0, 1.0), judgement(10, 0.8, 0.7), judgement(20, 0.9, 0.5)]
    base = {part: {"loss": 1.0, "by_level": [1.0] * 10} for part in ("heldout", "train")}
    write(folder / "heldout.json", {"levels": LEVELS, "base": base, "history": history, "best_step": 10,
          "best_loss": 0.8, "items": {"heldout": items, "train": items[:3]}})  # fmt: skip
    score = {"score": 0.3, "generated_to_training": 0.3, "generated_to_heldout": 1.1, "heldout_to_training": 1.0,
             "nearest": [{"clip": 0, "training_clip": "clip-7", "distance": 0.2}]}  # fmt: skip
    write(folder / "generated.json", {"clips": 4, "seconds": 2.0, "memorisation": score,
          "spread": {"data": 1.0, "base": 1.1, "adapter": 0.9}})  # fmt: skip
    source = {"path": "data/latents", "role": "train", "model": "nano", "card": "# Card of <data>",
              "splits": {"train": {"clips": 18, "seconds": 400.0}}}  # fmt: skip
    write(folder / "data.json", {"manifest": "f" * 64, "sources": [source], "prompts": ["warm pads"]})
    write(folder / "inspection.json", {"kind": "dora-rows", "rank": 4, "alpha": 4, "parameters": 12345, "step": 20,
          "effect": {"all": 0.1, "self-attention": 0.2}, "layers": {"model.a": 0.2, "model.b": 0.1}})  # fmt: skip
    write(folder / "machine.json", {"device": "1 × CPU", "plan": {"weights": 2**30}, "verdict": "off by 3 %"})
    write(folder / "demos" / "step-00000000" / "demos.json", [demo(folder, 0, 0.0)])
    for step in (10, 20):
        found = [demo(folder, step, strength) for strength in (0.5, 1.0)]
        write(folder / "demos" / f"step-{step:08d}" / "demos.json", found)
    return folder


def test_everything_of_the_folder_is_on_the_page(run: Path) -> None:
    text = write_report(run).read_text()
    for wanted in (
        "ab12cd34", "finished", "resumed 1 times", "Held-out gap", "base model", "t = 0.95", "clip-11", "Score 0.30",
        "clip-7", "dora-rows, rank 4", "12,345", "self-attention", "data/latents", "18", "warm pads",
        "# Card of &lt;data&gt;", "1 × CPU", "off by 3 %", "Steps per second", "note: &lt;b&gt;", "-12.0 LUFS",
        "400 Hz",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert text.count("<audio") == text.count('alt="mel spectrogram') == 5
    assert not list(run.glob(".report*"))


def test_text_from_outside_is_only_text(run: Path) -> None:
    text = write_report(run).read_text()
    assert HOSTILE not in text
    assert "&lt;script&gt;alert(&quot;x&quot;)" in text


def test_sounds_are_embedded_sample_for_sample(run: Path) -> None:
    text = write_report(run).read_text()
    embedded = re.findall(r'src="data:audio/flac;base64,([^"]+)"', text)
    heard = [soundfile.read(io.BytesIO(base64.b64decode(sound)), dtype="int16")[0] for sound in embedded]
    files = ["00000000/nano-base-prompt0-0", "00000020/nano-base-prompt0-0.5", "00000020/nano-base-prompt0-1"]
    for name, sound in zip(files, heard, strict=False):
        np.testing.assert_array_equal(sound, soundfile.read(run / f"demos/step-{name}.wav", dtype="int16")[0])


def test_the_newest_step_is_open_and_earlier_ones_are_folded(run: Path) -> None:
    text = write_report(run).read_text()
    assert text.index("<h3>Step 20</h3>") < text.index("<summary>Step 10</summary>")
    assert "<summary>Step 0</summary>" not in text, "the base stands beside the adapter in the newest step's rows"


def test_a_page_has_a_limit_and_names_what_is_beyond(run: Path) -> None:
    whole = len(write_report(run).read_bytes())
    text = audio.listening(run, read_run(run).played, audio.Budget(0.4 * whole))
    assert 0 < text.count("<audio") < 5
    assert "older sounds are in the run folder only" in text
    assert "step-00000010/nano-base-prompt0-1.wav" in text


def test_a_damaged_sound_is_named(run: Path) -> None:
    (run / "demos/step-00000020/nano-base-prompt0-1.wav").write_bytes(b"RIFF")
    text = write_report(run).read_text()
    assert "nano-base-prompt0-1.wav is missing or damaged" in text
    assert text.count("<audio") == 4


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    write(tmp_path / "run.json", {"id": "x", "version": "0.1.0", "status": "running"})
    text = write_report(tmp_path).read_text()
    assert "in progress" in text
    assert "<audio" not in text
    assert "Traceback" not in text


def test_it_is_refreshed(run: Path) -> None:
    write_report(run)
    record = json.loads((run / "run.json").read_text())
    write(run / "run.json", record | {"status": "interrupted"})
    assert "interrupted" in write_report(run).read_text()


def test_what_the_numbers_say(run: Path) -> None:
    read = read_run(run)
    assert change(read, "heldout") == pytest.approx(-0.1)
    assert read.seconds == pytest.approx(20 / 2.0)
    said = " ".join(reading(read))
    assert "10.0% below the base" in said
    assert "50.0% below" in said
    assert "lower at step 10 and has risen by 12.5%" in said
    assert "may be copies" in said


def test_worse_on_unseen_clips_is_said(run: Path) -> None:
    summary = json.loads((run / "heldout.json").read_text())
    summary["history"].append(judgement(30, 1.2, 0.4))
    write(run / "heldout.json", summary)
    assert "Training clips got better and unseen ones worse" in " ".join(reading(read_run(run)))
    assert 'class="bad">+20.0%' in render(read_run(run))


def test_curves_lie_where_the_values_are() -> None:
    svg = line_chart([Line("a < b", [(0, 1.0), (10, 3.0)], "c-train")], title="T", zero=(2.0, "base"), unit=" %")
    (start, end) = re.search(r'class="curve c-train" d="M([\d. ]+)L([\d. ]+)"', svg).groups()  # type: ignore[union-attr]
    level = re.search(r'class="curve c-base dashed" d="M[\d.]+ ([\d.]+)H', svg)
    assert level is not None
    (x0, y0), (x1, y1) = (tuple(map(float, pair.split())) for pair in (start, end))
    assert x0 < x1
    assert y0 > float(level[1]) > y1
    assert float(level[1]) == pytest.approx((y0 + y1) / 2, abs=0.11)
    assert "a &lt; b" in svg
    assert line_chart([Line("a", [], "c-train")], title="T") == ""


def test_ticks_are_round() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.5, 1.0])
    assert ticks(-43.0, 2.0) == pytest.approx([-40.0, -20.0, 0.0])
    assert ticks(0.0008, 0.0021) == pytest.approx([0.001, 0.0015, 0.002])


@pytest.mark.parametrize(("low", "high"), [(0.4884, 0.4892), (0.0029, 0.0031), (9e-5, 1.1e-4), (-45, 0), (1e4, 1.3e4)])
def test_tick_labels_tell_the_ticks_apart(low: float, high: float) -> None:
    svg = line_chart([Line("a", [(0, low), (1, high)], "c-train")], title="T")
    labels = re.findall(r'text-anchor="end">([-\d.,e]+)<', svg)
    assert len(labels) >= 2
    assert len(set(labels)) == len(labels)
    assert max(map(len, labels)) <= 7


def test_small_changes_look_small() -> None:
    def height(span: float) -> float:
        svg = line_chart([Line("a", [(0, 1.0), (1, 1.1)], "c-train")], title="T", span=span)
        found = re.search(r'c-train" d="M[\d.]+ ([\d.]+)L[\d.]+ ([\d.]+)"', svg)
        assert found is not None
        return float(found[1]) - float(found[2])

    assert height(1.0) == pytest.approx(height(0.0) * 0.112, rel=0.02)


def test_long_curves_are_thinned_and_keep_their_ends_and_mean() -> None:
    points = [(float(x), float(x % 7)) for x in range(10_000)]
    thin = thinned([*points, (10_000.0, float("nan"))])
    assert len(thin) == 400
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert sum(y for _, y in thin) / 400 == pytest.approx(3.0, abs=0.1)
    assert smoothed([(0, 1.0), (1, 3.0), (2, 5.0)], 2) == [(0, 1.0), (1, 2.0), (2, 4.0)]


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


class Browser:
    """Headless Chromium with one page, driven over its debugging pipe; `requests` are the page's, `errors` its own."""

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        assert program is not None, "these tests need Chromium: bash launch/setup.sh --dev"
        (to_read, self._to), (self._from, to_write) = os.pipe(), os.pipe()
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                   "--autoplay-policy=no-user-gesture-required", "--window-size=1280,1600", "--remote-debugging-pipe",
                   f"--user-data-dir={profile}"]  # fmt: skip
        joined = f"exec {shlex.join(command)} 3<&{to_read} 4>&{to_write} 2>/dev/null"
        self.process = subprocess.Popen(["bash", "-c", joined], pass_fds=(to_read, to_write))
        os.close(to_read), os.close(to_write)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._buffer, self._number, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer, noting what the page does meanwhile."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, page: Path) -> None:
        """Load a page wholly."""
        self.call("Page.navigate", url=page.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, script: str) -> Any:
        """The value of a script in the page, awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def close(self) -> None:
        """End the browser."""
        self.process.kill()
        self.process.wait()
        os.close(self._to), os.close(self._from)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], 60)
            received = os.read(self._from, 2**16) if ready else b""
            assert received, "Chromium does not answer"
            self._buffer += received
        message, self._buffer = self._buffer.split(b"\0", 1)
        event: dict[str, Any] = json.loads(message)
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(str(params))
        return event


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    started = Browser(tmp_path / "profile")
    yield started
    started.close()


def beyond_the_page(browser: Browser) -> list[str]:
    return [url for url in browser.requests if not url.startswith(("file:", "data:", "about:"))]


def test_in_a_browser_it_asks_for_nothing_and_plays(run: Path, browser: Browser) -> None:
    browser.open(write_report(run))
    facts = browser.evaluate(PROBE)
    assert beyond_the_page(browser) == []
    assert browser.errors == []
    assert facts["durations"] == pytest.approx([1.0] * 5, abs=0.01)
    assert min(facts["pictures"]) > 0
    assert facts["paused"], "starting one player stops the other"
    assert facts["position"] >= 0.5, "and goes on where the other was"
    assert facts["shown"] >= 15
    assert not facts["wider"]


def test_it_is_dark_where_that_is_wished_and_narrow_on_a_phone(run: Path, browser: Browser) -> None:
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    browser.open(write_report(run))
    facts = browser.evaluate(PROBE)
    assert facts["paper"] == "rgb(22, 23, 26)"
    assert not facts["wider"]


def test_the_browser_test_would_notice_a_request(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "page.html"
    page.write_text('<!doctype html><img src="http://127.0.0.1:9/picture.png">')
    browser.open(page)
    assert beyond_the_page(browser) == ["http://127.0.0.1:9/picture.png"]
