"""List the clips of a source: folders of any depth, manifests (`.jsonl`, `.csv`), WebDataset tars, on disk or at a URL.

`list_source` finds every clip and the text that belongs to it, and reports what it could not use. It opens no audio.
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from sa3train.audio.io import AUDIO_SUFFIXES
from sa3train.core.errors import DataError
from sa3train.data.sources.storage import Blob, LocalStorage, is_hidden, list_tar_members, open_storage

MANIFESTS = ("metadata.jsonl", "metadata.csv")
PATH_FIELDS = ("file_name", "path", "file", "audio", "filename", "audio_path")
_TEXT = (".txt", ".json")


@dataclass(slots=True)
class Clip:
    """One clip of a source.

    Attributes:
        source: Its path within the source.
        audio: The bytes of its audio file.
        text: The bytes of its `.txt`.
        fields: The bytes of its `.json`.
        row: Its manifest row as JSON text.
        stamp: Changes when any of these does.
    """

    source: str
    audio: Blob
    text: Blob | None = None
    fields: Blob | None = None
    row: str | None = None
    stamp: str = ""


@dataclass
class Listing:
    """What a source contains.

    Attributes:
        clips: Clips in order of path.
        problems: (path, reason) of what is meant to be a clip but cannot be one.
        skipped: Number of files of each suffix that are neither audio nor its text.
    """

    clips: list[Clip] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def describe_skipped(self) -> str:
        """Describe the skipped files.

        Returns:
            Text such as "12 .jpg, 1 .pdf"; empty when nothing was skipped.
        """
        return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in self.skipped.most_common())


def list_source(source: str) -> Listing:
    """List every clip of a source.

    Args:
        source: Folder, audio file, manifest, tar, or a URL of any of these.

    Returns:
        Its clips in order of path.

    Raises:
        DataError: When there is nothing at `source`, or nothing that could be a clip.
    """
    storage, name = open_storage(source)
    listing = Listing()
    if name is None:
        names = {name: stamp for name, stamp in storage.iterate_files() if not is_hidden(name)}
        _list_folder(storage, names, listing)
    elif name.endswith((".jsonl", ".csv")):
        _list_manifest(storage, name, dict(storage.iterate_files()), listing, alone=True)
    elif name.endswith(".tar"):
        _list_tar(storage, name, storage.get_blob(name).compute_stamp(), listing)
    elif name.lower().endswith(AUDIO_SUFFIXES):
        beside = {other: stamp for other, stamp in storage.iterate_files() if _belongs_to(other, name)}
        _list_folder(storage, beside, listing)
    else:
        raise DataError(
            f"unsupported source {source}. Give a folder, an audio file, a .jsonl or .csv manifest, or a .tar."
        )
    listing.clips.sort(key=lambda clip: clip.source)
    if not listing.clips and not listing.problems:
        raise DataError(
            f"no audio in {source} ({listing.describe_skipped() or 'it is empty'}). Supported: "
            f"{' '.join(AUDIO_SUFFIXES)}; also .tar and metadata.jsonl."
        )
    return listing


def _list_folder(storage: LocalStorage, names: Mapping[str, str], listing: Listing) -> None:
    """Add the clips among the files `names` (path → stamp)."""
    manifests = [name for name in names if PurePosixPath(name).name in MANIFESTS]
    rows: dict[str, str] = {}
    for name in manifests:
        rows |= _list_manifest(storage, name, names, listing, alone=False)
    used = set(manifests)
    for name in names:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in AUDIO_SUFFIXES:
            clip = _make_clip(storage, name, names, rows.get(name))
            used |= {name, *(blob.name for blob in (clip.text, clip.fields) if blob)}
            listing.clips.append(clip)
        elif suffix == ".tar":
            used.add(name)
            _list_tar(storage, name, names[name], listing)
    listing.skipped.update(PurePosixPath(name).suffix.lower() for name in names if name not in used)


def _make_clip(storage: LocalStorage, name: str, names: Mapping[str, str], row: str | None) -> Clip:
    sidecars = [next(filter(names.__contains__, _list_sidecars(name, suffix)), None) for suffix in _TEXT]
    text, fields = (storage.get_blob(sidecar) if sidecar else None for sidecar in sidecars)
    stamp = "|".join([names[name], *(names.get(sidecar or "", "") for sidecar in sidecars), row or ""])
    source = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return Clip(source, storage.get_blob(name), text, fields, row, stamp)


def _list_sidecars(name: str, suffix: str) -> Iterator[str]:
    """Where the text of an audio file may be: beside it, in a `txt/` (`json/`) folder there or instead of any of its
    folders (`set/wav/a/x.wav` → `set/txt/a/x.txt`).
    """
    folder, slash, file = name.rpartition("/")
    folders, kind = folder.split("/") if folder else [], suffix.lstrip(".")
    for text in (f"{file.rpartition('.')[0]}{suffix}", f"{file}{suffix}"):
        yield f"{folder}{slash}{text}"
        yield f"{folder}{slash}{kind}/{text}"
        for depth in reversed(range(len(folders))):
            yield "/".join([*folders[:depth], kind, *folders[depth + 1 :], text])


def _list_manifest(
    storage: LocalStorage, name: str, names: Mapping[str, str], listing: Listing, alone: bool
) -> dict[str, str]:
    """Rows of a manifest by the path of their audio, each as JSON text. `alone`: its rows are the clips."""
    rows: dict[str, str] = {}
    base = PurePosixPath(name).parent
    for number, (row, text) in enumerate(_iterate_manifest(storage.get_blob(name).read(), name), start=1):
        given = next((str(row[key]) for key in PATH_FIELDS if row.get(key)), None) if row else None
        is_absolute = given is not None and ("://" in given or given.startswith("/"))
        path = given if given is None or is_absolute else os.path.normpath(str(base / given))
        problem = ""
        if row is None:
            problem = text
        elif path is None:
            problem = f"names no file; one of {', '.join(PATH_FIELDS)} is needed"
        elif path in rows:
            problem = f"names {given} a second time; its first row is used"
        elif not alone and path not in names:
            problem = f"names {given}, which does not exist"
        if problem or path is None:
            listing.problems.append((f"{name}:{number}", problem))
            continue
        rows[path] = text
        if alone:
            _add_manifest_clip(storage, path, names, text, listing)
    return rows


def _add_manifest_clip(storage: LocalStorage, path: str, names: Mapping[str, str], row: str, listing: Listing) -> None:
    if path in names:
        listing.clips.append(_make_clip(storage, path, names, row))
    elif "://" in path or path.startswith("/"):
        blob = Blob(path, name=path)
        stamp = f"{blob.compute_stamp()}|{row}"
        listing.clips.append(Clip(path.rpartition("://")[2].lstrip("/"), blob, row=row, stamp=stamp))
    else:
        listing.problems.append((path, "is in the manifest but does not exist"))


def _iterate_manifest(content: bytes, name: str) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Yield each row with its JSON text, or None with what is wrong with it."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    if name.endswith(".csv"):
        try:
            for row in csv.DictReader(io.StringIO(text), restkey="", strict=True):
                yield row, json.dumps(row, ensure_ascii=False)
        except csv.Error as error:
            yield None, f"the rest is not readable as CSV ({error})"
        return
    for line in filter(str.strip, text.split("\n")):
        try:
            row = json.loads(line)
            yield (row, line) if isinstance(row, dict) else (None, "is not a JSON object")
        except (json.JSONDecodeError, RecursionError) as error:
            yield None, f"is not JSON ({error})"


def _list_tar(storage: LocalStorage, name: str, stamp: str, listing: Listing) -> None:
    """Add the clips of a WebDataset tar: members that differ in their suffix only."""
    groups, problems = list_tar_members(storage.localize(name))
    listing.problems += [(name, problem) for problem in problems]
    for key, members in groups.items():
        audio = [suffix for suffix in members if suffix in AUDIO_SUFFIXES]
        used = (*AUDIO_SUFFIXES, *_TEXT) if audio else AUDIO_SUFFIXES
        listing.skipped.update(suffix for suffix in members if suffix not in used)
        for suffix in audio:
            blob, text, fields = members[suffix], members.get(".txt"), members.get(".json")
            listing.clips.append(Clip(f"{name}/{key}{suffix}", blob, text, fields, None, f"{stamp}|{blob.offset}"))


def _belongs_to(name: str, audio: str) -> bool:
    """Whether a file is the audio file or could be its text."""
    return name == audio or any(name in _list_sidecars(audio, suffix) for suffix in _TEXT)
