"""List the clips of a source: folders of any depth, caption lists, WebDataset tars, on disk or at a URL.

`list_source` finds every clip and the text that belongs to it, and reports what it could not use. It opens no audio.
"""

import functools
import hashlib
import itertools
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sa3train.audio.io import AUDIO_SUFFIXES
from sa3train.core.errors import DataError
from sa3train.core.user_files import stat_file
from sa3train.data.sources.latents import DETAILS, LATENTS_SUFFIX, SILENCE
from sa3train.data.sources.lists import (
    LIST_LIMIT,
    LIST_SUFFIXES,
    PATH_FIELDS,
    ListRow,
    is_caption_list,
    is_list_stem,
    parse_object,
    read_list,
)
from sa3train.data.sources.storage import (
    Blob,
    Files,
    LocalStorage,
    TarStorage,
    is_url,
    open_storage,
    strip_file_scheme,
    translate_errors,
)
from sa3train.data.sources.text import compose, fold

OWN = "own_folder"
"""Code of the problem that a folder below the source is of sa3train, and skipped."""
ARCHIVE_SUFFIXES = {".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"}
UNPACK = "unpack archives to use what is in them"
_TEXT = (".txt", ".json")
_SHEETS = (".xlsx", ".xls", ".ods", ".parquet", *_TEXT)
_ABSOLUTE = re.compile(r"/|[A-Za-z]:/")


@dataclass(slots=True)
class Clip:
    """One clip of a source.

    Attributes:
        source: Its path within the source.
        audio: The bytes of its audio file.
        text: The bytes of its `.txt`.
        fields: The bytes of its `.json`.
        row: Its row of a caption list as JSON text.
        row_name: List and line of that row, such as "metadata.csv:3".
        others: Further `.txt` and `.json` files of the clip, which should say the same.
        notes: (finding code, detail) pairs: how its row was read where that is not obvious.
        stamp: Changes when any of these does.
        is_latents: Whether `audio` is latents of another tool, which `fields` describes.
    """

    source: str
    audio: Blob
    text: Blob | None = None
    fields: Blob | None = None
    row: str | None = None
    row_name: str = ""
    others: tuple[Blob, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    stamp: str = ""
    is_latents: bool = False


class SourceProblem(NamedTuple):
    """Something that is meant to be a clip, or the text of one, but cannot be used.

    Attributes:
        source: Its path within the source; for a row of a list, such as "metadata.csv:3".
        detail: The reason.
        code: Finding code.
    """

    source: str
    detail: str
    code: str = "damaged_source"


@dataclass
class Listing:
    """What a source contains.

    Attributes:
        clips: Clips in order of path.
        problems: What is meant to be a clip but cannot be one.
        skipped: Number of files of each suffix that are neither audio nor its text.
        of_latents: `silence.npy` and `details.json` of a folder of latents, by name.
    """

    clips: list[Clip] = field(default_factory=list)
    problems: list[SourceProblem] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    of_latents: dict[str, Blob] = field(default_factory=dict)

    def describe_skipped(self) -> str:
        """Describe the skipped files.

        Returns:
            Text such as "12 .jpg, 1 .zip (unpack archives to use what is in them)"; empty when nothing was skipped.
        """
        counts = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in self.skipped.most_common())
        return f"{counts} ({UNPACK})" if ARCHIVE_SUFFIXES & self.skipped.keys() else counts


