"""Audio, its text and its rows find each other in any spelling; what is not a file, or means two things, is named."""

import json
import os
import tarfile
import unicodedata
from pathlib import Path

import fsspec
import pytest

from helpers.sources import WAV, get_reasons, make_tar, read_captions, write_files
from sa3train.core.errors import DataError
from sa3train.data.audit.audit import AuditRules, audit_clip
from sa3train.data.sources.captions import read_clip_text
from sa3train.data.sources.listing import list_source

DECOMPOSED = unicodedata.normalize("NFD", "é/café.wav")

MATCHES = {
    "backslashes": ("drums/a.wav", "drums\\a.wav"),
    "dots": ("drums/a.wav", "./drums/../drums/a.wav"),
    "spaces and quotes": ("a.wav", " 'a.wav' "),
    "other case": ("drums/A.WAV", "Drums/a.wav"),
    "as a Mac writes": ("é/café.wav", DECOMPOSED),
    "of a Mac": (DECOMPOSED, "é/café.wav"),
    "Windows": ("drums/a.wav", "C:\\Users\\me\\set\\drums\\a.wav"),
    "another machine": ("drums/a.wav", "/home/me/set/drums/a.wav"),
    "a server": ("drums/a.wav", "\\\\server\\share\\drums\\a.wav"),
    "this machine": ("drums/a.wav", "{root}/drums/a.wav"),
    "a URL": ("a b.wav", "file://{root}/a%20b.wav"),
}


@pytest.mark.parametrize("name", MATCHES)
@pytest.mark.parametrize("alone", [False, True])
def test_rows_find_their_audio(tmp_path: Path, name: str, alone: bool) -> None:
    audio, given = MATCHES[name]
    row = {"file_name": given.format(root=tmp_path), "caption": "808"}
    write_files(tmp_path, {audio: "", "metadata.jsonl": json.dumps(row)})
    listing = list_source(str(tmp_path / "metadata.jsonl" if alone else tmp_path))
    assert read_captions(listing) == {audio: "808"}
    assert not listing.problems
    codes = [code for code, _ in listing.clips[0].notes]
    assert codes == ["list_row"] * (name in ("other case", "Windows", "another machine", "a server"))


