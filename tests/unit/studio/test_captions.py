"""Captions kept in sidecars: what is written where, undo, and what is refused."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from helpers.audio import noise, write_clip
from sa3train.core.errors import SA3Error
from sa3train.data.captioning import files
from sa3train.data.captioning.files import Edit
from sa3train.data.sources.captions import read_clip_text
from sa3train.data.sources.listing import list_source
from sa3train.studio.data import captions, captions_tab
from sa3train.studio.server.workspace import Workspace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one clip of each kind of caption; the audio need not be readable to be captioned."""
    audio = tmp_path / "root" / "audio"
    (audio / "deep").mkdir(parents=True)
    for name in ("text.wav", "fields.wav", "bare.wav", "deep/listed.wav"):
        (audio / name).write_bytes(b"RIFF")
    (audio / "text.txt").write_bytes(b"\xef\xbb\xbfold  words\r\n")
    (audio / "fields.json").write_text(json.dumps({"genre": "dub", "prompt": "old fields", "bpm": 90}))
    (audio / "metadata.jsonl").write_text(json.dumps({"file_name": "deep/listed.wav", "caption": "from the list"}))
    return audio


@pytest.fixture
def workspace(folder: Path) -> Workspace:
    return Workspace.create(folder.parent.parent / "studio", [folder.parent])


def undo(workspace: Workspace, folder: Path) -> str:
    return files.undo_save(folder, workspace.resolve).describe(folder)


def read_captions(folder: Path) -> dict[str, str]:
    return {clip.source: read_clip_text(clip).caption for clip in list_source(str(folder)).clips}


def save(workspace: Workspace, folder: Path, **edits: tuple[str, str]) -> int:
    named = {"text": "text.wav", "fields": "fields.wav", "bare": "bare.wav", "listed": "deep/listed.wav"}
    changes = captions.save_captions(workspace, folder, [Edit(named[name], *edit) for name, edit in edits.items()])
    return len(changes)


def test_each_caption_goes_where_encoding_reads_it(workspace: Workspace, folder: Path) -> None:
    assert read_captions(folder) == {
        "text.wav": "old words", "fields.wav": "old fields", "bare.wav": "", "deep/listed.wav": "from the list"
    }  # fmt: skip
    edits = {
        "text": ("old words", "new  words\n"),
        "fields": ("old fields", "new fields ü"),
        "bare": ("", "at last"),
        "listed": ("from the list", "better"),
    }
    assert save(workspace, folder, **edits) == 4
    assert read_captions(folder) == {
        "text.wav": "new words", "fields.wav": "new fields ü", "bare.wav": "at last", "deep/listed.wav": "better"
    }  # fmt: skip
    assert json.loads((folder / "fields.json").read_text()) == {"genre": "dub", "prompt": "new fields ü", "bpm": 90}
    assert (folder / "bare.txt").read_text() == "at last\n"


def test_captions_of_other_tools_are_kept_where_they_are(workspace: Workspace, folder: Path) -> None:
    (folder / "text.txt").unlink()
    (folder / "text.TXT").write_bytes("größer".encode("utf-16"))
    (folder / "fields.json").write_bytes(json.dumps({"Caption": "old", "BPM": 90}).encode("utf-16"))
    assert save(workspace, folder, text=("größer", "kleiner ü"), fields=("old", "new")) == 2
    assert (folder / "text.TXT").read_text(encoding="utf-8") == "kleiner ü\n"
    assert json.loads((folder / "fields.json").read_text(encoding="utf-8")) == {"Caption": "new", "BPM": 90}
    assert not (folder / "text.txt").exists()


def test_pipes_and_devices_are_not_opened(workspace: Workspace, folder: Path) -> None:
    for name in ("pipe.wav", "bare.txt", "captions.csv"):
        os.mkfifo(folder / name)
    (folder / "bare.json").symlink_to("/dev/zero")
    assert save(workspace, folder, text=("old words", "new")) == 1
    with pytest.raises(SA3Error, match=r"bare\.txt"):
        save(workspace, folder, bare=("", "new"))


def test_undo_restores_every_byte_save_by_save(workspace: Workspace, folder: Path) -> None:
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    save(workspace, folder, text=("old words", "one"), bare=("", "two"))
    save(workspace, folder, text=("one", "three"), fields=("old fields", "four"))
    assert files.count_saves(folder) == 2
    assert undo(workspace, folder) == "Captions taken back: 2 (text.txt, fields.json)."
    assert read_captions(folder)["text.wav"] == "one"
    undo(Workspace.create(workspace.folder, workspace.sources), folder)  # by another server
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before
    with pytest.raises(SA3Error, match="nothing to undo"):
        undo(workspace, folder)


def test_nothing_changed_is_nothing_saved(workspace: Workspace, folder: Path) -> None:
    assert save(workspace, folder, text=("old words", " old words ")) == 0
    assert files.count_saves(folder) == 0


def test_a_save_that_is_cut_short_can_be_undone(
    workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "text.txt").read_bytes()
    write = files.write_bytes
    calls: list[Path] = []

    def once(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) > 1:
            raise SA3Error("the disk is full")
        write(path, content)

    monkeypatch.setattr(files, "write_bytes", once)
    with pytest.raises(SA3Error, match="disk is full"):
        save(workspace, folder, text=("old words", "new"), bare=("", "new"))
    monkeypatch.undo()
    assert read_captions(folder)["text.wav"] == "new"
    undo(workspace, folder)
    assert (folder / "text.txt").read_bytes() == before
    assert not (folder / "bare.txt").exists()


