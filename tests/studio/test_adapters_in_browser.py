"""The Adapters page as a person meets it."""

import re
from pathlib import Path

from playwright.sync_api import Page, expect

from sa3train.adapters.formats.io import load_adapter
from sa3train.studio.server.workspace import Workspace


def choose(page: Page, box: str, value: str) -> None:
    field = page.locator(f"#{box} input")
    field.click()
    page.get_by_role("option", name=value).first.wait_for()  # the list comes when the page is there
    field.fill(value)
    field.press("Enter")
    field.blur()


def test_an_adapter_is_inspected_and_converted(page: Page, workspace: Workspace, artefacts: Path) -> None:
    page.click("#tab-adapters-button")
    result = page.locator("#adapters-result")
    expect(result.locator(".empty")).to_be_visible()
    page.click("#inspect-run")
    expect(page.locator("#inspect-adapter")).to_have_attribute("data-error", re.compile("choose one first"))
    choose(page, "inspect-adapter", "adapters/one.safetensors")
    page.click("#inspect-run")
    expect(result.locator("h3")).to_have_text(f"{workspace.sources[0].name}/adapters/one.safetensors")
    page.screenshot(path=artefacts / "adapters-inspect.png", full_page=True)

    page.locator("#adapter-tools").get_by_role("tab", name="Convert").click()
    choose(page, "convert-adapter", "adapters/one.safetensors")
    page.get_by_label("ComfyUI (.safetensors)").check()
    page.get_by_label("Write to").locator("visible=true").fill("out/one_comfy.safetensors")
    page.click("#convert-run")
    expect(result.locator("h3")).to_have_text("Written: out/one_comfy.safetensors")
    assert load_adapter(workspace.folder / "out" / "one_comfy.safetensors").tensors
    page.screenshot(path=artefacts / "adapters-convert.png", full_page=True)

    page.click("#convert-run")
    toast = page.locator(".toast-body")
    expect(toast.filter(has_text="Overwrite")).to_be_visible()
    page.get_by_label("Write to").locator("visible=true").fill("../one.safetensors")
    page.click("#convert-run")
    expect(toast.filter(has_text="not inside the workspace")).to_be_visible()
    assert not (workspace.folder.parent / "one.safetensors").exists()


def test_the_list_knows_what_was_written(page: Page, workspace: Workspace) -> None:
    page.click("#tab-adapters-button")
    page.locator("#adapter-tools").get_by_role("tab", name="Resize").click()
    choose(page, "resize-adapter", "adapters/two.safetensors")
    page.get_by_label("Write to").locator("visible=true").fill("out/two_r1.safetensors")
    page.fill("#resize-rank textarea, #resize-rank input", "1")
    page.click("#resize-run")
    result = page.locator("#adapters-result")
    expect(result).to_contain_text("of the change over all layers")
    page.locator("#adapter-tools").get_by_role("tab", name="Merge").click()
    page.locator("#merge-paths input").click()
    expect(page.get_by_role("option", name="out/two_r1.safetensors")).to_be_visible()
