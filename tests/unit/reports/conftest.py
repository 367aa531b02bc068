"""A run folder to report on."""

from pathlib import Path

import pytest

from helpers.run_folder import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "style-1")
