"""Progress bars, and progress as data."""

import json
import threading

import pytest
from tqdm import tqdm

from sa3train.core.log import report_stage, track_progress, write_json_progress


def test_bars_share_no_lock_with_forked_processes() -> None:
    """A fork that is killed while it holds a shared lock would block every later bar."""
    assert list(track_progress([1, 2], "test")) == [1, 2]
    assert isinstance(tqdm.get_lock(), type(threading.RLock()))


def test_a_stage_is_data_and_shows_no_bars_inside(capfd: pytest.CaptureFixture[str]) -> None:
    with report_stage("silent"):
        pass
    with write_json_progress(), report_stage("validating"):
        assert list(track_progress([1, 2], "clips")) == [1, 2]
    assert [json.loads(line)["stage"] for line in capfd.readouterr().out.splitlines()] == ["validating", ""]
