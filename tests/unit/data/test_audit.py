"""Every finding is made where it should be, and not where it should not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile

from helpers.audio import noise, sweep, tone, write_clip
from sa3train.audio.analysis import AudioAnalysis
from sa3train.data.audit import audit
from sa3train.data.audit.audit import AuditIndex, AuditRules, audit_clip, list_problem_rows, read_stamps, run_audit
from sa3train.data.audit.checks import (
    FINDING_TYPES,
    LIMITS,
    describe_rejection,
    hash_audio,
    is_rejected,
    measure,
    measure_clipping,
    rank_clip,
)
from sa3train.data.audit.report import AuditSummary, format_clip, write_audit_report
from sa3train.data.captioning.compose import list_pitchless
from sa3train.data.sources.captions import ClipText
from sa3train.data.sources.listing import list_source
from sa3train.data.sources.names import parse_name

RULES = AuditRules(longest_seconds=20.0, count_tokens=lambda texts: [len(text.split()) for text in texts], max_tokens=5)


def audit_rows(folder: Path, rules: AuditRules = RULES) -> dict[str, dict[str, Any]]:
    """Audit rows by source, comparisons included."""
    listing = list_source(str(folder))
    journal = folder.parent / f"{folder.name}.audit" / "audit-000.jsonl"
    run_audit(listing.clips, rules, journal, {})
    index = AuditIndex([journal], {clip.source: clip.stamp for clip in listing.clips}, list_problem_rows(listing))
    return {row["source"]: row for row in index.iterate_rows()}


def codes(row: dict[str, Any]) -> set[str]:
    return {found["code"] for found in row["findings"]}


def silence(seconds: float, channels: int = 2) -> np.ndarray:
    return np.zeros((round(seconds * 44100), channels), np.float32)


def with_nan() -> np.ndarray:
    samples = tone(1.0)
    samples[100] = np.nan
    return samples


def hit(samples: int) -> np.ndarray:
    """A drum normalized to full scale."""
    n = np.arange(samples)
    return (np.cos(n / 40) * np.exp(-n / 900))[:, None].astype(np.float32)


def kick() -> np.ndarray:
    """0.3 s with a mean above the level of silence."""
    time = np.arange(13230) / 44100
    return np.repeat((0.9 * np.exp(-30 * time) * np.sin(2 * np.pi * 35 * time))[:, None], 2, axis=1)


def surround(seconds: float = 1.0) -> np.ndarray:
    return noise(seconds, 96000, channels=6, peak=0.2)


Signal = tuple[np.ndarray, dict[str, Any]]

SIGNALS: dict[str, Callable[[], Signal]] = {
    "silent": lambda: (silence(1.0), {}),
    "silent, but for an offset": lambda: (silence(1.0) + 0.2, {}),
    "not_finite": lambda: (with_nan(), {"subtype": "FLOAT"}),
    "too_short": lambda: (tone(0.05), {}),
    "implausible": lambda: (tone(1.0) * 1e12, {"subtype": "FLOAT"}),
    "integer_scale": lambda: (tone(1.0) * 20000, {"subtype": "FLOAT"}),
    "integer_scale, quiet": lambda: (np.round(tone(1.0, peak=0.001) * 3e3), {"subtype": "FLOAT"}),
    "clipped": lambda: (np.clip(tone(1.0, peak=2.0), -1, 1), {}),
    "over_full_scale": lambda: (tone(1.0, peak=1.5), {"subtype": "FLOAT"}),
    "leading_silence": lambda: (np.concatenate([silence(0.8), tone(1.0)]), {}),
    "trailing_silence": lambda: (np.concatenate([tone(1.0), silence(1.4)]), {}),
    "dc_offset": lambda: (noise(1.0) * 0.5 + 0.05, {}),
    "trailing_silence, of a low hit": lambda: (np.concatenate([kick(), silence(1.2)]), {}),
    "dc_offset, of a hit": lambda: (np.repeat(hit(7759), 2, axis=1) * [[0.5, 0.4]] + 0.05, {}),
    "quiet": lambda: (noise(1.0, peak=0.005), {}),
    "low_rate": lambda: (noise(1.0, 8000), {"samplerate": 8000}),
    "one_sided": lambda: (noise(1.0) * np.array([1.0, 0.0], np.float32), {}),
    "mono_as_stereo": lambda: (tone(1.0), {}),
    "mono": lambda: (noise(1.0, channels=1), {}),
    "mono, a hit at full scale": lambda: (hit(7759), {}),
    "mono, a hit with more above than below 0": lambda: (hit(7759) ** 2, {}),
    "unplaced": lambda: (noise(1.0, channels=9, peak=0.2), {}),
    "multichannel": lambda: (surround(), {"samplerate": 96000}),
    "long": lambda: (noise(21.0), {}),
}

ALSO = {
    "silent": set(),
    "too_short": {"mono_as_stereo"},
    "clipped": {"mono_as_stereo"},
    "over_full_scale": {"mono_as_stereo"},
    "leading_silence": {"mono_as_stereo"},
    "trailing_silence": {"mono_as_stereo"},
}
"""What else is rightly found of these signals."""


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_have_their_finding_and_no_other(tmp_path: Path, name: str) -> None:
    samples, how = SIGNALS[name]()
    folder = tmp_path / "set"
    folder.mkdir()
    soundfile.write(folder / "a.wav", samples, **{"samplerate": 44100, **how})
    (folder / "a.txt").write_text("a sound")
    code = name.partition(",")[0]
    row = audit_rows(folder)["a.wav"]
    assert codes(row) == {code} | ALSO.get(code, set())
    assert is_rejected(row) == (FINDING_TYPES[code].severity == "error")
    assert FINDING_TYPES[code].fix
    assert FINDING_TYPES[code].title in format_clip(row)
    assert format_clip(row | {"source": "a\nb\x1b.wav"}).startswith("a\\nb\\x1b.wav: ")


@pytest.mark.parametrize("samples", [noise(2.0), sweep(2.0) * np.array([1, 0.8], np.float32)], ids=["noise", "sweep"])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "opus", "aiff"])
def test_sound_clips_are_clean_in_every_format(tmp_path: Path, samples: np.ndarray, kind: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    settings = {"format": "OGG", "subtype": "OPUS"} if kind == "opus" else {}
    soundfile.write(folder / f"a.{kind}", samples, 48000, **settings)
    (folder / "a.txt").write_text("a sound")
    row = audit_rows(folder)[f"a.{kind}"]
    assert row["findings"] == []
    assert row["sample_rate"] == 48000
    assert row["channels"] == 2
    assert abs(row["seconds"] - 88200 / 48000) < 0.06


def mix_loop(seconds: float = 4.0) -> np.ndarray:
    """Drums of noise and low tones, normalized to full scale."""
    time = np.arange(round(seconds * 44100)) / 44100
    beats = [(0.0, 60), (0.25, 180)]
    drums = sum(
        (np.sin(2 * np.pi * hertz * ((time - at) % 0.5)) * np.exp(-20 * ((time - at) % 0.5)) for at, hertz in beats),
        0.2 * np.random.default_rng(0).standard_normal(len(time)) * np.exp(-30 * (time % 0.125)),
    )
    return np.asarray(drums / np.abs(drums).max())


def quantize(samples: np.ndarray, bits: int = 16) -> np.ndarray:
    steps = 2 ** (bits - 1)
    return (np.clip(np.round(samples * steps), -steps, steps - 1) / steps).astype(np.float32)[None]


@pytest.mark.parametrize("gain", [1.2, 1.5, 2.0])
@pytest.mark.parametrize("after", [1.0, 0.985])
def test_hard_clipping_is_found(gain: float, after: float) -> None:
    clipped_CN = quantize(np.clip(mix_loop() * gain, -1, 1) * after)
    assert measure_clipping(clipped_CN) > LIMITS["clipped"]


@pytest.mark.parametrize("bits", [8, 16, 24])
@pytest.mark.parametrize("sound", ["loop", "hit", "low tone", "tone", "noise", "square"])
def test_full_scale_is_not_clipping(sound: str, bits: int) -> None:
    time = np.arange(44100) / 44100
    samples = {
        "loop": mix_loop(),
        "hit": hit(7759)[:, 0],
        "low tone": np.sin(2 * np.pi * 40 * time),
        "tone": np.sin(2 * np.pi * 440 * time),
        "noise": noise(1.0, channels=1, peak=1.0)[:, 0],
        "square": np.sign(np.sin(2 * np.pi * 100 * time) + 1e-6),
    }[sound]
    assert measure_clipping(quantize(samples, bits)) == 0


def test_channels_are_named_and_measured_as_they_are_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    samples = noise(1.0, channels=6, peak=0.9)
    soundfile.write(folder / "plain.wav", samples[:, :5], 44100)
    soundfile.write(folder / "named.wav", samples, 44100, format="WAVEX")
    soundfile.write(folder / "bass.wav", samples * np.array([0, 0, 0, 1, 0, 0]), 44100)
    rows = audit_rows(folder, AuditRules(captions="optional"))
    details = {name: " ".join(f["detail"] for f in row["findings"]) for name, row in rows.items()}
    assert "FL FR FC LFE BL BR" in details["named.wav"]
    assert "assumed" in details["plain.wav"]
    assert rows["named.wav"]["peak_db"] > 0
    assert "over_full_scale" in codes(rows["named.wav"])
    assert codes(rows["bass.wav"]) == {"silent", "uncaptioned"}


def test_silence_has_no_caption_and_drums_have_no_root(tmp_path: Path) -> None:
    write_clip(tmp_path / "set" / "soft bell.wav", silence(1.0))
    for name in ("Kick", "Bass"):
        write_clip(tmp_path / "set" / f"{name} Loop_F#_120bpm.wav", noise(1.0, seed=len(name)))
    rows = audit_rows(tmp_path / "set", AuditRules(captions="auto"))
    assert codes(rows["soft bell.wav"]) == {"silent"} and not rows["soft bell.wav"]["caption"]
    assert "root" not in [fact[0] for fact in rows["Kick Loop_F#_120bpm.wav"]["facts"]]
    for sound, pitchless in ((AudioAnalysis(), ()), (AudioAnalysis(sound="percussive"), ("root",))):
        assert list_pitchless(ClipText(name=parse_name("Bass Loop_F#_120bpm.wav")), sound) == pitchless


def test_the_same_samples_for_other_speakers_are_other_audio() -> None:
    samples_CN = noise(0.1, channels=4).T
    quad = hash_audio(samples_CN, 44100, ["FL", "FR", "BL", "BR"])
    assert hash_audio(samples_CN, 44100) == quad
    assert hash_audio(samples_CN, 44100, ["FL", "FR", "FC", "BC"]) != quad


def test_measurements(tmp_path: Path) -> None:
    # ITU-R BS.1770: a 997 Hz sine at 0 dBFS in one channel is -3.01 LUFS; in both at half scale, 6.02 - 3.01 dB less.
    row = measure(tone(5.0, 997.0, peak=0.5).T.copy(), 44100)
    assert row["lufs"] == pytest.approx(-6.02, abs=0.1)
    assert row["peak_db"] == pytest.approx(-6.02, abs=0.01)
    samples = np.concatenate([silence(0.25), noise(1.0), silence(0.5)])
    row = measure(samples.T.copy(), 44100)
    assert row["leading_silence"] == pytest.approx(0.25, abs=1e-3)
    assert row["trailing_silence"] == pytest.approx(0.5, abs=1e-3)
    assert row["dc"] < 0.01
    assert not row["same_channels"]
    assert len(row["thumb"]) == 96
    assert set(row["thumb"][:12]) == {"0"}
    assert set(row["thumb"][-26:]) == {"0"}
    assert measure(np.clip(tone(1.0, peak=2.0), -1, 1).T.copy(), 44100)["clipped"] == pytest.approx(2 / 3, abs=0.01)
    assert measure(tone(1.0, peak=1.0).T.copy(), 44100)["clipped"] == 0.0, "a full-scale sine is not clipped"


def test_unreadable_files_say_why(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in (("a.wav", b"RIFF nothing"), ("b.mp3", b""), ("c.m4a", b"\0\0\0\x20ftypM4A ")):
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("x")
    (folder / "d.wav").write_bytes(b"RIFF")
    rows = audit_rows(folder, AuditRules(captions="auto"))
    assert all(codes(row) == {"unreadable"} for row in rows.values()), "and no caption is asked for"
    if shutil.which("ffmpeg") is None:
        assert "apt install ffmpeg" in describe_rejection(rows["c.m4a"])


def test_cut_short(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for suffix in ("wav", "aiff"):
        path = write_clip(folder / f"a.{suffix}", noise(1.0), "x")
        path.write_bytes(path.read_bytes()[:-40000])
    rows = audit_rows(folder)
    assert [codes(row) - {"near_duplicate", "duplicate"} for row in rows.values()] == [{"cut_short"}] * 2
    assert "0.23 s of 1.00 s" in format_clip(rows["a.wav"])


def test_captions(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_clip(folder / "good.wav", noise(1.0, seed=1), "five words are just enough")
    write_clip(folder / "long.wav", noise(1.0, seed=2), "this one is too long now")
    write_clip(folder / "none.wav", noise(1.0, seed=3))
    write_clip(folder / "empty.wav", noise(1.0, seed=9), "  \n")
    write_clip(folder / "odd.wav", noise(1.0, seed=10))
    (folder / "odd.txt").write_bytes(b"\xff\xfe\xfd")
    write_clip(folder / "two.wav", noise(1.0, seed=11), "one thing")
    (folder / "two.json").write_text('{"caption": "another"}')
    rows = audit_rows(folder)
    found = {source.partition(".")[0]: codes(row) for source, row in rows.items()}
    assert found == {
        "good": set(),
        "long": {"caption_long"},
        "none": {"no_caption"},
        "empty": {"empty_caption"},
        "odd": {"bad_text", "empty_caption"},
        "two": {"caption_conflict"},
    }
    assert rows["long.wav"]["tokens"] == 6
    assert "6 tokens, the model reads 5" in format_clip(rows["long.wav"])
    free = audit_rows(folder, AuditRules(captions="optional"))
    assert not is_rejected(free["none.wav"]) and codes(free["none.wav"]) == codes(free["empty.wav"]) == {"uncaptioned"}


def chord(seed: int, stretch: float = 1.0) -> np.ndarray:
    """Six seconds of plucked notes, other ones for each seed."""
    rng = np.random.default_rng(seed)
    samples = np.zeros(int(6 * 44100 * stretch))
    for _ in range(12):
        start, length = (int(rng.integers(*of) * stretch) for of in ((0, 5 * 44100), (8000, 40000)))
        time = np.arange(length) / 44100
        frequency = 110 * 2 ** (rng.integers(0, 36) / 12)
        for harmonic in range(1, 6):
            samples[start : start + length] += np.sin(2 * np.pi * frequency * harmonic * time) * np.exp(-3 * time)
    return np.stack([samples, 0.8 * samples], axis=1).astype(np.float32) / 20


def drum(hertz: float) -> np.ndarray:
    time = np.arange(26460) / 44100
    samples = np.sin(2 * np.pi * (hertz * time + 4 * (1 - np.exp(-30 * time)))) * np.exp(-8 * time)
    return np.stack([samples, samples], axis=1).astype(np.float32) / 2


def test_duplicates(tmp_path: Path) -> None:
    folder, samples = tmp_path / "set", chord(0)
    write_clip(folder / "a.wav", samples, "one")
    soundfile.write(folder / "b.flac", soundfile.read(folder / "a.wav", dtype="int16")[0], 44100)
    (folder / "b.txt").write_text("the same in another container")
    copies = ("Copy of a.wav", "a (1).wav", "a copy 2.wav", "a - Copy (3).wav", "A_dup.wav")
    for name in copies:
        write_clip(folder / name, samples, "sorted before the one that it is a copy of")
    write_clip(folder / "c.wav", samples * 0.5, "softer")
    write_clip(folder / "d.ogg", samples, "lossy")
    write_clip(folder / "e.mp3", samples, "lossy too")
    soundfile.write(folder / "f.wav", samples.mean(axis=1), 44100)
    for number in range(1, 12):
        write_clip(folder / f"other{number}.wav", chord(number), "different")
    (folder / "f.txt").write_text("mono")
    write_clip(folder / "g.wav", np.pad(samples, ((20000, 30000), (0, 0))), "silence around it")
    for hertz in (45, 50, 56, 63):
        write_clip(folder / f"other_kick{hertz}.wav", drum(hertz), "another pitch")
    write_clip(folder / "softer_kick.mp3", drum(45) / 4, "lossy and softer")
    write_clip(folder / "0.wav", samples)  # without a caption
    rows = audit_rows(folder, AuditRules())
    found = {source: codes(row) & {"duplicate", "near_duplicate"} for source, row in rows.items()}
    assert found["a.wav"] == set()
    assert found["b.flac"] == found["0.wav"] == {"duplicate"}, "of a rejected clip, too"
    assert all(found[name] == {"duplicate"} for name in copies)
    lossy = ("c.wav", "d.ogg", "e.mp3", "f.wav", "g.wav", "softer_kick.mp3")
    assert {name for name in found if found[name] == {"near_duplicate"}} == set(lossy)
    assert not any(found[name] for name in found if name.startswith("other"))
    assert "of a.wav" in format_clip(rows["b.flac"])
    assert "of a.wav" in format_clip(rows["e.mp3"])


def test_a_stretched_copy_is_held_out_with_its_original(tmp_path: Path) -> None:
    for name, samples in (("120bpm", chord(0)), ("123bpm", chord(0, 120 / 123)), ("other", chord(1))):
        write_clip(tmp_path / "set" / f"{name}.wav", samples, "x")
    clips, journal = list_source(str(tmp_path / "set")).clips, tmp_path / "audit.jsonl"
    run_audit(clips, RULES, journal, {})
    index = AuditIndex([journal], {clip.source: clip.stamp for clip in clips})
    assert index.similar.tolist() == [0, 1, 2] and index.find_groups().tolist() == [0, 0, 2]


def test_problems_of_the_source_are_rows(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_clip(folder / "a.wav", noise(1.0), "x")
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.wav"}\n')
    rows = audit_rows(folder)
    assert codes(rows["metadata.jsonl:1"]) == {"damaged_source"}
    assert is_rejected(rows["metadata.jsonl:1"])


def test_an_audit_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, journal = tmp_path / "set", tmp_path / "work" / "audit-000.jsonl"
    for number in range(5):
        write_clip(folder / f"{number}.wav", noise(0.5, seed=number), "x")
    clips = list_source(str(folder)).clips
    run_audit(clips[:3], RULES, journal, {})
    journal.write_bytes(journal.read_bytes()[:-25])  # killed while writing the third row
    seen = []
    monkeypatch.setattr(
        "sa3train.data.audit.audit.audit_clip", lambda clip, rules: seen.append(clip.source) or audit_clip(clip, rules)
    )
    run_audit(clips, RULES, journal, read_stamps([journal]), threads=1)
    assert seen == ["2.wav", "3.wav", "4.wav"]
    index = AuditIndex([journal], {clip.source: clip.stamp for clip in clips})
    assert index.sources == [f"{number}.wav" for number in range(5)]


def test_a_changed_clip_is_audited_again(tmp_path: Path) -> None:
    folder, journal = tmp_path / "set", tmp_path / "work" / "audit-000.jsonl"
    write_clip(folder / "a.wav", noise(0.5), "before")
    run_audit(list_source(str(folder)).clips, RULES, journal, {})
    write_clip(folder / "a.wav", noise(0.7), "after")
    clips = list_source(str(folder)).clips
    run_audit(clips, RULES, journal, read_stamps([journal]))
    (row,) = AuditIndex([journal], {clip.source: clip.stamp for clip in clips}).iterate_rows()
    assert row["caption"] == "after"
    assert row["seconds"] == pytest.approx(0.7)


def test_what_all_clips_share_does_not_hide_what_is_worse() -> None:
    def make_row(source: str, *codes: str) -> dict[str, Any]:
        found = [{"code": code, "severity": FINDING_TYPES[code].severity, "detail": ""} for code in codes]
        return {"source": source, "findings": found}

    rows = [
        make_row("a", "no_caption"),
        make_row("b"),
        make_row("c", "no_caption", "clipped"),
        make_row("d", "no_caption", "silent"),
        make_row("e", "clipped"),
    ]
    assert "".join(row["source"] for row in sorted(rows, key=rank_clip)) == "dcaeb"


def test_audio_that_lacks_nothing_but_captions_is_counted(tmp_path: Path) -> None:
    write_clip(tmp_path / "set" / "good.wav", noise(2.0), "x")
    write_clip(tmp_path / "set" / "bare.wav", noise(3.0))
    write_clip(tmp_path / "set" / "bare and silent.wav", silence(4.0))
    summary = write_audit_report(tmp_path / "out", "set", audit_rows(tmp_path / "set").values())
    assert (summary.seconds, summary.uncaptioned_seconds) == (2.0, 3.0)
    assert summary.count_clips() == "3 clips, 2 rejected, 2.0 s of usable audio, 3.0 s more with captions"


def test_reports(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_clip(folder / "good.wav", noise(2.0), "x")
    write_clip(folder / "bad <b>.wav", silence(1.0), "y & z")
    rows = list(audit_rows(folder).values())
    summary = write_audit_report(tmp_path / "out", str(folder), rows)
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert [row["source"] for row in written["clips"]] == ["bad <b>.wav", "good.wav"]
    assert written["summary"]["rejected"] == 1
    assert written["summary"]["seconds"] == 2.0
    assert written["summary"]["findings"]["silent"] == {
        "clips": 1, "severity": "error", "fix": FINDING_TYPES["silent"].fix,
    }  # fmt: skip
    page = (tmp_path / "out" / "audit.html").read_text()
    assert page.count("<svg") == 2
    assert "bad &lt;b&gt;.wav" in page
    for address in re.findall(r'<audio[^>]* src="([^"]*)"', page):
        assert (tmp_path / "out" / unquote(address)).is_file(), "the page plays its clips, wherever the two are taken"
    assert page.count("<audio") == 2
    (folder / "good.wav").unlink()
    write_audit_report(tmp_path / "out", str(folder), rows)
    assert (tmp_path / "out" / "audit.html").read_text().count("<audio") == 1
    assert "y &amp; z" in page
    assert "http" not in page.replace("http-equiv", ""), "nothing is fetched from elsewhere"
    table = summary.format_table()
    assert "2 clips, 1 rejected" in table
    assert "silent throughout" in table
    assert FINDING_TYPES["silent"].fix in table
    assert "no problems" in AuditSummary("empty").format_table()


@pytest.mark.parametrize("name", ["CAPTION_FIELDS", "MAX_TAG_LENGTH", "LIMITS", "FINDING_TYPES", "COMPOSITION"])
def test_the_version_follows_what_it_guards(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = audit.compute_audit_version()
    assert before == audit.compute_audit_version()
    changes = {"CAPTION_FIELDS": ("text",), "MAX_TAG_LENGTH": 100, "COMPOSITION": (audit.analysis,)}
    changed = changes[name] if name in changes else dict(list(getattr(audit, name).items())[1:])
    monkeypatch.setattr(audit, name, changed)
    assert audit.compute_audit_version() != before