def test_what_others_wrote_meanwhile_is_never_overwritten(workspace: Workspace, folder: Path) -> None:
    (folder / "text.txt").write_text("theirs")
    with pytest.raises(SA3Error, match="changed elsewhere since it was shown"):
        save(workspace, folder, bare=("", "mine"), text=("old words", "mine"))
    assert not (folder / "bare.txt").exists(), "half of a refused save was written"
    save(workspace, folder, text=("theirs", "mine"), bare=("", "mine"))
    (folder / "text.txt").write_text("theirs again")
    told = undo(workspace, folder)
    assert told.startswith("Captions taken back: 1 (bare.txt). Edited since, so left alone: text.txt. ")
    assert files.UNDO_FILE in told and "theirs" in (folder / files.UNDO_FILE).read_text()
    assert (folder / "text.txt").read_text() == "theirs again"
    assert not (folder / "bare.txt").exists()
    assert files.count_saves(folder) == 0, "an earlier save can be undone next"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ({"text": ("old words", "x" * 20_000)}, "shorten it"),
        ({"fields": ("old fields", "")}, "remove it there"),
        ({"listed": ("from the list", " ")}, "remove it there"),
    ],
)
def test_captions_that_cannot_be_kept_are_refused(
    workspace: Workspace, folder: Path, edit: dict[str, tuple[str, str]], told: str
) -> None:
    with pytest.raises(SA3Error, match=told):
        save(workspace, folder, **edit)
    assert files.count_saves(folder) == 0


def test_clips_that_are_gone_archived_or_share_a_file(workspace: Workspace, folder: Path) -> None:
    with pytest.raises(SA3Error, match="no longer exists"):
        captions.save_captions(workspace, folder, [Edit("ghost.wav", "", "boo")])
    with tarfile.open(folder / "more.tar", "w") as tar:
        tar.add(folder / "bare.wav", "inner.wav")
    with pytest.raises(SA3Error, match="in an archive"):
        captions.save_captions(workspace, folder, [Edit("more.tar/inner.wav", "", "boo")])
    (folder / "bare.flac").write_bytes(b"fLaC")
    with pytest.raises(SA3Error, match="share one caption file"):
        captions.save_captions(workspace, folder, [Edit("bare.wav", "", "a"), Edit("bare.flac", "", "b")])


@pytest.mark.parametrize("link", ["folder", "audio", "caption"])
def test_links_out_of_the_studio_are_refused(workspace: Workspace, folder: Path, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.wav").write_bytes(b"RIFF")
    (outside / "secret.txt").write_text("secret")
    name, target = {
        "folder": ("linked", outside),
        "audio": ("linked.wav", outside / "a.wav"),
        "caption": ("bare.txt", outside / "secret.txt"),
    }[link]
    (folder / name).symlink_to(target)
    with pytest.raises(SA3Error, match="leads out of the studio's folders"):
        captions.list_clips(workspace, folder)
    with pytest.raises(SA3Error, match="outside the folders"):
        captions.list_clips(workspace, outside)
    with pytest.raises(SA3Error, match="outside the folders"):
        captions.list_clips(workspace, folder / ".." / ".." / "outside")


def test_a_damaged_undo_log_is_said(workspace: Workspace, folder: Path) -> None:
    save(workspace, folder, bare=("", "x"))
    (folder / files.UNDO_FILE).write_text("[")
    with pytest.raises(SA3Error, match="is damaged"):
        undo(workspace, folder)


def test_the_table_is_searched_and_paged(workspace: Workspace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions_tab, "PAGE", 3)
    rows, total, page = captions_tab.list_rows(workspace, folder, "", False, 99)
    assert (len(rows), total, page) == (1, 4, 2)
    assert captions_tab.list_rows(workspace, folder, "OLD", False, 1)[0] == [
        ["fields.wav", "old fields"], ["text.wav", "old words"]
    ]  # fmt: skip
    assert captions_tab.list_rows(workspace, folder, "", True, 1)[0] == [["bare.wav", ""]]
    monkeypatch.setattr(captions_tab, "MAX_SEARCHED", 2)
    assert captions_tab.list_rows(workspace, folder, "listed", False, 1)[1] == 1
    with pytest.raises(SA3Error, match="audit it"):
        captions_tab.list_rows(workspace, folder, "", True, 1)


def test_the_tables_rows_become_edits() -> None:
    before = {"a.wav": "one", "b.wav": "two"}
    assert captions_tab.find_edits(before, [["b.wav", " two "], ["a.wav", "three"]]) == [Edit("a.wav", "one", "three")]
    assert captions_tab.find_edits(before, []) == []
    with pytest.raises(SA3Error, match="not a clip of this folder"):
        captions_tab.find_edits(before, [["c.wav", "x"]])


def test_many_captions_are_replaced_at_once_and_taken_back(workspace: Workspace, folder: Path) -> None:
    before = read_captions(folder)
    with pytest.raises(SA3Error, match="no caption"):
        captions.replace_text(workspace, folder, "", "new", "x")
    assert len(captions.replace_text(workspace, folder, "text.wav", "old", "new")) == 1
    assert len(captions.replace_text(workspace, folder, "", "old", "new")) == 1
    assert read_captions(folder) == {name: text.replace("old", "new") for name, text in before.items()}
    undo(workspace, folder)
    undo(workspace, folder)
    assert read_captions(folder) == before


def test_clips_without_a_caption_are_captioned_and_taken_back(workspace: Workspace, folder: Path) -> None:
    before = read_captions(folder)
    write_clip(folder / "soft kick.wav", noise(0.2))
    changes, without = captions.caption_rest(workspace, folder, "{name} {kind}")
    assert read_captions(folder) == before | {"soft kick.wav": "soft kick one-shot"}
    assert [one.source for one in without] == ["bare.wav"], "which cannot be read"
    assert [change.path.name for change in changes] == ["soft kick.txt"]
    undo(workspace, folder)
    assert read_captions(folder) == before | {"soft kick.wav": ""}
