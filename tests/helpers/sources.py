"""Folders and tars of clips with their text, and what listing them gives."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from helpers.audio import encode, tone
from sa3train.data.sources.captions import read_clip_text
from sa3train.data.sources.listing import Listing

WAV = encode(tone(0.2))


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write texts and bytes as they are, and a clip for each name of a wav."""
    for name, given in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = WAV if name.lower().endswith(".wav") else given
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def make_tar(path: Path, members: Mapping[str, bytes], links: Mapping[str, bytes] | None = None) -> Path:
    """Make a tar of files, and of links, pipes and devices, given by their types in a tar."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
        for name, kind in (links or {}).items():
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, next(iter(members))
            tar.addfile(header)
    return path


def read_captions(listing: Listing) -> dict[str, str]:
    """Caption by clip."""
    return {clip.source: read_clip_text(clip).caption for clip in listing.clips}


def get_reasons(listing: Listing) -> dict[str, str]:
    """Detail by source of the problems."""
    return {problem.source: problem.detail for problem in listing.problems}
