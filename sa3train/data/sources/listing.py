"""Where clips come from: folders of any depth, manifests (`.jsonl`, `.csv`), WebDataset tars, on disk or at a URL.

`list_source` finds every clip and the text that goes with it, and says what it could not make sense of. It opens no
audio.
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
from sa3train.data.sources.storage import Blob, Place, is_hidden, open_place, tar_groups

MANIFESTS = ("metadata.jsonl", "metadata.csv")
PATH_FIELDS = ("file_name", "path", "file", "audio", "filename", "audio_path")
_TEXT = (".txt", ".json")


@dataclass(slots=True)
class Clip:
    """One clip of a source: its path there, its bytes, and where its text is. `stamp` changes when any of them does."""

    source: str
    audio: Blob
    text: Blob | None = None
    fields: Blob | None = None
    row: str | None = None
    stamp: str = ""

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.source).suffix.lower()


@dataclass
class Listing:
    """What a source holds. `problems`: (path, reason) of what is meant to be a clip but cannot be one. `skipped`: how
    many files of each suffix are neither audio nor text for it.
    """

    clips: list[Clip] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def list_source(source: str) -> Listing:
    """Every clip of a folder, an audio file, a manifest, a tar, or a URL of any of these, in order of path.

    Raises `DataError` when there is nothing there, or nothing in it that could be a clip.
    """
    place, inner = open_place(source)
    listing = Listing()
    if inner is None:
        names = {name: stamp for name, stamp in place.files() if not is_hidden(name)}
        _list_folder(place, names, listing)
    elif inner.endswith((".jsonl", ".csv")):
        _list_manifest(place, inner, dict(place.files()), listing, alone=True)
    elif inner.endswith(".tar"):
        _list_tar(place, inner, place.stamp(inner), listing)
    elif inner.lower().endswith(AUDIO_SUFFIXES):
        _list_folder(place, {name: stamp for name, stamp in place.files() if _beside(name, inner)}, listing)
    else:
        raise DataError(
            f"cannot take clips from {source}: give a folder, an audio file, a .jsonl or .csv manifest, or a .tar."
        )
    listing.clips.sort(key=lambda clip: clip.source)
    if not listing.clips and not listing.problems:
        found = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in listing.skipped.most_common(5))
        raise DataError(
            f"no audio in {source} ({found or 'it is empty'}). Known kinds: {' '.join(AUDIO_SUFFIXES)}; "
            f"also .tar and metadata.jsonl."
        )
    return listing


def _list_folder(place: Place, names: Mapping[str, str], listing: Listing) -> None:
    manifests = [name for name in names if PurePosixPath(name).name in MANIFESTS]
    rows: dict[str, str] = {}
    for name in manifests:
        rows |= _list_manifest(place, name, names, listing, alone=False)
    used = set(manifests)
    for name in names:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in AUDIO_SUFFIXES:
            clip = _clip(place, name, names, rows.get(name))
            used |= {name, *(blob.name for blob in (clip.text, clip.fields) if blob)}
            listing.clips.append(clip)
        elif suffix == ".tar":
            used.add(name)
            _list_tar(place, name, names[name], listing)
    listing.skipped.update(PurePosixPath(name).suffix.lower() for name in names if name not in used)


def _clip(place: Place, name: str, names: Mapping[str, str], row: str | None) -> Clip:
    text, fields = (next(filter(names.__contains__, _sidecars(name, suffix)), None) for suffix in _TEXT)
    stamp = "|".join([names[name], names.get(text or "", ""), names.get(fields or "", ""), row or ""])
    label = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return Clip(
        label, place.blob(name), place.blob(text) if text else None, place.blob(fields) if fields else None, row, stamp
    )


def _sidecars(name: str, suffix: str) -> Iterator[str]:
    """Where the text of an audio file may be: beside it, in a `txt/` (`json/`) folder there or in place of any of its
    folders (`set/wav/a/x.wav` → `set/txt/a/x.txt`).
    """
    folder, slash, file = name.rpartition("/")
    folders, kind = folder.split("/") if folder else [], suffix.lstrip(".")
    for text in (f"{file.rpartition('.')[0]}{suffix}", f"{file}{suffix}"):
        yield f"{folder}{slash}{text}"
        yield f"{folder}{slash}{kind}/{text}"
        for depth in reversed(range(len(folders))):
            yield "/".join([*folders[:depth], kind, *folders[depth + 1 :], text])


def _list_manifest(place: Place, name: str, names: Mapping[str, str], listing: Listing, alone: bool) -> dict[str, str]:
    """Rows of a manifest by the path of their audio, each as JSON text. `alone`: its rows are the clips."""
    rows: dict[str, str] = {}
    base = PurePosixPath(name).parent
    for number, (row, text) in enumerate(_manifest_rows(place.blob(name).read(), name), start=1):
        where = f"{name}:{number}"
        if row is None:
            listing.problems.append((where, text))
            continue
        given = next((str(row[key]) for key in PATH_FIELDS if row.get(key)), None)
        if given is None:
            listing.problems.append((where, f"names no file; one of {', '.join(PATH_FIELDS)} is needed"))
            continue
        path = given if "://" in given or given.startswith("/") else os.path.normpath(str(base / given))
        if path in rows:
            listing.problems.append((where, f"names {given} a second time; its first row is used"))
            continue
        if not alone and path not in names:
            listing.problems.append((where, f"names {given}, which is not there"))
            continue
        rows[path] = text
        if alone:
            _add_listed(place, path, names, text, listing)
    return rows


def _add_listed(place: Place, path: str, names: Mapping[str, str], row: str, listing: Listing) -> None:
    if path in names:
        listing.clips.append(_clip(place, path, names, row))
    elif "://" in path or path.startswith("/"):
        blob = Blob.at(path)
        listing.clips.append(Clip(path.rpartition("://")[2].lstrip("/"), blob, row=row, stamp=f"{blob.stamp()}|{row}"))
    else:
        listing.problems.append((path, "is in the manifest but not there"))


def _manifest_rows(content: bytes, name: str) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Each row with its JSON text, or None with what is wrong with it."""
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


def _list_tar(place: Place, name: str, stamp: str, listing: Listing) -> None:
    """Clips of a WebDataset tar: members of one name but for its suffix."""
    groups, faults = tar_groups(place.local(name))
    listing.problems += [(name, fault) for fault in faults]
    for key, members in groups.items():
        audio = [suffix for suffix in members if suffix in AUDIO_SUFFIXES]
        listing.skipped.update(suffix for suffix in members if suffix not in (*AUDIO_SUFFIXES, *_TEXT))
        if not audio:
            listing.skipped.update(suffix for suffix in members if suffix in _TEXT)
        for suffix in audio:
            blob = members[suffix]
            listing.clips.append(
                Clip(
                    f"{name}/{key}{suffix}",
                    blob,
                    members.get(".txt"),
                    members.get(".json"),
                    None,
                    f"{stamp}|{blob.offset}",
                )
            )


def _beside(name: str, inner: str) -> bool:
    """Whether `name` is the file `inner` or could be text for it."""
    return name == inner or any(name in _sidecars(inner, suffix) for suffix in _TEXT)


def describe_skipped(listing: Listing) -> str:
    """`12 .jpg, 1 .pdf` for what was skipped; empty when nothing was."""
    return ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in listing.skipped.most_common())
