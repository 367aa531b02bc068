"""The Play page as a person meets it: all modes with two adapters, a comparison, bad uses, a reload in mid-work."""

import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from helpers.studio_page import close_error
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.studio.app import run_studio
from sa3train.studio.play import cards, form
from sa3train.studio.server.access import AccessSettings
from sa3train.studio.server.jobs import Job
from sa3train.studio.server.workspace import Workspace


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, generations stand still at their next step; they can be cancelled there."""
    opened, report = threading.Event(), Job.report_progress

    def wait(job: Job, message: str, progress: float) -> None:
        report(job, message, progress)
        while message.startswith("step") and not opened.wait(0.05):
            report(job, message, progress)

    monkeypatch.setattr(Job, "report_progress", wait)
    yield opened
    opened.set()


def settle(page: Page) -> None:
    """Two frames: what has just been opened listens to what is typed."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def fill_opened(page: Page, field: str, text: str) -> None:
    """Fill a field whose section has just been opened; twice, since it is put in workspace anew while that goes on."""
    box = page.locator(field)
    expect(box).to_be_visible()
    for written in ("", text):
        settle(page)
        box.fill(written)
    settle(page)
    box.blur()
    expect(box).to_have_value(text)


def ask(page: Page, prompt: str, duration: str = "1", steps: str = "2") -> None:
    page.fill("#play-prompt textarea", prompt)
    page.fill("#play-duration input", duration)
    if not page.locator("#play-steps textarea, #play-steps input").is_visible():
        page.get_by_role("button", name="More settings").click()
    fill_opened(page, "#play-steps textarea, #play-steps input", steps)


def add_adapters(page: Page) -> None:
    for number, name in enumerate(("one", "two")):
        page.get_by_role("button", name="Add adapter").click()
        page.locator("#play-rack fieldset").nth(number).get_by_label("File").fill(f"adapters/{name}.safetensors")
    page.locator("#play-rack fieldset").nth(1).get_by_label("Strength", exact=True).fill("0.5")


def choose_source(page: Page, path: str) -> None:
    field = page.locator("#play-source input")
    field.click()
    page.get_by_role("option", name="audio/tone.wav").first.wait_for()  # the list comes when the page is there
    field.fill(path)
    field.press("Enter")
    field.blur()


def newest(workspace: Workspace) -> dict[str, object]:
    record: dict[str, object] = json.loads(max(workspace.history.glob("*.json")).read_text(encoding="utf-8"))
    return record


def made(page: Page, workspace: Workspace, prompt: str) -> dict[str, object]:
    """Generate and wait for the card; the sidecar of what was made."""
    page.click("#play-generate")
    first = page.locator("#play-results article.card").first
    expect(first.locator("h3")).to_have_text(prompt)
    return newest(workspace)


def test_three_modes_with_two_adapters(page: Page, workspace: Workspace, artefacts: Path) -> None:
    ask(page, "text with two adapters")
    add_adapters(page)
    record = made(page, workspace, "text with two adapters")
    assert [entry["strength"] for entry in record["adapters"]] == [1.0, 0.5]  # type: ignore[attr-defined]
    page.screenshot(path=artefacts / "play-text.png", full_page=True)

    page.get_by_label("Audio to audio", exact=True).check()
    choose_source(page, "audio/tone.wav")
    ask(page, "restyled")
    record = made(page, workspace, "restyled")
    assert record["inputs"]["init_audio"]["path"].endswith("tone.wav")  # type: ignore[index]

    page.get_by_label("Inpaint", exact=True).check()
    ask(page, "filled in", duration="2")
    canvas = page.locator("#play-regions canvas")
    expect(canvas).to_have_attribute("aria-label", "waveform, 2 seconds, 1 regions")
    expect(page.locator("#play-regions")).to_contain_text("The marked regions are regenerated")
    page.get_by_role("button", name="remove region 1").click()
    expect(canvas).to_have_attribute("aria-label", "waveform, 2 seconds, 0 regions")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 40, steps=4)
    page.mouse.up()
    expect(page.get_by_label("region 1, start in seconds")).to_have_value("0.5")
    page.get_by_role("button", name="Add region").click()
    page.get_by_label("region 2, end in seconds").fill("1.9")
    page.get_by_label("region 2, end in seconds").press("Tab")
    record = made(page, workspace, "filled in")
    settings = record["settings"]
    assert settings["inpaint_mask_start_seconds"] == [0.5, 1.0]  # type: ignore[index]
    assert settings["inpaint_mask_end_seconds"] == [1.0, 1.9]  # type: ignore[index]
    page.screenshot(path=artefacts / "play-inpaint.png", full_page=True)
    page.get_by_role("button", name="remove region 2").click()
    page.locator("#play-results article.card").first.get_by_role("button", name="Reuse settings").click()
    expect(page.get_by_label("region 2, end in seconds")).to_have_value("1.9")


