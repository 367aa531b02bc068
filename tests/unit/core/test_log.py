"""Progress bars."""

import threading

from tqdm import tqdm

from sa3train.core.log import track_progress


def test_bars_share_no_lock_with_forked_processes() -> None:
    """A fork that is killed while it holds a shared lock would block every later bar."""
    assert list(track_progress([1, 2], "test")) == [1, 2]
    assert isinstance(tqdm.get_lock(), type(threading.RLock()))
