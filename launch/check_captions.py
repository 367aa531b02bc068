"""Measure how well tempo and key are heard, on clips of known tempo and key that it renders.

Run as `python launch/check_captions.py FOLDER`, where the programs `fluidsynth` and `dpkg-deb` and the packages `mido`
and `music21` are installed, and FOLDER holds Debian's `hydrogen-data`, `mma` and `fluid-soundfont-gm` unpacked
(`dpkg -x`).

Loops: the drum patterns of Hydrogen's demo songs, in two and in four bars, and the drums of the styles of MMA, both at
tempos drawn from 72 to 175 BPM and cut to whole bars. Keys: the first 8 s of scores from music21's corpus, each
transposed at random and played by one of 26 instruments; the key is proven by the signature, music21's analysis and the
last bass note. Every other song, style and score is of the half on which the estimators were chosen; both halves are
printed, and other scores that had no part in any choice. `--fit` fits the weights that tell a tempo from its double on
the chosen halves of both kinds of loops, and prints how often they are right on the others.
"""

import argparse
import functools
import json
import random
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sa3train.audio import analysis
from sa3train.audio.io import load_audio
from sa3train.audio.notes import get_relative_key

RATE = 44100
TICKS = 480
PENALTY = 10.0
SECONDS = 8.0
DRUMS = {
    "kick": 36, "rim": 37, "stick": 37, "snare": 38, "clap": 39, "floor": 43, "pedal": 44, "open": 46, "hat": 42,
    "hh": 42, "closed": 42, "crash": 49, "splash": 55, "ride": 51, "bell": 53, "cowbell": 56, "tom": 45, "conga": 63,
    "clave": 75, "shaker": 70, "tamb": 54,
}  # fmt: skip
"""General MIDI's drum by a word in an instrument's name; the first that fits."""
PROGRAMS = (
    0, 4, 5, 6, 11, 12, 16, 19, 21, 22, 24, 25, 26, 40, 42, 46, 48, 52, 56, 60, 65, 68, 71, 73, 80, 89,
)  # fmt: skip
CORPUS = {
    "bach": 30, "ryansMammoth": 14, "oneills1850": 14, "airdsAirs": 14, "haydn": 14, "mozart": 14, "beethoven": 10,
    "corelli": 10, "joplin": 6, "schumann_robert": 6, "schubert": 4, "monteverdi": 6, "chopin": 4, "handel": 4,
}  # fmt: skip
"""Most scores of each part of the corpus."""


