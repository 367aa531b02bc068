"""`sa3-data audit` of a folder of odd files: it ends, and says of each what it is."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from helpers.audio import encode, noise
from helpers.sources import make_tar

SPARSE = 1 << 31
LISTED = {"special_file"}
DAMAGED = {"damaged_source"}
UNREADABLE = {"unreadable"}


class OddFolder:
    """Makes odd files. Keeps for each path the findings of which the audit makes one, or the caption that it reads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.findings: dict[str, set[str]] = {}
        self.captions: dict[str, str] = {}
        self.seed = 0

    def write(self, name: str | bytes, content: bytes | str) -> Path:
        path = self.root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def make_clip(self, form: str = "WAV", seconds: float = 0.3, rate: int = 44100, **settings: Any) -> bytes:
        self.seed += 1
        return encode(noise(seconds, rate, seed=self.seed), form, rate=rate, **settings)

    def add(self, name: str | bytes, content: bytes | str, *findings: str, source: str = "") -> None:
        """A file that is odd in itself."""
        self.write(name, content)
        self.findings[source or os.fsdecode(name)] = set(findings)

    def add_named(self, audio: str | bytes, text: str | bytes, source: str = "") -> None:
        """A sound clip with an odd name, whose text is found."""
        self.write(audio, self.make_clip())
        self.captions[source or os.fsdecode(audio)] = "a caption"
        self.write(text, "a caption")

    def add_text(self, name: str, text: str, content: bytes | str, *findings: str, caption: str = "") -> None:
        """A sound clip with odd text."""
        self.write(f"{name}.wav", self.make_clip())
        self.write(f"{name}{text}", content)
        self.findings[f"{name}.wav"] = set(findings)
        if caption:
            self.captions[f"{name}.wav"] = caption

    def add_list(self, folder: str, content: bytes | str, *problems: str, name: str = "metadata.csv") -> None:
        """A folder of the clips `a.wav` and `b.wav` with an odd list; `problems` are what is found where."""
        for clip in "ab":
            self.write(f"{folder}/{clip}.wav", self.make_clip())
        self.write(f"{folder}/{name}", content)
        for problem in problems:
            self.findings[f"{folder}/{problem}"] = DAMAGED


@pytest.fixture
def odd(tmp_path: Path) -> OddFolder:
    return OddFolder(tmp_path / "set")


