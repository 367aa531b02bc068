"""Captions of a folder of audio, edited and kept in the sidecars that `sa3-encode` reads, with undo.

Every save is noted before a file is touched, with what each file held before; files are replaced whole. So a save that
was cut short can be undone like any other, and nothing that was written elsewhere meanwhile is overwritten.
"""

import base64
import datetime
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3train.core.errors import DataError
from sa3train.core.files import write_bytes, write_json
from sa3train.data.sources.captions import CAPTION_FIELDS, describe
from sa3train.data.sources.listing import Clip, list_source
from sa3train.data.sources.storage import Blob
from sa3train.studio.server.workspace import StudioError, Workspace

UNDO = "captions"
KEPT_SAVES = 100
LONGEST_CAPTION = 10_000

_lock = threading.Lock()


@dataclass(frozen=True)
class Edit:
    """A caption as the table showed it, and as it is to be."""

    source: str
    before: str
    after: str


@dataclass(frozen=True)
class Change:
    """A file with what it held, and what it is to hold; None: no such file."""

    path: Path
    before: bytes | None
    after: bytes


def clips_of(workspace: Workspace, folder: Path) -> list[Clip]:
    """The clips of a folder of audio. Raises `SA3Error` when there are none, or a link leads out of the studio."""
    clips = list_source(str(workspace.folder(folder, "folder of audio"))).clips
    blobs = [blob for clip in clips for blob in (clip.audio, clip.text, clip.fields) if blob is not None]
    for path in {Path(part) for blob in blobs for part in _risky(blob)}:
        try:
            workspace.inside(path)
        except StudioError as error:
            raise StudioError(f"{folder} reaches out of the studio's folders: {error}") from error
    return clips


def caption_of(clip: Clip) -> str:
    """The caption that training would be told."""
    return describe(clip).caption


def save(workspace: Workspace, folder: Path, edits: Sequence[Edit]) -> list[Change]:
    """Write changed captions to their sidecars, and give the files. Raises `SA3Error`, with nothing written, when a
    caption has been changed elsewhere since it was shown, or has no file of its own.
    """
    edits = [edit for edit in edits if _tidy(edit.after) != edit.before]
    if not edits:
        return []
    with _lock:
        clips = {clip.source: clip for clip in clips_of(workspace, folder)}
        changes = [_change(workspace, clips.get(edit.source), edit) for edit in edits]
        if len({change.path for change in changes}) < len(changes):
            raise StudioError("two of these clips share one caption file: rename one of them. Nothing is saved.")
        _write_log(workspace, folder, [*_read_log(workspace, folder), _entry(changes)])
        for change in changes:
            write_bytes(change.path, change.after)
    return changes


def undo(workspace: Workspace, folder: Path) -> list[str]:
    """Take the last save back; the files that it concerned. Raises `SA3Error` when there is none, or one of its files
    has been changed since.
    """
    with _lock:
        log = _read_log(workspace, folder)
        if not log:
            raise StudioError(f"there is nothing to undo in {workspace.shown(folder)}.")
        changes = [_noted(workspace, file) for file in log[-1]["files"]]
        for change in changes:
            if _content(change.path) not in (change.before, change.after):
                raise StudioError(
                    f"{change.path} has been changed elsewhere since: mend it by hand. Nothing is undone."
                )
        for change in changes:
            if change.before is None:
                change.path.unlink(missing_ok=True)
            else:
                write_bytes(change.path, change.before)
        _write_log(workspace, folder, log[:-1])
    return [workspace.shown(change.path) for change in changes]


def saves(workspace: Workspace, folder: Path) -> int:
    """How many saves can be undone."""
    return len(_read_log(workspace, folder))


def is_own(clip: Clip) -> bool:
    """Whether the clip is a file of its own, beside which a caption can be kept."""
    return clip.audio.local_path() is not None and (clip.text is None or clip.text.local_path() is not None)


def _risky(blob: Blob) -> list[str]:
    """Paths that may lead elsewhere: the folder that a file is in, and the file when it is a link."""
    path = Path(blob.path)
    return [str(path.parent), *([blob.path] if path.is_symlink() else [])]


def _change(workspace: Workspace, clip: Clip | None, edit: Edit) -> Change:
    after = _tidy(edit.after)
    if clip is None:
        raise StudioError(f"{edit.source} is no longer there: look at the folder again. Nothing is saved.")
    if not is_own(clip):
        raise StudioError(f"{edit.source} lies in an archive: its caption cannot be edited here. Nothing is saved.")
    if len(after) > LONGEST_CAPTION:
        raise StudioError(f"the caption of {edit.source} has {len(after)} characters: shorten it. Nothing is saved.")
    if caption_of(clip) != edit.before:
        raise StudioError(
            f"the caption of {edit.source} was changed elsewhere since it was shown: look at the folder again. "
            f"Nothing is saved."
        )
    fields = _fields(clip)
    if not after and (clip.row is not None or fields is not None):
        raise StudioError(f"{edit.source} has a caption in a manifest or .json too: empty it there. Nothing is saved.")
    if clip.text is None and clip.fields is not None and fields is not None:
        path, content = workspace.inside(clip.fields.path), _with_caption(fields, after)
    else:
        beside = clip.text.path if clip.text is not None else str(Path(clip.audio.path).with_suffix(".txt"))
        path, content = workspace.inside(beside), f"{after}\n".encode()
    return Change(path, _content(path), content)


def _fields(clip: Clip) -> dict[str, Any] | None:
    """The object in a clip's `.json` when its caption is kept there."""
    if clip.fields is None or clip.fields.local_path() is None:
        return None
    try:
        fields = json.loads(clip.fields.read().decode("utf-8-sig"))
    except (DataError, ValueError, RecursionError):
        return None
    kept = isinstance(fields, dict) and any(str(fields.get(name) or "").strip() for name in CAPTION_FIELDS)
    return fields if kept else None


def _with_caption(fields: dict[str, Any], caption: str) -> bytes:
    name = next(name for name in CAPTION_FIELDS if str(fields.get(name) or "").strip())
    return (json.dumps(fields | {name: caption}, indent=2, ensure_ascii=False) + "\n").encode()


def _tidy(caption: str) -> str:
    return " ".join(str(caption).split())


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


def _log_path(workspace: Workspace, folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return workspace.home / UNDO / f"{folder.name[:40]}-{name}.json"


def _read_log(workspace: Workspace, folder: Path) -> list[dict[str, Any]]:
    path = _log_path(workspace, folder)
    content = _content(path)
    if content is None:
        return []
    try:
        log = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): delete it; what it could undo is lost.") from error
    return list(log)


def _write_log(workspace: Workspace, folder: Path, log: Sequence[dict[str, Any]]) -> None:
    write_json(_log_path(workspace, folder), list(log[-KEPT_SAVES:]))


def _entry(changes: Sequence[Change]) -> dict[str, Any]:
    files = [
        {"path": str(change.path), "before": _text(change.before), "after": _text(change.after)} for change in changes
    ]
    return {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "files": files}


def _noted(workspace: Workspace, file: dict[str, str | None]) -> Change:
    before = file["before"]
    return Change(
        workspace.inside(str(file["path"])),
        None if before is None else base64.b64decode(before),
        base64.b64decode(str(file["after"])),
    )


def _text(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode("ascii")
