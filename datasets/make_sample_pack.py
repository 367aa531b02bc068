"""Write a sample pack of 60 files as several vendors would: their names, chunks and tags, and three mistakes.

    python datasets/make_sample_pack.py OUT            # the pack, of nothing but audio
    python datasets/make_sample_pack.py OUT --check    # how many of its captions say what is true

ACID, Apple Loops, LIST/INFO, bext, iXML, smpl and ID3 chunks, AIFF and FLAC; loops, one-shots and textures. All sounds
are synthesized here, so that tempo and key are known. Shapes: C audio channels, N samples.
"""

from __future__ import annotations

import argparse
import io
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from mutagen.id3 import ID3, TBPM, TCON, TKEY

from sa3train.audio.notes import get_pitch_class, parse_key
from sa3train.data.captioning.service import caption_folder
from sa3train.data.sources.captions import read_clip_text
from sa3train.data.sources.listing import list_source

RATE = 44100
F64 = np.ndarray[Any, np.dtype[np.float64]]


class Row(NamedTuple):
    """Files of one habit: names with fields, how many, the sound, tempos and keys, and what is written in the file."""

    name: str
    count: int
    sound: str
    kind: str
    tempos: tuple[int, ...] = ()
    keys: tuple[str, ...] = ()
    habit: str = ""
    wrong: Any = None


ROWS = (
    Row("Loops/Deep House/NS_Drum_Loop_{n:02}_{bpm}bpm.wav", 6, "drums", "drum loop", (120, 122, 124), (), "acid"),
    Row("Loops/Deep House/{bpm}_{key}in_Bass_{n}.wav", 6, "bass", "bass loop", (122, 124), ("Cm", "Am", "F#m"), "acid"),
    Row("Loops/Techno/TK Synth Loop {n} {bpm} BPM {key}.wav", 5, "arp", "synth loop", (128, 132), ("Dm", "Gm"), "id3"),
    Row("Apple Loops/House Organ {n:02}.aif", 5, "chords", "organ loop", (118, 126), ("Fm", "Bbm", "Em"), "basc"),
    Row("Loops/Drum & Bass/DnB_Break_{n:02}_{bpm}.wav", 4, "drums", "break loop", (170, 174), (), "info"),
    Row("Loops/Hip Hop/Dusty Drums {n}.wav", 4, "drums", "drum loop", (88, 92)),
    Row("Loops/Lo-Fi/Mellow_Keys_{n}.wav", 4, "chords", "keys loop", (80, 84), ("Dm", "Am"), "ixml"),
    Row("One Shots/Kicks/Kick_{n:02}_128bpm_Am.wav", 5, "kick", "kick one-shot", (), ("Am",), "smpl"),
    Row("One Shots/Snares/SNR {n}.wav", 4, "snare", "snare one-shot"),
    Row("One Shots/Hats/Hat_Closed_{n}.wav", 3, "hat", "hi-hat one-shot", (), (), "acid"),
    Row("One Shots/Bass/BassHit_{n}.wav", 4, "note", "bass one-shot", (), ("Cm", "Em", "Gm"), "smpl"),
    Row("Textures/Wind Through Reeds {n}.wav", 5, "wind", "wind through reeds", (), (), "bext"),
    Row("Textures/Vinyl Crackle {n}.flac", 2, "crackle", "vinyl crackle"),
    Row("Loops/Tech House/Groove_{n:02}_125bpm.wav", 1, "drums", "loop", (125,), (), "acid", 140),
    Row("Loops/House/Chord Loop {n:02} Gm 120bpm.wav", 1, "chords", "chord loop", (120,), ("Gm",), "id3", "Bm"),
    Row("Loops/House/Drum_Loop_{n:02}_140bpm.wav", 1, "drums", "drum loop", (96,)),
)


class Truth(NamedTuple):
    """What is true of a file."""

    path: str
    row: Row
    bpm: int | None
    key: str | None
    seed: int


def list_files() -> Iterator[Truth]:
    """Yield the files of the pack."""
    seed = 0
    for row in ROWS:
        for n in range(1, row.count + 1):
            bpm = row.tempos[n % len(row.tempos)] if row.tempos else None
            key = row.keys[n % len(row.keys)] if row.keys else None
            yield Truth(row.name.format(n=n, bpm=bpm, key=key), row, bpm, key, seed := seed + 1)