def main() -> int:
    """Render what is missing, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Debian's packages unpacked; the clips go to its sub-folder clips")
    parser.add_argument("--fit", action="store_true", help="fit the weights that tell a tempo from its double")
    arguments = parser.parse_args()
    font = next(arguments.folder.rglob("FluidR3_GM.sf2"), Path("/usr/share/sounds/sf2/FluidR3_GM.sf2"))
    clips, all_heard = arguments.folder / "clips", []
    for name, list_drums in (("loops", list_loops), ("grooves", list_grooves)):
        heard = measure_tempos(render_set(clips / name, functools.partial(list_drums, arguments.folder), font))
        print_tempos(heard, name, 0)
        print_tempos(heard, f"{name}, cut within a beat", 1)
        all_heard += heard
    for name, is_blind in (("keys", False), ("blind-keys", True)):
        print_keys(name, render_set(clips / name, functools.partial(list_scores, is_blind), font))
    if arguments.fit:
        fit_octaves(all_heard)
    return 0


def read_mono(path: Path) -> Any:
    """Read a clip as the analysis hears it."""
    return load_audio(path, analysis.RATE, 1)[0]


def measure_tempos(clips: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Any], list[np.ndarray]]]:
    """Estimate the tempo of each loop whole, and cut within a beat; with the attacks that were heard."""
    found = []
    for clip in clips:
        mono_N = read_mono(clip["path"])
        cut_N = mono_N[: len(mono_N) - round(0.37 * 60 / clip["bpm"] * analysis.RATE)]
        attacks = [analysis.measure_attacks(part_N) for part_N in (mono_N, cut_N)]
        lengths = [len(part_N) / analysis.RATE for part_N in (mono_N, cut_N)]
        tempos = [analysis.estimate_tempo(*pair) for pair in zip(attacks, lengths, strict=True)]
        found.append((clip, tempos, attacks))
    return found


def print_tempos(heard: list[Any], title: str, number: int) -> None:
    """Print how often tempos are right."""
    for half in (0, 1, None):
        rows = [(tempos[number], clip["bpm"]) for clip, tempos, _ in heard if half in (None, clip["half"])]
        ratios = np.array([tempo.bpm / bpm if tempo else 0.0 for tempo, bpm in rows])
        right = np.abs(ratios - 1) < 0.02
        octave = np.minimum(np.abs(np.log2(np.maximum(ratios, 1e-9)) - np.array([[-1], [0], [1]])), 9).min(0) < 0.0286
        sure = np.array([bool(tempo and tempo.is_sure) for tempo, _ in rows])
        loops = np.mean([bool(tempo and tempo.is_loop) for tempo, _ in rows])
        name = {0: "chosen on", 1: "held out", None: "all"}[half]
        print(
            f"{title}, {name} ({len(rows)}): within 2% {right.mean():.3f}, with half and double {octave.mean():.3f}",
            end=", ",
        )
        print(f"taken for loops {loops:.3f}; said {sure.mean():.3f}, of these right {right[sure].mean():.3f}")


def print_keys(title: str, clips: list[dict[str, Any]]) -> None:
    """Print how often keys are right."""
    rows = []
    for clip in clips:
        tonic, mode = clip["key"].split()
        true = f"{analysis.NOTES[int(tonic)]} {mode}"
        said, strength = analysis.estimate_key(read_mono(clip["path"]))
        rows.append((clip["half"] or 0, said == true, said == get_relative_key(true), strength, said is not None))
    table = np.array(rows, dtype=float)
    for half in (None,) if any(clip["half"] is None for clip in clips) else (0, 1, None):
        part = table if half is None else table[table[:, 0] == half]
        name, sure = {0: "chosen on", 1: "held out", None: "all"}[half], part[:, 4] > 0
        print(
            f"{title}, {name} ({len(part)}): right {part[:, 1].mean():.3f}, relative {part[:, 2].mean():.3f}", end="; "
        )
        print(f"said {sure.mean():.3f}, of these right or relative {part[sure, 1:3].sum() / sure.sum():.3f}")


def fit_octaves(heard: list[Any]) -> None:
    """Fit the weights on the chosen halves, and print them and how often they are right on the others.

    Each loop gives two examples: heard from its own tempo, and from half of it. So nothing is learned of how fast music
    usually is.
    """
    examples = [
        (clip["half"], analysis.measure_octave(attacks_T - attacks_T.mean(), clip["bpm"] / times), times == 2)
        for clip, _, parts in heard
        for attacks_T in parts
        for times in (1, 2)
    ]
    of, X, y = (np.array(column, dtype=float) for column in zip(*examples, strict=True))
    weights = fit_logistic(X[of == 0], y[of == 0])
    for half in (0, 1):
        print(f"half {half}: right {np.mean((X[of == half] @ weights > 0) == y[of == half]):.3f}")
    print("weights:", np.round(weights, 2).tolist())


def fit_logistic(X: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fit a logistic regression with an L2 penalty on standardized features; the last column is constant."""
    mean, scale = X[:, :-1].mean(0), X[:, :-1].std(0)
    Z = np.c_[(X[:, :-1] - mean) / scale, np.ones(len(X))]
    penalty, weights = np.diag([PENALTY] * (Z.shape[1] - 1) + [1e-6]), np.zeros(Z.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-Z @ weights))
        weights -= 0.5 * np.linalg.solve(
            (Z * (p * (1 - p))[:, None]).T @ Z + penalty, Z.T @ (p - y) + penalty @ weights
        )
    unscaled = weights[:-1] / scale
    return np.r_[unscaled, weights[-1] - unscaled @ mean]


def render_set(folder: Path, list_clips: Callable[[], Iterator[dict[str, Any]]], font: Path) -> list[dict[str, Any]]:
    """Render a set of clips, once: each a WAV file, and `set.json` with what is known of them."""
    record = folder / "set.json"
    if not record.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if not (clips := list(list_clips())):
            raise SystemExit(f"nothing to render for {folder}: is what it is made of unpacked?")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda clip: render_clip(folder / clip["file"], clip, font), clips))
        record.write_text(json.dumps([{k: v for k, v in clip.items() if k != "notes"} for clip in clips], indent=1))
    return [clip | {"path": folder / clip["file"]} for clip in json.loads(record.read_text())]