def list_source(source: str) -> Listing:
    """List every clip of a source.

    Args:
        source: Folder, audio file, caption list, tar, or a URL of any of these.

    Returns:
        Its clips in order of path.

    Raises:
        DataError: When there is nothing at `source`, or nothing that could be a clip.
    """
    storage, name = open_storage(source)
    listing, suffix = Listing(), _get_suffix(name or "")
    if name is None:
        files = storage.list_files()
        if own := files.own.get(""):
            raise DataError(f"{source} is {own}, not a source of audio. Give the folder of your recordings.")
        folder = _Folder(storage, files, listing)
        folder.add_all()
        if not listing.clips:
            folder.add_latents()
    elif suffix in LIST_SUFFIXES:
        _Folder(storage, storage.list_files(), listing).add_list(name)
    elif suffix == ".tar":
        _add_tar(storage, name, storage.get_blob(name).compute_stamp(), listing)
    elif suffix in AUDIO_SUFFIXES:
        _Folder(storage, storage.list_files(), listing).add_clip(name)
    else:
        raise DataError(
            f"unsupported source {source}. Give a folder, an audio file, a caption list ({' '.join(LIST_SUFFIXES)}), "
            f"or a .tar{f' ({UNPACK})' if suffix in ARCHIVE_SUFFIXES else ''}."
        )
    listing.clips = list(_drop_repeated(sorted(listing.clips, key=lambda clip: clip.source), listing.problems))
    if not listing.clips and all(problem.code == OWN for problem in listing.problems):
        folders = [f"{problem.source}: {problem.detail}" for problem in listing.problems]
        raise DataError(
            f"no audio in {source} ({'; '.join(folders) or listing.describe_skipped() or 'it is empty'}). Supported: "
            f"{' '.join(AUDIO_SUFFIXES)}; also .tar and metadata.jsonl."
        )
    return listing


def _drop_repeated(clips: Iterable[Clip], problems: list[SourceProblem]) -> Iterator[Clip]:
    before = None
    for clip in clips:
        if clip.source == before:
            problems.append(SourceProblem(clip.source, f"a clip has the same path; {clip.audio.path} is not used"))
        else:
            yield clip
        before = clip.source


@dataclass(slots=True)
class _Entry:
    """A row of a list and the file it names; small, since a million of them have to fit the memory.

    `foreign`: start of the given path that is of another machine. `given`: that path, None where it equals `path`.
    """

    list: str
    line: int
    text: str
    path: str
    given: str | None
    foreign: str
    notes: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return f"{self.list}:{self.line}"


