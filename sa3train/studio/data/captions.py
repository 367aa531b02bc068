"""The captions of a folder of the studio's: listed, composed, edited and undone."""

from collections.abc import Sequence
from pathlib import Path

from sa3train.data.captioning import files
from sa3train.data.captioning.files import Change, Edit
from sa3train.data.captioning.service import Proposal, propose_captions
from sa3train.data.sources.captions import read_clip_text
from sa3train.data.sources.listing import Clip, list_source
from sa3train.data.sources.own_folders import is_text
from sa3train.data.sources.storage import Blob
from sa3train.studio.server.workspace import StudioError, Workspace


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
        The changed files. A `DataError` is raised, with nothing written, where a caption cannot be saved.
    """
    return files.save_captions(folder, list_clips(workspace, folder), edits, workspace.resolve)


def caption_rest(workspace: Workspace, folder: Path, template: str) -> tuple[list[Change], list[Proposal]]:
    """Write captions for the clips that have none.

    Args:
        workspace: The studio's folders.
        folder: Folder of audio.
        template: How captions are composed.

    Returns:
        The changed files, and the clips for which there is no caption, with the reason.
    """
    clips = list_clips(workspace, folder)
    found = list(propose_captions(clips, [clip for clip in clips if not get_caption(clip)], template))
    edits = [Edit(one.source, "", one.composed.caption) for one in found if not one.problem]
    return save_captions(workspace, folder, edits), [one for one in found if one.problem]


def replace_text(workspace: Workspace, folder: Path, words: str, old: str, new: str) -> list[Change]:
    """Replace text in many captions at once.

    Args:
        workspace: The studio's folders.
        folder: Folder of audio.
        words: Only captions of clips in whose path or caption these are; empty for all.
        old: Text to replace, in this case.
        new: Text in its place; a caption of which nothing is left stays as it is.

    Returns:
        The changed files.

    Raises:
        StudioError: When there is nothing to replace.
    """
    if not old:
        raise StudioError("Replace is empty. Enter the text to replace.")
    pairs = [(clip, get_caption(clip)) for clip in list_clips(workspace, folder)]
    wanted = words.strip().lower()
    pairs = [pair for pair in pairs if wanted in pair[0].source.lower() or wanted in pair[1].lower()]
    edits = [Edit(clip.source, caption, caption.replace(old, new)) for clip, caption in pairs if old in caption]
    edits = [edit for edit in edits if edit.after.strip(" ,")]
    if not edits:
        raise StudioError(f"no caption of these clips has {old!r}.")
    return save_captions(workspace, folder, edits)


def _list_links(blob: Blob) -> list[str]:
    """Paths that may lead elsewhere: the folder that a file is in, and the file when it is a link."""
    path = Path(blob.path)
    return [str(path.parent), *([blob.path] if path.is_symlink() else [])]
