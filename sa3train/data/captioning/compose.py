"""Compose a caption from what a clip's tags and names say and what is heard, by a template that the user edits.

A wrong tempo or key in a caption is worse than none: sources that contradict one another are believed where the audio
decides between them, and left out otherwise.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from sa3train.audio.analysis import AudioAnalysis
from sa3train.audio.notes import get_relative_key, parse_key
from sa3train.data.captioning.template import DEFAULT_TEMPLATE, fill_parts
from sa3train.data.loading.prompts import list_template_fields
from sa3train.data.sources.captions import ClipText
from sa3train.data.sources.facts import Fact, format_fact_value, is_same
from sa3train.data.sources.names import NAME_WORDS, normalize_name

_HEARD = "heard"
_CLEAR_KEY = 0.93
"""A key heard this clearly was right or relative in all of 39 scores: a name that contradicts it is not believed."""


@dataclass(frozen=True)
class Composed:
    """A composed caption.

    Attributes:
        caption: The caption; empty where no field of the template has a value.
        facts: What it was composed of, with sources.
        problems: (finding code, detail) pairs: where what is heard contradicts what is written.
    """

    caption: str
    facts: list[Fact] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def describe(self) -> str:
        """Describe what the caption was composed of.

        Returns:
            Such as "bpm 128 (file name), key A minor (heard)".
        """
        return ", ".join(f"{fact.name} {format_fact_value(fact.value)} ({fact.source})" for fact in self.facts)


def compose_caption(
    text: ClipText,
    sound: AudioAnalysis | None,
    template: str = DEFAULT_TEMPLATE,
    common_words: Collection[str] = (),
    description: str = "",
) -> Composed:
    """Compose the caption of one clip.

    Args:
        text: What its tags and names say.
        sound: What is heard in it; None where it was not analyzed.
        template: Text with fields of `CAPTION_VALUES`.
        common_words: Words of names that do not tell clips apart, as `find_common_words` returns.
        description: What a captioning model says.

    Returns:
        The caption, and what it is made of.
    """
    problems: list[tuple[str, str]] = []
    facts = [Fact("description", description, "captioning model")] if description else []
    form = _find_form(text, sound)
    facts += [fact for name in ("genre", "title", "mood", "instrument", "meter") for fact in _list_last(text, name)]
    known = {*common_words, *text.name.genre.split()}
    words = " ".join(word for word in text.name.words if word not in known)
    facts += [Fact("name", words, "file name")] if words else []
    facts += [_name_kind(text, sound, form, bool(words))]
    if form.value != "one-shot":
        facts += _choose("bpm", text, _fit_genre(text, sound.bpm) if sound and sound.bpm else None, problems)
    pitchless = list_pitchless(text, sound)
    if "key" not in pitchless:
        keys = _choose("key", text, sound.key if sound and form.value != "one-shot" else None, problems)
        if problems[-1:] and problems[-1][0] == "key_heard" and sound and sound.key_strength >= _CLEAR_KEY:
            keys = [fact for fact in keys if fact.source != "file name"]
        facts += keys or ([] if "root" in pitchless else _list_root(text))
    if sound:
        heard = {name: getattr(sound, name) for name in ("brightness", "density", "sound", "loudness")}
        facts += [Fact(name, value, _HEARD) for name, value in heard.items() if value]
    values = {fact.name: format_fact_value(fact.value) for fact in facts if fact.value}
    used = list_template_fields(template)
    return Composed(
        fill_parts(template, values), [fact for fact in facts if fact.name in used and fact.value], problems
    )


def list_pitchless(text: ClipText, sound: AudioAnalysis | None) -> Collection[str]:
    """List which of key and root say nothing of a clip: drums have neither, whatever their names and chunks state.

    Args:
        text: What its tags and names say.
        sound: What is heard in it; None where it was not analyzed.

    Returns:
        Names of facts.
    """
    is_hit = text.name.kind in NAME_WORDS["hits"]
    if is_hit and _find_form(text, sound).value == "one-shot":  # the key of a single drum is that of its kit
        return ("key", "root")
    return ("root",) if is_hit or (sound and sound.sound == "percussive") else ()


def _list_last(text: ClipText, name: str) -> list[Fact]:
    """The tag of a name, with its source where that is kept."""
    if not text.tags.get(name):
        return []
    source = next((fact.source for fact in reversed(text.facts) if fact.name == name), "tag")
    return [Fact(name, text.tags[name], source)]


def _find_form(text: ClipText, sound: AudioAnalysis | None) -> Fact:
    for fact in reversed(text.facts):
        if fact.name == "type" and fact.value in ("loop", "one-shot"):
            return fact
    is_hit = text.name.kind in NAME_WORDS["hits"]
    is_loop_by_folder = (text.name.form, text.name.form_source) == ("loop", "folder name")
    has_tempo = any(fact.name == "bpm" and fact.source != "folder name" for fact in text.facts)
    is_single = is_loop_by_folder and is_hit and not has_tempo and sound is not None and sound.form == "one-shot"
    if text.name.form and not is_single:  # a hit in a folder of loops is none
        return Fact("type", text.name.form, "name")
    if sound and not sound.form and is_hit:
        return Fact("type", "one-shot", "name")
    return Fact("type", sound.form if sound else "", _HEARD)


def _name_kind(text: ClipText, sound: AudioAnalysis | None, form: Fact, has_words: bool) -> Fact:
    """Such as "kick one-shot"; without a kind in the name "percussive loop", unless other words of it say more."""
    heard = "" if text.name.kind or has_words or not sound else sound.sound
    kind = " ".join(filter(None, (text.name.kind or heard, str(form.value) or ("sound" if heard else ""))))
    sources = ("name" if text.name.kind else _HEARD if heard else "", form.source if form.value else "")
    return Fact("kind", kind, " and ".join(dict.fromkeys(filter(None, sources))))


def _fit_genre(text: ClipText, heard: float) -> float:
    """The heard tempo, or its half or double where that alone is one of the genre's."""
    genres = map(normalize_name, re.split("[,;/]", str(text.tags.get("genre", ""))))
    ranges = [NAME_WORDS["tempos"][genre] for genre in genres if genre in NAME_WORDS["tempos"]]
    fitting = (bpm for bpm in (heard, heard / 2, heard * 2) if any(low <= bpm <= high for low, high in ranges))
    return next(fitting, heard)


