"""Files appear whole or not at all."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sa3train.core import files
from sa3train.core.errors import SA3Error
from sa3train.core.files import create_staging_dir, replace_file, write_json, write_text


def test_a_finished_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    write_text(target, "old")
    write_text(target, "new")
    assert target.read_text() == "new"
    assert [entry.name for entry in target.parent.iterdir()] == ["a.txt"]


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"step": 1})

    def stop_in_the_middle() -> None:
        with replace_file(target) as temporary:
            temporary.write_text("half")
            raise ValueError("stopped in the middle")

    with pytest.raises(ValueError, match="middle"):
        stop_in_the_middle()
    assert json.loads(target.read_text()) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_nan_is_not_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SA3Error, match=r"cannot write .*a\.bin.*No space left"), replace_file(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("")
    with pytest.raises(SA3Error, match="cannot write"):
        write_text(tmp_path / "occupied" / "a.txt", "")


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, dir: Path, **__: object) -> None:  # as the system does; for root it never would
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dir / ".a.bin.x7f3.part"))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(SA3Error, match=r"cannot write .*a\.bin: Permission denied.*choose a folder"):
        write_text(tmp_path / "a.bin", "")


def test_an_oserror_of_another_file_is_not_relabelled(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replace_file(tmp_path / "a.bin"):
        (tmp_path / "missing").read_bytes()
    assert not list(tmp_path.iterdir())


def killed_while_writing(target: Path) -> None:
    """Leave what a process leaves that SIGKILL meets between two lines of its writing."""
    child = os.fork()
    if child == 0:
        with replace_file(target) as temporary:
            temporary.write_text("half")
            (temporary.parent / ".tmpOfTheWriter").write_text("half")  # safetensors writes to a file of its own
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    for name in ("a.txt", "a.txt", "step-8.safetensors"):
        killed_while_writing(tmp_path / name)
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2, "each process removed what the one before had left"
    mine = next(entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".part"))
    others = [".a.txt.notes.part", mine.replace(files._HOST, "0" * len(files._HOST))]
    for name in others:
        (tmp_path / name).mkdir()
    write_text(target, "new")
    assert target.read_text() == "new"
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"a.txt", *others}, "what another host may be writing, and what only looks like it, stays"


def test_a_process_looks_for_leftovers_once_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Path] = []
    monkeypatch.setattr(files, "_remove_abandoned", looked.append)
    monkeypatch.chdir(tmp_path)
    for path in ("a", "b", tmp_path / "c", "deeper/d", "deeper/e"):
        write_text(path, "")
    assert looked == [tmp_path, tmp_path / "deeper"]


def test_a_full_disk_is_named_for_tensors_too(tmp_path: Path) -> None:
    """The system refuses what goes beyond 10 kB of a file."""
    script = (
        "import sys, torch; from sa3train.core.safetensors_file import write_tensors; "
        "write_tensors(sys.argv[1], {'a': torch.ones(9999)})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.safetensors")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert "SA3Error: cannot write" in done.stderr and "a.safetensors: File too large. Nothing was left" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_writer_at_work_keeps_what_it_has(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with replace_file(target) as slow:
        slow.unlink()  # a writer may put another file in its place
        slow.write_text("slow")
        files._SWEPT.clear()
        write_text(target, "quick")
        assert target.read_text() == "quick"
    assert target.read_text() == "slow"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_removed_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    lock, removed = fcntl.flock, []

    def late(handle: int, how: int) -> None:
        lock(handle, how)
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].rmdir()

    monkeypatch.setattr("fcntl.flock", late)
    with create_staging_dir(tmp_path / "a") as folder:
        assert folder.is_dir() and folder != removed[0]
    assert not list(tmp_path.iterdir())


def test_without_locks_nothing_is_taken_for_abandoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with replace_file(tmp_path / "a.txt") as slow:
        slow.write_text("slow")
        files._SWEPT.clear()
        write_text(tmp_path / "a.txt", "quick")
    assert (tmp_path / "a.txt").read_text() == "slow"
