"""What the names of files and folders say, as sample packs write them: "Kick_04_128bpm_Am.wav", "Loops/Deep House".

A wrong tempo in a caption is worse than none. So a number is a tempo where "bpm" stands beside it. Any other number is
only a candidate (it may be an index or a machine), which `confirm_tempo` accepts where the clip is whole bars long.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from sa3train.audio.notes import parse_key
from sa3train.data.sources.facts import parse_bpm

SLOWEST, FASTEST = 40, 250
"""Tempos, in beats per minute, that a number beside "bpm" may mean."""
_CANDIDATES = (60, 200)
_BARS = (1, 2, 4, 8, 16)
_LENGTH_TOLERANCE = 0.003

_TEMPO = r"(?<![\d.,])(\d{2,3}(?:[.,]\d{1,2})?)"
_BPM = (
    re.compile(rf"{_TEMPO}[ _-]?bpms?(?![a-z])", re.IGNORECASE),
    re.compile(rf"(?<![a-z])bpm[ _=-]?{_TEMPO}(?!\d)", re.IGNORECASE),
)
_FROM = re.compile(r"(\d{2,3}) ?(?:-|–|to) ?$", re.IGNORECASE)
_TO = re.compile(r" ?(?:-|–|to) ?(\d{2,3})(?!\d)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.,#-])(\d{2,3})(?![\w,]|\.\d)")
_NO_TEMPO = re.compile(
    r"(?<![a-z])(?:juno|sh|jx|cr|mc|mpc|cs|cp|dx|cz|sq|ax|dr|tx|sp|op|d|k|m|vol|take|part|no|nr|mic|ch|track)"
    r"[ .-]{0,2}$",
    re.IGNORECASE,
)
"""Machines (Juno-106, SH-101, MPC60) and counts, whose numbers are no tempo."""
_SIGN = r"(?:[#♯b♭]|[ _-]?(?:sharp|flat))?"
_KEYS = tuple(
    re.compile(rf"(?<![A-Za-z0-9#'])({pattern})(?![A-Za-z0-9#'])")
    for pattern in (rf"[A-G]{_SIGN}[ _-]?(?:[Mm]in(?:or)?|[Mm]aj(?:or)?|MIN|MAJ)", r"[a-g][#b]?(?:min|maj)(?:or)?",
                    r"[A-G][#♯b♭]?m")
)  # fmt: skip
_WORDS = re.compile(r"[AE]m|[A-G][ _-]M?m?(?:in|aj)", re.IGNORECASE)
"""Keys that are words too: "Take Em Down", "A Min of Silence". They count at the end and beside a tempo."""
_BEFORE_KEY = re.compile(r"(?:\d{2,3}|bpm)[ _-]{1,3}$", re.IGNORECASE)
_AFTER_KEY = re.compile(r"[ _-]*(?:\d{0,3}$|\d{2,3}(?!\d)|bpm)", re.IGNORECASE)
_CHORD = re.compile(r"(?<![A-Za-z0-9#])[A-G][#b]?(?:m|min|maj|dim|aug|sus|add)\d{0,2}(?![A-Za-z0-9])")
_ROOT = re.compile(r"(?<![A-Za-z0-9#])([A-G][#♯b♭])(?![A-Za-z0-9#])")

NAME_WORDS = yaml.safe_load((Path(__file__).parents[2] / "assets" / "names.yaml").read_text(encoding="utf-8"))
"""Genres, kinds of sound, and words that say nothing."""
_GENRES, _SPELLINGS, _EMPTY = NAME_WORDS["genres"], NAME_WORDS["spellings"], frozenset(NAME_WORDS["empty"])
_KIND_PATTERNS = {
    kind: re.compile(rf"(?<![a-z])(?:{pattern})(?![a-z])") for kind, pattern in NAME_WORDS["kinds"].items()
}
_LOOP = re.compile(r"(?<![a-z])(?:loops?|loopable)(?![a-z])")
_ONE_SHOT = re.compile(r"(?<![a-z])(?:one ?shots?|shots?|single hits?)(?![a-z])")
_FORMS = ((_ONE_SHOT, "one-shot"), (_LOOP, "loop"))
_MOST_WORDS = 5


@dataclass(frozen=True)
class NameFacts:
    """What a clip's name says; empty or None where it says nothing.

    Attributes:
        bpm: Tempo that stands beside "bpm".
        bpm_source: "file name" or "folder name".
        candidates: Other numbers of the file's name that may be a tempo.
        key: As `sa3train.data.sources.facts.parse_key` returns.
        root: Note, where a name with a tempo has a note without a mode.
        genre: Genre, such as "deep house".
        kind: Instrument or kind of sound, such as "kick".
        form: "loop" or "one-shot".
        form_source: "file name" or "folder name".
        words: Other words of the file's name.
    """

    bpm: int | float | None = None
    bpm_source: str = ""
    candidates: tuple[int, ...] = ()
    key: str | None = None
    root: str | None = None
    genre: str = ""
    kind: str = ""
    form: str = ""
    form_source: str = ""
    words: tuple[str, ...] = ()


def parse_name(source: str) -> NameFacts:
    """Parse the path of a clip.

    Args:
        source: Its path within the source, with `/`.

    Returns:
        What it says.
    """
    path = PurePosixPath(source)
    stem, folders = path.stem, list(reversed(path.parent.parts))
    plain, plain_folders = normalize_name(stem), [normalize_name(folder) for folder in folders]
    bpm = _find_bpm(stem)
    of_folders = next((found for found in map(_find_bpm, folders) if found), None)
    kinds = _find_kinds(plain)
    kind = next((found[-1] for found in (kinds, *map(_find_kinds, plain_folders)) if found), "")
    form_of_file = _find_form(plain)
    form = form_of_file or next(filter(None, map(_find_form, plain_folders)), "")
    key = _find_key(stem)
    root = _ROOT.search(stem) if bpm and not key else None
    return NameFacts(
        bpm=bpm or of_folders,
        bpm_source="file name" if bpm else "folder name" if of_folders else "",
        candidates=()
        if bpm or of_folders or (kind in NAME_WORDS["hits"] and form != "loop")
        else _find_candidates(stem),
        key=key,
        root=root[1].replace("♯", "#").replace("♭", "b") if root else None,
        genre=next((found for text in (*plain_folders, plain) if (found := _find_genre(text, text != plain))), ""),
        kind=kind,
        form=form,
        form_source="file name" if form_of_file else "folder name" if form else "",
        words=tuple(dict.fromkeys((*_list_words(stem), *(each for each in kinds if each != kind)))),
    )


def confirm_tempo(facts: NameFacts, seconds: float | None) -> int | None:
    """Find the number in a clip's name that must be its tempo, since the clip is whole bars long at it.

    Args:
        facts: What the name says.
        seconds: Length of the clip; None where it is not known.

    Returns:
        Beats per minute; None where there is no such number, or more than one.
    """
    bars = _BARS if facts.form == "loop" else _BARS[1:]
    found = [
        bpm
        for bpm in facts.candidates
        if seconds and any(abs(seconds * bpm / 240 - bar) <= _LENGTH_TOLERANCE * bar for bar in bars)
    ]
    return found[0] if len(set(found)) == 1 else None


def find_common_words(sources: Iterable[str]) -> frozenset[str]:
    """Find the words in most names of a pack, such as its vendor's: they do not tell its clips apart.

    Args:
        sources: Paths of all clips.

    Returns:
        Words in more than half of the names of at least eight clips.
    """
    words = [set(parse_name(source).words) for source in sources]
    counts = Counter(word for of_name in words for word in of_name)
    return frozenset(word for word, count in counts.items() if len(words) >= 8 and count > len(words) / 2)


def normalize_name(text: str) -> str:
    """Normalize a name or a genre, so that it can be looked up in `NAME_WORDS`.

    Args:
        text: Such as "HiHat_01-DnB".

    Returns:
        Lower-case words with single spaces, genres in one spelling: "hi hat 01 drum and bass".
    """
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])", " ", text)
    words = re.sub(r"[^\w&#']+|_", " ", text).lower().split()
    plain = f" {' '.join(words)} "
    for spelling, genre in _SPELLINGS.items():
        plain = plain.replace(f" {spelling} ", f" {genre} ")
    return plain.strip()


def _find_form(plain: str) -> str:
    return next((form for pattern, form in _FORMS if pattern.search(plain)), "")


def _find_bpm(text: str) -> int | float | None:
    """The tempo beside "bpm"; None for two different ones, and for a range such as "120-128 bpm"."""
    found = set()
    for match in (match for pattern in _BPM for match in pattern.finditer(text)):
        bpm = parse_bpm(match[1]) or 0
        ends = (_FROM.search(text[: match.start()]), _TO.match(text[match.end() :]))
        if any(end and SLOWEST <= int(end[1]) <= FASTEST for end in ends):
            return None
        found |= {bpm} if SLOWEST <= bpm <= FASTEST else set()
    return found.pop() if len(found) == 1 else None


def _find_candidates(stem: str) -> tuple[int, ...]:
    if "bpm" in stem.lower():
        return ()  # an unclear one
    spaced = stem.replace("_", " ")
    return tuple(
        int(match[1])
        for match in _NUMBER.finditer(spaced)
        if _CANDIDATES[0] <= int(match[1]) <= _CANDIDATES[1] and not _NO_TEMPO.search(spaced[: match.start()])
    )


def _find_key(stem: str) -> str | None:
    """The one key in a name; None for several, and for words that look like one."""
    found = {
        parse_key(match[1].replace("_", " "))
        for pattern in _KEYS
        for match in pattern.finditer(stem)
        if not _WORDS.fullmatch(match[1]) or _has_key_place(stem, match)
    }
    return found.pop() if len(found) == 1 else None


def _has_key_place(stem: str, match: re.Match[str]) -> bool:
    is_first_person = re.search(r"(?<![a-z])i[ _-]$", stem[: match.start()], re.IGNORECASE)
    beside = _BEFORE_KEY.search(stem[: match.start()]) or _AFTER_KEY.match(stem[match.end() :])
    return bool(beside) and not is_first_person


def _find_kinds(plain: str) -> list[str]:
    """The kinds of sound in a name, of which the last is what it is: "pad chords" are chords, "bass drum" is a kick."""
    for genre in _GENRES:
        plain = f" {plain} ".replace(f" {genre} ", " ")
    found = [(match.start(), -match.end(), kind) for kind, p in _KIND_PATTERNS.items() for match in p.finditer(plain)]
    kinds, behind = [], 0
    for start, minus_end, kind in sorted(found):
        if start >= behind:
            kinds.append(kind)
            behind = -minus_end
    return kinds


def _find_genre(plain: str, is_folder: bool) -> str:
    found = [genre for genre in _GENRES if f" {genre} " in f" {plain} "]
    words = [word for word in plain.split() if word not in _EMPTY and word.isalpha()]
    whole = " ".join(words) if is_folder else ""
    return max(found, key=len) if found else whole if whole in NAME_WORDS["genre_folders"] else ""


def _list_words(stem: str) -> tuple[str, ...]:
    """Words that describe: neither tempo, key, kind nor genre, no codes, and none that says nothing."""
    for pattern in (*_BPM, *_KEYS, _CHORD):
        stem = pattern.sub(" ", stem)
    codes = {word.lower() for word in re.findall(r"[A-Z]{2,4}(?![a-z])", stem)}
    rest = normalize_name(stem)
    for genre in _GENRES:
        rest = f" {rest} ".replace(f" {genre} ", " ")
    for pattern in (*_KIND_PATTERNS.values(), _LOOP, _ONE_SHOT):
        rest = pattern.sub(" ", rest)
    words = (word for word in rest.split() if word.isalpha() and len(word) > 2 and word not in _EMPTY | codes)
    kept = (word for word in words if re.search("[aeiouyà-ÿ]|[^a-z]", word))
    return tuple(dict.fromkeys(kept))[:_MOST_WORDS]
