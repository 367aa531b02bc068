"""The Data page as a person meets it: captions are edited and undone, a folder is audited and encoded, prompts seen."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from helpers.audio import noise, tone, write_clip
from helpers.chromium import PATIENCE_MS
from helpers.studio_page import close_error, find_serious_violations, open_studio
from sa3train.studio.data import captions
from sa3train.studio.server.workspace import Workspace

LATE_FRAMES = """() => {
    const frame = window.requestAnimationFrame;
    window.requestAnimationFrame = called => frame(time => setTimeout(called, 500, time));
}"""


@pytest.fixture
def clips(workspace: Workspace, tmp_path: Path) -> Path:
    """A folder of 4 short clips, one of them without caption; in the folder beside it a link leads out of the studio.

    What the test before has written is gone.
    """
    folder, linked = workspace.sources[1:]
    for path in (*folder.iterdir(), *linked.iterdir()):
        path.unlink()
    for number in range(3):
        write_clip(folder / f"{number}.wav", noise(1.0 + number / 10, seed=number), f"noise, number {number}")
    write_clip(folder / "bare.wav", tone(1.0))
    write_clip(tmp_path / "secret.wav", tone(0.2))
    (linked / "a.wav").symlink_to(tmp_path / "secret.wav")
    for name in ("captions", "jobs", "audits"):
        shutil.rmtree(workspace.home / name, ignore_errors=True)
    return folder


@pytest.fixture
def page(browser: Browser, address: str, clips: Path) -> Iterator[Page]:
    """The Data page with the folder chosen."""
    with open_studio(browser, address) as found:
        found.get_by_role("tab", name="Data", exact=True).click()
        expect(found.locator("#captions-count")).to_contain_text("2 clips")
        choose(found, str(clips))
        expect(found.locator("#captions-count")).to_contain_text("4 clips")
        yield found


def cell(page: Page, text: str) -> Locator:
    return page.locator("#captions-table").get_by_role("gridcell").filter(has_text=text).first


def caption_cell(page: Page, clip: str) -> Locator:
    row = page.locator("#captions-table").get_by_role("row").filter(has_text=re.compile(rf"^\s*{re.escape(clip)}"))
    return row.get_by_role("gridcell").nth(1)


def write(page: Page, clip: str, caption: str) -> None:
    """Type a caption into the table."""
    caption_cell(page, clip).dblclick()
    field = page.locator("#captions-table textarea")
    expect(field).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type(caption)
    expect(field).to_have_value(caption)
    page.keyboard.press("Enter")
    expect(field).to_have_count(0)
    expect(caption_cell(page, clip)).to_contain_text(caption)


def open_tab(page: Page, name: str) -> None:
    page.locator("#tab-data").get_by_role("tab", name=name, exact=True).click()


def choose(page: Page, folder: str) -> None:
    expect(page.locator("#data-folder:not([inert])")).to_be_visible()
    box = page.locator("#data-folder input")
    box.fill(folder)
    box.press("Enter")
    box.blur()


def test_captions_are_edited_saved_and_undone(page: Page, clips: Path, artefacts: Path) -> None:
    write(page, "bare.wav", "a plain tone")
    write(page, "0.wav", "noise, the first")
    only = page.get_by_label("Without caption only")
    only.check()
    close_error(page, "unsaved captions")
    page.locator("#captions-save").click()
    expect(page.locator("#captions-status")).to_contain_text("bare.txt")
    assert (clips / "bare.txt").read_text() == "a plain tone\n"
    assert (clips / "0.txt").read_text() == "noise, the first\n"
    expect(page.locator("#captions-status .command")).to_contain_text("printf")
    expect(page.locator("#captions-count")).to_contain_text("0 clips")
    only.uncheck()
    cell(page, "bare.wav").click()
    expect(page.locator("#captions-player b")).to_have_text("bare.wav")
    expect(page.locator("#captions-player audio")).to_be_visible()
    assert find_serious_violations(page) == []
    page.screenshot(path=artefacts / "data-captions.png", full_page=True)
    page.locator("#captions-undo").click()
    expect(page.locator("#captions-status")).to_contain_text("Captions taken back: 2")
    assert not (clips / "bare.txt").exists()
    assert (clips / "0.txt").read_text() == "noise, number 0"


def test_clips_are_captioned_and_captions_replaced(page: Page, clips: Path, artefacts: Path) -> None:
    page.get_by_role("button", name="Clips without a caption").click()
    page.locator("#captions-compose textarea").fill("{name} {sound}")
    page.locator("#captions-compose-all").click()
    expect(page.locator("#captions-status")).to_contain_text("Captioned 1 clip;")
    assert (clips / "bare.txt").read_text() == "bare tonal\n"
    page.get_by_role("button", name="Search and replace").click()
    page.locator("#captions-replace").get_by_label("Replace").fill("noise")
    page.locator("#captions-replace").get_by_label("With").fill("hiss")
    page.locator("#captions-replace-all").click()
    expect(page.locator("#captions-status")).to_contain_text("Replaced in 3 captions")
    expect(caption_cell(page, "0.wav")).to_contain_text("hiss, number 0")
    assert find_serious_violations(page) == []
    page.screenshot(path=artefacts / "data-captions-composed.png", full_page=True)
    for left in (1, 0):
        page.locator("#captions-undo").click()
        expect(page.locator("#captions-count")).to_contain_text(f"undone: {left}")
    assert not (clips / "bare.txt").exists() and (clips / "0.txt").read_text() == "noise, number 0"


def test_a_caption_is_kept_however_slow_the_answer(page: Page, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No letter waits for a frame; Save ends the typing by itself; while it is answered nothing can be typed that the
    answer would undo.
    """
    asked, answer, save = threading.Event(), threading.Event(), captions.save_captions

    def slow(*arguments: Any) -> Any:
        asked.set()
        assert answer.wait(PATIENCE_MS / 1000)
        return save(*arguments)

    monkeypatch.setattr(captions, "save_captions", slow)
    page.evaluate(LATE_FRAMES)
    caption_cell(page, "bare.wav").dblclick()
    page.keyboard.type("still in the field")
    page.locator("#captions-save").click()
    assert asked.wait(PATIENCE_MS / 1000)
    cell(page, "0.wav").dblclick(force=True)
    page.keyboard.type("too early")
    expect(page.locator("#captions-table textarea")).to_have_count(0)
    answer.set()
    expect(page.locator("#captions-status")).to_contain_text("bare.txt")
    assert (clips / "bare.txt").read_text() == "still in the field\n"
    monkeypatch.undo()
    write(page, "0.wav", "after the answer")
    page.locator("#captions-undo").click()  # refused: what was held is given back after an error too
    close_error(page, "unsaved captions")
    write(page, "1.wav", "after the error")
    page.locator("#captions-save").click()
    expect(page.locator("#captions-status")).to_contain_text("1.txt")
    said = [(clips / f"{name}.txt").read_text() for name in (0, 1)]
    assert said == ["after the answer\n", "after the error\n"]