def test_a_late_answer_leaves_drawn_regions_alone(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    page.get_by_label("Inpaint", exact=True).check()
    choose_source(page, "audio/tone.wav")
    add, canvas = page.get_by_role("button", name="Add region"), page.locator("#play-regions canvas")
    expect(page.locator("#play-duration input")).to_have_value("2")
    expect(page.get_by_label("region 1, end in seconds")).to_have_value("1.33")
    settle(page)
    asked, answer, drawing = threading.Event(), threading.Event(), form.describe_waveform

    def slow(*arguments: Any) -> Any:
        asked.set()
        assert answer.wait(600)
        return drawing(*arguments)

    monkeypatch.setattr(form, "describe_waveform", slow)
    page.fill("#play-duration input", "30")
    assert asked.wait(600)
    add.click()
    field, before = page.get_by_label("region 2, end in seconds"), canvas.evaluate("one => one.toDataURL()")
    drawn = field.input_value()
    answer.set()
    page.wait_for_function(
        "before => document.querySelector('#play-regions canvas').toDataURL() !== before", arg=before
    )
    expect(field).to_have_value(drawn)
    expect(canvas).to_have_attribute("aria-label", "waveform, 2 seconds, 2 regions")


def test_a_grid_and_what_one_does_with_a_result(page: Page, workspace: Workspace, artefacts: Path) -> None:
    ask(page, "a grid")
    add_adapters(page)
    page.get_by_role("button", name="Compare, same seed").click()
    fill_opened(page, "#play-strengths input, #play-strengths textarea", "0, 1")
    page.get_by_label("Base and post-trained model side by side").check()
    settle(page)
    expect(page.locator("#play-strengths input, #play-strengths textarea")).to_have_value("0, 1")
    page.click("#play-compare")
    first = page.locator("#play-results article.card").first
    expect(first.locator(".take")).to_have_count(4)
    assert first.locator("h3").text_content() == "a grid"
    names = first.locator(".take b").all_text_contents()
    assert names == ["nano, no adapter", "nano, strength ×1", "nano-base, no adapter", "nano-base, strength ×1"]
    first.locator("summary", has_text="Copy as command").nth(1).click()
    assert "sa3-generate --model nano" in (first.locator("code").nth(1).text_content() or "")
    page.screenshot(path=artefacts / "play-grid.png", full_page=True)

    first.locator(".take").nth(1).get_by_role("button", name="Reuse settings").click()
    expect(page.locator("#play-rack fieldset")).to_have_count(2)
    expect(page.locator("#play-steps textarea, #play-steps input")).to_have_value("2")
    toast = page.locator(".toast-body")
    first.locator(".take").nth(0).get_by_role("button", name="Continue").click()
    expect(toast.last).to_contain_text("Adapters are now those of the result: none.")
    first.locator(".take").nth(3).get_by_role("button", name="Inpaint").click()
    expect(toast.last).to_contain_text(re.compile("of the result: .*one.safetensors, .*two.safetensors"))
    first.locator(".take").nth(0).get_by_role("button", name="Continue").click()
    expect(page.locator("#play-duration input")).to_have_value("1.5")
    expect(page.locator("#play-model")).to_be_in_viewport()
    expect(page.locator("#play-regions canvas")).to_be_visible()
    ask(page, "continued", duration="1.5")
    record = made(page, workspace, "continued")
    assert record["settings"]["inpaint_mask_start_seconds"] == [1.0]  # type: ignore[index]


def test_two_at_once_queue_cancel_is_immediate_and_a_reload_loses_nothing(
    page: Page, workspace: Workspace, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_cards = cards.list_cards

    def list_slowly(*arguments: Any) -> list[dict[str, str]]:
        time.sleep(2)  # an answer that takes longer than the next one must not arrive after it
        return list_cards(*arguments)

    monkeypatch.setattr(cards, "list_cards", list_slowly)
    before = len(list(workspace.history.glob("*.json")))
    ask(page, "slow one")
    page.click("#play-generate")
    expect(page.locator(".job[data-state=running]")).to_contain_text("step")
    ask(page, "kept")
    page.click("#play-generate")
    expect(page.locator(".job[data-state=waiting]")).to_contain_text("next to start")
    page.get_by_role("button", name="Cancel slow one").click()
    expect(page.locator(".job").filter(has_text="slow one")).to_have_count(0)
    expect(page.locator(".job[data-state=running]")).to_contain_text("kept")
    page.reload()
    expect(page.locator(".job[data-state=running]")).to_contain_text("kept")
    gate.set()
    first = page.locator("#play-results article.card").first
    expect(first.locator("h3")).to_have_text("kept")
    assert len(list(workspace.history.glob("*.json"))) == before + 1


def test_a_narrow_screen_comes_back_to_its_page_too(page: Page) -> None:
    page.set_viewport_size({"width": 240, "height": 600})
    page.locator("#tab-adapters-button").click()
    page.reload()
    expect(page.locator("#tab-adapters")).to_be_visible()


def test_a_form_outlives_a_reload_until_it_is_reset(page: Page, workspace: Workspace) -> None:
    ask(page, "kept for later", duration="3")
    add_adapters(page)
    page.get_by_label("Inpaint", exact=True).check()
    choose_source(page, "audio/tone.wav")
    page.get_by_label("region 1, end in seconds").fill("1.9")
    page.get_by_label("region 1, end in seconds").press("Tab")
    page.locator("#tab-adapters-button").click()
    page.fill("#inspect-adapter input", "adapters/one.safetensors")
    page.locator("#inspect-adapter input").press("Enter")
    page.get_by_role("tab", name="Resize").click()
    page.locator("#resize-overwrite input").check()
    page.locator("#tab-runs-button").click()
    settings = page.get_by_label("Further settings, one per line")
    settings.fill("adapter.rank=8\nlogger.api_Key=123\noptimizer.lr=1e-3")
    settle(page)
    page.reload()
    expect(page.locator("#tab-runs")).to_be_visible()
    page.locator("#tab-play-button").click()
    expect(page.locator("#play-prompt textarea")).to_have_value("kept for later")
    expect(page.locator("#play-steps textarea, #play-steps input")).to_have_value("2")  # what is set is not hidden
    expect(page.locator("#play-rack fieldset").nth(1).get_by_label("Strength", exact=True)).to_have_value("0.5")
    expect(page.get_by_label("region 1, end in seconds")).to_have_value("1.9")
    page.locator("#tab-adapters-button").click()
    expect(page.locator("#inspect-adapter input")).to_have_value("adapters/one.safetensors")
    page.get_by_role("tab", name="Resize").click()
    expect(page.locator("#resize-overwrite input")).not_to_be_checked()
    page.locator("#tab-runs-button").click()
    expect(settings).to_have_value("adapter.rank=8\noptimizer.lr=1e-3")
    page.locator("#tab-play-button").click()
    page.locator("#tab-play .reset-form").click()
    for _ in range(2):
        expect(page.locator("#play-prompt textarea")).to_have_value("")
        expect(page.locator("#play-rack fieldset")).to_have_count(0)
        expect(page.locator("#play-source")).to_be_hidden()
        settle(page)
        page.reload()
        page.wait_for_function("() => Object.keys(sa3).filter(name => name.startsWith('kept_')).length === 4")


@pytest.mark.parametrize(
    ("fields", "marked"),
    [
        ({"bars": "4"}, "bars"),
        ({"prompt-at": "2: choir"}, "prompt-at"),
        ({"cfg-interval-max": "0.2"}, "cfg-interval-min"),
        ({"duration": "9999"}, "duration"),
        ({"batch-size": "10000"}, "batch-size"),
    ],
)
def test_what_the_generator_would_refuse_is_told_at_the_field_and_starts_nothing(
    page: Page, fields: dict[str, str], marked: str
) -> None:
    ask(page, "refused")
    page.get_by_role("button", name="Bars, loops").click()
    for name, value in fields.items():
        fill_opened(page, f"#play-{name} textarea, #play-{name} input", value)
    page.click("#play-generate")
    field = page.locator(f"#play-{marked}")
    expect(field).to_have_attribute("data-error", re.compile("."))
    expect(field.locator(".info-text:visible")).to_have_count(0)  # which had said the same when the field was left
    assert page.locator(".job").count() == 0
    field.locator("textarea, input").first.fill("1")
    expect(page.locator("[data-error]")).to_have_count(0)


def test_a_message_leaves_its_field_visible_on_a_phone(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.click("#play-generate")
    field = page.locator("#play-prompt")
    expect(field).to_have_attribute("data-error", re.compile("empty"))
    message, box = page.locator(".toast-body").bounding_box(), field.bounding_box()
    assert message is not None and box is not None
    assert message["y"] + message["height"] <= box["y"] <= box["y"] + box["height"] <= 800
    page.get_by_test_id("toast-close").click()
    expect(page.locator(".toast-body")).to_have_count(0)
    expect(field).to_have_attribute("data-error", re.compile("empty"))
    page.locator("#tab-play .reset-form").click()
    expect(page.locator("[data-error]")).to_have_count(0)


def test_an_error_that_comes_again_stays_as_long_as_the_first(page: Page) -> None:
    page.clock.install()
    toast = page.locator(".toast-body")
    for _ in range(2):
        page.click("#play-generate")
        expect(toast.filter(has_text="Prompt is empty")).to_have_count(1)
        page.clock.fast_forward(15_000)
    expect(toast).to_have_count(1)
    page.clock.fast_forward(6_000)
    expect(toast).to_have_count(0)


def test_bad_uses_are_told(page: Page, workspace: Workspace, tmp_path: Path) -> None:
    before = len(list(workspace.history.glob("*")))
    page.click("#play-generate")
    close_error(page, "prompt")
    ask(page, "bad")
    page.get_by_role("button", name="Add adapter").click()
    file = page.locator("#play-rack fieldset").first.get_by_label("File")
    link = workspace.sources[0] / "link"
    link.unlink(missing_ok=True)
    link.symlink_to("/etc")
    for path in ("/etc/passwd", "../../x.safetensors", "link/passwd"):
        file.fill(path)
        page.click("#play-generate")
        close_error(page, "outside the folders")
    link.unlink()
    file.fill("adapters/one.safetensors")
    page.get_by_role("button", name="Add adapter").click()
    second = page.locator("#play-rack fieldset").nth(1)
    second.get_by_label("File").fill("adapters/one.safetensors@7")
    page.click("#play-generate")
    close_error(page, "step 7")
    expect(second).to_have_attribute("data-error", re.compile("^Adapter 2: "))
    spanned = second.evaluate("one => getComputedStyle(one, '::after').gridColumn")
    assert spanned == "1 / -1", "the message is as wide as the adapter's fields"
    for number in (2, 1):
        page.get_by_role("button", name=f"remove adapter {number}").click()
    page.get_by_label("Audio to audio", exact=True).check()
    choose_source(page, "audio/words.wav")
    close_error(page, "words.wav")
    huge = tmp_path / "huge.wav"
    huge.write_bytes(b"RIFF" + bytes(3 * 2**20))
    page.locator(".play-source-box input[type=file]").set_input_files(huge)
    close_error(page, "size")
    assert len(list(workspace.history.glob("*"))) == before
    assert not [path for path in workspace.uploads.rglob("*") if path.is_file() and path.stat().st_size > 2 * 2**20]


def test_uploads_are_kept_inside_the_studio(page: Page, workspace: Workspace) -> None:
    page.locator("#play-rack input[type=file]").set_input_files(workspace.sources[0] / "adapters" / "two.safetensors")
    uploaded = page.locator("#play-rack fieldset").first.get_by_label("File")
    expect(uploaded).to_have_value(re.compile("two.safetensors$"))
    assert Path(uploaded.input_value()).is_relative_to(workspace.uploads)
    page.get_by_label("Audio to audio", exact=True).check()
    page.locator(".play-source-box input[type=file]").set_input_files(workspace.sources[0] / "audio" / "tone.wav")
    expect(page.locator("#play-regions canvas")).to_have_attribute("aria-label", re.compile("2 seconds"))
    expect(page.locator("#play-duration input")).to_have_value("2")
    ask(page, "from uploads")
    record = made(page, workspace, "from uploads")
    assert Path(record["inputs"]["init_audio"]["path"]).is_relative_to(workspace.uploads)  # type: ignore[index]


@pytest.mark.parametrize("path", ["/etc/passwd", "{root}/../x", "{root}/.env"])
def test_other_files_are_not_served(address: str, workspace: Workspace, path: str) -> None:
    (workspace.sources[0] / ".env").write_text("secret")
    answer = httpx.get(f"{address}gradio_api/file={path.replace('{root}', str(workspace.sources[0]))}")
    assert answer.status_code in (403, 404)


def test_a_studio_with_a_password_shows_nothing_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # and back to that of the shared studio
    (tmp_path / "take.wav").write_bytes(b"RIFF")
    guarded = Workspace.create(tmp_path / "studio", [tmp_path], device="cpu")
    with (
        run_studio(guarded, AccessSettings(password="a long password")) as found,
        httpx.Client(base_url=found) as client,
    ):
        asked = f"gradio_api/file={tmp_path}/take.wav"
        assert client.get("config").status_code == 401
        assert client.get(asked).status_code == 401
        assert client.post("login", data={"username": "me", "password": "a wrong word"}).status_code == 400
        assert client.post("login", data={"username": "me", "password": "a long password"}).status_code == 200
        assert client.get(asked).status_code == 200


def test_prompts_that_an_adapter_carries_are_offered(page: Page, workspace: Workspace) -> None:
    path = workspace.sources[0] / "adapters" / "one.safetensors"
    adapter = load_adapter(path)
    save_adapter(
        path.with_name("told.safetensors"), replace(adapter, metadata={"prompts": '["solo koto", "koto duo"]'})
    )
    expect(page.locator("#play-offered")).to_be_hidden()
    page.get_by_role("button", name="Add adapter").click()
    page.locator("#play-rack fieldset").first.get_by_label("File").fill("adapters/told.safetensors")
    page.locator("#play-rack fieldset").first.get_by_label("File").blur()
    page.locator("#play-offered input").click()
    page.get_by_role("option", name="koto duo").click()
    expect(page.locator("#play-prompt textarea")).to_have_value("koto duo")