def render_clip(path: Path, clip: dict[str, Any], font: Path) -> None:
    """Render notes by fluidsynth, and cut the audio to `seconds`."""
    import mido
    import soundfile

    channel = 9 if clip["program"] is None else 0
    messages = [] if clip["program"] is None else [(0.0, mido.Message("program_change", program=clip["program"]))]
    for start, length, pitch, velocity in clip["notes"]:
        messages.append((start, mido.Message("note_on", note=pitch, velocity=velocity, channel=channel)))
        messages.append((start + length, mido.Message("note_off", note=pitch, channel=channel)))
    track, now = mido.MidiTrack(), 0
    for at, message in sorted(messages, key=lambda pair: (pair[0], pair[1].type)):
        tick = round(at * TICKS * 2)  # 120 BPM unless told otherwise: two quarters a second
        track.append(message.copy(time=tick - now))
        now = tick
    song = mido.MidiFile(ticks_per_beat=TICKS)
    song.tracks.append(track)
    with tempfile.TemporaryDirectory() as scratch:
        midi, wav = Path(scratch) / "a.mid", Path(scratch) / "a.wav"
        song.save(str(midi))
        command = ["fluidsynth", "-niq", "-g", "0.5", "-r", str(RATE), "-F", str(wav), str(font), str(midi)]
        subprocess.run(command, check=True, capture_output=True)
        audio_NC = soundfile.read(wav, dtype="float32", always_2d=True)[0]
    samples = round(clip["seconds"] * RATE)
    audio_NC = np.pad(audio_NC[:samples], ((0, max(0, samples - len(audio_NC))), (0, 0)))
    soundfile.write(path, audio_NC, RATE)