def test_captioning_is_told_of_from_its_start(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, caption = threading.Event(), captions.caption_rest

    def slow(*arguments: Any) -> Any:
        assert answer.wait(PATIENCE_MS / 1000)
        return caption(*arguments)

    monkeypatch.setattr(captions, "caption_rest", slow)
    page.get_by_role("button", name="Clips without a caption").click()
    page.locator("#captions-compose-all").click()
    expect(page.locator("#captions-status")).to_contain_text(re.compile(r"Captioning and saving… [1-9] s"))
    answer.set()
    expect(page.locator("#captions-status")).to_contain_text("Captioned 1 clip;")


def test_captions_that_are_not_saved_outlive_another_server(page: Page, clips: Path) -> None:
    write(page, "bare.wav", "not saved yet")
    page.evaluate("window.isOld = true")
    page.route("**/gradio_api/app_id", lambda route: route.fulfill(json={"app_id": "another"}))
    told = page.get_by_role("alert").filter(has_text="captions that are not saved")
    expect(told).to_be_visible()
    with page.expect_event("dialog") as asked:
        page.evaluate("setTimeout(() => location.reload())")
    assert asked.value.type == "beforeunload"
    asked.value.dismiss()
    assert page.evaluate("window.isOld")
    expect(caption_cell(page, "bare.wav")).to_contain_text("not saved yet")
    page.locator("#captions-save").click()
    page.wait_for_function("!window.isOld")  # nothing is lost now
    assert (clips / "bare.txt").read_text() == "not saved yet\n"
    page.unroute("**/gradio_api/app_id")


def test_a_reload_comes_back_to_the_tab_on_the_page(page: Page) -> None:
    open_tab(page, "Encode")
    page.reload()
    expect(page.locator("#encode-start")).to_be_visible()
    page.locator("#tab-play-button").click()
    page.locator("#tab-data-button").click()
    page.reload()
    expect(page.locator("#encode-start")).to_be_visible()


def test_an_audit_says_what_is_wrong(page: Page, artefacts: Path) -> None:
    open_tab(page, "Audit")
    page.locator("#audit-start").click()
    expect(page.locator("#audit-result")).to_contain_text("write one to a .txt of its name")
    expect(page.locator("#audit-status")).to_contain_text("done")
    expect(page.locator("#audit-status .command")).to_contain_text("sa3-data audit")
    expect(page.locator("#audit-result audio")).to_have_count(4)
    expect(page.locator("#audit-result svg")).to_have_count(4)
    assert find_serious_violations(page) == []
    page.screenshot(path=artefacts / "data-audit.png", full_page=True)


def test_a_folder_is_encoded_and_its_prompts_are_seen(page: Page, workspace: Workspace, artefacts: Path) -> None:
    open_tab(page, "Encode")
    page.get_by_label("Folder for the latents").fill("latents/mine")
    page.get_by_label("optional", exact=True).last.check()
    page.locator("#encode-start").click()
    expect(page.locator("#encode-result")).to_contain_text("training clips")
    expect(page.locator("#encode-status .state")).to_have_text(re.compile("done"))
    index = json.loads((workspace.folder / "latents" / "mine" / "index.json").read_text())
    assert index["clips"] == 4
    assert find_serious_violations(page) == []
    page.screenshot(path=artefacts / "data-encode.png", full_page=True)
    open_tab(page, "Prompts")
    page.get_by_label("Trigger word").fill("zap")
    page.locator("#prompts-show").click()
    expect(page.locator("#prompts-shown")).to_contain_text("zap, noise, number 1")
    page.get_by_label("Templates, one per line").fill("{caption}\n{mood}")
    page.locator("#prompts-show").click()
    close_error(page, "has no effect")
    assert find_serious_violations(page) == []
    page.screenshot(path=artefacts / "data-prompts.png", full_page=True)


def test_folders_outside_and_links_out_are_refused(page: Page, clips: Path) -> None:
    choose(page, "/etc")
    close_error(page, "outside the folders that may be read")
    choose(page, "clips/../..")
    close_error(page, "outside the folders that may be read")
    choose(page, str(clips.parent / "linked"))
    close_error(page, "leads out of the studio")
    open_tab(page, "Audit")
    page.locator("#audit-start").click()
    close_error(page, "leads out of the studio")


def test_an_encode_that_lacks_captions_is_helped_by_a_click(page: Page, workspace: Workspace) -> None:
    open_tab(page, "Encode")
    page.get_by_label("Folder for the latents").fill("composed")
    page.locator("#encode-start").click()
    expect(page.locator("#encode-status .notice.error")).to_contain_text("no caption")
    page.get_by_role("button", name="Encode with Captions: auto").click()
    expect(page.locator("#encode-result")).to_contain_text("latents/composed")
    expect(page.locator("#encode-retry")).to_be_hidden()
    expect(page.locator("#encode-status .command code")).to_contain_text("captions=auto")
    assert json.loads((workspace.folder / "latents" / "composed" / "index.json").read_text())["clips"] == 4


def test_a_failed_encode_is_dismissed(page: Page, clips: Path) -> None:
    open_tab(page, "Encode")
    (clips / "mono.wav").write_text("no audio")
    page.locator("#encode-start").click()
    expect(page.locator("#encode-status .notice.error")).to_contain_text("Max rejected")
    page.locator("#encode-dismiss").click()
    expect(page.locator("#encode-status .notice.error")).to_have_count(0)
    expect(page.locator("#encode-dismiss")).to_be_hidden()