def add_special(odd: OddFolder) -> None:
    for name in ("pipe.wav", "pipe.txt", "pipe.json", "pipe.tar", "lists/pipe/metadata.csv"):
        (odd.root / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(odd.root / name)
        odd.findings[name] = LISTED
    with contextlib.chdir(odd.root), socket.socket(socket.AF_UNIX) as server:  # its path may have 107 characters
        server.bind("socket.wav")
    links = {"zero.wav": "/dev/zero", "null.flac": "/dev/null", "zero.txt": "/dev/zero", "loop.wav": "loop.wav",
             "gone.wav": "moved.wav", "up": ".", "names_again": "names", "piped.ogg": "pipe.wav"}  # fmt: skip
    for name, target in links.items():
        (odd.root / name).symlink_to(target)
    (odd.root / "folder.wav").mkdir()
    odd.findings |= dict.fromkeys([*links, "socket.wav", "folder.wav"], LISTED)


def add_audio(odd: OddFolder) -> None:
    wav, flac = odd.make_clip(), odd.make_clip("FLAC")
    for name, content in {
        "empty.wav": b"", "text.wav": "deep kick", "page.mp3": "<html>404</html>", "zeros.ogg": bytes(5000),
        "image.wav": b"\x89PNG\r\n\x1a\n" + bytes(100), "noise.opus": np.random.default_rng(0).bytes(9000),
        "header.flac": flac[:60], "no_samples.wav": odd.make_clip(seconds=0),
    }.items():  # fmt: skip
        odd.add(name, content, *UNREADABLE)
    odd.add("cut.wav", wav[: len(wav) // 2], "cut_short", "unreadable")
    odd.add("cut.flac", flac[: len(flac) // 2], "cut_short", "unreadable")
    odd.add("slow.wav", odd.make_clip(rate=100, seconds=20), "implausible")
    odd.add("short.wav", odd.make_clip(seconds=0.01), "too_short")
    odd.add_named("copy.wav", "copy.txt")
    odd.add_text("copy_2", ".txt", "the same", "duplicate")
    odd.write("copy_2.wav", (odd.root / "copy.wav").read_bytes())
    for name, samples, finding in (
        ("nan.wav", noise(0.3) * np.nan, {"not_finite"}),
        ("silent.wav", noise(0.3) * 0, {"silent"}),
        ("integers.wav", noise(0.3) * 32768, {"implausible", "integer_scale"}),
        ("clipped.wav", np.clip(noise(0.3) * 9, -1, 1), {"clipped"}),
    ):
        soundfile.write(odd.root / name, samples, 44100, subtype="FLOAT")
        odd.findings[name] = finding


def add_names(odd: OddFolder) -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    odd.add_named(f"names/{decomposed}.wav", "names/café.txt")
    odd.add_named("names/thé.wav", f"names/{unicodedata.normalize('NFD', 'thé')}.TXT")
    odd.add_named(b"names/caf\xe9.wav", b"names/caf\xe9.txt", "names/caf\\xe9.wav")
    odd.add(b"names/bad\xe9.wav", "deep kick", "unreadable", source="names/bad\\xe9.wav")
    odd.add_named(b"names/caf\xe8.wav", b"names/caf\xe8.txt", "names/caf\\xe8.wav")
    for stem in ("two\nlines", "a;b,c", "ends in space ", "v1.0", "-dash", "x" * 240, "[brackets]", "100%", "キック"):
        odd.add_named(f"names/{stem}.wav", f"names/{stem}.txt")
    odd.add_named("names/UPPER.WAV", "names/UPPER.TXT")
    odd.add_named("names/double.wav", "names/double.wav.txt")


def add_texts(odd: OddFolder) -> None:
    odd.add_text("utf16", ".txt", "tiefe Trommel".encode("utf-16"), "text_encoding", caption="tiefe Trommel")
    odd.add_text("utf16_no_bom", ".txt", "Größe".encode("utf-16-be"), "text_encoding", caption="Größe")
    odd.add_text("western", ".txt", "café “noir”".encode("cp1252"), "text_encoding", caption="café “noir”")
    odd.add_text("utf16_json", ".json", '{"Caption": "deep"}'.encode("utf-16"), "text_encoding", caption="deep")
    odd.add_text("russian", ".txt", "глубокий бас".encode("cp1251"), "bad_text")
    odd.add_text("binary", ".txt", bytes(100), "bad_text")
    odd.add_text("bom", ".txt", "\ufeff", "empty_caption")
    odd.add_text("broken", ".json", "{broken", "bad_fields")
    odd.add_text("array", ".json", "[1, 2]", "bad_fields")
    odd.add_text("deep", ".json", "[" * 100_000, "bad_fields")
    odd.add_text("twice", ".json", '{"caption": "a", "caption": "b"}', "bad_fields")
    odd.add_text("huge_number", ".json", f'{{"caption": "a", "n": {"1" * 5000}}}', "bad_fields")
    odd.add_text("two", ".txt", "one", "caption_conflict", caption="one")
    odd.write("two.wav.txt", "another")
    odd.add_text("huge", ".txt", "x", "bad_text")
    os.truncate(odd.root / "huge.txt", SPARSE)


def add_lists(odd: OddFolder) -> None:
    head, lines = "file_name,caption\n", "captions.jsonl"
    odd.add_list("lists/commas", f"{head}a.wav,deep, punchy 808 kick, long tail\n")
    odd.add_list("lists/excel", "sep=;\r\nFile Name;Caption;BPM\r\na.wav;deep, punchy 808 kick, long tail;120\r\n")
    odd.add_list("lists/tabs", "Path\tText\na.wav\tdeep, punchy 808 kick, long tail\n".encode("utf-16"))
    odd.add_list("lists/windows", f'{head}C:\\me\\windows\\a.wav,"deep, punchy 808 kick, long tail"\n')
    odd.captions |= dict.fromkeys(
        (f"lists/{name}/a.wav" for name in ("commas", "excel", "tabs", "windows")), "deep, punchy 808 kick, long tail"
    )
    odd.findings |= {"lists/commas/a.wav": {"list_row"}, "lists/tabs/a.wav": {"text_encoding"}}
    odd.add_list("lists/cells", "file_name,bpm,caption\na.wav,120,deep, punchy\nb.wav,90,ok\n", "metadata.csv:2")
    odd.captions["lists/cells/b.wav"] = "ok"
    odd.add_list("lists/columns", "file_name,caption,Caption\na.wav,deep,high\n", "metadata.csv:2")
    odd.add_list("lists/quote", f'{head}a.wav,"808 kick\nb.wav,"deep"\n', "metadata.csv:2")
    odd.add_list("lists/missing", f"{head}a.wav,x\n/dev/zero,y\ngone.wav,z\n", "metadata.csv:3", "metadata.csv:4")
    odd.add_list("lists/russian", "глубокий,бас\n".encode("cp1251"), "metadata.csv")
    odd.add_list("lists/image", b"\x89PNG\r\n\x1a\n" + bytes(100), "metadata.csv")
    odd.add_list("lists/sheet", b"PK\3\4", "metadata.xlsx", name="metadata.xlsx")
    odd.add_list("lists/lines", '{"file": "a.wav"}\n{"file"\n[]\n', f"{lines}:2", f"{lines}:3", name="captions.jsonl")
    odd.add_list("lists/disagree", f"{head}a.wav,deep\n", "metadata.jsonl:1")
    odd.write("lists/disagree/metadata.jsonl", '{"file_name": "a.wav", "caption": "high"}')
    odd.add_list("lists/huge", head, "metadata.csv")
    os.truncate(odd.root / "lists/huge/metadata.csv", SPARSE)


def add_tars(odd: OddFolder) -> None:
    members, links = {"a.wav": odd.make_clip(), "a.wav.txt": b"in a tar"}, {"pipe.wav": tarfile.FIFOTYPE}
    make_tar(odd.root / "whole.tar", members, links | {"link.wav": tarfile.SYMTYPE})
    odd.captions["whole.tar/a.wav"] = "in a tar"
    whole = (odd.root / "whole.tar").read_bytes()
    odd.findings["whole.tar"] = DAMAGED
    odd.add("cut.tar", whole[:20_000], *DAMAGED)
    odd.findings["cut.tar/a.wav"] = {"cut_short", "unreadable"}
    odd.add("zip.tar", b"\x1f\x8b" + whole[:2000], *DAMAGED)
    odd.add("empty.tar", b"", *DAMAGED)


@pytest.mark.slow
def test_a_folder_of_odd_files_is_audited_to_its_end(odd: OddFolder, tmp_path: Path) -> None:
    odd.root.mkdir()
    for make in (add_special, add_audio, add_names, add_texts, add_lists, add_tars):
        make(odd)
    out = tmp_path / "audit"
    command = [sys.executable, "-m", "sa3train.cli.data", "audit", str(odd.root), "--out", str(out), "-n", "1000"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads((out / "audit.json").read_text(encoding="utf-8"))["clips"]:
        rows.setdefault(row["source"], []).append(row)
    found = {source: {f["code"] for row in group for f in row["findings"]} for source, group in rows.items()}
    assert len({*odd.findings, *odd.captions}) >= 80
    assert {name: found.get(name) for name, wanted in odd.findings.items() if not wanted & found.get(name, set())} == {}
    captions = {source: group[0]["caption"] for source, group in rows.items()}
    assert {name: captions.get(name) for name in odd.captions} == odd.captions
    allowed = {"no_caption", "empty_caption", "duplicate", "near_duplicate"}
    errors = {
        source: {f["code"] for row in group for f in row["findings"] if f["severity"] == "error"} - allowed
        for source, group in rows.items()
        if source not in odd.findings
    }
    assert {source: codes for source, codes in errors.items() if codes} == {}