class _Folder:
    """A folder, with indices of the text that may belong to its audio and of the audio that its lists may name."""

    def __init__(self, storage: LocalStorage, files: Files, listing: Listing) -> None:
        self.storage, self.files, self.listing, self.names = storage, files, listing, files.stamps
        self.root = f"{storage.root if is_url(storage.root) else Path(storage.root).absolute().as_posix()}/"
        self.spellings: dict[str, list[str]] = {}  # names by key, where they are not called like their key
        text_folders: dict[str, set[str]] = {suffix: set() for suffix in _TEXT}
        for name in self.names:
            key = fold(name)
            if key != name:
                self.spellings.setdefault(key, []).append(name)
            if key.endswith(_TEXT):
                text_folders[_get_suffix(key)].add(posixpath.dirname(key))
        self.text_folders = text_folders
        self.folders = {fold(folder) for name in self.names for folder in _list_parents(posixpath.dirname(name))}
        self.tails: dict[tuple[str, str], list[tuple[str, str]]] = {}

    def add_all(self) -> None:
        """Add every clip, with the rows of the folder's lists."""
        entries: dict[str, _Entry] = {}
        used, known = set(filter(is_caption_list, self.names)), len(self.listing.clips)
        for name in sorted(used):
            self.read_list(name, entries, alone=False)
        for name in self.names:
            suffix = _get_suffix(name)
            if suffix in AUDIO_SUFFIXES:
                used |= self.add_clip(name, entries.get(name))
            elif suffix == ".tar" and not isinstance(self.storage, TarStorage):
                used.add(name)
                _add_tar(self.storage, name, self.names[name], self.listing)
        sheets = {name for name in self.names if name.lower().endswith(_SHEETS) and is_list_stem(name)} - used
        if any(not (clip.text or clip.fields or clip.row) for clip in self.listing.clips[known:]):
            reason = "clips here have no caption, and this is not read as a list: export it as .csv in UTF-8"
            self.listing.problems += [SourceProblem(name, reason) for name in sorted(sheets)]
            used |= sheets
        self.listing.skipped.update(_get_suffix(name) for name in self.names if name not in used)
        meant = (*AUDIO_SUFFIXES, *_TEXT, *LIST_SUFFIXES, ".tar")
        self.listing.skipped.update(suffix for suffix in map(_get_suffix, self.files.special) if suffix not in meant)
        special = {name: why for name, why in self.files.special.items() if _get_suffix(name) in meant}
        for name, reason in (special | self.files.unlisted).items():
            self.listing.problems.append(SourceProblem(_show(name), reason, "special_file"))
        self.listing.problems += [SourceProblem(_show(at), f"it is {own}", OWN) for at, own in self.files.own.items()]

    def add_latents(self) -> None:
        """Add the latents of another tool: each `.npy` with the `.json` beside it."""
        latents = [name for name in self.names if _get_suffix(name) == LATENTS_SUFFIX]
        of_all = {name: base for name in self.names if (base := posixpath.basename(name)) in (SILENCE, DETAILS)}
        described = {name: f"{posixpath.splitext(name)[0]}.json" for name in latents if name not in of_all}
        if not described:
            return
        self.listing.of_latents = {base: self.storage.get_blob(name) for name, base in of_all.items()}
        for name, fields in described.items():
            if fields not in self.names:
                self.listing.problems.append(SourceProblem(_show(name), f"there is no {fields}, which describes it"))
                continue
            audio, text = self.storage.get_blob(name), self.storage.get_blob(fields)
            stamp = f"{self.names[name]}|{self.names[fields]}"
            self.listing.clips.append(Clip(_show(name), audio, fields=text, stamp=stamp, is_latents=True))
        used = {*latents, *described.values(), *of_all}
        for name in self.names:
            if _get_suffix(name) == ".json" and name not in used:
                self.listing.problems.append(SourceProblem(_show(name), "there is no .npy that it describes"))
                used.add(name)
        self.listing.skipped = Counter(_get_suffix(name) for name in self.names if name not in used)

    def add_clip(self, name: str, entry: _Entry | None = None) -> set[str]:
        """Add an audio file with its text; returns the names of all these files."""
        found = [self.find_text(name, suffix) for suffix in _TEXT]
        text, fields = (self.storage.get_blob(names[0]) if names else None for names in found)
        others = tuple(self.storage.get_blob(other) for names in found for other in names[1:])
        used = [name, *(side for names in found for side in names)]
        row = entry.text if entry else None
        notes = entry.notes if entry else ()
        row_name, audio = entry.name if entry else "", self.storage.get_blob(name)
        stamps = (self.names.get(file) or self.storage.get_blob(file).compute_stamp() for file in used)
        stamp = "|".join([*stamps, _hash_text(row or ""), repr(notes) if notes else ""])
        self.listing.clips.append(Clip(_show(name), audio, text, fields, row, row_name, others, notes, stamp))
        return set(used)

    def find_text(self, name: str, suffix: str) -> list[str]:
        """Find the text files of an audio file, all in one folder. Those that spell another file's name are of that."""
        folder, slash, file = name.rpartition("/")
        stem = posixpath.splitext(file)[0]
        if not self.text_folders[suffix]:
            return []
        for place in _list_text_folders(folder, suffix[1:]):
            if fold(place) in self.text_folders[suffix]:
                prefix = f"{place}/" if place else ""
                found = [match for own in (stem, file) for match in self.look_up(f"{prefix}{own}{suffix}")]
                if found := [match for match in found if self.is_text_of(match, f"{folder}{slash}", stem, file)]:
                    return found
        return []

    def is_text_of(self, text: str, folder: str, stem: str, file: str) -> bool:
        """Whether a text file whose name is spelled otherwise belongs to no other audio file."""
        own = posixpath.splitext(posixpath.basename(text))[0]
        if own in (stem, file):
            return True
        others = (f"{own}{suffix}" for suffix in ("", *AUDIO_SUFFIXES, *map(str.upper, AUDIO_SUFFIXES)))
        return not any(f"{folder}{other}" in self.names for other in others)

    def look_up(self, path: str) -> list[str]:
        """Find the file of this name, and others whose names differ in case or Unicode form only."""
        wanted = fold(path)
        spellings = (path,) if wanted == path else (path, wanted)
        found = [name for name in spellings if name in self.names]
        return list(dict.fromkeys([*found, *self.spellings.get(wanted, ())]))

    def add_list(self, name: str) -> None:
        """Add the clips that a list names."""
        entries: dict[str, _Entry] = {}
        self.read_list(name, entries, alone=True)
        while entries:  # emptied on the way, for memory
            path, entry = entries.popitem()
            if path in self.names:
                self.add_clip(path, entry)
                continue
            is_whole = _is_whole(path)
            audio = Blob(path if is_whole else f"{self.root}{path}", name=path)
            stamp = f"{audio.compute_stamp()}|{_hash_text(entry.text)}"
            source = _show(path.rpartition("://")[2].replace(os.sep, "/").lstrip("/"))
            row, row_name, notes = entry.text, entry.name, entry.notes
            self.listing.clips.append(Clip(source, audio, row=row, row_name=row_name, notes=notes, stamp=stamp))

    def read_list(self, name: str, entries: dict[str, _Entry], alone: bool) -> None:
        """Add the rows of a list to `entries`, by the path of their audio. `alone`: its rows are the clips."""
        try:
            rows, encoding = read_list(self.storage.get_blob(name).read(LIST_LIMIT), name)
        except DataError as error:
            self.listing.problems.append(SourceProblem(name, str(error)))
            return
        notes = (("text_encoding", f"{name} is read as {encoding}"),) if encoding else ()
        found: list[_Entry] = []
        for row in rows:
            place = f"{name}:{row.line}"
            try:
                if row.problem:
                    raise DataError(row.problem)
                if row.text:
                    path, foreign = self.resolve(row, posixpath.dirname(name), alone)
                    remarks = notes + _describe_match(row, place, path, foreign)
                    given = None if row.paths[0] == path else row.paths[0]
                    found.append(_Entry(name, row.line, row.text, path, given, foreign, remarks))
            except DataError as error:
                self.listing.problems.append(SourceProblem(place, str(error)))
        # All paths of another machine must start in one folder there: else a file that is called alike would match.
        starts = Counter(entry.foreign for entry in found if entry.foreign)
        start = next((start for start, count in starts.most_common(1) if 2 * count > starts.total()), "")
        for entry in found:
            known = entries.get(entry.path)
            if entry.foreign not in ("", start):
                given = entry.given or entry.path
                problem = f"names {given:.200}, which does not exist. If {entry.path} is meant, write that"
            elif known is None:
                entries[entry.path] = entry
                continue
            elif not _is_same(known.text, entry.text):
                problem = f"names {entry.given or entry.path:.200} a second time; {known.name} is used"
            else:
                continue
            self.listing.problems.append(SourceProblem(entry.name, problem))

    def resolve(self, row: ListRow, base: str, alone: bool) -> tuple[str, str]:
        """The file that a row names, and what of its path is of another machine. Raises `DataError` for none or two."""
        found: dict[str, str] = {}
        for given in row.paths:
            matches, foreign = self.find_audio(given, base)
            if foreign and alone and Path(given).is_file():  # is of this machine
                continue
            if len(matches) > 1:
                raise DataError(f"names {given:.200}, which may be {' or '.join(map(_show, matches))}")
            found |= dict.fromkeys(matches, foreign)
        if len(found) > 1:
            raise DataError(f"names several files: {', '.join(map(_show, found))}")
        if found:
            path, foreign = found.popitem()
            if not alone and _get_suffix(path) not in AUDIO_SUFFIXES:
                raise DataError(f"names {path}, which is not audio")
            return path, foreign
        if not row.paths:
            raise DataError(f"names no file; one of {', '.join(PATH_FIELDS)} is needed")
        given = strip_file_scheme(row.paths[0].strip())
        if alone and _is_whole(given):
            return given, ""
        path = posixpath.normpath(posixpath.join(base, given))
        if not alone or is_url(self.root):
            raise DataError(f"names {given:.200}: {self.files.special.get(path, 'it does not exist')}")
        with translate_errors(f"names {given:.200}, which cannot be used"):
            stat_file(f"{self.root}{path}")
        return path, ""

    def find_audio(self, given: str, base: str) -> tuple[list[str], str]:
        """Find the files that a path in a list may mean, and the start of that path where it is of another machine."""
        bare = strip_file_scheme(given.strip().strip("\"'").strip())
        slashed = bare.replace("\\", "/")
        for path in (bare, slashed):
            if path.startswith(self.root):
                return self.match(path.removeprefix(self.root)), ""
        if not _ABSOLUTE.match(slashed):
            spellings = dict.fromkeys((given, bare, slashed))
            return next(filter(None, (self.match(posixpath.join(base, path)) for path in spellings)), []), ""
        folder, _, file = posixpath.normpath(slashed).rpartition("/")
        tails = self.tails.get((folder, base))
        if tails is None:
            tails = self.tails[folder, base] = list(self.list_tails(folder, base))
        found = ((self.match(f"{below}{file}"), start) for below, start in tails)
        return next((pair for pair in found if pair[0]), ([], ""))

    def list_tails(self, folder: str, base: str) -> Iterator[tuple[str, str]]:
        """Folders here that a folder of another machine may be, the most similar first, each with what it is below."""
        parts = folder.split("/")
        for number in range(1, len(parts) + 1):
            tail, start = "".join(f"{part}/" for part in parts[number:]), "/".join(parts[:number]) + "/"
            here = dict.fromkeys((posixpath.join(base, tail), tail))
            yield from ((below, start) for below in here if fold(below.rstrip("/")) in self.folders)

    def match(self, path: str) -> list[str]:
        """Find files by their path: as written, else in another Unicode form, else in other case."""
        full = posixpath.normpath(path)
        if full in self.names:
            return [full]
        matches = self.look_up(full)
        return [name for name in matches if compose(name) == compose(full)] or matches


