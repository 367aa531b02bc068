"""Audio that browsers do not play, such as AIFF, as WAV that they do."""

import contextlib
import hashlib
from os import fsencode
from pathlib import Path

import soundfile

from sa3train.audio.io import AUDIO_SUFFIXES, BLOCK, read_whole, write_audio
from sa3train.core.errors import AudioError
from sa3train.core.files import replace_file
from sa3train.studio.server.workspace import Workspace

PLAYED = (".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".mp4", ".aac")
PLAYED_WAV = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "ALAW", "ULAW", "MPEG_LAYER_III")
KEPT = 20
"""Number of converted files that are kept."""
LARGEST_WAV, LARGEST_WHOLE = 1 << 30, 1 << 24
"""Most bytes of a converted file, and of one that is decoded as a whole, since libsndfile does not read it."""


def is_playable(path: Path) -> bool:
    """Check whether browsers play a file, if it is audio at all.

    Args:
        path: The file.

    Returns:
        False for audio in a container or encoding that they do not know.
    """
    if path.suffix.lower() != ".wav":
        return path.suffix.lower() in PLAYED or path.suffix.lower() not in AUDIO_SUFFIXES
    with contextlib.suppress(soundfile.LibsndfileError, OSError):
        return soundfile.info(str(path)).subtype in PLAYED_WAV
    return True


def convert_audio(workspace: Workspace, path: Path) -> Path:
    """Convert audio to WAV in the studio's home, unless that is done already.

    Args:
        workspace: The studio's folders.
        path: The file.

    Returns:
        The WAV file.

    Raises:
        AudioError: The file cannot be read, or is too long.
    """
    found = path.stat()
    name = hashlib.sha256(f"{path} {found.st_mtime_ns} {found.st_size}".encode(errors="replace")).hexdigest()[:24]
    folder = workspace.home / "players"
    target = folder / f"{name}.wav"
    if not target.is_file():
        folder.mkdir(exist_ok=True)
        _convert(path, target)
        latest = sorted(folder.glob("*.wav"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
        for file in latest[KEPT:]:
            file.unlink(missing_ok=True)
    return target


def _convert(path: Path, target: Path) -> None:
    """Convert audio block by block, up to where it is damaged."""
    try:
        source = soundfile.SoundFile(fsencode(path))
    except soundfile.LibsndfileError as error:
        if path.stat().st_size > LARGEST_WHOLE:
            raise AudioError(f"{path} is too large to be converted for the browser. Convert it to WAV.") from error
        decoded = read_whole(path)
        write_audio(target, decoded.audio_CN, decoded.sample_rate)
        return
    with source:
        if source.frames * source.channels * 2 > LARGEST_WAV:
            raise AudioError(f"{path} is too long to be converted for the browser. Cut it into clips.")
        with (
            replace_file(target) as part,
            soundfile.SoundFile(fsencode(part), "w", source.samplerate, source.channels, "PCM_16", format="WAV") as wav,
            contextlib.suppress(soundfile.LibsndfileError),
        ):
            while len(block_NC := source.read(BLOCK // source.channels, "float32", always_2d=True)):
                wav.write(block_NC)