ROWS = {
    "two files in other case": (["A.wav", "a.WAV"], ["a.wav"], [1]),
    "two columns of paths": (["a.wav", "b.wav"], [{"path": "a.wav", "file_name": "b.wav"}], [1]),
    "a path and a name": (["x/a.wav"], [{"path": "x/a.wav", "file_name": "a.wav"}], []),
    "a file twice": (["a.wav"], ["a.wav", "./a.wav"], [2]),
    "not audio": (["a.wav", "b.pdf"], ["b.pdf"], [1]),
    "a device": (["a.wav"], ["/dev/zero"], [1]),
    "zero bytes": (["a.wav"], ["a\0.wav"], [1]),
    # One folder of another machine is this one; a file that is called alike in another folder there is not.
    "folders of another machine": (["a.wav", "b.wav", "c.wav"], ["/me/a.wav", "/me/b.wav", "/lib/c.wav"], [3]),
    "no folder of another machine": (["a.wav", "b.wav"], ["/me/a.wav", "/lib/b.wav"], [1, 2]),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_name_no_file_or_two(tmp_path: Path, name: str) -> None:
    files, given, problems = ROWS[name]
    rows = [
        {**(row if isinstance(row, dict) else {"file": row}), "caption": f"no. {number}"}
        for number, row in enumerate(given, start=1)
    ]
    write_files(tmp_path, {**dict.fromkeys(files, ""), "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    listing = list_source(str(tmp_path))
    assert list(get_reasons(listing)) == [f"metadata.jsonl:{line}" for line in problems]
    used = [caption for caption in read_captions(listing).values() if caption]
    assert used == [row["caption"] for line, row in enumerate(rows, start=1) if line not in problems]


def test_lists_that_disagree_are_named_and_those_that_agree_are_not(tmp_path: Path) -> None:
    table = "file,caption,bpm\na.wav,deep,120\nb.wav,low,90\n"
    rows = [{"path": "a.wav", "caption": "deep", "bpm": 120}, {"path": "b.wav", "caption": "high", "bpm": 90}]
    lines = "\n".join(map(json.dumps, rows))
    write_files(tmp_path, {"a.wav": "", "b.wav": "", "metadata.csv": table, "metadata.jsonl": lines})
    listing = list_source(str(tmp_path))
    assert read_captions(listing) == {"a.wav": "deep", "b.wav": "low"}
    assert list(get_reasons(listing)) == ["metadata.jsonl:2"]
    assert "metadata.csv:3 is used" in get_reasons(listing)["metadata.jsonl:2"]


def test_a_list_that_cannot_be_read_leaves_the_rest(tmp_path: Path) -> None:
    lists = {"metadata.csv": bytes(100), "b/metadata.csv": "file_name,caption\nb.wav,deep\n"}
    other = dict.fromkeys(("captions.xlsx", "metadata.json", "captions.txt"), "[]")
    write_files(tmp_path, {"a.wav": "", "b/b.wav": "", **lists, **other})
    listing = list_source(str(tmp_path))
    assert read_captions(listing) == {"a.wav": "", "b/b.wav": "deep"}
    assert set(get_reasons(listing)) == {"metadata.csv", *other}


def test_other_files_named_like_lists_are_no_problem_where_every_clip_has_a_caption(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.wav": "", "a.txt": "deep", "metadata.json": "{}"})
    listing = list_source(str(tmp_path))
    assert not listing.problems
    assert listing.skipped == {".json": 1}


def test_system_folders_are_not_listed(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.wav": ""})
    (tmp_path / "z").symlink_to("/proc")
    listing = list_source(str(tmp_path))
    assert [clip.source for clip in listing.clips] == ["a.wav"]
    assert "/proc" in get_reasons(listing)["z"]


@pytest.mark.parametrize("target", ["/", "..", "../.."])
def test_links_to_folders_around_the_source_are_not_followed(tmp_path: Path, target: str) -> None:
    write_files(tmp_path, {"others.wav": "", "sets/mine/a.wav": ""})
    (tmp_path / "sets" / "mine" / "up").symlink_to(target)
    listing = list_source(str(tmp_path / "sets" / "mine"))
    assert [clip.source for clip in listing.clips] == ["a.wav"]
    assert "which this folder is in" in get_reasons(listing)["up"]


@pytest.mark.parametrize("content", [b"a" * 2048, bytes(5 << 20)])
def test_tars_that_go_on_after_their_end(tmp_path: Path, content: bytes) -> None:
    """Joined tars, and downloads whose rest is zeros."""
    make_tar(tmp_path / "a.tar", {"a.wav": WAV})
    assert not list_source(str(tmp_path)).problems
    with (tmp_path / "a.tar").open("ab") as file:
        file.write(content)
    listing = list_source(str(tmp_path))
    assert (len(listing.clips), list(get_reasons(listing))) == (1, ["a.tar"])


CAPTIONS = {
    '{"file": "a.wav", "caption": 808}': "808",
    '{"file": "a.wav", "caption": ["warm", "pads"]}': "warm, pads",
    '{"file": "a.wav", "caption": {}, "text": "deep"}': "deep",
    '{"file": "a.wav", "\\u200bcaption": "\\ufeffdeep\\u200b  kick"}': "deep kick",
    '{"file": "a.wav", "caption": "deep"}\n{"file": "a.wav", "caption": "deep"}': "deep",
}


@pytest.mark.parametrize("row", CAPTIONS)
def test_captions_of_rows(tmp_path: Path, row: str) -> None:
    write_files(tmp_path, {"a.wav": "", "metadata.jsonl": row})
    listing = list_source(str(tmp_path))
    text = read_clip_text(listing.clips[0])
    assert (text.caption, text.tags, text.problems, listing.problems) == (CAPTIONS[row], {}, [], [])


def test_letters_that_were_converted_wrongly_are_named(tmp_path: Path) -> None:
    caption = "café d’or".encode().decode("cp1252")
    write_files(tmp_path, {"a.wav": "", "a.txt": caption, "b.wav": "", "b.txt": "São Paulo, MAÇÃ, café"})
    first, second = map(read_clip_text, list_source(str(tmp_path)).clips)
    assert (first.caption, [code for code, _ in first.problems]) == (caption, ["misread_text"])
    assert not second.problems


@pytest.mark.parametrize(
    ("audio", "text"),
    [
        ("a.wav", "a.TXT"),
        ("A.WAV", "A.Txt"),
        ("set/wav/a.wav", "set/txt/a.wav.TXT"),
        ("Hat.WAV", "hat.txt"),
        ("set/Wav/A.wav", "set/txt/a.txt"),
        (DECOMPOSED, "é/café.txt"),
        ("é/café.wav", unicodedata.normalize("NFD", "é/café.wav.TXT")),
    ],
)
def test_text_files_in_other_spellings(tmp_path: Path, audio: str, text: str) -> None:
    write_files(tmp_path, {audio: "", text: "deep"})
    listing = list_source(str(tmp_path))
    assert read_captions(listing) == {audio: "deep"}
    assert not listing.skipped


@pytest.mark.parametrize(("one", "other"), [("é", "e\u0301"), ("Kick", "kick")])
def test_files_that_differ_in_spelling_only_keep_their_own_text(tmp_path: Path, one: str, other: str) -> None:
    write_files(tmp_path, {f"{one}.wav": "", f"{one}.txt": "first", f"{other}.wav": ""})
    assert read_captions(list_source(str(tmp_path))) == {f"{one}.wav": "first", f"{other}.wav": ""}
    write_files(tmp_path, {f"{other}.txt": "second"})
    listing = list_source(str(tmp_path))
    assert read_captions(listing) == {f"{one}.wav": "first", f"{other}.wav": "second"}
    assert not any(read_clip_text(clip).problems for clip in listing.clips)


def test_two_text_files_of_a_clip_that_disagree(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.wav": "", "a.txt": "one", "a.TXT": "one", "a.wav.txt": "two", "txt/a.txt": "elsewhere"})
    (clip,) = list_source(str(tmp_path)).clips
    text = read_clip_text(clip)
    assert text.caption == "one"
    ((code, detail),) = text.problems
    assert code == "caption_conflict"
    assert "a.wav.txt" in detail
    assert "a.TXT" not in detail


def test_special_files_are_problems_and_other_names_are_skipped(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.wav": "", "folder.wav/b.wav": ""})
    for name in ("pipe.wav", "pipe.tar", "a.txt", "metadata.csv", "pipe"):
        os.mkfifo(tmp_path / name)
    for name, target in {"zero.flac": "/dev/zero", "loop.wav": "loop.wav", "gone.ogg": "nowhere"}.items():
        (tmp_path / name).symlink_to(target)
    listing = list_source(str(tmp_path))
    assert [clip.source for clip in listing.clips] == ["a.wav", "folder.wav/b.wav"]
    assert {problem.code for problem in listing.problems} == {"special_file"}
    wanted = {"pipe.wav", "pipe.tar", "a.txt", "metadata.csv", "zero.flac", "loop.wav", "gone.ogg", "folder.wav"}
    assert set(get_reasons(listing)) == wanted
    assert listing.skipped == {"": 1}
    for name in ("pipe.wav", "pipe.tar", "metadata.csv", "loop.wav"):
        with pytest.raises(DataError, match=name):
            list_source(str(tmp_path / name))


def test_a_list_of_special_files_is_audited(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    paths = ["pipe.wav", str(tmp_path / "pipe.wav"), "/dev/zero", "/proc/kmsg", str(tmp_path)]
    write_files(tmp_path, {"list.jsonl": "\n".join(json.dumps({"path": path}) for path in paths)})
    listing = list_source(str(tmp_path / "list.jsonl"))
    rows = [audit_clip(clip, AuditRules("optional")) for clip in listing.clips]
    found = {row["source"]: {finding["code"] for finding in row["findings"]} for row in rows}
    assert set(found) | set(get_reasons(listing)) >= {"list.jsonl:1", "dev/zero", "proc/kmsg"}
    assert len(found) + len(listing.problems) == len(paths)
    assert all("unreadable" in codes for codes in found.values())


def test_files_without_a_size_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of /proc are regular and say that they are empty; reading some of them, such as kmsg, never ends."""
    for name in ("a.wav", "b.tar", "c.mp3", "c.txt"):
        (tmp_path / name).touch()

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise AssertionError(f"{self} was opened")

    listing = list_source(str(tmp_path))
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(tarfile, "open", refuse)
    assert "empty" in get_reasons(list_source(str(tmp_path)))["b.tar"]
    for clip in listing.clips:
        findings = audit_clip(clip, AuditRules("optional"))["findings"]
        assert "unreadable" in {finding["code"] for finding in findings}


def test_links_that_fan_out_are_listed_once(tmp_path: Path) -> None:
    """Each of 39 folders links to the next one twice: 2³⁹ paths."""
    for number in range(40):
        folder = tmp_path / f"{number:02d}"
        folder.mkdir()
        if number < 39:
            for name in "xy":
                (folder / name).symlink_to(tmp_path / f"{number + 1:02d}")
    write_files(tmp_path, {"39/a.wav": ""})
    assert len(list_source(str(tmp_path / "00")).clips) == 1
    listing = list_source(str(tmp_path))
    assert [clip.source for clip in listing.clips] == ["39/a.wav"]
    assert len(listing.problems) == 2 * 39


def test_a_folder_that_cannot_be_listed_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"a.wav": "", "closed/b.wav": ""})
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).rstrip("/").endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_source(str(tmp_path))
    assert [clip.source for clip in listing.clips] == ["a.wav"]
    assert "Permission denied" in get_reasons(listing)["closed"]
    with pytest.raises(DataError, match="Permission denied"):
        list_source(str(tmp_path / "closed"))


def test_tars_have_lists_and_odd_members(tmp_path: Path) -> None:
    members = {"s/a.wav": WAV, "s/metadata.csv": b"file_name,caption\na.wav,deep, punchy\n"}
    links = {"pipe.wav": tarfile.FIFOTYPE, "link.wav": tarfile.LNKTYPE, "d.wav": tarfile.CHRTYPE}
    make_tar(tmp_path / "a.tar", members, links)
    listing = list_source(str(tmp_path))
    assert read_captions(listing) == {"a.tar/s/a.wav": "deep, punchy"}
    assert [problem.source for problem in listing.problems] == ["a.tar"] * 3


def test_a_huge_audio_file_is_not_read(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.wav": ""})
    os.truncate(tmp_path / "a.wav", 1 << 40)
    finding, _ = audit_clip(*list_source(str(tmp_path)).clips, AuditRules("optional"))["findings"]
    assert finding["code"] == "unreadable"
    assert "1024 GiB" in finding["detail"]


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_what_sa3train_made_is_no_source(tmp_path: Path, scheme: str) -> None:
    files = {
        "a.wav": b"", "kits/index.json": '{"format": "mine"}', "kits/b.wav": b"", "kits/config.yaml": "",
        "kits/run.json": "{}", "kits/c.wav": b"", "kits/.sa3-studio/d.wav": b"",
        "runs/one/run.json": '{"identity": {}}', "runs/one/config.yaml": "", "runs/one/demos/step-1/demo.wav": b"",
        "latents/index.json": '{"format": "sa3train-latents"}', "latents/c.wav": b"", "latents/c.txt": "hum",
        "studio/.sa3-studio/uploads/d.wav": b"", "studio/results/e.wav": b"",
    }  # fmt: skip
    write_files(tmp_path, files)
    root = f"{scheme}{tmp_path}"
    if scheme:
        fsspec.filesystem("memory").put(str(tmp_path), str(tmp_path), recursive=True)
    found = list_source(root)
    assert [clip.source for clip in found.clips] == ["a.wav", "kits/b.wav", "kits/c.wav"]
    made = {"runs/one": "it is a training run", "latents": "it is latents", "studio": "it is the workspace of a studio"}
    assert get_reasons(found) == made
    assert {problem.code for problem in found.problems} == {"own_folder"}
    for folder in made:
        with pytest.raises(DataError, match="not a source of audio"):
            list_source(f"{root}/{folder}")
    (named,) = list_source(f"{root}/latents/c.wav").clips
    assert read_clip_text(named).caption == "hum"
    with pytest.raises(DataError, match="one: it is a training run"):
        list_source(f"{root}/runs")
