"""Model cards: what they say, what they leave out, and a folder that is whole or absent."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from helpers.golden import PLAIN
from sa3train.adapters.adapter import Adapter
from sa3train.adapters.formats.io import load_adapter, save_adapter
from sa3train.core.errors import SA3Error
from sa3train.reports.card import NAMES_ONLY, CardOptions, Sample, find_run, pack_card, render_card, write_run_card

EVIL = "koto ``` # heading <script>"


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    metadata = {
        "base_model": "small-music-base",
        "prompts": json.dumps(["solo koto", EVIL]),
        "training_config": '{"data": {"dir": "/secret/place"}}',
        "trigger": "zmx",
        "step": "20",
        "data_summary": "18 clips",
    }
    return replace(load_adapter(PLAIN / "adapters" / "dora-rows.safetensors"), metadata=metadata, source="")


def read_front_matter(card: str) -> dict[str, Any]:
    front: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return front


def test_the_front_matter_is_what_the_hub_reads(adapter: Adapter) -> None:
    card = render_card(adapter, "a.safetensors", CardOptions("koto", "cc-by-4.0"), [Sample("samples/1.flac", EVIL)])
    front = read_front_matter(card)
    assert front["base_model"] == "stabilityai/stable-audio-3-small-music-base"
    assert (front["license"], front["instance_prompt"]) == ("cc-by-4.0", "zmx")
    assert front["widget"] == [{"text": EVIL, "output": {"url": "samples/1.flac"}}]
    assert {"dora-rows", "stable-audio-3"} <= set(front["tags"])
    assert "--model small-music --lora a.safetensors -p 'solo koto'" in card
    assert "18 clips" in card and "20 training steps" in card


@pytest.mark.parametrize(
    ("license", "front"),
    [(None, {}), ("mit", {"license": "mit"}), ("Ask me", {"license": "other", "license_name": "Ask me"})],
)
def test_a_license_is_only_what_the_author_says(license: str | None, front: dict[str, str], adapter: Adapter) -> None:
    card = render_card(adapter, "a.safetensors", CardOptions("koto", license))
    assert {key: value for key, value in read_front_matter(card).items() if key.startswith("license")} == front
    assert ("has stated no license" in card) == (license is None)


def test_prompts_cannot_end_the_code_that_they_stand_in(adapter: Adapter) -> None:
    body = render_card(adapter, "a.safetensors", CardOptions("koto"), [Sample("1.wav", EVIL)]).split("---\n", 2)[2]
    outside = "".join(body.split("```")[::2])
    assert body.count("```") == 4 and "heading" not in "".join(outside.split("`")[::2])


@pytest.mark.parametrize(
    ("prompts", "example", "only_names"),
    [
        (["kick_01", "kick", "warm analog pad, 90 BPM, A minor", "a very long and slow koto melody"], 2, False),
        (["Kick_01 wav", "lo-fi drum loop"], 1, False),
        (["kick_01", "BassHit_4"], 0, True),
        (["koto"], 0, True),
    ],
)
def test_the_example_is_the_prompt_that_describes_most(
    prompts: list[str], example: int, only_names: bool, adapter: Adapter
) -> None:
    named = replace(adapter, metadata={"prompts": json.dumps(prompts)})
    card = render_card(named, "a.safetensors", CardOptions("koto"))
    assert f"-p {shlex.quote(prompts[example])} -o" in card
    assert (NAMES_ONLY in card) == only_names


def test_a_run_folder_says_what_its_adapter_is(run: Path, adapter: Adapter) -> None:
    save_adapter(run / "adapter.safetensors", replace(adapter, metadata={"base_model": "nano-base"}))
    write_run_card(run)
    card = (run / "README.md").read_text()
    assert (
        "# style-1" in card
        and "10.0% lower per clip than the base model's (±34.0%, 12 clips: within noise)" in card
        and "18 clips, 7 min" in card
    )
    assert "demos/step-00000020/nano-base-prompt0-1.wav" in card and "step-00000010" not in card
    assert "drums" not in card, "prompts of an adapter that carries none are private"
    save_adapter(run / "adapter.safetensors", replace(adapter, metadata={"prompts": '["koto"]', "step": "10"}))
    write_run_card(run)
    card = (run / "README.md").read_text()
    assert "drums" in card and "measured at step 20" in card
    found = find_run(run / "adapter.safetensors")
    assert found is not None and found.path == run


@pytest.mark.parametrize("shows_prompts", [True, False])
def test_the_folder_for_the_hub_holds_nothing_else(
    shows_prompts: bool, run: Path, adapter: Adapter, tmp_path: Path
) -> None:
    save_adapter(run / "adapter.safetensors", adapter)
    target = pack_card(tmp_path / "hub", adapter, CardOptions("koto", shows_prompts=shows_prompts), run=find_run(run))
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert files == ["README.md", "koto.safetensors", "samples/1.wav"]
    with safe_open(target / "koto.safetensors", framework="pt") as file:
        text = json.dumps(file.metadata()) + (target / "README.md").read_text()
    assert "/secret/place" not in text
    assert ("solo koto" in text) == shows_prompts
    assert load_adapter(target / "koto.safetensors").fingerprint == adapter.fingerprint


def test_a_folder_of_something_else_is_not_replaced(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(SA3Error, match="something else"):
        pack_card(tmp_path, adapter, CardOptions("koto"), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
