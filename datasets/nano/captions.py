"""Captions from a plan: the tags SA3 users write, short phrases, and plain sentences, each leaving out what it
likes.
"""

from __future__ import annotations

import random

from composer import Plan

TRACK_TYPES = {"pitched": "Instrument", "drum": "Drums", "band": "Music", "effect": "SFX"}


def capitalize_first(text: str) -> str:
    """Capitalize the first letter alone: "BPM" and keys stay as they are."""
    return text[:1].upper() + text[1:]


def add_article(text: str) -> str:
    """Put "A" or "An" in front: "An organ", "An 808 beat"."""
    return f"{'An' if text[0] in 'aeiou8' else 'A'} {text}"


def _facts(plan: Plan) -> list[str]:
    """The audible facts as short phrases, most telling first; empty ones are left out."""
    facts = [plan.register and f"{plan.register} register", plan.articulation, plan.figure]
    facts += [plan.bpm and f"{plan.bpm} BPM", plan.key, plan.mood, plan.dynamics]
    facts += [{"reverb": "reverb", "dry": ""}[plan.room], plan.width if plan.width == "mono" else ""]
    return [str(fact) for fact in facts if fact]


def tags(plan: Plan, rng: random.Random) -> str:
    """`TrackType: …, Instruments: …, Genre: …` with fields dropped by chance."""
    fields = [("Genre", rng.choice(plan.sound.genres)), ("Mood", plan.mood), ("BPM", str(plan.bpm or ""))]
    fields += [("Key", plan.key), ("Style", ", ".join(f for f in (plan.figure, plan.articulation) if f))]
    fields += [("Register", plan.register), ("Dynamics", plan.dynamics), ("Stereo", plan.width)]
    kept = [f"{name}: {value}" for name, value in fields if value and rng.random() < 0.7]
    what = "SFX" if plan.sound.kind == "effect" else "Instruments"
    head = [f"TrackType: {TRACK_TYPES[plan.sound.kind]}", f"{what}: {plan.sound.name.capitalize()}"]
    return ", ".join(head + kept)


def phrase(plan: Plan, rng: random.Random) -> str:
    """`solo piano, arpeggio, 112 BPM`."""
    facts = [fact for fact in _facts(plan) if rng.random() < 0.6]
    rng.shuffle(facts)
    return ", ".join([rng.choice(("", "solo ", "")) + plan.sound.name, *facts])


def sentence(plan: Plan, rng: random.Random) -> str:
    """`A soft violin plays a legato melody in the high register, in D minor at 72 BPM.`"""
    name, kind = plan.sound.name, plan.sound.kind
    stereo = rng.choice(("", f" in {plan.width}"))
    if kind == "effect":
        return rng.choice((f"Sound effect: {name}{stereo}.", f"The sound of {name}{stereo}.", f"{name} sound{stereo}"))
    words = " ".join(word for word in (plan.dynamics, plan.mood) if word and rng.random() < 0.6)
    who = f"{words} {name}".strip()
    tempo = f" at {plan.bpm} BPM" if rng.random() < 0.6 else f", {plan.tempo}"
    room = {"reverb": rng.choice((", with reverb", ", in a large hall")), "dry": rng.choice(("", ", dry"))}[plan.room]
    if kind == "drum":
        doing = "a single hit" if plan.figure == "one-shot" else "a loop"
        tempo = "" if plan.figure == "one-shot" else tempo
        return capitalize_first(f"{who} playing {doing}{tempo}{room}{stereo}.")
    if kind == "band":
        return capitalize_first(f"{who} in {plan.key}{tempo}{room}{stereo}.")
    article = "" if plan.figure in ("chords", "repeated notes") else "a "
    play = rng.choice(("plays", "playing"))
    where = f" in the {plan.register} register" if rng.random() < 0.7 else ""
    key = f" in {plan.key}" if rng.random() < 0.5 else ""
    return f"{add_article(who)} {play} {article}{plan.articulation} {plan.figure}{where}{key}{tempo}{room}{stereo}."


def captions(plan: Plan, rng: random.Random, count: int = 3) -> list[str]:
    """`count` different captions, the three forms in turn."""
    forms = (tags, sentence, phrase)
    return [forms[number % 3](plan, rng) for number in range(count)]
