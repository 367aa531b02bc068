"""Clips and their text are found wherever people put them; what is not understood is named."""

import contextlib
import http.server
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from helpers.audio import tone, write_clip
from helpers.sources import WAV, get_reasons, make_tar, read_captions
from sa3train.core.errors import DataError
from sa3train.data.audit.audit import AuditRules, audit_clip
from sa3train.data.shards.reader import LatentStore
from sa3train.data.sources.captions import read_clip_text
from sa3train.data.sources.listing import list_source
from sa3train.data.sources.storage import Blob

CLIP = tone(0.2)


def add(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("audio", "text"),
    [
        ("a.wav", "a.txt"),
        ("deep/er/a.wav", "deep/er/a.txt"),
        ("deep/a.wav", "deep/a.wav.txt"),
        ("set/a.wav", "set/txt/a.txt"),
        ("set/wav/a.wav", "set/txt/a.txt"),
        ("set/wav/part1/a.wav", "set/txt/part1/a.txt"),
        ("wav/one/two/a.wav", "txt/one/two/a.txt"),
    ],
)
def test_captions_are_found_beside_and_in_sibling_folders(tmp_path: Path, audio: str, text: str) -> None:
    write_clip(tmp_path / audio, CLIP)
    add(tmp_path / text, "a soft tone\n")
    listing = list_source(str(tmp_path))
    assert read_captions(listing) == {audio: "a soft tone"}
    assert not listing.problems
    assert not listing.skipped


def test_json_sidecars_give_caption_and_tags(tmp_path: Path) -> None:
    write_clip(tmp_path / "wav" / "a.wav", CLIP)
    fields = {"text": "warm pad", "genre": "ambient", "bpm": 90, "gain": -1.5, "tags": ["soft", "slow"], "x": None}
    add(tmp_path / "json" / "a.json", json.dumps(fields | {"beats": [0, 0.667], "deep": {"a": 1}}))
    (clip,) = list_source(str(tmp_path)).clips
    description = read_clip_text(clip)
    assert description.caption == "warm pad"
    assert description.tags == {"genre": "ambient", "bpm": 90, "gain": -1.5, "tags": "soft, slow"}
    assert description.beats == [0.0, 0.667]
    assert not description.problems


