"""The Runs page as a person meets it: a run is planned, started, lost with its server, found, stopped, resumed."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from helpers.audio import noise, write_clip
from helpers.chromium import PATIENCE_MS
from helpers.studio_page import close_error, find_serious_violations, open_studio
from sa3train.cli.encode import main as encode_main
from sa3train.core import processes

FAST = "callbacks=none\ndata.num_workers=0\ndata.batch_size=2\ntrainer.log_every=1"


class Studio:
    """A studio in a process of its own, that can be killed and started again at the same address."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "sa3train.cli.studio", str(self.root.parent)]
        command += ["--workspace", str(self.root), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.address in self.process.stdout.readline()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the latents of 4 short clips, in a folder with their audio."""
    folder = tmp_path_factory.mktemp("pack") / "studio"
    for number in range(4):
        write_clip(folder.parent / "audio" / f"{number}.wav", noise(1.2 + number / 10, seed=number), f"noise {number}")
    encode = [f"source={folder.parent / 'audio'}", f"out={folder / 'latents'}", "model=nano", "split=0.3"]
    assert encode_main(encode) == 0
    return folder


@pytest.fixture(scope="module")
def studio(root: Path) -> Iterator[Studio]:
    found = Studio(root)
    yield found
    found.kill()
    for folder in (root / "runs").glob("*/"):
        processes.stop(folder, at_once=True)  # what a failed test has left behind


def clear(root: Path) -> None:
    """Take away the runs of a test that came before, which may have been this one's first try."""
    for folder in (root / "runs").glob("*/"):
        processes.stop(folder, at_once=True)
        while processes.get_running_pid(folder) is not None:
            time.sleep(0.05)
        shutil.rmtree(folder)


@pytest.fixture
def page(browser: Browser, studio: Studio, root: Path) -> Iterator[Page]:
    """The Runs page, with no run on it."""
    clear(root)
    if studio.process.poll() is not None:
        studio.start()  # a test ended between its two
    with open_studio(browser, studio.address) as found:
        open_runs_page(found)
        yield found


def open_runs_page(page: Page) -> None:
    page.get_by_role("tab", name="Runs", exact=True).click()
    expect(page.locator("#run-start")).to_be_visible()


def fill(page: Page, folder: str, steps: int, further: str = FAST) -> None:
    page.get_by_label("Run folder").fill(folder)
    page.locator("#run-steps input, #run-steps textarea").fill(str(steps))
    page.get_by_label("Further settings").fill(further)


def state(page: Page, words: str) -> None:
    expect(page.locator("#run-head .state")).to_have_text(re.compile(f"^{words}"))


def choose(page: Page, name: str) -> None:
    """Show a run, whichever is shown."""
    page.locator("#run-list label").filter(has_text=name).click()
    expect(page.locator("#run-head h2")).to_contain_text(name)


def steps(folder: Path) -> int:
    lines = (folder / "metrics.csv").read_text().splitlines() if (folder / "metrics.csv").is_file() else []
    return int(lines[-1].partition(",")[0]) if len(lines) > 1 else 0


def other_run(folder: Path, name: str) -> None:
    """A finished run that differs from the one in `folder` in its steps."""
    other = folder.with_name(name)
    other.mkdir()
    config = (folder / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"max_steps: \d+", "max_steps: 7", config))
    shutil.copy(folder / "run.json", other)


@pytest.mark.slow
def test_a_run_outlives_the_server_and_is_found_again(page: Page, studio: Studio, root: Path, artefacts: Path) -> None:
    fill(page, "lasting", 30)
    page.locator("#run-start").click()
    expect(page.locator("#run-start-told")).to_contain_text("Started runs/lasting")
    expect(page.locator("#run-head h2")).to_contain_text("runs/lasting")
    pid = processes.read_record(root / "runs" / "lasting")["pid"]
    studio.kill()
    ended = (root / "runs" / "lasting" / "adapter.safetensors").is_file()  # the page may be slower than the run
    assert ended or psutil.pid_exists(pid), "the run went with its server"
    studio.start()
    page.goto(studio.address)
    open_runs_page(page)
    choose(page, "runs/lasting")
    state(page, "finished")
    assert steps(root / "runs" / "lasting") == 30
    assert (root / "runs" / "lasting" / "adapter.safetensors").is_file()
    expect(page.locator("#run-curves")).to_contain_text("Training loss")
    expect(page.locator("#run-command")).to_contain_text("sa3-train recipe=style")
    assert find_serious_violations(page) == []
    page.screenshot(path=artefacts / "runs.png", full_page=True)
    page.locator("#tab-runs").get_by_role("tab", name="Evaluate").click()
    expect(page.locator("#evaluate-start")).to_be_visible()
    page.locator("#run-head [data-play]").click()
    expect(page.locator("#play-rack fieldset").first.get_by_label("File")).to_have_value("runs/lasting")


