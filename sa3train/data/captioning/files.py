"""Save captions in the sidecar files that `sa3-encode` reads, with undo.

Every save is logged before a file is touched, with the content of each file before; files are replaced whole. So an
interrupted save can be undone like any other, and nothing that another program wrote meanwhile is overwritten. The log
is a hidden file of the folder, so that a save of the studio can be undone by the command, and the reverse. Contents
before a save that its undo could not restore stay in the log, as "kept".
"""

import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3train.core.errors import DataError
from sa3train.core.files import write_bytes, write_json
from sa3train.core.text import get_utc_time, list_few
from sa3train.core.user_files import read_file
from sa3train.data.sources.captions import read_clip_text
from sa3train.data.sources.listing import Clip
from sa3train.data.sources.lists import CAPTION_FIELDS
from sa3train.data.sources.text import TEXT_LIMIT, decode_text, normalize_field, tidy

UNDO_FILE = ".sa3-captions.json"
"""Hidden file in a folder of audio: the saves that can be undone."""
MAX_CAPTION_LENGTH = 10_000
_MAX_SAVES = 100

_lock = threading.Lock()


@dataclass(frozen=True)
class Edit:
    """An edited caption.

    Attributes:
        source: The clip.
        before: The caption that was shown.
        after: The new caption.
    """

    source: str
    before: str
    after: str


@dataclass(frozen=True)
class Change:
    """A change of a file.

    Attributes:
        path: The file.
        before: Its content before; None when it did not exist.
        after: Its content after.
    """

    path: Path
    before: bytes | None
    after: bytes


@dataclass(frozen=True)
class Undone:
    """What `undo_save` did.

    Attributes:
        restored: Files that are again as they were before the save.
        kept: Files that were edited after it and stay as they are.
        is_logged: Whether one of those had a content before the save, which stays in the log.
    """

    restored: list[Path]
    kept: list[Path]
    is_logged: bool

    def describe(self, folder: str | Path) -> str:
        """Describe what was done.

        Args:
            folder: Folder of audio.

        Returns:
            Sentences, which name the files by their path in the folder.
        """
        restored, kept = ([os.path.relpath(path, folder) for path in paths] for paths in (self.restored, self.kept))
        text = f"Captions taken back: {len(restored)}{f' ({list_few(restored, 5)})' if restored else ''}."
        left = f" Edited since, so left alone: {list_few(kept, 10)}." if kept else ""
        return text + left + (f" What was there before the save stays in {UNDO_FILE}." if self.is_logged else "")


Resolve = Callable[[str | Path], Path]
"""Checks a path that is about to be written, and returns it."""


def save_captions(
    folder: str | Path, clips: Sequence[Clip], edits: Sequence[Edit], resolve: Resolve = Path
) -> list[Change]:
    """Save changed captions to their sidecar files.

    Args:
        folder: Folder of audio.
        clips: Its clips, as they are now.
        edits: Captions to save; unchanged ones are skipped.
        resolve: Checks each path.

    Returns:
        The changed files.

    Raises:
        DataError: With nothing written, when another program has changed a caption since it was shown, or a caption
            has no file of its own.
    """
    edits = [edit for edit in edits if tidy(edit.after) != edit.before]
    if not edits:
        return []
    with _lock:
        known = {clip.source: clip for clip in clips}
        changes = [_make_change(resolve, known.get(edit.source), edit) for edit in edits]
        if len({change.path for change in changes}) < len(changes):
            raise DataError("two of these clips share one caption file: rename one of them. Nothing was saved.")
        _write_log(folder, [*_read_log(folder), _make_log_entry(Path(folder), changes)])
        for change in changes:
            write_bytes(change.path, change.after)
    return changes


def undo_save(folder: str | Path, resolve: Resolve = Path) -> Undone:
    """Undo the last save, in all files that were not edited after it.

    Args:
        folder: Folder of audio.
        resolve: Checks each path.

    Returns:
        The restored files, and those that stay.

    Raises:
        DataError: When there is nothing to undo, or a file cannot be read or written.
    """
    with _lock:
        log = _read_log(folder)
        last = next(reversed(_list_saves(log)), None)
        if last is None:
            raise DataError(f"there is nothing to undo in {folder}.")
        changes = [_parse_change(resolve, Path(folder), file) for file in last["files"]]
        kept = [change.path for change in changes if _read_content(change.path) not in (change.before, change.after)]
        restored = [change for change in changes if change.path not in kept]
        for change in restored:
            if change.before is None:
                change.path.unlink(missing_ok=True)
            else:
                write_bytes(change.path, change.before)
        log.remove(last)
        files = [file for file, change in zip(last["files"], changes, strict=True) if change.path in kept]
        if lost := [file for file in files if file["before"] is not None]:
            log.append({**last, "files": lost, "kept": True})
        _write_log(folder, log)
    return Undone([change.path for change in restored], kept, bool(lost))


