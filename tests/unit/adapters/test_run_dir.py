"""Adapters are found in the folders that hold them."""

from pathlib import Path

import pytest

from sa3train.adapters.formats.run_dir import locate_adapter
from sa3train.core.errors import AdapterError
from sa3train.core.processes import PROCESS_FILE


def test_a_folder_with_one_adapter_file_stands_for_it(tmp_path: Path) -> None:
    file = tmp_path / "style.safetensors"
    for name in (file.name, "README.md"):
        (tmp_path / name).touch()
    assert locate_adapter(tmp_path) == file
    config = tmp_path / "adapter_config.json"
    config.touch()
    assert locate_adapter(tmp_path) == tmp_path, "a PEFT folder is read whole"
    config.unlink()
    (tmp_path / "other.safetensors").touch()
    assert locate_adapter(tmp_path) == tmp_path, "one of two is not guessed"


def test_a_run_that_made_nothing_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / PROCESS_FILE).touch()
    with pytest.raises(AdapterError, match="has no adapter: it has not begun, or ended before its first step"):
        locate_adapter(tmp_path)