def test_the_sidecar_of_generated_audio_is_no_caption(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.wav", CLIP)
    add(tmp_path / "a.wav.json", json.dumps({"made_by": "sa3train", "file": "a.wav", "seed": 3, "caption": "a hum"}))
    (clip,) = list_source(str(tmp_path)).clips
    text = read_clip_text(clip)
    assert (text.caption, text.tags, text.problems) == ("", {}, [])
    add(tmp_path / "a.json", json.dumps({"caption": "warm pad", "key": "C"}))
    (clip,) = list_source(str(tmp_path)).clips
    text = read_clip_text(clip)
    assert (text.caption, text.tags, text.problems) == ("warm pad", {"key": "C"}, [])


def test_manifests_add_captions_and_name_what_is_missing(tmp_path: Path) -> None:
    for name in ("sub/a.wav", "sub/b.wav", "c.wav"):
        write_clip(tmp_path / name, CLIP)
    rows = [
        {"file_name": "sub/a.wav", "caption": "first", "bpm": 120},
        {"path": "./sub/b.wav", "text": "second"},
        {"file_name": "gone.wav", "caption": "third"},
        {"caption": "whose?"},
        {"file_name": "c.wav", "caption": "fourth"},
        {"file_name": "c.wav", "caption": "again"},
    ]
    lines = [json.dumps(row) for row in rows] + ["{not json", "[1]"]
    add(tmp_path / "metadata.jsonl", "\n".join(lines))
    listing = list_source(str(tmp_path))
    assert read_captions(listing) == {"c.wav": "fourth", "sub/a.wav": "first", "sub/b.wav": "second"}
    problems = get_reasons(listing)
    assert "gone.wav" in problems["metadata.jsonl:3"]
    assert "names no file" in problems["metadata.jsonl:4"]
    assert "a second time" in problems["metadata.jsonl:6"]
    assert "JSON" in problems["metadata.jsonl:7"]
    assert "not an object" in problems["metadata.jsonl:8"]


def test_a_manifest_in_a_subfolder_counts_from_there(tmp_path: Path) -> None:
    write_clip(tmp_path / "one" / "a.wav", CLIP)
    add(tmp_path / "one" / "metadata.csv", "file_name,caption,bpm,tempo\na.wav,from csv,98,007\n")
    (clip,) = list_source(str(tmp_path)).clips
    assert read_clip_text(clip).caption == "from csv"
    assert read_clip_text(clip).tags == {"bpm": 98, "tempo": "007"}, "numbers are numbers, but not 007"


def test_a_manifest_alone_is_a_source(tmp_path: Path) -> None:
    inside = write_clip(tmp_path / "set" / "a.wav", CLIP)
    outside = write_clip(tmp_path / "elsewhere" / "b.wav", CLIP)
    rows = [{"path": "a.wav", "caption": "in"}, {"path": str(outside), "caption": "out"}, {"path": "no.wav"}]
    add(tmp_path / "set" / "list.jsonl", "\n".join(map(json.dumps, rows)))
    listing = list_source(str(tmp_path / "set" / "list.jsonl"))
    assert sorted(read_captions(listing).values()) == ["in", "out"]
    assert list(get_reasons(listing)) == ["list.jsonl:3"]
    assert inside.exists()


def test_one_file_is_a_source(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.wav", CLIP, "mine")
    write_clip(tmp_path / "b.wav", CLIP, "other")
    assert read_captions(list_source(str(tmp_path / "a.wav"))) == {"a.wav": "mine"}


def test_tars_of_raw_audio(tmp_path: Path) -> None:
    members = {
        "000.wav": WAV,
        "000.txt": b"zero",
        "sub/001.wav": WAV,
        "sub/001.json": b'{"caption": "one", "key": "A minor"}',
        "002.cls": b"7",
    }
    make_tar(tmp_path / "part-0.tar", members)
    write_clip(tmp_path / "beside.wav", CLIP, "beside")
    listing = list_source(str(tmp_path))
    found = {"beside.wav": "beside", "part-0.tar/000.wav": "zero", "part-0.tar/sub/001.wav": "one"}
    assert read_captions(listing) == found
    assert all(clip.audio.read() == WAV for clip in listing.clips if "tar" in clip.source)
    assert listing.skipped == {".cls": 1}
    assert read_captions(list_source(str(tmp_path / "part-0.tar"))) == {k: v for k, v in found.items() if "tar" in k}


def test_dots_in_names_and_names_that_come_twice(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", {"01. song.wav": WAV, "01. song.txt": b"dotted", "./02.wav": WAV, "02.wav": WAV})
    listing = list_source(str(tmp_path))
    assert read_captions(listing) == {"a.tar/01. song.wav": "dotted", "a.tar/02.wav": ""}
    assert "02.wav more than once" in get_reasons(listing)["a.tar"]


def test_damaged_tars_are_named(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {f"{n}.wav": WAV for n in range(4)})
    content = bytearray(path.read_bytes())
    step = 512 + -(-len(WAV) // 512) * 512
    content[2 * step : 2 * step + 300] = b"\xff" * 300
    path.write_bytes(content)
    listing = list_source(str(path))
    assert len(listing.clips) == 2, "those before the damage"
    assert listing.problems[0][0] == "a.tar"
    assert f"damaged at byte {2 * step}" in listing.problems[0][1]
    (tmp_path / "b.tar").write_bytes(bytes(content[: step + 700]))
    (problem,) = list_source(str(tmp_path / "b.tar")).problems
    assert "unexpected end of data" in problem[1]


def test_compressed_tars_are_refused_with_the_fix(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(write_clip(tmp_path / "x.wav", CLIP), "x.wav")
    (problem,) = list_source(str(tmp_path / "a.tar")).problems
    assert "plain .tar" in problem[1]


def test_other_files_are_counted_and_hidden_ones_left_out(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.wav", CLIP, "x")
    for name in ("cover.jpg", "b.pdf", "c.pdf", ".DS_Store", "__MACOSX/._a.wav", ".trash/old.wav", "alone.txt"):
        add(tmp_path / name, "?")
    listing = list_source(str(tmp_path))
    assert [clip.source for clip in listing.clips] == ["a.wav"]
    assert listing.skipped == {".pdf": 2, ".jpg": 1, ".txt": 1}
    assert listing.describe_skipped().startswith("2 .pdf") and "unpack" not in listing.describe_skipped()
    add(tmp_path / "more.tar.gz", "?")
    assert list_source(str(tmp_path)).describe_skipped().endswith("1 .gz (unpack archives to use what is in them)")
    with pytest.raises(DataError, match=r"or a \.tar \(unpack archives"):
        list_source(str(tmp_path / "more.tar.gz"))


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        list_source(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="empty path"):
        list_source("")
    add(tmp_path / "a.pdf", "?")
    with pytest.raises(DataError, match=r"no audio in .*1 \.pdf"):
        list_source(str(tmp_path))
    with pytest.raises(DataError, match="unsupported"):
        list_source(str(tmp_path / "a.pdf"))


def test_stamps_change_with_audio_and_text(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.wav", CLIP, "x")
    (before,) = list_source(str(tmp_path)).clips
    path.with_suffix(".txt").write_text("another", encoding="utf-8")
    (after,) = list_source(str(tmp_path)).clips
    assert before.stamp != after.stamp


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    file_system = fsspec.filesystem("memory")
    yield file_system
    file_system.rm("/set", recursive=True)


def test_memory_urls(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    memory.pipe("/set/deep/a.wav", WAV)
    memory.pipe("/set/deep/a.txt", b"far away")
    memory.pipe("/set/part.tar", make_tar(tmp_path / "x.tar", {"1.wav": WAV, "1.txt": b"in a tar"}).read_bytes())
    listing = list_source("memory://set")
    assert read_captions(listing) == {"deep/a.wav": "far away", "part.tar/1.wav": "in a tar"}
    assert all(clip.audio.read() == WAV for clip in listing.clips)
    assert read_captions(list_source("memory://set/deep/a.wav")) == {"a.wav": "far away"}
    with pytest.raises(DataError, match=r"no audio in|cannot list"):
        list_source("memory://elsewhere")


def test_http_folders_manifests_and_tars(tmp_path: Path, server: str) -> None:
    write_clip(tmp_path / "set" / "a b.wav", CLIP, "over http")
    write_clip(tmp_path / "set" / "c.wav", CLIP)
    make_tar(tmp_path / "set" / "t.tar", {"1.wav": WAV, "1.txt": b"in a tar"})
    add(tmp_path / "set" / "metadata.jsonl", json.dumps({"file_name": "c.wav", "caption": "listed"}))
    listing = list_source(f"{server}/set/")
    assert sorted(read_captions(listing).values()) == ["in a tar", "listed", "over http"]
    assert all(len(clip.audio.read()) > 1000 for clip in listing.clips)
    add(tmp_path / "far.jsonl", json.dumps({"path": f"{server}/set/c.wav", "caption": "by url"}))
    (clip,) = list_source(str(tmp_path / "far.jsonl")).clips
    assert read_clip_text(clip).caption == "by url"
    assert len(clip.audio.read()) > 1000
    with pytest.raises(DataError, match="cannot"):
        list_source(f"{server}/nothing/here.tar")


def test_what_changes_on_a_web_server_is_noticed(tmp_path: Path, server: str) -> None:
    write_clip(tmp_path / "set" / "a.wav", CLIP, "first")
    make_tar(tmp_path / "set" / "t.tar", {"1.wav": WAV, "1.txt": b"in a tar"})
    before = {clip.source: clip.stamp for clip in list_source(f"{server}/set").clips}
    assert before == {clip.source: clip.stamp for clip in list_source(f"{server}/set").clips}
    add(tmp_path / "set" / "a.txt", "second, and longer")
    make_tar(tmp_path / "set" / "t.tar", {"1.wav": WAV, "1.txt": b"in a longer tar" * 2000})
    fsspec.filesystem("http").invalidate_cache()
    listing = list_source(f"{server}/set")
    assert all(before[clip.source] != clip.stamp for clip in listing.clips)
    assert read_captions(listing)["t.tar/1.wav"].startswith("in a longer tar"), "not the copy that was fetched before"


@pytest.mark.parametrize("fault", ["500", "cut short", "gone"])
def test_a_web_server_that_fails_is_an_error_of_ours(fault: str) -> None:
    class Failing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if fault == "500":
                self.send_error(500)
                return
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x")
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as running:
        url = f"http://127.0.0.1:{running.server_port}/set"
        if fault == "gone":
            running.server_close()
        else:
            threading.Thread(target=running.serve_forever).start()
        with pytest.raises(DataError, match="cannot list http"):
            list_source(url)
        with pytest.raises(DataError, match="cannot be read"):
            Blob(f"{url}/a.wav").read()
        with pytest.raises(DataError, match=r"cannot read http.*index\.json"):
            LatentStore(url)
        if fault != "gone":
            running.shutdown()


@pytest.mark.parametrize(("length", "content"), [("", b"abc" * 300), ("", None), ("900", b"abc" * 300), ("1001", b"")])
def test_no_more_than_the_limit_is_read_from_a_web_server(length: str, content: bytes | None) -> None:
    """Servers need not say how much there is, and a radio station never ends."""

    class Radio(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            if length:
                self.send_header("Content-Length", length)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            with contextlib.suppress(OSError):
                self.wfile.write(content or b"")
                while content is None:
                    self.wfile.write(b"music")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Radio) as running:
        threading.Thread(target=running.serve_forever).start()
        blob = Blob(f"http://127.0.0.1:{running.server_port}/a.mp3")
        if content:
            assert blob.read(limit=1000) == content
        else:
            with pytest.raises(DataError, match="more than 1000 bytes"):
                blob.read(limit=1000)
        running.shutdown()


def test_a_file_that_goes_away_is_unreadable(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.wav", CLIP, "there")
    (clip,) = list_source(str(tmp_path)).clips
    path.unlink()
    (found,) = audit_clip(clip, AuditRules())["findings"]
    assert found["code"] == "unreadable"


@pytest.mark.parametrize("suffix", [".mp3", ".ogg", ".flac", ".aiff"])
def test_embedded_tags(tmp_path: Path, suffix: str) -> None:
    import mutagen
    from mutagen.id3 import COMM, TBPM, TCON, TIT2, TXXX

    path = write_clip(tmp_path / f"a{suffix}", CLIP)
    file = mutagen.File(path)
    if suffix in (".mp3", ".aiff"):
        if file.tags is None:
            file.add_tags()
        for frame in (TIT2(3, ["Morning"]), TCON(3, ["folk"]), TBPM(3, ["96"]), TXXX(3, "mood", ["calm"])):
            file.tags.add(frame)
        file.tags.add(COMM(3, "eng", "", ["take two"]))
    else:
        file["title"], file["genre"], file["BPM"] = "Morning", "folk", "96"
        file["mood"], file["comment"] = "calm", "take two"
    file.save()
    (clip,) = list_source(str(tmp_path)).clips
    for content in (None, path.read_bytes()):
        tags = read_clip_text(clip, content).tags
        wanted = {"title": "Morning", "genre": "folk", "bpm": 96, "mood": "calm", "comment": "take two"}
        assert {name: tags.get(name) for name in wanted} == wanted


def _atom(name: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return (len(content) + 8).to_bytes(4, "big") + name + content


def test_embedded_mp4_tags(tmp_path: Path) -> None:
    """A file with an empty sound track and iTunes tags, put together by hand (ISO 14496-12)."""
    header = _atom(b"mdhd", bytes(12), (44100).to_bytes(4, "big"), (44100).to_bytes(4, "big"), bytes(4))
    kind = _atom(b"hdlr", bytes(8), b"soun", bytes(13))
    samples = _atom(b"minf", _atom(b"stbl", _atom(b"stsd", bytes(8))))

    def tag(name: bytes, flag: int, value: bytes) -> bytes:
        return _atom(name, _atom(b"data", flag.to_bytes(4, "big"), bytes(4), value))

    tags = _atom(b"ilst", tag(b"\xa9nam", 1, b"Morning"), tag(b"tmpo", 21, (96).to_bytes(2, "big")))
    meta = _atom(b"meta", bytes(4), _atom(b"hdlr", bytes(8), b"mdirappl", bytes(9)), tags)
    track = _atom(b"trak", _atom(b"mdia", header, kind, samples))
    movie = _atom(b"moov", _atom(b"mvhd", bytes(100)), track, _atom(b"udta", meta))
    (tmp_path / "a.m4a").write_bytes(_atom(b"ftyp", b"M4A ", bytes(4), b"M4A mp42isom") + movie)
    (clip,) = list_source(str(tmp_path)).clips
    assert read_clip_text(clip).tags == {"title": "Morning", "bpm": 96}


def test_the_nearest_text_wins_and_differences_are_noted(tmp_path: Path) -> None:
    import mutagen

    path = write_clip(tmp_path / "a.flac", CLIP, "from txt")
    file = mutagen.File(path)
    file["genre"], file["description"] = "embedded", "from inside"
    file.save()
    add(tmp_path / "a.json", json.dumps({"caption": "from json", "genre": "json"}))
    row = {"file_name": "a.flac", "caption": "from txt", "genre": "manifest", "artist": "m"}
    add(tmp_path / "metadata.jsonl", json.dumps(row))
    (clip,) = list_source(str(tmp_path)).clips
    description = read_clip_text(clip)
    assert description.caption == "from txt"
    assert description.tags["genre"] == "json"
    assert description.tags["artist"] == "m"
    ((code, detail),) = description.problems
    assert code == "caption_conflict"
    assert "embedded tags, a.json" in detail


def test_beats_that_are_no_list_are_noted(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.wav", CLIP)
    add(tmp_path / "a.json", '{"beats": "120"}')
    (clip,) = list_source(str(tmp_path)).clips
    assert [note[0] for note in read_clip_text(clip).problems] == ["bad_fields"]
