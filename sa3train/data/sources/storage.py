"""Storage of source audio: folders on disk or at a URL, files in them, and members of tars (damaged ones included)."""

import contextlib
import errno
import hashlib
import os
import re
import tarfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from sa3train.audio.decode import AUDIO_LIMIT
from sa3train.audio.io import AUDIO_SUFFIXES
from sa3train.core.errors import DataError
from sa3train.core.files import get_cache_dir
from sa3train.core.user_files import check_content, read_file, scan_folder, stat_file
from sa3train.data.sources.own_folders import INDEX_LIMIT, find_own_folders, identify_own_folder, is_hidden


def is_url(path: str) -> bool:
    """Tell whether fsspec has to open a path.

    Args:
        path: Path or URL, such as `memory://…`, `s3://…` or `simplecache::https://…`.

    Returns:
        False for a path on this machine.
    """
    return re.search(r"[A-Za-z0-9+.-]{2,}://|::", path) is not None  # `C://` is a drive


def strip_file_scheme(path: str) -> str:
    """Turn a `file://` URL into the path it names.

    Args:
        path: Path or URL.

    Returns:
        A path on this machine; anything else as it is.
    """
    scheme, mark, rest = path.partition("://")
    if not mark or scheme.lower() not in ("file", "local"):
        return path
    path = unquote(rest.removeprefix("localhost")) if scheme.lower() == "file" else rest
    return re.sub(r"^/(?=[A-Za-z]:[/\\])", "", path)  # file:///C:/clips


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

    def read(self, limit: int = AUDIO_LIMIT) -> bytes:
        """Read the bytes.

        Args:
            limit: Most bytes to read.

        Returns:
            All of them.

        Raises:
            DataError: When they cannot be read in full, or are more than `limit`.
        """
        with translate_errors("cannot be read"):
            if is_url(self.path):
                file_system, path = fsspec.core.url_to_fs(self.path)
                content = read_remote_file(file_system, path, self.offset, self.size, limit)
            else:
                content = read_file(self.path, self.offset, self.size, limit)
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
                return _make_local_stamp(stat_file(self.path))
        except DataError:
            return ""


@dataclass
class Files:
    """What a storage contains. Paths are within the storage, with `/`.

    Attributes:
        stamps: Stamp by path of every file, in order of path.
        special: Reason by path of what cannot be opened as a file.
        unlisted: Reason by path of the folders that cannot be listed, or are listed already.
        own: What it is by path of the folders that sa3train made; only "", the storage itself, is listed nevertheless,
            for a file in it that is named.
    """

    stamps: dict[str, str] = field(default_factory=dict)
    special: dict[str, str] = field(default_factory=dict)
    unlisted: dict[str, str] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)


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

    def list_files(self) -> Files:
        """List all files below the folder but hidden ones, opening none.

        Folders that are linked from elsewhere are listed once, by their own path if that is below this folder too: so
        links in a circle end, and links that fan out do not multiply. A link to a folder around this one, such as `/`,
        is not followed: it is hardly meant as data, and leads anywhere.

        Returns:
            The files.

        Raises:
            DataError: The folder itself cannot be listed.
        """
        files, seen = Files(), dict[str, str]()
        folders = deque([""])
        while folders:
            prefix = folders.popleft()
            try:
                real_path, entries = scan_folder(f"{self.root}/{prefix}" if prefix else self.root or ".")
            except OSError as error:
                if not prefix:
                    raise DataError(f"cannot list the folder {self.root} ({_describe_error(error)}).") from error
                files.unlisted[prefix.rstrip("/")] = f"folder cannot be listed: {_describe_error(error)}"
                continue
            if real_path in seen:
                reason = f"it is a link to {seen[real_path]}, which is listed already"
                files.unlisted[prefix.rstrip("/")] = reason
                continue
            if f"{real_path}/".startswith(_SYSTEM_FOLDERS):
                files.unlisted[prefix.rstrip("/")] = f"it is a folder of the system ({real_path})"
                continue
            if next(iter(seen), "").startswith(f"{real_path.rstrip('/')}/"):  # the first is this folder itself
                files.unlisted[prefix.rstrip("/")] = f"it is a link to {real_path}, which this folder is in"
                continue
            seen[real_path] = prefix or "the whole folder"
            folder = prefix.rstrip("/")
            if own := identify_own_folder(folder, [entry.name for entry in entries], self._read_mark):
                files.own[folder] = own
                if folder:
                    continue
            for entry in entries:
                if not is_hidden(entry.name):
                    _add_entry(f"{prefix}{entry.name}", entry, files, folders)
        files.stamps = dict(sorted(files.stamps.items()))
        return files

    def _read_mark(self, name: str) -> bytes:
        return self.get_blob(name).read(INDEX_LIMIT)

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

    def list_files(self) -> Files:
        """List all files below the URL but hidden ones.

        Returns:
            The files.
        """
        base, files = self._path.rstrip("/") + "/", Files()
        with translate_errors(f"cannot list {self.root}"):
            found: dict[str, Any] = self._file_system.find(self._path, detail=True)
            if not found:
                self._file_system.ls(self._path)  # `find` reports an unreachable folder as an empty one
        names = {path.removeprefix(base): path for path in sorted(found) if path.startswith(base) and path != base}
        files.own = find_own_folders(names, self._read_mark)
        own = tuple(f"{folder}/" for folder in files.own if folder)
        for name, path in names.items():
            if not (is_hidden(name) or name.startswith(own)):
                # The listing of a web server gives names only.
                files.stamps[name] = _make_remote_stamp(found[path]) or self.get_blob(name).compute_stamp()
        return files

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


