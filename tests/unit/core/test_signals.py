"""The first stop signal is an exception or a note, the second Ctrl-C the end."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from sa3train.core.signals import STOP_SIGNALS, Interrupted, handle_signals

PROGRAM = """
import os, signal, sys, time
from sa3train.core.signals import Interrupted, handle_signals
kill = lambda number: os.kill(os.getpid(), number)
"""


def run(body: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", PROGRAM + body], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_raised_once_and_handlers_are_given_back(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, handle_signals():
        os.kill(os.getpid(), number)
    assert caught.value.number == number and signal.getsignal(number) is before
    assert not isinstance(caught.value, Exception), "no library may swallow it"


def test_an_action_is_called_once_and_surrounding_handlers_remember_it() -> None:
    noted: list[int] = []
    with handle_signals():
        with handle_signals(noted.append):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun repeats it while the run is saved
    assert noted == [signal.SIGTERM]
    with pytest.raises(Interrupted), handle_signals():
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_ctrl_c_ends_at_once_also_after_the_loop() -> None:
    done = run("""
with handle_signals():
    with handle_signals(print):
        kill(signal.SIGINT)
    try:
        kill(signal.SIGINT)
    finally:
        print("never")
""")
    assert done.returncode == 130 and "never" not in done.stdout


@pytest.mark.parametrize("body", ["with handle_signals(): import greedy", "import sa3train.cli; kill(signal.SIGINT)"])
def test_ctrl_c_while_modules_are_imported_is_one_line_and_130(body: str, tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text("""
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    pass
""")
    done = run(f"sys.path.insert(0, {str(tmp_path)!r})\n{body}\nprint('never')")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by Ctrl-C\n")


def test_ignored_signals_stay_ignored_and_forks_leave_ctrl_c_to_their_parent() -> None:
    done = run("""
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
with handle_signals():
    kill(signal.SIGHUP)
    for number in (signal.SIGINT, signal.SIGTERM):
        child = os.fork()
        if not child:
            kill(number)
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["7", str(-signal.SIGTERM)]


def test_other_threads_are_left_alone() -> None:
    seen: list[Any] = []

    def work() -> None:
        with handle_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
