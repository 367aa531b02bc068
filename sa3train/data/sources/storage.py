"""Storage of source audio: folders on disk or at a URL, files in them, and members of tars (damaged ones included)."""

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
from sa3train.core.files import get_cache_dir


def is_url(path: str) -> bool:
    """Tell whether fsspec has to open a path.

    Args:
        path: Path or URL, such as `memory://…`, `s3://…` or `simplecache::https://…`.

    Returns:
        False for a path on this machine.
    """
    return "://" in path or "::" in path


@dataclass(frozen=True, slots=True)
class Blob:
    """A file, or part of one.

    Attributes:
        path: Path or URL.
        offset: First byte.
        size: Number of bytes; -1 for the whole file.
        name: Path within its source.
    """

    path: str
    offset: int = 0
    size: int = -1
    name: str = ""

    def read(self) -> bytes:
        """Read the bytes.

        Returns:
            All of them.

        Raises:
            DataError: When they cannot be read in full.
        """
        with translate_errors("cannot be read"):
            if is_url(self.path):
                file_system, path = fsspec.core.url_to_fs(self.path)
                end = None if self.size < 0 else self.offset + self.size
                content = bytes(file_system.cat_file(path, start=self.offset or None, end=end))
            else:
                with Path(self.path).open("rb") as file:
                    file.seek(self.offset)
                    content = file.read(self.size)
        if 0 <= self.size != len(content):
            raise DataError(f"is truncated: {len(content)} of {self.size} bytes exist")
        return content

    def local_path(self) -> str | None:
        """Get the path of a whole file on this machine.

        Returns:
            The path; None for part of a file and for a URL.
        """
        return self.path if self.size < 0 and not is_url(self.path) else None

    def compute_stamp(self) -> str:
        """Compute a stamp that changes when the file does.

        Returns:
            Size and time, or what the server tells; empty when the file does not exist.
        """
        try:
            with translate_errors("does not exist"):
                if is_url(self.path):
                    file_system, path = fsspec.core.url_to_fs(self.path)
                    return _make_remote_stamp(file_system.info(path))
                return _make_local_stamp(Path(self.path).stat())
        except DataError:
            return ""


class LocalStorage:
    """A folder on this machine.

    Attributes:
        root: Its path.
    """

    def __init__(self, root: str) -> None:
        """Open a folder.

        Args:
            root: Its path.
        """
        self.root = root

    def iterate_files(self) -> Iterator[tuple[str, str]]:
        """Iterate over all files below the folder, in order.

        Yields:
            (path within the folder with `/`, stamp).
        """
        yield from sorted(self._walk(self.root, "", frozenset()))

    def _walk(self, folder: str, prefix: str, above: frozenset[str]) -> Iterator[tuple[str, str]]:
        above = above | {os.path.realpath(folder)}
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        if os.path.realpath(entry.path) not in above:  # a link to a parent folder would never end
                            yield from self._walk(entry.path, f"{prefix}{entry.name}/", above)
                    else:
                        try:
                            stamp = _make_local_stamp(entry.stat())
                        except FileNotFoundError:
                            stamp = ""  # a broken link: listed, so that reading it can report that
                        yield f"{prefix}{entry.name}", stamp
        except PermissionError as error:
            raise DataError(f"cannot read the folder {folder}. Change its permissions, or exclude it.") from error

    def get_blob(self, name: str) -> Blob:
        """Get a file of this folder.

        Args:
            name: Path within the folder.

        Returns:
            The whole file.
        """
        return Blob(f"{self.root}/{name}" if self.root else name, name=name)

    def localize(self, name: str) -> str:
        """Make a file available on this machine.

        Args:
            name: Path within the folder.

        Returns:
            Path on this machine.
        """
        return self.get_blob(name).path


class RemoteStorage(LocalStorage):
    """A folder at a URL. Tars are downloaded to the cache, since their members are read at random."""

    def __init__(self, url: str) -> None:
        """Open a URL.

        Args:
            url: Any URL that fsspec opens.
        """
        super().__init__(url.rstrip("/"))
        with translate_errors(f"cannot open {url}"):
            self._file_system, self._path = fsspec.core.url_to_fs(url)

    def iterate_files(self) -> Iterator[tuple[str, str]]:
        """Iterate over all files below the URL, in order.

        Yields:
            (path within the folder with `/`, stamp).
        """
        base = self._path.rstrip("/") + "/"
        with translate_errors(f"cannot list {self.root}"):
            found: dict[str, Any] = self._file_system.find(self._path, detail=True)
            if not found:
                self._file_system.ls(self._path)  # `find` reports an unreachable folder as an empty one
        for path in sorted(found):
            name = path.removeprefix(base)
            if path.startswith(base) and name:
                # The listing of a web server gives names only.
                yield name, _make_remote_stamp(found[path]) or self.get_blob(name).compute_stamp()

    def localize(self, name: str) -> str:
        """Download a file to the cache.

        Args:
            name: Path within the folder.

        Returns:
            Path on this machine.
        """
        blob = self.get_blob(name)
        # One copy per stamp, so that a tar which has changed is downloaded again.
        version = hashlib.sha256(blob.compute_stamp().encode()).hexdigest()[:16]
        with translate_errors(f"cannot download {blob.path}"):
            cache = str(get_cache_dir() / "downloads" / version)
            return str(fsspec.open_local(f"simplecache::{blob.path}", simplecache={"cache_storage": cache}))