def main() -> int:
    """Write the pack, or check captions of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the pack")
    parser.add_argument("--check", action="store_true", help="compose captions for it and count what they say")
    arguments = parser.parse_args()
    if arguments.check:
        return check_captions(arguments.out)
    for truth in list_files():
        path = arguments.out / truth.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_file(truth))
    print(f"wrote 60 files to {arguments.out}")
    return 0


def check_captions(folder: Path) -> int:
    """Print what the captions of the pack say, and how often tempo, key and kind are right."""
    captions = {clip.source: read_clip_text(clip).caption for clip in list_source(str(folder)).clips}
    captions |= caption_folder(folder, dry_run=True).list_captions()
    counts = Counter[str]()
    for truth in list_files():
        caption = captions[truth.path] or ""
        bpm, key = re.search(r"(\d+) BPM", caption), re.search(r"\b[A-G][#b]? (?:minor|major)", caption)
        wanted_key = parse_key(truth.key) if truth.bpm and truth.key else None
        pairs = {
            "tempo": (bpm and int(bpm[1]), truth.bpm),
            "key": (key and key[0], wanted_key),
            "kind": (truth.row.kind if all(word in caption for word in truth.row.kind.split()) else "", truth.row.kind),
        }
        for name, (said, wanted) in pairs.items():
            verdict = "right" if said == wanted else "wrong" if said else "left out"
            counts[f"{name} {verdict if said or wanted else 'none, rightly'}"] += 1
            if verdict != "right":
                print(f"{name} {verdict}: {truth.path}: {caption}")
    print(", ".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    return 0


def make_file(truth: Truth) -> bytes:
    """Make the bytes of a file: audio, then the chunks of its vendor."""
    rng, row = np.random.default_rng(truth.seed), truth.row
    mono_N = make_loop(truth, rng) if truth.bpm else make_single(row.sound, rng, truth.key)
    audio_NC = np.stack([mono_N, np.roll(mono_N, 40)], 1) * 0.7 / np.abs(mono_N).max()
    form = {".aif": "AIFF", ".flac": "FLAC"}.get(Path(truth.path).suffix, "WAV")
    with io.BytesIO() as file:
        soundfile.write(file, audio_NC, RATE, format=form, subtype="PCM_16")
        return add_chunks(file.getvalue(), list_chunks(truth, len(mono_N) / RATE))


def list_chunks(truth: Truth, seconds: float) -> dict[bytes, bytes]:
    """List the chunks of a file by their names."""
    row, bpm = truth.row, float(truth.bpm or 0)
    beats = round(seconds * bpm / 60)
    root = get_pitch_class(truth.key) if truth.key else 0
    if row.habit == "acid":
        flags = (0 if bpm else 1) | (2 if truth.key else 0)
        return {b"acid": struct.pack("<IHHfIHHf", flags, 48 + root, 0x8000, 0.0, beats, 4, 4, row.wrong or bpm)}
    if row.habit == "basc":
        return {b"basc": struct.pack(">IIHHHHH", 1, beats, 48 + root, 1, 4, 4, 2) + bytes(66)}
    if row.habit == "smpl":
        return {b"smpl": struct.pack("<9I", 0, 0, 22676, 36 + root, 0, 0, 0, 0, 0)}
    if row.habit == "info":
        parts = b"".join(
            n + struct.pack("<I", len(v)) + v for n, v in ((b"IGNR", b"Drum & Bass\0"), (b"ISFT", b"Live"))
        )
        return {b"LIST": b"INFO" + parts}
    if row.habit == "bext":
        return {b"bext": b"wind through dry reeds at dusk, close microphones".ljust(602, b"\0")}
    if row.habit == "ixml":
        text = f"<BWFXML><ASWG><tempo>{bpm:g}</tempo><inKey>{truth.key}</inKey><isLoop>true</isLoop></ASWG></BWFXML>"
        return {b"iXML": text.encode()}
    if row.habit == "id3":
        tags = ID3()
        for frame in (
            TBPM(text=str(truth.bpm)),
            TKEY(text=row.wrong or truth.key),
            TCON(text=Path(truth.path).parent.name),
        ):
            tags.add(frame)
        with io.BytesIO() as file:
            tags.save(file)
            return {b"id3 ": file.getvalue()}
    return {}


def add_chunks(content: bytes, chunks: dict[bytes, bytes]) -> bytes:
    """Append chunks to a RIFF or AIFF file."""
    sign = "<" if content.startswith(b"RIFF") else ">"
    for name, value in chunks.items():
        content += name + struct.pack(f"{sign}I", len(value)) + value + bytes(len(value) % 2)
    return content if not chunks else content[:4] + struct.pack(f"{sign}I", len(content) - 8) + content[8:]


def make_loop(truth: Truth, rng: np.random.Generator) -> F64:
    """Make two or four whole bars; what rings on behind the end comes in at the start."""
    assert truth.bpm
    bars = 2 if truth.row.sound == "arp" else 4
    step, total = 15 / truth.bpm * RATE, round(bars * 240 / truth.bpm * RATE)
    out_N = np.zeros(total)
    for place, sound in list_notes(truth, bars, rng):
        at = round(place * step) + np.arange(len(sound))
        np.add.at(out_N, at % total, sound)
    return out_N


def list_notes(truth: Truth, bars: int, rng: np.random.Generator) -> Iterator[tuple[int, F64]]:
    """Yield the sounds of a loop with their places in sixteenths."""
    kind = truth.row.sound
    if kind == "drums":
        is_house = 110 < (truth.bpm or 0) < 150
        kicks = {0, 4, 8, 12} if is_house else {0, 10, int(rng.choice([3, 6, 7]))}
        sounds = {name: make_single(name, rng) for name in ("kick", "snare", "hat")}
        for place in range(16 * bars):
            if place % 16 in kicks:
                yield place, sounds["kick"]
            if place % 8 == 4:
                yield place, 0.7 * sounds["snare"]
            if place % 4 == 2 or (place % 2 == 0 and not is_house) or rng.random() < 0.15:
                yield place, 0.35 * sounds["hat"]
        return
    tonic = get_pitch_class(truth.key or "C")
    roots = (0, 8, 3, 7) if bars == 4 else (0, 7)  # i VI III v: the chords of a minor key
    for bar, root in enumerate(roots[:bars]):
        third = 3 if root in (0, 7) else 4
        chord = (root, root + third, root + 7)
        if kind == "chords":
            for place in (0, 6, 12):
                for note in chord:
                    yield 16 * bar + place, make_note(48 + tonic + note, 0.9, 3)
        elif kind == "bass":
            for place in (0, 3, 6, 8, 11, 14):
                yield 16 * bar + place, make_note(36 + tonic + int(rng.choice((root, root, root + 7))), 0.3, 5)
        else:
            for place in range(0, 16, 2):
                yield 16 * bar + place, make_note(60 + tonic + chord[place // 2 % 3], 0.4, 8)


def make_note(pitch: int, seconds: float, decay: float) -> F64:
    """A plucked tone of six harmonics."""
    t = np.arange(round(seconds * RATE)) / RATE
    f = 440 * 2 ** ((pitch - 69) / 12)
    tone = sum(np.sin(2 * np.pi * f * n * t) / n**1.5 for n in range(1, 7))
    return np.asarray(tone * np.exp(-decay * t) * np.minimum(1, t * 300) * np.minimum(1, (seconds - t) * 100))


def make_single(kind: str, rng: np.random.Generator, key: str | None = None) -> F64:
    """A drum, a low note or a texture."""
    seconds = {"kick": 0.4, "snare": 0.3, "hat": 0.12, "note": 1.2}.get(kind, 6.0)
    t = np.arange(round(seconds * RATE)) / RATE
    noise = rng.standard_normal(len(t))
    if kind == "kick":
        return np.asarray(np.sin(2 * np.pi * (rng.uniform(42, 60) * t + 8 * (1 - np.exp(-30 * t)))) * np.exp(-9 * t))
    if kind == "snare":
        return np.asarray((0.6 * noise + np.sin(2 * np.pi * rng.uniform(170, 220) * t)) * np.exp(-18 * t))
    if kind == "hat":
        return np.asarray(np.diff(noise, prepend=0.0) * np.exp(-45 * t))
    if kind == "note":
        return make_note(36 + get_pitch_class(key or "C"), seconds, 3)
    if kind == "crackle":
        return np.asarray((rng.random(len(t)) < 8 / RATE) * noise + 0.02 * noise)
    smooth = np.convolve(noise, np.hanning(60), "same")
    return np.asarray(smooth * (1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.15, 0.3) * t)))


if __name__ == "__main__":
    sys.exit(main())
