"""Captions composed of tags, names and sound: by template, for clips without one, and taken back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.audio import noise, write_clip
from helpers.golden import PLAIN
from sa3train.audio.analysis import AudioAnalysis
from sa3train.cli.data import main
from sa3train.cli.encode import main as encode
from sa3train.core.errors import SA3Error
from sa3train.data.captioning import files
from sa3train.data.captioning.captioner import Captioner
from sa3train.data.captioning.compose import compose_caption
from sa3train.data.captioning.service import caption_folder
from sa3train.data.captioning.template import DEFAULT_TEMPLATE, check_template, fill_parts
from sa3train.data.shards.reader import LatentStore
from sa3train.data.sources.captions import ClipText
from sa3train.data.sources.facts import Fact
from sa3train.data.sources.listing import list_source
from sa3train.data.sources.names import parse_name

VALUES = {"genre": "house", "kind": "bass loop", "bpm": "120", "key": "A minor"}


@pytest.mark.parametrize(
    ("template", "without", "caption"),
    [
        ("{genre} {kind}, {bpm} BPM, {key}", "", "house bass loop, 120 BPM, A minor"),
        ("{genre} {kind}, {bpm} BPM, {key}", "genre bpm", "bass loop, A minor"),
        ("{genre} {kind}, {bpm} BPM, {key}", "key kind", "house, 120 BPM"),
        ("my sound, {kind}", "", "my sound, bass loop"),
        ("my sound, {kind}", "kind", ""),
        ("{{x}} {kind}", "", "{x} bass loop"),
    ],
)
def test_parts_without_a_value_are_dropped(template: str, without: str, caption: str) -> None:
    assert fill_parts(template, {name: value for name, value in VALUES.items() if name not in without}) == caption


@pytest.mark.parametrize("template", ["{kind", "{tempo} BPM", "fixed text"])
def test_templates_that_cannot_be_filled(template: str) -> None:
    with pytest.raises(SA3Error):
        check_template(template)


def compose(name: str, *facts: Fact, **heard: object) -> tuple[str, list[str]]:
    text = ClipText(tags={fact.name: fact.value for fact in facts}, facts=list(facts), name=parse_name(name))
    composed = compose_caption(text, AudioAnalysis(**heard), DEFAULT_TEMPLATE)
    return composed.caption, [code for code, _ in composed.problems]


TAG, NAME = Fact("bpm", 128, "ACID chunk"), Fact("bpm", 120, "file name")
HEARD_CLEARLY = {"key": "E major", "key_strength": 0.95}


@pytest.mark.parametrize(
    ("name", "facts", "heard", "caption", "codes"),
    [
        ("bass loop.wav", [NAME], {}, "bass loop, 120 BPM", []),
        ("kick.wav", [Fact("root", "C", "sampler chunk")], {"sound": "percussive"}, "kick one-shot", []),
        ("pad.wav", [Fact("root", "C", "sampler chunk")], {}, "pad, C", []),
        ("bass loop.wav", [NAME], {"bpm": 60.2}, "bass loop, 120 BPM", []),  # half of it is heard
        ("bass loop.wav", [], {"bpm": 60.2, "key": "C major"}, "bass loop, 60 BPM, C major", []),
        ("bass.wav", [Fact("genre", "Hip-Hop", "ID3 tag")], {"bpm": 140.0}, "Hip-Hop bass, 140 BPM", []),
        ("bass.wav", [Fact("genre", "Trip-Hop", "ID3 tag")], {"bpm": 176.0}, "Trip-Hop bass, 88 BPM", []),
        ("bass.wav", [Fact("genre", "Dub, Drum & Bass", "tag")], {"bpm": 87.0}, "Dub, Drum & Bass bass, 174 BPM", []),
        ("dnb bass.wav", [Fact("genre", "drum and bass", "name")], {"bpm": 87.0}, "drum and bass bass, 174 BPM", []),
        ("Boom Bap/bass.wav", [Fact("genre", "boom bap", "name")], {"bpm": 56.0}, "boom bap bass, 112 BPM", []),
        ("Techno/bass.wav", [Fact("genre", "techno", "name")], {"bpm": 88.0}, "techno bass, 88 BPM", []),
        ("bass loop.wav", [NAME, TAG], {}, "bass loop", []),  # undecided
        ("bass loop.wav", [Fact("bpm", "fast", "bass loop.json")], {"bpm": 120.0}, "bass loop, 120 BPM", []),
        ("bass loop.wav", [NAME, TAG], {"bpm": 120.1}, "bass loop, 120 BPM", []),
        ("bass loop.wav", [NAME], {"bpm": 93.0}, "bass loop", ["tempo_heard"]),
        ("kick.wav", [NAME], {"form": "one-shot"}, "kick one-shot", []),
        ("pad.wav", [Fact("key", "A minor", "tag")], {"key": "C major"}, "pad, A minor", []),  # its relative
        ("pad.wav", [Fact("key", "A minor", "tag")], {"key": "E major"}, "pad, A minor", ["key_heard"]),
        ("pad.wav", [Fact("key", "A minor", "file name")], {"key": "E major"}, "pad, A minor", ["key_heard"]),
        ("pad.wav", [Fact("key", "A minor", "file name")], HEARD_CLEARLY, "pad", ["key_heard"]),
        ("pad.wav", [Fact("key", "A minor", "ACID chunk")], HEARD_CLEARLY, "pad, A minor", ["key_heard"]),
        ("kick.wav", [Fact("key", "A minor", "file name")], {"form": "one-shot"}, "kick one-shot", []),
        ("Loops/kick.wav", [], {"form": "one-shot"}, "kick one-shot", []),
        ("Loops/kick.wav", [], {"form": "loop"}, "kick loop", []),
        ("Loops/kick.wav", [Fact("bpm", 120, "folder name")], {"form": "one-shot"}, "kick one-shot", []),
        ("Loops/kick.wav", [NAME], {"form": "one-shot"}, "kick loop, 120 BPM", []),
        ("Loops/kick.wav", [TAG], {"form": "one-shot"}, "kick loop, 128 BPM", []),
        ("Crash Loop 120bpm.wav", [NAME], {"form": "one-shot"}, "crash cymbal loop, 120 BPM", []),
        ("One Shots/kick loop.wav", [], {"form": "one-shot"}, "kick loop", []),
        ("kick loop.wav", [Fact("key", "A minor", "file name")], {}, "kick loop, A minor", []),
        ("pad.wav", [Fact("root", "F#", "ACID chunk")], {}, "pad, F#", []),
        ("x.wav", [], {"sound": "percussive", "form": "loop"}, "percussive loop", []),
        ("Techno/rain on roof.wav", [Fact("genre", "techno", "name")], {"sound": "tonal"}, "techno rain roof", []),
    ],
)
def test_what_can_be_believed(
    name: str, facts: list[Fact], heard: dict[str, object], caption: str, codes: list[str]
) -> None:
    assert compose(name, *facts, **heard) == (caption, codes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two clips with a caption, two without, one that cannot be read."""
    made = tmp_path / "pack"
    write_clip(made / "a.wav", noise(0.3), "mine")
    write_clip(made / "b.wav", noise(0.3, seed=1))
    (made / "b.json").write_text(json.dumps({"prompt": "theirs", "bpm": 90}))
    write_clip(made / "Techno" / "bright snare 120bpm.wav", noise(0.3, seed=2))
    write_clip(made / "deep pad loop Am.wav", noise(0.3, seed=3))
    (made / "broken kick.wav").write_bytes(b"RIFF")
    return made