def list_loops(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the loops: every drum pattern of a whole bar with at least four hits and a kick or snare."""
    rng = random.Random(0)
    for number, path in enumerate(sorted(folder.rglob("*.h2song"))):
        song = ET.parse(path).getroot()
        names = {one.findtext("id"): (one.findtext("name") or "").lower() for one in song.iter("instrument")}
        drums = {key: next((DRUMS[word] for word in DRUMS if word in name), None) for key, name in names.items()}
        seen = set()
        for pattern in song.iter("pattern"):
            hits = [
                (int(note.findtext("position") or 0), drums.get(note.findtext("instrument")),
                 float(note.findtext("velocity") or 0.8))
                for note in pattern.iter("note")
            ]  # fmt: skip
            hits = [hit for hit in hits if hit[1]]
            content = tuple(sorted(hits))
            if int(pattern.findtext("size") or 0) != 192 or len(hits) < 4 or content in seen:
                continue
            if not {drum for _, drum, _ in hits} & {36, 37, 38, 39} or len({at for at, _, _ in hits}) < 4:
                continue
            seen.add(content)
            for bars in (2, 4):
                bpm = rng.randint(72, 175)
                beat = 60 / bpm
                notes = [
                    ((at / 48 + 4 * bar) * beat, 0.1, drum, max(1, min(127, round(127 * level))))
                    for bar in range(bars)
                    for at, drum, level in hits
                ]
                yield {
                    "file": f"{path.stem}-{len(seen)}-{bars}.wav", "bpm": bpm, "seconds": 4 * bars * beat,
                    "half": number % 2, "program": None, "notes": notes,
                }  # fmt: skip


def list_grooves(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the drums of MMA's grooves in four quarters: the first one of each style, in two or in four bars."""
    import mido

    rng, clips = random.Random(1), list[dict[str, Any]]()
    program = next(folder.rglob("bin/mma"), None)
    if program is None:
        return
    program = program.resolve()
    for style in sorted(folder.rglob("stdlib/*.mma")):
        text = style.read_text(encoding="latin-1")
        groove = re.search(r"^DefGroove\s+(\S+)", text, re.MULTILINE)
        if not groove or re.search(r"^\s*Time(?:sig)? +(?!4\b)", text, re.MULTILINE | re.IGNORECASE):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            song, midi = Path(scratch) / "a.mma", Path(scratch) / "a.mid"
            song.write_text(
                "\n".join(
                    [
                        "Tempo 120",
                        f"Include {style.resolve()}",
                        f"Groove {groove[1]}",
                        *(f"{bar} C" for bar in range(1, 5)),
                    ]
                )
            )
            command = [sys.executable, str(program), str(song), "-f", str(midi)]
            made = subprocess.run(command, check=False, capture_output=True, cwd=style.parents[2])
            messages = list(mido.merge_tracks(mido.MidiFile(midi).tracks)) if midi.is_file() else []
        if not messages:
            print(f"{style.stem} is left out: {made.stdout.decode(errors='replace').strip()[-100:]}")
            continue
        resolution, now, hits = 192, 0, []
        for message in messages:
            now += message.time
            if message.type == "note_on" and message.channel == 9 and message.velocity:
                hits.append((now / resolution, message.note, message.velocity))
        bars, bpm = rng.choice((2, 4)), rng.randint(72, 175)
        beat = 60 / bpm
        notes = [(at * beat, 0.1, drum, level) for at, drum, level in hits if at < 4 * bars - 0.01]
        if len({at for at, *_ in notes}) >= 4 * bars and {drum for *_, drum, _ in notes} & {35, 36, 37, 38, 39, 40}:
            clips.append({
                "file": f"{style.stem}-{bars}.wav", "bpm": bpm, "seconds": 4 * bars * beat,
                "program": None, "notes": notes,
            })  # fmt: skip
    for number, clip in enumerate(sorted(clips, key=lambda clip: clip["file"])):
        yield clip | {"half": number % 2}


def list_scores(is_blind: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the openings of scores whose key is proven; the blind ones are those behind the last that is looked at."""
    from music21 import corpus

    rng, count = random.Random(0), 0
    for part, most in CORPUS.items():
        paths = sorted(corpus.getComposer(part))
        rng.shuffle(paths)
        found = 0
        for path in paths[: 4 * most]:
            clip = make_score_clip(path, rng) if found < most else None
            if clip:
                found, count = found + 1, count + 1
                if not is_blind:
                    yield clip | {"file": f"{part}-{found}.wav", "half": count % 2}
        others = paths[4 * most : 8 * most] if is_blind else []
        own = random.Random(part)
        found = 0
        for path in others:
            clip = make_score_clip(path, own) if found < most else None
            if clip:
                found += 1
                yield clip | {"file": f"{part}-{found}.wav", "half": None}


def make_score_clip(path: Path, rng: random.Random) -> dict[str, Any] | None:
    """Make the notes of a score's first seconds; None where its key cannot be proven."""
    from music21 import chord, corpus, key, stream, tempo

    try:
        score = corpus.parse(str(path))
        score = score.scores[0] if isinstance(score, stream.Opus) else score
        flat = (
            score.expandRepeats().flatten() if not score.recurse().getElementsByClass("RepeatMark") else score.flatten()
        )
        signature = next(iter(flat.getElementsByClass(key.KeySignature)), None)
        found = score.analyze("key")
        notes = [note for note in flat.notes if note.quarterLength > 0]
        last = max(note.offset for note in notes)
        bass = min(pitch.midi for note in notes if note.offset + note.quarterLength > last for pitch in note.pitches)
    except Exception:  # noqa: BLE001, music21 raises many for what it cannot read
        return None
    if signature is None or signature.sharps != found.sharps or bass % 12 != found.tonic.pitchClass:
        return None
    mark = next(iter(flat.getElementsByClass(tempo.MetronomeMark)), None)
    bpm = mark.getQuarterBPM() if mark and mark.getQuarterBPM() else rng.randint(76, 132)
    shift, beat = rng.randint(-5, 6), 60 / bpm
    played = [
        (float(note.offset) * beat, float(note.quarterLength) * beat * 0.95, pitch.midi + shift, 90)
        for note in notes
        for pitch in (note.pitches if isinstance(note, chord.Chord) else [note.pitch])
        if float(note.offset) * beat < SECONDS and 21 <= pitch.midi + shift <= 108
    ]
    name = f"{(found.tonic.pitchClass + shift) % 12} {found.mode}"
    return {"key": name, "seconds": SECONDS, "program": rng.choice(PROGRAMS), "notes": played}


if __name__ == "__main__":
    sys.exit(main())
