"""What the form asks for is checked before anything is loaded."""

from dataclasses import replace
from pathlib import Path

import pytest

from sa3train.core.errors import RequestError
from sa3train.studio.play.form import values_of, wish_of
from sa3train.studio.play.request import AdapterWish, Wish, factors, regions_of
from sa3train.studio.server.workspace import StudioError, Workspace

PLAIN = Wish("nano", "a tone", duration=1.0)


def test_a_row_of_the_rack_is_an_adapter() -> None:
    row = {
        "path": "a.safetensors",
        "strength": 0.5,
        "conditioner": "",
        "low": 0.2,
        "high": 0.8,
        "exclude": "ff",
        "partial": True,
    }
    wish = AdapterWish.of_row(row)
    assert wish == AdapterWish("a.safetensors", 0.5, None, (0.2, 0.8), "ff", True)
    assert AdapterWish.of_row(wish.row()) == wish


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"path": ""}, "has no file"),
        ({"path": "a", "strength": "loud"}, "must be a number"),
        ({"path": "a", "low": True}, "number"),
    ],
)
def test_rows_that_say_nothing_usable_are_refused(row: dict[str, object], told: str) -> None:
    with pytest.raises((StudioError, RequestError), match=told):
        AdapterWish.of_row(row)


def test_a_wish_is_checked(workspace: Workspace) -> None:
    checked = replace(PLAIN, adapters=(AdapterWish("adapters/one.safetensors"),)).checked(workspace)
    assert checked.seed >= 0
    assert checked.adapters[0].path == str(workspace.roots[0] / "adapters" / "one.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": "  "}, "write a prompt"),
        ({"mode": "restyle"}, "starts from audio"),
        ({"mode": "restyle", "source": "../x.wav"}, "outside the folders"),
        ({"mode": "inpaint", "source": "audio/none.wav"}, "there is no audio file"),
        ({"mode": "inpaint", "source": "audio/tone.wav"}, "say what to generate anew"),
        ({"mode": "continue", "source": "audio/tone.wav"}, "ask for a longer duration"),
        ({"adapters": (AdapterWish("/etc/passwd"),)}, "outside the folders"),
        ({"adapters": (AdapterWish("adapters/none.safetensors"),)}, "there is no adapter"),
        ({"model": "../models/mine"}, "outside the folders"),
        ({"model": "medum"}, "there is no model folder"),
    ],
)
def test_wishes_that_cannot_be_are_refused(workspace: Workspace, change: dict[str, object], told: str) -> None:
    with pytest.raises(StudioError, match=told):
        replace(PLAIN, **change).checked(workspace)  # type: ignore[arg-type]


def test_a_continuation_starts_where_the_audio_ends(workspace: Workspace) -> None:
    wish = replace(PLAIN, mode="continue", source="audio/tone.wav", duration=3.0).checked(workspace)
    assert wish.regions == ((2.0, 3.0),)
    assert wish.arguments()["inpaint_mask_start_seconds"] == [2.0]


def test_modes_give_their_own_arguments(workspace: Workspace) -> None:
    assert "init_audio" not in PLAIN.arguments()
    restyled = replace(PLAIN, mode="restyle", source="audio/tone.wav").checked(workspace).arguments()
    assert restyled["init_audio"] == str(workspace.roots[0] / "audio" / "tone.wav")
    regions = ((0.1, 0.4), (0.6, 0.9))
    filled = replace(PLAIN, mode="inpaint", source="audio/tone.wav", regions=regions).checked(workspace).arguments()
    assert (filled["inpaint_mask_start_seconds"], filled["inpaint_mask_end_seconds"]) == ([0.1, 0.6], [0.4, 0.9])


def test_strengths_are_scaled_together() -> None:
    wish = replace(PLAIN, adapters=(AdapterWish("a", 0.8, 0.4), AdapterWish("b")))
    half = wish.at(0.5).adapters
    assert [(each.strength, each.conditioner_strength) for each in half] == [(0.4, 0.2), (0.5, None)]
    assert wish.at(0).adapters == ()


def test_the_twin_uses_its_own_sampling() -> None:
    twin = replace(PLAIN, steps=3, cfg_scale=4.0, negative_prompt="noise").on_sibling()
    assert (twin.model, twin.steps, twin.cfg_scale, twin.negative_prompt) == ("nano-base", None, None, None)
    with pytest.raises(StudioError, match="no known twin"):
        replace(PLAIN, model="/some/folder").on_sibling()


def test_lists_of_strengths_are_read() -> None:
    assert factors("1, 0; 0.5 ,1") == [0.0, 0.5, 1.0]
    for text in ("", "loud", ",".join(map(str, range(9))), "1e9"):
        with pytest.raises(StudioError):
            factors(text)


def test_regions_must_be_numbers() -> None:
    assert regions_of([[0, "1.5"]]) == ((0.0, 1.5),)
    with pytest.raises(RequestError, match="must be a number"):
        regions_of([[None, 1]])


def test_the_form_holds_a_whole_wish(workspace: Workspace) -> None:
    wish = Wish(
        "nano-base", "a tone", "inpaint", "noise", 1.5, 7, 2, 3, 2.5, "dpmpp", (0.1, 0.9), 1.0, 0.2, 0.5,
        str(Path(workspace.roots[0]) / "audio" / "tone.wav"), 0.7, ((0.5, 1.0),), True, True, "fp32",
        (AdapterWish("adapters/one.safetensors", 0.5, 0.2, (0.1, 0.6), "ff", True),),
    )  # fmt: skip
    again = wish_of(*values_of(workspace, wish))
    assert replace(again, source=wish.source) == wish
    assert again.checked(workspace).source == wish.source
