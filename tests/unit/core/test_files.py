"""Files appear whole or not at all."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sa3train.core import files, safetensors_file
from sa3train.core.errors import SA3Error
from sa3train.core.files import (
    check_target,
    create_staging_dir,
    number_path,
    replace_file,
    write_files,
    write_json,
    write_new,
    write_text,
)


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


def test_a_header_that_would_reach_into_the_tensors_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = b'{"__metadata__":{"b":"","a":""},"c":1E22}'  # Python writes 1e+22
    content = len(header).to_bytes(8, "little") + header
    monkeypatch.setattr(safetensors_file, "save_file", lambda tensors, path, metadata: path.write_bytes(content))
    with pytest.raises(SA3Error, match=r"cannot write a\.safetensors: its header has 41 bytes, and 42 when"):
        safetensors_file.write_tensors(tmp_path / "a.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("")
    with pytest.raises(SA3Error, match="cannot write"):
        write_text(tmp_path / "occupied" / "a.txt", "")


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Path.mkdir

    def refuse(path: Path, *arguments: object, **options: object) -> None:  # as the system does, but not for root
        if path.suffix == ".part":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        make(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)
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


@pytest.mark.slow
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
            shutil.rmtree(removed[0])

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


@pytest.mark.parametrize("seconds", [5.0, 0.0])
def test_a_file_that_another_program_has_open_on_windows_is_tried_again_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    busy, replace, tried = PermissionError(errno.EACCES, "used by another process", "a.txt"), Path.replace, list[Path]()
    busy.winerror = 32  # type: ignore[attr-defined]

    def refuse_twice(path: Path, target: Path) -> None:
        tried.append(path)
        if len(tried) <= 2:
            raise busy
        replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse_twice)
    monkeypatch.setattr(files, "BUSY_SECONDS", seconds)
    if seconds:
        write_text(tmp_path / "a.txt", "new")
        assert (tmp_path / "a.txt").read_text() == "new" and len(tried) == 3
        return
    busy.filename = str(tmp_path / "a.txt")
    with pytest.raises(SA3Error, match=r"used by another process.*Close the program"):
        write_text(tmp_path / "a.txt", "new")
    assert not list(tmp_path.iterdir())


def test_files_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    def list_paths(number: int) -> list[Path]:
        return [number_path(tmp_path / name, number) for name in ("a.wav", "b.json")]

    def make(paths: Sequence[Path]) -> list[bytes]:
        return [path.name.encode() for path in paths]

    (tmp_path / "b-2.json").symlink_to("nowhere")
    written = [write_files(list_paths, make, overwrite) for overwrite in (False, False, True)]
    assert [[path.name for path in paths] for paths in written] == [
        ["a.wav", "b.json"],
        ["a-3.wav", "b-3.json"],
        ["a.wav", "b.json"],
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="no content"):
        write_files(lambda _: [tmp_path / "c.wav"], fail_without_content, overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def fail_without_content(_: Sequence[Path]) -> list[bytes]:
    raise RuntimeError("no content")


def test_a_number_that_another_process_takes_in_between_is_passed_over(tmp_path: Path) -> None:
    def take(paths: Sequence[Path]) -> list[bytes]:
        if paths[0].name == "a.wav":
            paths[0].write_bytes(b"theirs")
        return [b"ours"]

    assert write_files(lambda number: [number_path(tmp_path / "a.wav", number)], take, False) == [tmp_path / "a-2.wav"]
    assert ((tmp_path / "a.wav").read_bytes(), (tmp_path / "a-2.wav").read_bytes()) == (b"theirs", b"ours")


def test_a_file_in_the_place_of_the_folder_ends_the_search_for_a_number(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for folder in ("notes", "link"):
        with pytest.raises(SA3Error, match="cannot write"):
            write_new(tmp_path / folder / "a.wav", b"")


def test_targets_are_neither_inputs_nor_in_their_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "folder" / "in.bin"
    source.parent.mkdir()
    source.write_bytes(b"x")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "hard.bin").hardlink_to(source)
    (tmp_path / "other").write_bytes(b"y")
    (source.parent / "model.safetensors").write_bytes(b"z")
    (source.parent / "adapter.safetensors").write_bytes(b"z")
    names = ("folder/in.bin", "link/in.bin", "folder/../folder/in.bin", "hard.bin", "folder", "link", ".")
    pairs = [(name, str(source)) for name in (str(source), *names)]
    for target, read in (*pairs, ("folder/model.safetensors", "link")):
        with pytest.raises(SA3Error, match="would replace the input"):
            check_target(target, [read], overwrite=True)
    check_target("folder/adapter.safetensors", ["link"], overwrite=True)
    (source.parent / "run.json").write_bytes(b"{}")
    with pytest.raises(SA3Error, match="would replace the input"):
        check_target("folder/adapter.safetensors", ["link"], overwrite=True)
    for fine in ("other", "folder/out.bin", "new/out.bin", "in.bin", "x" * 300):
        check_target(fine, [source, ".", "nowhere", "x" * 300], overwrite=True)
    with pytest.raises(SA3Error, match=r"other exists already.*overwrite=True"):
        check_target("other", [source], overwrite=False)
