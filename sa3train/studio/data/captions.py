"""Edit the captions of a folder of audio in the sidecar files that `sa3-encode` reads, with undo.

Every save is logged before a file is touched, with the content of each file before; files are replaced whole. So an
interrupted save can be undone like any other, and nothing that another program wrote meanwhile is overwritten.
"""

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
from sa3train.core.user_files import read_file
from sa3train.data.sources.captions import read_clip_text
from sa3train.data.sources.listing import Clip, list_source
from sa3train.data.sources.lists import CAPTION_FIELDS
from sa3train.data.sources.storage import Blob
from sa3train.data.sources.text import TEXT_LIMIT, decode_text, normalize_field
from sa3train.studio.server.folders import is_text
from sa3train.studio.server.workspace import StudioError, Workspace

UNDO = "captions"
_MAX_SAVES = 100
_MAX_CAPTION_LENGTH = 10_000

_lock = threading.Lock()


@dataclass(frozen=True)
class Edit:
    """An edited caption.

    Attributes:
        source: The clip.
        before: The caption that the table showed.
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


def list_clips(workspace: Workspace, folder: Path) -> list[Clip]:
    """List the clips of a folder of audio.

    Args:
        workspace: The studio's folders.
        folder: The folder.

    Returns:
        Its clips, without those whose name is not valid text, which an audit lists.

    Raises:
        StudioError: When the folder is in the workspace, or a link leads out of the studio's folders.
    """
    found = workspace.resolve_folder(folder, "folder of audio")
    if found.is_relative_to(workspace.folder):
        raise StudioError(f"{folder} is in the workspace: what the studio made is no source. Choose a folder of yours.")
    listed = list_source(str(found)).clips
    clips = [clip for clip in listed if is_text(clip.source)]
    blobs = [blob for clip in clips for blob in (clip.audio, clip.text, clip.fields, *clip.others) if blob is not None]
    for path in {Path(part) for blob in blobs for part in _list_links(blob)}:
        try:
            workspace.resolve(path)
        except StudioError as error:
            raise StudioError(f"{folder} leads out of the studio's folders: {error}") from error
    return clips


def get_caption(clip: Clip) -> str:
    """Get the caption that training would use.

    Args:
        clip: The clip.

    Returns:
        The caption; empty for none.
    """
    return read_clip_text(clip).caption


def save_captions(workspace: Workspace, folder: Path, edits: Sequence[Edit]) -> list[Change]:
    """Save changed captions to their sidecar files.

    Args:
        workspace: The studio's folders.
        folder: Folder of audio.
        edits: Captions to save; unchanged ones are skipped.

    Returns:
        The changed files.

    Raises:
        StudioError: With nothing written, when another program has changed a caption since it was shown, or a caption
            has no file of its own.
    """
    edits = [edit for edit in edits if _normalize(edit.after) != edit.before]
    if not edits:
        return []
    with _lock:
        clips = {clip.source: clip for clip in list_clips(workspace, folder)}
        changes = [_make_change(workspace, clips.get(edit.source), edit) for edit in edits]
        if len({change.path for change in changes}) < len(changes):
            raise StudioError("two of these clips share one caption file: rename one of them. Nothing was saved.")
        _write_log(workspace, folder, [*_read_log(workspace, folder), _make_log_entry(changes)])
        for change in changes:
            write_bytes(change.path, change.after)
    return changes


def undo_save(workspace: Workspace, folder: Path) -> list[str]:
    """Undo the last save.

    Args:
        workspace: The studio's folders.
        folder: Folder of audio.

    Returns:
        The restored files.

    Raises:
        StudioError: When there is nothing to undo, or a file has been changed since.
    """
    with _lock:
        log = _read_log(workspace, folder)
        if not log:
            raise StudioError(f"there is nothing to undo in {workspace.shorten(folder)}.")
        changes = [_parse_change(workspace, file) for file in log[-1]["files"]]
        for change in changes:
            if _read_content(change.path) not in (change.before, change.after):
                raise StudioError(
                    f"{change.path} has been changed elsewhere since: edit it by hand. Nothing was undone."
                )
        for change in changes:
            if change.before is None:
                change.path.unlink(missing_ok=True)
            else:
                write_bytes(change.path, change.before)
        _write_log(workspace, folder, log[:-1])
    return [workspace.shorten(change.path) for change in changes]


def count_saves(workspace: Workspace, folder: Path) -> int:
    """Count the saves that can be undone.

    Args:
        workspace: The studio's folders.
        folder: Folder of audio.

    Returns:
        The number.
    """
    return len(_read_log(workspace, folder))


def has_sidecar(clip: Clip) -> bool:
    """Tell whether a clip is a separate file, beside which a caption can be saved.

    Args:
        clip: The clip.

    Returns:
        False for a clip in an archive.
    """
    return clip.audio.local_path() is not None and (clip.text is None or clip.text.local_path() is not None)


def _list_links(blob: Blob) -> list[str]:
    """Paths that may lead elsewhere: the folder that a file is in, and the file when it is a link."""
    path = Path(blob.path)
    return [str(path.parent), *([blob.path] if path.is_symlink() else [])]


def _make_change(workspace: Workspace, clip: Clip | None, edit: Edit) -> Change:
    after = _normalize(edit.after)
    if clip is None:
        raise StudioError(f"{edit.source} no longer exists: reload the folder. Nothing was saved.")
    if not has_sidecar(clip):
        raise StudioError(f"{edit.source} is in an archive: its caption cannot be edited here. Nothing was saved.")
    if len(after) > _MAX_CAPTION_LENGTH:
        raise StudioError(f"the caption of {edit.source} has {len(after)} characters: shorten it. Nothing was saved.")
    if get_caption(clip) != edit.before:
        raise StudioError(
            f"the caption of {edit.source} was changed elsewhere since it was shown: reload the folder. "
            f"Nothing was saved."
        )
    fields = _read_caption_fields(clip)
    if not after and (clip.row is not None or fields is not None):
        raise StudioError(
            f"{edit.source} also has a caption in a manifest or .json: remove it there. Nothing was saved."
        )
    if clip.text is None and clip.fields is not None and fields is not None:
        path, content = workspace.resolve(clip.fields.path), _encode_fields(fields, after)
    else:
        beside = clip.text.path if clip.text is not None else str(Path(clip.audio.path).with_suffix(".txt"))
        path, content = workspace.resolve(beside), f"{after}\n".encode()
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


def _normalize(caption: str) -> str:
    return " ".join(str(caption).split())


def _read_content(path: Path) -> bytes | None:
    try:
        return read_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


def _log_path(workspace: Workspace, folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return workspace.home / UNDO / f"{folder.name[:40]}-{name}.json"


def _read_log(workspace: Workspace, folder: Path) -> list[dict[str, Any]]:
    path = _log_path(workspace, folder)
    content = _read_content(path)
    if content is None:
        return []
    try:
        log = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}): delete it; its undo steps are lost.") from error
    return list(log)


def _write_log(workspace: Workspace, folder: Path, log: Sequence[dict[str, Any]]) -> None:
    write_json(_log_path(workspace, folder), list(log[-_MAX_SAVES:]))


def _make_log_entry(changes: Sequence[Change]) -> dict[str, Any]:
    files = [{name: _encode_content(value) for name, value in vars(change).items()} for change in changes]
    return {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "files": files}


def _parse_change(workspace: Workspace, file: dict[str, str | None]) -> Change:
    before = file["before"]
    content = None if before is None else before.encode("latin-1")
    return Change(workspace.resolve(str(file["path"])), content, str(file["after"]).encode("latin-1"))


def _encode_content(value: Path | bytes | None) -> str | None:
    """A path, or the content of a file, whose bytes become characters one by one, whatever its encoding."""
    return value.decode("latin-1") if isinstance(value, bytes) else None if value is None else str(value)