def open_storage(source: str) -> tuple[LocalStorage, str | None]:
    """Open a folder or a file as storage.

    Args:
        source: Path or URL.

    Returns:
        The folder and None; for a file, its folder and its name.

    Raises:
        DataError: When there is neither a folder nor a file.
    """
    if is_url(source):
        head, _, name = source.rstrip("/").rpartition("/")
        is_file = "." in name and not head.endswith("/") and _is_remote_file(source)
        return (RemoteStorage(head), name) if is_file else (RemoteStorage(source), None)
    path = Path(source)
    if path.is_dir():
        return LocalStorage(str(path)), None
    if path.is_file():
        return LocalStorage(str(path.absolute().parent)), path.name
    raise DataError(f"{source} does not exist. Give a folder of audio, a manifest, a .tar, or a URL of one.")


def _is_remote_file(url: str) -> bool:
    with translate_errors(f"cannot open {url}"):
        file_system, path = fsspec.core.url_to_fs(url)
        return bool(file_system.info(path).get("type") == "file")


def _make_local_stamp(state: os.stat_result) -> str:
    return f"{state.st_size}:{state.st_mtime_ns}"


def _make_remote_stamp(info: Any) -> str:
    known = (
        *("size", "ETag", "etag", "Content-MD5", "Digest", "md5Hash", "LastModified", "Last-Modified"),
        *("last_modified", "mtime", "created"),
    )
    return ":".join(str(info[name]) for name in known if info.get(name) is not None)


@contextlib.contextmanager
def translate_errors(what: str) -> Iterator[None]:
    """Turn whatever a file system raises into a `DataError`.

    Every file system behind fsspec (HTTP, S3, …) has exceptions of its own, few of them `OSError`.

    Args:
        what: Start of the message, such as "cannot open URL".

    Yields:
        Nothing.

    Raises:
        DataError: When the block raises anything.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{what} ({_describe_error(error)})") from error


def _describe_error(error: Exception) -> str:
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    if status and message:
        return f"the server returned {status} {message}"
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


_TAR_ERRORS = (ValueError, KeyError, IndexError, OverflowError, MemoryError, RecursionError, EOFError)
"""What damaged headers make tarfile raise besides its own errors."""

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


def list_tar_members(path: str) -> tuple[dict[str, dict[str, Blob]], list[str]]:
    """List the members of a plain tar, grouped by name.

    Args:
        path: Path of the tar on this machine.

    Returns:
        Members by name without suffix, then by suffix (`.wav`, `.txt`); and what is wrong with the tar.
    """
    groups: dict[str, dict[str, Blob]] = {}
    problems: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _iterate_members(tar):
                if not member.isfile() or is_hidden(member.name):
                    continue
                name = Path(member.name.removeprefix("./"))
                group = groups.setdefault(str(name.with_suffix("")), {})
                if name.suffix.lower() in group:
                    problems.append(f"contains {member.name} more than once; the last is used")
                group[name.suffix.lower()] = Blob(path, member.offset_data, member.size)
            problems += _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, *_TAR_ERRORS) as error:
        remedy = " Compressed tars have no random access: unpack it, or make a plain .tar."
        reason = str(error) or type(error).__name__
        problems.append(f"is not a readable tar ({reason}).{remedy if _is_compressed(path) else ''}")
    return groups, problems


def is_hidden(name: str) -> bool:
    """Tell whether a file is hidden, or one that macOS packs beside real ones.

    Args:
        name: Path within a source.

    Returns:
        Whether to skip it.
    """
    path = f"/{name.removeprefix('./')}"
    return "/." in path or "/__MACOSX" in path


def _iterate_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # keeps memory flat on tars with millions of members
        yield member


def _check_end(path: str, offset: int) -> list[str]:
    """tarfile takes a damaged header for the end; the true end is a block of zeros."""
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if offset > size:
        return [f"is truncated: {offset - size} bytes of its last member are missing"]
    if block.strip(b"\0"):
        return [f"is damaged at byte {offset} of {size}: the rest is not read. Make it again, or unpack it"]
    return []


def _is_compressed(path: str) -> bool:
    with Path(path).open("rb") as file:
        return file.read(6).startswith(_COMPRESSED)
