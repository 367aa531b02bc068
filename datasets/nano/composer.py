"""Composes one clip: a plan of what will be heard, and its score. Everything follows from one `random.Random`."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from score import DRUMS, PAN, REVERB, Note, Score
from sounds import KNOWN, ROOT_NAMES, SCALES, Sound

FIGURES = ("melody", "arpeggio", "chords", "single note", "repeated notes", "scale run")
REGISTERS = ("low", "mid", "high")
SHORT = 3.0  # seconds: the longest clip of a sound that is over at once
TEMPI = {"slow": (60, 72, 80), "medium": (96, 104, 112), "fast": (132, 144, 160)}
MOODS = {
    ("major", "slow"): ("peaceful", "warm"),
    ("major", "medium"): ("cheerful", "bright"),
    ("major", "fast"): ("energetic", "happy"),
    ("minor", "slow"): ("sad", "dark"),
    ("minor", "medium"): ("melancholic", "serious"),
    ("minor", "fast"): ("tense", "dramatic"),
}


@dataclass(frozen=True)
class Plan:
    """What a clip is, and so what its captions may say. Fields that do not apply are empty."""

    sound: Sound
    seconds: float
    figure: str = ""
    register: str = ""
    tempo: str = ""
    bpm: int = 0
    root: int = 0
    mode: str = ""
    articulation: str = ""
    dynamics: str = ""
    room: str = "dry"
    width: str = "stereo"
    seed: int = 0

    @property
    def mood(self) -> str:
        """The first mood word that mode and tempo suggest."""
        return MOODS[self.mode, self.tempo][self.seed % 2] if self.mode else ""

    @property
    def key(self) -> str:
        """Such as "C minor"; empty without a mode."""
        return f"{ROOT_NAMES[self.root]} {self.mode}" if self.mode else ""


def make_plan(rng: random.Random, sound: Sound | None = None, seconds: tuple[float, float] = (1.0, 12.0)) -> Plan:
    """Draw a plan: any known class, or the one given. Lengths lean to 2..7 s."""
    sound = sound or rng.choice(KNOWN)
    low, high = seconds
    length = round(min(high, max(low, rng.triangular(low, high, low + 0.3 * (high - low)))), 1)
    plan = Plan(sound, length, width=rng.choice(("stereo", "stereo", "mono")), seed=rng.getrandbits(48))
    if sound.kind == "effect":
        return replace(plan, seconds=min(length, SHORT)) if sound.name == "impact" else plan
    tempo = rng.choice(tuple(TEMPI))
    plan = replace(plan, tempo=tempo, bpm=rng.choice(TEMPI[tempo]), dynamics=rng.choice(("soft", "loud")))
    plan = replace(plan, room=rng.choice(("dry", "dry", "reverb")))
    if sound.kind == "drum":
        figure = rng.choice(("one-shot", "loop", "loop")) if len(sound.keys) < 3 else "loop"
        return replace(plan, figure=figure, seconds=min(length, SHORT) if figure == "one-shot" else length)
    plan = replace(plan, root=rng.randrange(12), mode=rng.choice(("major", "minor")))
    if sound.kind == "band":
        return plan
    figure = rng.choice([name for name in FIGURES if not (sound.family == "bass" and name == "chords")])
    articulation = rng.choice(("staccato", "legato"))
    if figure == "single note" and (sound.decay or articulation == "staccato"):
        plan = replace(plan, seconds=min(length, SHORT))
    return replace(plan, figure=figure, register=rng.choice(REGISTERS), articulation=articulation)


def keys_of(plan: Plan, low: int, high: int) -> list[int]:
    """The scale's MIDI keys between two keys, both included."""
    return [key for key in range(low, high + 1) if (key - plan.root) % 12 in SCALES[plan.mode]]