def _choose(name: str, text: ClipText, heard: str | float | None, problems: list[tuple[str, str]]) -> Sequence[Fact]:
    """The tempo or key that can be believed, in a list; empty where sources contradict one another undecided."""
    of_name = (fact for fact in text.facts if fact.name == name)
    stated = [
        fact
        for fact in of_name
        if (isinstance(fact.value, int | float) if name == "bpm" else parse_key(str(fact.value)))
    ]
    if not stated:
        said = round(heard) if isinstance(heard, float) else heard  # as prompts have tempos
        return [Fact(name, said, _HEARD)] if said else []
    agreed = [fact for fact in stated if heard and _may_be_same(name, fact.value, heard)]
    is_single = all(is_same(name, fact.value, stated[-1].value) for fact in stated)
    if heard and not agreed:
        known = ", ".join(f"{format_fact_value(fact.value)} ({fact.source})" for fact in stated)
        problems.append((f"{'tempo' if name == 'bpm' else name}_heard", f"{known}, heard {format_fact_value(heard)}"))
        return [] if name == "bpm" else stated[-1:] if is_single else []
    return stated[-1:] if is_single else agreed[-1:] if _are_same(name, agreed) else []


def _are_same(name: str, facts: Sequence[Fact]) -> bool:
    return bool(facts) and all(is_same(name, fact.value, facts[0].value) for fact in facts)


def _may_be_same(name: str, stated: str | int | float, heard: str | int | float) -> bool:
    """Whether a tempo is the one that is heard, its half or double; a key that one or its relative."""
    if name == "bpm":
        return any(is_same(name, stated, float(heard) * factor) for factor in (0.5, 1.0, 2.0))
    return is_same(name, stated, heard) or is_same(name, stated, get_relative_key(str(heard)))


def _list_root(text: ClipText) -> list[Fact]:
    """The root note as the key, where nothing states one."""
    is_stated = any(fact.name == "key" for fact in text.facts)
    return [] if is_stated else [Fact("key", *fact[1:]) for fact in _list_last(text, "root")]
