"""What is in a plain tar of audio and text, damaged ones included."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from sa3train.data.places import Blob

_DAMAGE = (ValueError, KeyError, IndexError, OverflowError, MemoryError, RecursionError, EOFError)
"""What damaged headers make tarfile raise besides its own errors."""

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


def tar_groups(path: str) -> tuple[dict[str, dict[str, Blob]], list[str]]:
    """Members by name without suffix, then by suffix (`.wav`, `.txt`); and what is wrong with the tar."""
    groups: dict[str, dict[str, Blob]] = {}
    faults: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar):
                if not member.isfile() or is_hidden(member.name):
                    continue
                name = Path(member.name.removeprefix("./"))
                group = groups.setdefault(str(name.with_suffix("")), {})
                if name.suffix.lower() in group:
                    faults.append(f"holds {member.name} more than once; the last is used")
                group[name.suffix.lower()] = Blob(path, member.offset_data, member.size)
            faults += _end_faults(path, tar.offset)
    except (tarfile.TarError, OSError, *_DAMAGE) as error:
        remedy = " Compressed tars cannot be read at random: unpack it, or make a plain .tar." if _packed(path) else ""
        faults.append(f"is not a readable tar ({error or type(error).__name__}).{remedy}")
    return groups, faults


def is_hidden(name: str) -> bool:
    """Hidden files and what macOS packs beside real ones."""
    path = f"/{name.removeprefix('./')}"
    return "/." in path or "/__MACOSX" in path


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # keeps memory flat on tars with millions of members
        yield member


def _end_faults(path: str, offset: int) -> list[str]:
    """tarfile takes a damaged header for the end; the true end is a block of zeros."""
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if offset > size:
        return [f"is cut short: {offset - size} bytes of its last member are missing"]
    if block.strip(b"\0"):
        return [f"is damaged at byte {offset} of {size}: what follows is not read. Make it anew, or unpack it"]
    return []


def _packed(path: str) -> bool:
    with Path(path).open("rb") as file:
        return file.read(6).startswith(_COMPRESSED)
