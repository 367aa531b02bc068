"""Bytes at a path or URL: a folder to list, and blobs (files or stretches of files) to read.

What is in a plain tar of audio and text, damaged ones included.
"""

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from sa3train.core.errors import DataError
from sa3train.core.files import cache_dir


def is_url(path: str) -> bool:
    """Whether fsspec has to open it: `memory://…`, `s3://…`, `simplecache::https://…`."""
    return "://" in path or "::" in path


@dataclass(frozen=True, slots=True)
class Blob:
    """A file, or `size` bytes of it from `offset` on. `name` is its path within its source."""

    path: str
    offset: int = 0
    size: int = -1
    name: str = ""

    @staticmethod
    def at(path: str) -> "Blob":
        """The whole file at a path or URL."""
        return Blob(path, name=path)

    def read(self) -> bytes:
        """Its bytes. Raises `DataError` when they cannot be had in full."""
        with reaching("cannot be read"):
            if is_url(self.path):
                file_system, path = fsspec.core.url_to_fs(self.path)
                end = None if self.size < 0 else self.offset + self.size
                content = bytes(file_system.cat_file(path, start=self.offset or None, end=end))
            else:
                with Path(self.path).open("rb") as file:
                    file.seek(self.offset)
                    content = file.read(self.size)
        if 0 <= self.size != len(content):
            raise DataError(f"is cut short: {len(content)} of {self.size} bytes are there")
        return content

    def local_path(self) -> str | None:
        """The file itself, when it is a whole file on this machine."""
        return self.path if self.size < 0 and not is_url(self.path) else None

    def stamp(self) -> str:
        """Changes when the file does; empty when it is not there."""
        try:
            with reaching("is not there"):
                if is_url(self.path):
                    file_system, path = fsspec.core.url_to_fs(self.path)
                    return _remote_stamp(file_system.info(path))
                return _local_stamp(Path(self.path).stat())
        except DataError:
            return ""


class Place:
    """A folder on this machine."""

    def __init__(self, root: str) -> None:
        self.root = root

    def files(self) -> Iterator[tuple[str, str]]:
        """(path within the folder with `/`, stamp) of every file, in order."""
        yield from sorted(self._walk(self.root, "", frozenset()))

    def _walk(self, folder: str, prefix: str, above: frozenset[str]) -> Iterator[tuple[str, str]]:
        above = above | {os.path.realpath(folder)}
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        if os.path.realpath(entry.path) not in above:  # a link to a folder above would never end
                            yield from self._walk(entry.path, f"{prefix}{entry.name}/", above)
                    else:
                        try:
                            stamp = _local_stamp(entry.stat())
                        except FileNotFoundError:
                            stamp = ""  # a link to nowhere: listed, so that its reading can say so
                        yield f"{prefix}{entry.name}", stamp
        except PermissionError as error:
            raise DataError(f"may not read the folder {folder}: change its permissions, or leave it out.") from error

    def blob(self, name: str) -> Blob:
        """The file `name` of this place."""
        return Blob(f"{self.root}/{name}" if self.root else name, name=name)

    def stamp(self, name: str) -> str:
        return self.blob(name).stamp()

    def local(self, name: str) -> str:
        """A path on this machine with the bytes of `name`."""
        return self.blob(name).path


class RemotePlace(Place):
    """A folder at a URL. Tars are fetched whole into the cache, since their members are read at random."""

    def __init__(self, url: str) -> None:
        super().__init__(url.rstrip("/"))
        with reaching(f"cannot open {url}"):
            self.file_system, self.path = fsspec.core.url_to_fs(url)

    def files(self) -> Iterator[tuple[str, str]]:
        base = self.path.rstrip("/") + "/"
        with reaching(f"cannot list {self.root}"):
            found: dict[str, Any] = self.file_system.find(self.path, detail=True)
            if not found:
                self.file_system.ls(self.path)  # `find` takes a folder that cannot be had for an empty one
        for name in sorted(found):
            if name.startswith(base) and len(name) > len(base):
                # The listing of a web server names files and says nothing of them.
                yield name.removeprefix(base), _remote_stamp(found[name]) or self.stamp(name.removeprefix(base))

    def local(self, name: str) -> str:
        blob = self.blob(name)
        # A copy is kept for each stamp, so that a tar which has changed is fetched anew.
        version = hashlib.sha256(blob.stamp().encode()).hexdigest()[:16]
        with reaching(f"cannot fetch {blob.path}"):
            cache = str(cache_dir() / "downloads" / version)
            return str(fsspec.open_local(f"simplecache::{blob.path}", simplecache={"cache_storage": cache}))


def open_place(source: str) -> tuple[Place, str | None]:
    """The folder at `source`, or, when it is a file, its folder and its name. Raises `DataError` when it is neither."""
    if is_url(source):
        head, _, name = source.rstrip("/").rpartition("/")
        is_file = "." in name and not head.endswith("/") and _is_remote_file(source)
        return (RemotePlace(head), name) if is_file else (RemotePlace(source), None)
    path = Path(source)
    if path.is_dir():
        return Place(str(path)), None
    if path.is_file():
        return Place(str(path.absolute().parent)), path.name
    raise DataError(f"there is no {source}. Give a folder of audio, a manifest, a .tar, or a URL of one.")


def _is_remote_file(url: str) -> bool:
    with reaching(f"cannot open {url}"):
        file_system, path = fsspec.core.url_to_fs(url)
        return bool(file_system.info(path).get("type") == "file")


def _local_stamp(state: os.stat_result) -> str:
    return f"{state.st_size}:{state.st_mtime_ns}"


def _remote_stamp(info: Any) -> str:
    known = (
        *("size", "ETag", "etag", "Content-MD5", "Digest", "md5Hash", "LastModified", "Last-Modified"),
        *("last_modified", "mtime", "created"),
    )
    return ":".join(str(info[name]) for name in known if info.get(name) is not None)


@contextlib.contextmanager
def reaching(what: str) -> Iterator[None]:
    """Turn whatever a file system raises into a `DataError` that starts with `what`.

    Every kind behind fsspec (HTTP, S3 …) has exceptions of its own, few of them `OSError`.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{what} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    if status and message:
        return f"the server answers {status} {message}"
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


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