@pytest.mark.slow
def test_watched_stopped_and_resumed(page: Page, root: Path) -> None:
    folder = root / "runs" / "long"
    fill(page, "runs/long", 100_000)
    page.locator("#run-start").click()
    expect(page.locator("#run-head h2")).to_contain_text("runs/long")
    state(page, "running")
    left = [page.locator(place).bounding_box() for place in ("#run-stop", "#run-head h2")]
    assert len({box["x"] for box in left if box}) == 1  # they stand below each other
    expect(page.locator("#run-curves")).to_contain_text("Steps per second")
    expect(page.get_by_label("Run folder")).to_have_value("")
    page.get_by_label("Run folder").fill("runs/long")
    page.locator("#run-start").click()
    expect(page.locator("#run-start-told")).to_contain_text("Press Start again")
    page.locator("#run-start").click()
    close_error(page, "already exists")
    page.locator("#run-stop").click()
    state(page, "stopped")
    reached = steps(folder)
    assert 0 < reached < 100_000
    assert list((folder / "checkpoints").glob("*.safetensors")), processes.read_log_tail(folder)
    page.locator("#run-resume").click()
    state(page, "running")
    until = time.monotonic() + PATIENCE_MS / 1000
    while steps(folder) <= reached and time.monotonic() < until:
        page.wait_for_timeout(500)
    assert steps(folder) > reached
    page.reload()
    open_runs_page(page)
    choose(page, "runs/long")
    state(page, "running")
    page.locator("#run-stop").click()
    state(page, "stopped")
    runs = page.locator("#tab-runs")
    runs.get_by_role("tab", name="Log", exact=True).click()
    expect(page.locator("#run-log")).to_contain_text("the state is saved")
    runs.get_by_role("tab", name="Settings", exact=True).click()
    other_run(folder, "shorter")
    expect(page.locator("#run-list")).to_contain_text("runs/shorter")
    page.locator("#run-other input").click()
    page.get_by_role("option", name="runs/shorter").click()
    expect(page.locator("#run-differences")).to_contain_text("trainer.max_steps")
    assert find_serious_violations(page) == []


def test_bad_requests_are_refused_with_a_message(page: Page, root: Path, tmp_path: Path) -> None:
    (root / "link").unlink(missing_ok=True)
    (root / "link").symlink_to(tmp_path)
    for folder, further, message in (
        ("../audio/run", FAST, "not inside the workspace"),
        ("/etc/run", FAST, "not inside the workspace"),
        ("runs/x", "run_dir=/etc", "is set by the field Run folder"),
        ("runs/x", "hydra.run.dir=/etc", "cannot be set here"),
        ("runs/x", "optimizer.lrr=1", "optimizer.lr"),
        ("runs/x", "data.prompts.trigger=$\\{oc.env:HOME\\}", "refers to other settings"),
        ("link/x", FAST, "not inside the workspace"),
    ):
        fill(page, folder, 2, further)
        page.locator("#run-start").click()
        close_error(page, message)
        assert not (root / "runs" / "x").exists()
        assert not list(tmp_path.iterdir())
    (root / "link").unlink()


def test_a_plan_and_a_wrong_number_that_is_explained_where_it_is_typed(page: Page, root: Path, artefacts: Path) -> None:
    fill(page, "runs/${oc.env:HOME}", -1)
    page.locator("#run-steps input, #run-steps textarea").blur()
    expect(page.locator("#run-form")).to_contain_text("Steps must be from 1")
    page.locator("#run-steps input, #run-steps textarea").fill("3")
    page.get_by_label("Further settings").focus()
    expect(page.locator("#run-form")).not_to_contain_text("Steps must be from 1")
    page.locator("#run-plan").click()
    expect(page.locator("#run-plan-shown")).to_contain_text("3 with a batch of 2 clips")
    expect(page.locator("#run-plan-shown")).to_contain_text("trial steps")
    expect(page.locator("#run-plan-shown")).to_contain_text(re.compile("Memory plan.*weights"))
    assert not list((root / "runs").glob("*"))
    page.screenshot(path=artefacts / "runs-plan.png", full_page=True)
    expect(page.locator("#run-plan")).to_have_text("Plan")
    expect(page.locator("#run-plan-shown[data-old]")).to_have_count(0)
    page.locator("#run-steps input, #run-steps textarea").fill("4")
    expect(page.locator("#run-plan-shown[data-old]")).to_have_count(1)
    command = page.locator("#run-plan-shown code").text_content() or ""
    assert shlex.split(command)[4] == f'run_dir="{root}/runs/\\${{oc.env:HOME}}"'


@pytest.mark.slow
def test_a_run_started_during_a_plan_is_told_of_beside_it(page: Page, root: Path) -> None:
    fill(page, "runs/early", 2)
    page.locator("#run-plan").click()
    expect(page.locator("#run-plan-shown")).to_contain_text("trial steps")
    page.locator("#run-start").click()
    expect(page.locator("#run-start-told")).to_contain_text("Started runs/early")
    expect(page.locator("#run-plan-shown")).to_contain_text(re.compile("Memory plan.*weights"))
    expect(page.locator("#run-plan")).to_have_text("Plan")
    expect(page.locator("#run-start-told")).to_contain_text("Started runs/early")
    expect(page.get_by_label("Run folder")).to_have_value("")
    assert (root / "runs" / "early").is_dir()
    page.locator("#run-plan").click()
    expect(page.locator("#run-start-told")).to_have_text("")


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> None:
    """Processes of the tests take one core each."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
