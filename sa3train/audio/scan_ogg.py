"""Scan of Ogg files: chained and multiplexed streams, damaged pages, and streams without an end."""

import contextlib
import io
from collections.abc import Iterator

from mutagen.ogg import OggPage
from mutagen.ogg import error as OggError

from sa3train.audio.scan import Problem, Scan

AUDIO_STREAMS = (b"\x01vorbis", b"OpusHead", b"Speex   ", b"\x7fFLAC")
"""First bytes of the streams that hold audio."""

FLAC_MAPPING_BYTES = 9  # before the native header in the first packet (Ogg mapping of FLAC, version 1.0)


class _Stream:
    """One logical stream: its pages in order, as they stand in the file."""

    def __init__(self, first: OggPage, link: int) -> None:
        start = first.packets[0] if first.packets else b""
        self.kind = next((kind for kind in AUDIO_STREAMS if start.startswith(kind)), b"")
        self.link = link
        self.pages: list[bytes] = []
        self.is_ended = self.has_audio = False
        self.missing = self.missing_before = 0

    def add(self, page: OggPage, content: bytes) -> None:
        self.missing = max(self.missing, page.sequence - len(self.pages))
        if not self.has_audio and page.position > 0:
            self.has_audio, self.missing_before = True, self.missing
        self.is_ended |= page.last
        self.pages.append(content)

    def rebuild(self) -> bytes:
        if self.kind != b"\x7fFLAC":
            return b"".join(self.pages)
        return b"".join(page[27 + page[26] :] for page in self.pages)[FLAC_MAPPING_BYTES:]


def scan_ogg(content: bytes) -> Scan:
    """Scan the pages of an Ogg file.

    libsndfile reads the first stream of a chained file, nothing of a multiplexed one or of FLAC, and stops at damage.

    Args:
        content: Bytes of the file.

    Returns:
        The scan. The first audio stream of each link becomes a part, unless the file is one such stream.
    """
    streams, damaged = _collect_streams(content)
    audible = [stream for stream in streams if stream.kind]
    chosen = list({stream.link: stream for stream in reversed(audible)}.values())[::-1]
    problems = []
    if not all(stream.is_ended for stream in chosen):
        problems.append(Problem("cut_short", "the stream has no end: how much is missing is not known"))
    # A recording of a running stream begins with its headers and any later page; that is no loss.
    missing = sum(stream.missing - (0 if damaged else stream.missing_before) for stream in chosen)
    if missing:
        problems.append(Problem("cut_short", f"{missing} pages are missing or damaged"))
    if len(chosen) < len(audible):
        problems.append(Problem("unread_data", f"{len(audible) - len(chosen)} parallel audio streams"))
    is_plain = len(streams) == 1 and not damaged and (not chosen or chosen[0].kind != b"\x7fFLAC")
    return Scan(
        parts=() if is_plain else tuple(stream.rebuild() for stream in chosen),
        problems=tuple(problems),
        is_known=is_plain and not missing,
    )


def _collect_streams(content: bytes) -> tuple[list[_Stream], int]:
    """Collect the logical streams in the order of their first pages, and count the bytes between pages."""
    streams: list[_Stream] = []
    current: dict[int, _Stream] = {}
    end = damaged = link = 0
    was_first = True
    for page, start in _iterate_pages(content):
        damaged += start - end
        end = start + page.size
        link += page.first and not was_first
        was_first = page.first
        if page.first or page.serial not in current:
            current[page.serial] = _Stream(page, link)
            streams.append(current[page.serial])
        current[page.serial].add(page, content[start:end])
    return streams, damaged


def _iterate_pages(content: bytes) -> Iterator[tuple[OggPage, int]]:
    """Yield pages with a true checksum and their offsets, and go on after what is none."""
    file = io.BytesIO(content)
    start = content.find(b"OggS")
    while start >= 0:
        file.seek(start)
        end = start + 4
        with contextlib.suppress(OggError, EOFError):
            page = OggPage(file)
            if page.write() == content[start : file.tell()]:
                end = file.tell()
                yield page, start
        start = content.find(b"OggS", end)
