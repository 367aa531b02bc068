"""Temporary files for long data: where they lie, and what is said when they cannot be written."""

import errno
import os
from pathlib import Path

import pytest

from sa3train.core import mapped
from sa3train.core.errors import SA3Error


def refuse(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("is_given", [True, False])
def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_given: bool) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(SA3Error, match=rf"in .*: No space left.*{'choose' if is_given else 'set TMPDIR to'} a folder"):
        mapped.map_tensor((2, 1000), tmp_path if is_given else None)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SA3Error, match=r"none: No such file"):
        mapped.map_tensor((2, 1000), tmp_path / "none")


@pytest.mark.parametrize("is_chosen", [True, False])
def test_large_files_are_not_put_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_chosen: bool) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mapped, "_LARGE_FILES", tmp_path / "disk")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "memory"))
    (tmp_path / "disk").mkdir()
    if is_chosen:
        monkeypatch.setenv("TMPDIR", str(tmp_path / "memory"))
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(SA3Error, match=rf"in .*{'memory' if is_chosen else 'disk'}: No space"):
        mapped.map_tensor((2, 1000))