def count_saves(folder: str | Path) -> int:
    """Count the saves that can be undone.

    Args:
        folder: Folder of audio.

    Returns:
        The number.
    """
    return len(_list_saves(_read_log(folder)))


def has_sidecar(clip: Clip) -> bool:
    """Tell whether a clip is a separate file, beside which a caption can be saved.

    Args:
        clip: The clip.

    Returns:
        False for a clip in an archive or at a URL.
    """
    return clip.audio.local_path() is not None and (clip.text is None or clip.text.local_path() is not None)


def get_caption_path(clip: Clip) -> str | None:
    """Get the path of the text file that holds a clip's caption, or would.

    Args:
        clip: The clip.

    Returns:
        The path; None for a clip in an archive or at a URL.
    """
    if not has_sidecar(clip):
        return None
    return clip.text.path if clip.text is not None else str(Path(clip.audio.path).with_suffix(".txt"))


def _make_change(resolve: Resolve, clip: Clip | None, edit: Edit) -> Change:
    after = tidy(edit.after)
    if clip is None:
        raise DataError(f"{edit.source} no longer exists: reload the folder. Nothing was saved.")
    if not has_sidecar(clip):
        raise DataError(f"{edit.source} is in an archive: its caption cannot be edited here. Nothing was saved.")
    if len(after) > MAX_CAPTION_LENGTH:
        raise DataError(f"the caption of {edit.source} has {len(after)} characters: shorten it. Nothing was saved.")
    if read_clip_text(clip).caption != edit.before:
        raise DataError(
            f"the caption of {edit.source} was changed elsewhere since it was shown: reload the folder. "
            f"Nothing was saved."
        )
    fields = _read_caption_fields(clip)
    if not after and (clip.row is not None or fields is not None):
        raise DataError(f"{edit.source} also has a caption in a manifest or .json: remove it there. Nothing was saved.")
    if clip.text is None and clip.fields is not None and fields is not None:
        path, content = resolve(clip.fields.path), _encode_fields(fields, after)
    else:
        path, content = resolve(get_caption_path(clip) or ""), f"{after}\n".encode()
    return Change(path, _read_content(path), content)


def _read_caption_fields(clip: Clip) -> dict[str, Any] | None:
    """The object in a clip's `.json` when its caption is there."""
    if clip.fields is None or clip.fields.local_path() is None:
        return None
    try:
        fields = json.loads(decode_text(clip.fields.read(TEXT_LIMIT))[0])
    except (DataError, ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) and _find_caption_field(fields) else None


def _find_caption_field(fields: dict[str, Any]) -> str:
    """The field that the caption is read from; empty for none."""
    used = [name for name, value in fields.items() if str(value or "").strip()]
    found = (name for wanted in CAPTION_FIELDS for name in used if normalize_field(name) == wanted)
    return next(found, "")


def _encode_fields(fields: dict[str, Any], caption: str) -> bytes:
    name = _find_caption_field(fields)
    return (json.dumps(fields | {name: caption}, indent=2, ensure_ascii=False) + "\n").encode()


def _read_content(path: Path) -> bytes | None:
    try:
        return read_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


def _read_log(folder: str | Path) -> list[dict[str, Any]]:
    path = Path(folder) / UNDO_FILE
    content = _read_content(path)
    if content is None:
        return []
    try:
        log = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): delete it; its undo steps are lost.") from error
    return list(log)


def _list_saves(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that can be undone."""
    return [entry for entry in log if not entry.get("kept")]


def _write_log(folder: str | Path, log: Sequence[dict[str, Any]]) -> None:
    path = Path(folder) / UNDO_FILE
    if log:
        kept = [entry for entry in log if entry.get("kept")]
        write_json(path, [*kept, *_list_saves(log)[-_MAX_SAVES:]])
    else:
        path.unlink(missing_ok=True)


def _make_log_entry(folder: Path, changes: Sequence[Change]) -> dict[str, Any]:
    """Contents as text whose characters are the bytes, whatever their encoding; paths as they are from the folder."""
    files = [
        {
            "path": str(change.path.relative_to(folder) if change.path.is_relative_to(folder) else change.path),
            "before": None if change.before is None else change.before.decode("latin-1"),
            "after": change.after.decode("latin-1"),
        }
        for change in changes
    ]
    return {"at": get_utc_time(), "files": files}


def _parse_change(resolve: Resolve, folder: Path, file: dict[str, str | None]) -> Change:
    before = file["before"]
    content = None if before is None else before.encode("latin-1")
    return Change(resolve(folder / str(file["path"])), content, str(file["after"]).encode("latin-1"))