def register_range(sound: Sound, register: str) -> tuple[int, int]:
    """The third of the playable range that a register names, at least an octave wide."""
    third = (sound.high - sound.low) / 3
    centre = sound.low + third * (REGISTERS.index(register) + 0.5)
    half = max(6.0, third / 2)
    low = min(max(sound.low, round(centre - half)), sound.high - 12)
    return low, min(sound.high, max(low + 12, round(centre + half)))


def _velocity(plan: Plan, rng: random.Random) -> int:
    return rng.randint(45, 62) if plan.dynamics == "soft" else rng.randint(96, 118)


def _figure_steps(plan: Plan, rng: random.Random, count: int) -> list[tuple[float, list[int]]]:
    """(beats, scale degrees) of successive events of the plan's figure, degrees counted in `count` scale keys."""
    place = rng.randrange(count)
    if plan.figure == "single note":
        return [(64.0, [place])]
    if plan.figure == "repeated notes":
        return [(0.5, [place])] * 64
    if plan.figure == "scale run":
        ladder = list(range(count)) + list(range(count - 2, 0, -1))
        return [(0.5, [ladder[(place + i) % len(ladder)]]) for i in range(64)]
    if plan.figure == "chords":
        roots = rng.choice(((0, 3, 4, 0), (0, 5, 3, 4), (0, 4, 5, 3)))
        return [(2.0, [(r + d) % max(1, count - 1) for d in (0, 2, 4)]) for r in roots * 8]
    if plan.figure == "arpeggio":
        shape = rng.choice(((0, 2, 4, 7), (0, 4, 2, 4), (7, 4, 2, 0)))
        return [(0.5, [min(count - 1, shape[i % 4] + (i // 8 % 2))]) for i in range(64)]
    steps: list[tuple[float, list[int]]] = []
    rhythm = rng.choice(((1.0, 0.5, 0.5), (0.5, 0.5, 1.0), (1.5, 0.5), (1.0, 1.0)))
    for i in range(64):
        place = max(0, min(count - 1, place + rng.choice((-2, -1, -1, 1, 1, 2))))
        steps.append((rhythm[i % len(rhythm)], [place]))
    return steps


def pitched(plan: Plan, rng: random.Random) -> list[Note]:
    """One instrument playing the plan's figure until the clip's end."""
    low, high = register_range(plan.sound, plan.register)
    keys, beat = keys_of(plan, low, high), 60 / plan.bpm
    share = 0.45 if plan.articulation == "staccato" else 0.98
    notes: list[Note] = []
    at = 0.0
    for beats, degrees in _figure_steps(plan, rng, len(keys)):
        room = plan.seconds - at
        if room < 0.2:
            break
        length = min(beats * beat * share, room - 0.05)
        if plan.figure == "single note":
            length = min(0.35, room) if plan.articulation == "staccato" else room * 0.9
        notes += [Note(at, length, keys[degree], _velocity(plan, rng)) for degree in degrees]
        at += beats * beat
    return notes


PATTERNS = {  # steps of half a beat in a bar of four, per percussion key
    "rock drums": {36: (0, 4), 38: (2, 6), 42: range(8)},
    "house drums": {36: (0, 2, 4, 6), 39: (2, 6), 46: (1, 3, 5, 7)},
    "congas": {63: (0, 3, 6), 64: (2, 5), 62: (1, 4, 7)},
    "toms": {47: (0, 1), 43: (4, 5), 50: (2, 6)},
    "hi-hat": {42: range(8)},
    "kick drum": {36: (0, 2, 4, 6)},
    "snare drum": {38: (0, 2, 3, 4, 6)},
    "crash cymbal": {49: (0, 4)},
    "hand claps": {39: (2, 6)},
}


def drums(plan: Plan, rng: random.Random, name: str = "", gain: float = 1.0) -> list[Note]:
    """The class's pattern in half beats, or one stroke."""
    if plan.figure == "one-shot":
        return [Note(0.0, 1.0, rng.choice(plan.sound.keys), _velocity(plan, rng), DRUMS)]
    step = 30 / plan.bpm
    notes: list[Note] = []
    for key, places in PATTERNS[name or plan.sound.name].items():
        for bar in range(int(plan.seconds / (8 * step)) + 1):
            for place in places:
                start = (8 * bar + place) * step
                if name == "" and plan.sound.name == "hand claps":
                    start -= 2 * step  # the first clap opens the clip
                if 0 <= start < plan.seconds - 0.15:
                    velocity = max(1, min(127, round(gain * _velocity(plan, rng))))
                    notes.append(Note(start, 0.2, key, velocity, DRUMS))
    return notes


BAND_PARTS: dict[str, tuple[tuple[int, str, int, int], ...]] = {  # (program, figure, low, high); bars of four beats
    "jazz trio": ((0, "chords", 55, 72), (32, "walk", 31, 50)),
    "rock band": ((30, "chords", 43, 60), (33, "pulse", 31, 45)),
    "techno loop": ((81, "arpeggio", 60, 79), (38, "pulse", 31, 43)),
    "orchestra": ((48, "chords", 52, 72), (60, "melody", 50, 67), (73, "melody", 72, 88)),
}
BAND_DRUMS = {"jazz trio": "hi-hat", "rock band": "rock drums", "techno loop": "house drums"}


def band(plan: Plan, rng: random.Random, score: Score) -> None:
    """A small band over one chord progression, written into `score`."""
    beat, roots = 60 / plan.bpm, rng.choice(((0, 3, 4, 0), (0, 5, 3, 4)))
    for channel, (program, figure, low, high) in enumerate(BAND_PARTS[plan.sound.name]):
        score.programs[channel] = program
        score.controls[channel] = {PAN: (44, 84, 64)[channel]}
        keys = keys_of(plan, low, high)
        for count in range(int(plan.seconds / beat) + 1):
            degree, start = roots[count // 2 % 4], count * beat
            length = min(beat, plan.seconds - start - 0.05)
            if length < 0.1:
                break
            velocity = _velocity(plan, rng)
            if figure == "chords" and count % 2 == 0:
                chord = [keys[(degree + d) % len(keys)] for d in (0, 2, 4)]
                score.notes += [Note(start, 1.9 * length, key, velocity, channel) for key in chord]
            elif figure == "pulse":
                key = keys[degree % len(keys)]
                score.notes += [Note(start + h * beat / 2, 0.4 * beat, key, velocity, channel) for h in (0, 1)]
            elif figure == "walk":
                score.notes.append(Note(start, 0.9 * length, keys[(degree + count % 4) % len(keys)], velocity, channel))
            elif figure == "arpeggio":
                for h, d in enumerate((0, 2, 4, 7)):
                    key = keys[(degree + d) % len(keys)]
                    score.notes.append(Note(start + h * beat / 4, 0.2 * beat, key, velocity, channel))
            elif figure == "melody":
                key = keys[(degree + rng.choice((0, 2, 4))) % len(keys)]
                score.notes.append(Note(start, 0.95 * length, key, velocity, channel))
    if plan.sound.name in BAND_DRUMS:
        score.notes += drums(plan, rng, BAND_DRUMS[plan.sound.name], gain=0.85)


def compose(plan: Plan) -> Score:
    """The plan's score (not for effects, which `effects.py` makes as audio)."""
    rng = random.Random(plan.seed)
    score = Score(plan.seconds, programs={0: plan.sound.program})
    if plan.sound.kind == "pitched":
        score.notes = pitched(plan, rng)
    elif plan.sound.kind == "drum":
        score.notes = drums(plan, rng)
    else:
        band(plan, rng, score)
    for channel in {note.channel for note in score.notes}:
        controls = score.controls.setdefault(channel, {})
        controls[REVERB] = 110 if plan.room == "reverb" else 12
    score.notes = [note for note in score.notes if note.start < plan.seconds - 0.1]
    return score