def _is_whole(path: str) -> bool:
    """Tell whether a path is one of this machine, or a URL, wherever its list lies."""
    return is_url(path) or Path(path).is_absolute()


@functools.lru_cache(maxsize=1)
def _list_parents(folder: str) -> tuple[str, ...]:
    return ("", *itertools.accumulate(folder.split("/"), lambda above, name: f"{above}/{name}"))


@functools.lru_cache(maxsize=4096)
def _list_text_folders(folder: str, kind: str) -> tuple[str, ...]:
    """Where the text of a folder's audio may be: there, in `txt/` (`json/`) there or instead of any of its folders
    (`set/wav/a` → `set/txt/a`).
    """
    parts = folder.split("/") if folder else []
    instead = ("/".join([*parts[:depth], kind, *parts[depth + 1 :]]) for depth in reversed(range(len(parts))))
    return (folder, posixpath.join(folder, kind), *instead)


def _add_tar(storage: LocalStorage, name: str, stamp: str, listing: Listing) -> None:
    """Add the clips of a WebDataset tar."""
    try:
        tar = TarStorage(storage.localize(name), stamp)
    except DataError as error:
        listing.problems.append(SourceProblem(name, str(error)))
        return
    listing.problems += [SourceProblem(name, problem) for problem in tar.problems]
    members = Listing(skipped=listing.skipped)
    _Folder(tar, tar.list_files(), members).add_all()
    for clip in members.clips:
        clip.source = f"{name}/{clip.source}"
    listing.clips += members.clips
    listing.problems += [problem._replace(source=f"{name}/{problem.source}") for problem in members.problems]


def _describe_match(row: ListRow, place: str, path: str, foreign: str) -> tuple[tuple[str, str], ...]:
    """Notes on how a row was read, and how its file was found."""
    details = [row.note] if row.note else []
    written = [compose(re.split(r"[/\\]", given.strip("\"' "))[-1]) for given in row.paths]
    if foreign:
        details.append(f"names a file in {foreign:.200}, which is not on this machine; {_show(path)} is used")
    elif compose(posixpath.basename(path)) not in written and fold(posixpath.basename(path)) in map(fold, written):
        details.append(f"writes the name in other case; {_show(path)} is used")
    return tuple(("list_row", f"{place} {detail}") for detail in details)


def _is_same(one: str, other: str) -> bool:
    texts = [
        {name: str(value) for name, value in parse_object(text).items() if name not in PATH_FIELDS and value != ""}
        for text in (one, other)
    ]
    return texts[0] == texts[1]


def _get_suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _hash_text(text: str) -> str:
    """A short stand-in for a row's text, of which a million have to fit the memory."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest() if text else ""


def _show(name: str) -> str:
    """A file name as text; bytes that are not UTF-8 stay distinct."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