class TarStorage(LocalStorage):
    """The members of a plain tar.

    Attributes:
        problems: What is wrong with the tar.
    """

    def __init__(self, path: str, stamp: str) -> None:
        """Read the headers of a tar.

        Args:
            path: Path on this machine.
            stamp: Stamp of the tar.
        """
        super().__init__(path)
        self.problems: list[str] = []
        self._members: dict[str, Blob] = {}
        self._stamp = stamp
        try:
            self._read_members(path)
        except (tarfile.TarError, OSError, *_TAR_ERRORS) as error:
            hint = " Compressed tars have no random access: unpack it, or make a plain .tar."
            reason = str(error) or type(error).__name__
            self.problems.append(f"is not a readable tar ({reason}).{hint if _is_compressed(path) else ''}")

    def _read_members(self, path: str) -> None:
        check_content(path)
        with tarfile.open(path, "r:") as tar:
            for member in _iterate_members(tar):
                name = member.name.removeprefix("./")
                if member.isdir() or is_hidden(name):
                    continue
                if not member.isreg() or member.issparse():
                    kind = "sparse" if member.issparse() else "a link, pipe or device"
                    self.problems.append(f"contains {name} as {kind}: it is not read. Store it as a plain file")
                    continue
                if name in self._members:
                    self.problems.append(f"contains {name} more than once; the last is used")
                self._members[name] = Blob(path, member.offset_data, member.size, name)
            self.problems += _check_end(path, tar.offset)

    def list_files(self) -> Files:
        """List the members.

        Returns:
            The files.
        """
        return Files({name: f"{self._stamp}|{blob.offset}" for name, blob in self._members.items()})

    def get_blob(self, name: str) -> Blob:
        """Get a member.

        Args:
            name: Its path.

        Returns:
            Its bytes within the tar.
        """
        return self._members[name]


