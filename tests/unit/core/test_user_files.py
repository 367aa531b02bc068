"""What is not a regular file is never opened, and a drive that does not answer holds nothing up."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sa3train.core import user_files
from sa3train.core.errors import SA3Error
from sa3train.core.files import check_target, write_bytes
from sa3train.core.user_files import check_folder, is_file, read_file, scan_folder, stat_file


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a long path would not fit


SPECIAL: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": bind_socket,
    "folder": os.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "pipe behind a link": lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe")),
    "loop": lambda path: path.symlink_to(path),
    "gone": lambda path: path.symlink_to("nowhere"),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_files_are_not_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.wav"
    SPECIAL[kind](path)
    for read in (stat_file, read_file):
        with pytest.raises(OSError, match=r"a\.wav"):
            read(path)
    _, entries = scan_folder(str(tmp_path))
    assert not any(is_file(entry) for entry in entries)


@pytest.mark.parametrize("kind", SPECIAL)
def test_pipes_sockets_and_devices_are_neither_opened_nor_replaced_by_us(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run" / "a.wav"
    path.parent.mkdir()
    SPECIAL[kind](path)
    if kind in ("folder", "loop", "gone", "nothing"):
        check_folder(tmp_path)
        check_target(path, [], overwrite=True)
        return
    for check in (lambda: check_folder(tmp_path), lambda: check_target(path, [], True), lambda: write_bytes(path, b"")):
        with pytest.raises(SA3Error, match=r"a\.wav.*it is a (named pipe|socket|device), not a file"):
            check()
    assert not path.is_file()


def test_regular_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("a")
    assert read_file(tmp_path / "link") == b"0123456789"
    assert read_file(tmp_path / "a", 2, 3) == b"234"
    assert read_file(tmp_path / "a", 8, 3) == b"89"
    assert read_file(str(tmp_path / "a"), limit=10) == b"0123456789"
    with pytest.raises(OSError, match="at most 9"):
        read_file(tmp_path / "a", limit=9)
    path, entries = scan_folder(str(tmp_path))
    assert (path, [entry.name for entry in entries]) == (str(tmp_path), ["a", "link"])
    assert all(map(is_file, entries))


def test_files_of_the_system_are_empty() -> None:
    assert read_file("/proc/self/status") == b""


def test_names_with_zero_bytes_are_refused() -> None:
    with pytest.raises(OSError, match="zero byte"):
        stat_file("a\0.wav")


def test_a_drive_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    dead, answer, scan = tmp_path / "dead", os.stat, os.scandir

    def wait(path: str) -> None:
        if str(path).startswith(str(dead)):
            released.wait()

    def block_stat(path: str) -> os.stat_result:
        wait(path)
        return answer(path)

    def block_scan(path: str) -> object:
        wait(path)
        return scan(path)

    dead.mkdir()
    monkeypatch.setattr(user_files, "DRIVE_TIMEOUT", 0.05)
    monkeypatch.setattr(os, "stat", block_stat)
    monkeypatch.setattr(os, "scandir", block_scan)
    try:
        for name in ("a.wav", "b.wav"):
            with pytest.raises(TimeoutError, match="does not answer"):
                stat_file(dead / name)
        with pytest.raises(TimeoutError, match="does not answer"):
            scan_folder(str(dead))
        monkeypatch.setattr(user_files, "DRIVE_TIMEOUT", 60)
        assert scan_folder(str(tmp_path))[0] == str(tmp_path)
    finally:
        released.set()