def make_captioner(folder: Path) -> str:
    """A random model that writes some of a few words for what it hears."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Speech2TextConfig, Speech2TextFeatureExtractor
    from transformers import Speech2TextForConditionalGeneration as Model

    words = ["<s>", "<pad>", "</s>", "<unk>", "warm", "piano", "dark", "drums"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    sizes = {
        f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")
    }
    config = Speech2TextConfig(
        vocab_size=len(words), d_model=8, conv_channels=8, max_source_positions=500, max_target_positions=64,
        decoder_start_token_id=2, pad_token_id=1, bos_token_id=0, eos_token_id=2, **sizes,
    )  # fmt: skip
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    for part in (
        Model(config),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        Speech2TextFeatureExtractor(),
    ):
        part.save_pretrained(folder)
    return str(folder)


def test_a_captioning_model_describes(folder: Path, tmp_path: Path) -> None:
    captioner = Captioner.load(make_captioner(tmp_path / "model"))
    with pytest.raises(SA3Error, match="description"):
        caption_folder(folder, "{kind}", captioner)
    captions = caption_folder(folder, "{description}, {kind}", captioner, dry_run=True).list_captions()
    said = captions["deep pad loop Am.wav"].removesuffix(", pad loop")
    assert set(said.split()) <= {"warm", "piano", "dark", "drums"} and said
    with pytest.raises(SA3Error, match="captioning model"):
        Captioner.load(str(tmp_path / "none"))


def test_an_unknown_captioning_model_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(url: str, **_: object) -> None:
        asked.append(url)
        raise OSError("no answer")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    with pytest.raises(SA3Error, match=r"config\.json of nobody/nothing failed: no answer"):
        Captioner.load("nobody/nothing")
    assert len(asked) == 1


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_clips_without_a_caption_are_captioned(folder: Path) -> None:
    write_clip(folder / "soft bell.wav", 0 * noise(0.3) + 0.1)
    only_lfe = np.zeros((len(noise(0.3)), 6))
    only_lfe[:, 3] = noise(0.3)[:, 0]
    write_clip(folder / "deep drone.wav", only_lfe)
    before = read_all(folder)
    done = caption_folder(folder)
    after = {name: content for name, content in read_all(folder).items() if name not in before}
    assert {name: content.decode() for name, content in after.items() if name.endswith(".txt")} == {
        "Techno/bright snare 120bpm.txt": "techno bright snare one-shot\n",
        "deep pad loop Am.txt": "deep pad loop, A minor\n",
    }
    problems = {one.source: one.problem for one in done.proposals if one.problem}
    assert done.kept == 2 and set(problems) == {"broken kick.wav", "soft bell.wav", "deep drone.wav"}
    assert problems["soft bell.wav"] == problems["deep drone.wav"] == "silent throughout"
    assert {name: content for name, content in read_all(folder).items() if name in before} == before
    assert caption_folder(folder).changes == []


def test_what_may_be_a_caption_is_not_covered(folder: Path) -> None:
    write_clip(folder / "twin.wav", noise(seconds=0.5))
    write_clip(folder / "twin.flac", noise(seconds=0.5, seed=1))
    write_clip(folder / "old.wav", noise(seconds=0.5))
    write_clip(folder / "broken.wav", noise(seconds=0.5))
    texts = {"old.txt": "Тёмный бас".encode("cp1251"), "broken.json": b'{"caption": "my words", }'}
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    done = caption_folder(folder)
    problems = {one.source: one.problem for one in done.proposals if one.problem}
    assert "its caption file is that of twin.flac" in problems["twin.wav"]
    assert "may have a caption: old.txt" in problems["old.wav"] and "broken.json" in problems["broken.wav"]
    assert (folder / "twin.txt").is_file() and not (folder / "broken.txt").exists()
    assert {name: (folder / name).read_bytes() for name in texts} == texts


def test_the_command_writes_and_takes_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_all(folder)
    assert main(["caption", str(folder), "--dry-run"]) == 0
    assert read_all(folder) == before
    assert main(["caption", str(folder), "--template", "{kind}"]) == 0
    printed = capsys.readouterr().out
    assert "broken kick.wav" in printed and "pad loop" in printed and "--undo" in printed
    (folder / "mine.txt").write_text("of no clip")
    edited = next(path for path in folder.rglob("*.txt") if str(path.relative_to(folder)) not in before)
    edited.write_text("my own words")
    assert main(["caption", str(folder), "--undo"]) == 0
    assert capsys.readouterr().out.endswith(f"). Edited since, so left alone: {edited.relative_to(folder)}.\n")
    edited.unlink()
    assert read_all(folder) == before | {"mine.txt": b"of no clip"}
    assert main(["caption", str(folder), "--undo"]) != 0
    assert main(["caption", str(folder), "--undo", "--dry-run"]) != 0


def test_what_an_undo_leaves_alone_is_not_lost(folder: Path) -> None:
    (clip,) = (clip for clip in list_source(str(folder)).clips if clip.source == "a.wav")
    for before, after in (("mine", "second"), ("second", "third")):
        files.save_captions(folder, [clip], [files.Edit("a.wav", before, after)])
    (folder / "a.txt").write_text("edited elsewhere")
    for _ in range(2):
        undone = files.undo_save(folder)
        assert (undone.restored, undone.kept) == ([], [folder / "a.txt"])
        logged = json.loads((folder / files.UNDO_FILE).read_text())
        assert {file["before"].strip() for entry in logged for file in entry["files"]} == {"mine", "second"}
    assert files.count_saves(folder) == 0


def test_encode_captions_a_folder_of_nothing_but_audio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, word in enumerate(("warm", "cold", "dusty", "clean")):
        write_clip(tmp_path / "pack" / f"{word} pad loop Am.wav", noise(0.3, seed=number))
    settings = [f"model={PLAIN}", "device=cpu", "threads=1", "captions=auto", "split=0"]
    assert encode([f"source={tmp_path / 'pack'}", f"out={tmp_path / 'out'}", *settings]) == 0
    captions = sorted(str(record["caption"]) for _, record in LatentStore(tmp_path / "out").iterate_records())
    assert captions == [f"{word} pad loop, A minor" for word in ("clean", "cold", "dusty", "warm")]
    assert "caption composed" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "audit.json").read_text())["clips"]
    assert ["key", "A minor", "file name"] in rows[0]["facts"]
    changed = ["caption_template={key} {kind}", "captions=required"]
    assert encode([f"source={tmp_path / 'pack'}", f"out={tmp_path / 'x'}", *settings[:3], *changed]) != 0


def test_clips_that_come_later_change_what_names_tell_apart(tmp_path: Path) -> None:
    def list_captions(words: str) -> list[str]:
        for number, word in enumerate(words.split()):
            write_clip(tmp_path / "pack" / f"acme {word} pad loop.wav", noise(0.3, seed=ord(word[0]) + number))
        settings = [f"model={PLAIN}", "device=cpu", "threads=1", "captions=auto", "split=0"]
        assert encode([f"source={tmp_path / 'pack'}", f"out={tmp_path / 'out'}", *settings]) == 0
        return sorted(str(record["caption"]) for _, record in LatentStore(tmp_path / "out").iterate_records())

    few, more = "clean cold dusty warm", "bold deep faint grand"
    assert list_captions(few) == [f"acme {word} pad loop" for word in few.split()]
    assert list_captions(more) == sorted(f"{word} pad loop" for word in (few + " " + more).split())