def open_storage(source: str) -> tuple[LocalStorage, str | None]:
    """Open a folder or a file as storage.

    Args:
        source: Path or URL.

    Returns:
        The folder and None; for a file, its folder and its name.

    Raises:
        DataError: When there is neither a folder nor a file.
    """
    source = strip_file_scheme(source)
    if not source:
        raise DataError("the source is an empty path. Name a folder: . for the current one.")
    if is_url(source):
        head, _, name = source.rstrip("/").rpartition("/")
        is_file = "." in name and not head.endswith("/") and _is_remote_file(source)
        return (RemoteStorage(head), name) if is_file else (RemoteStorage(source), None)
    path = Path(source)
    if path.is_dir():
        return LocalStorage(str(path)), None
    if path.is_file():
        return LocalStorage(str(path.absolute().parent)), path.name
    reason = ""
    try:
        stat_file(path)
    except OSError as error:
        reason = f" ({_describe_error(error)})"
    raise DataError(f"cannot open {source}{reason}. Give a folder of audio, a caption list, a .tar, or a URL of one.")


def read_remote_file(file_system: Any, path: str, offset: int = 0, size: int = -1, limit: int = AUDIO_LIMIT) -> bytes:
    """Read a file behind fsspec, or part of it, as `read_file` does on this machine.

    Args:
        file_system: Its file system.
        path: Its path there.
        offset: First byte.
        size: Number of bytes; -1 for the whole file.
        limit: Most bytes to read.

    Returns:
        The bytes; fewer than `size` where the file ends.

    Raises:
        OSError: The file has more bytes than `limit`. File systems raise other exceptions too, see `translate_errors`.
    """
    length = file_system.info(path).get("size") if size < 0 else size
    content = bytearray()
    if length is None:  # a web server that does not say, maybe because there is no end
        with file_system.open(path, "rb") as file:
            while len(content) <= limit and (part := file.read(limit + 1 - len(content))):
                content += part
    elif length <= limit:
        content += file_system.cat_file(path, **({} if size < 0 else {"start": offset or None, "end": offset + size}))
    if max(length or 0, len(content)) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", path)
    return bytes(content)


def _add_entry(name: str, entry: os.DirEntry[str], files: Files, folders: deque[str]) -> None:
    """Add an entry of a folder to `files`, or to the `folders` to list: linked ones last."""
    try:
        if entry.is_dir(follow_symlinks=False):
            folders.appendleft(f"{name}/")
            if name.lower().endswith(AUDIO_SUFFIXES):
                files.special[name] = "it is a folder, not a file"
        elif entry.is_symlink() or not entry.is_file():
            files.stamps[name] = _make_local_stamp(stat_file(entry.path))
        else:
            files.stamps[name] = _make_local_stamp(entry.stat())
    except IsADirectoryError:
        folders.append(f"{name}/")
    except OSError as error:
        files.special[name] = _describe_error(error)


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
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):  # fsspec's name for any failure
        return _describe_error(error.__cause__)
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


_SYSTEM_FOLDERS = ("/proc/", "/sys/")
"""Their files are made up as they are read, without end; a link to the whole disk leads there."""

_TAR_ERRORS = (ValueError, KeyError, IndexError, OverflowError, MemoryError, RecursionError, EOFError)
"""What damaged headers make tarfile raise besides its own errors."""

_LONGEST_RECORD = 4 << 20
"""Most bytes of zeros at the end of a tar; `tar -b` makes up to a megabyte."""

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


def _iterate_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # keeps memory flat on tars with millions of members
        yield member


def _check_end(path: str, offset: int) -> list[str]:
    """tarfile takes a damaged header, and the end of the first of joined tars, for the end: only zeros follow the true
    one, up to a record's length.
    """
    size = Path(path).stat().st_size
    if offset > size:
        return [f"is truncated: {offset - size} bytes of its last member are missing"]
    rest = read_file(path, offset, min(size - offset, _LONGEST_RECORD))
    if rest.strip(b"\0") or size - offset > _LONGEST_RECORD:
        return [f"is damaged at byte {offset} of {size}, or several in one: the rest is not read. Unpack it"]
    return []


def _is_compressed(path: str) -> bool:
    with contextlib.suppress(OSError):
        return read_file(path, size=6).startswith(_COMPRESSED)
    return False
