"""Stopping politely: Ctrl-C, SIGTERM and SIGHUP end a command by an exception, or after the step that is computed.

A second Ctrl-C ends the process at once. Signals that the process was started to ignore (nohup, `&` in a script) stay
ignored. Forked children leave Ctrl-C to the process that forked them. A loader's workers leave all of these signals to
it, which terminals, schedulers and service managers send to every process of a job: the step that is being computed
still needs them.
"""

import _thread
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)
"""What asks any command to stop."""
REQUEUE_SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))
"""What schedulers send before a time limit."""
STOP_FILE_VARIABLE = "SA3_STOP_FILE"
"""Environment variable that names the file of `watch_stop_file`."""


class Interrupted(BaseException):
    """A stop signal. Not a `KeyboardInterrupt`, which Lightning would turn into exit code 1.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {describe_signal(number)}{''.join(_advice[-1:])}")
        self.number = number


@contextlib.contextmanager
def explain_stop(advice: str) -> Iterator[None]:
    """Explain what a stop signal leaves undone, in the message of `Interrupted` while inside.

    Args:
        advice: The end of the message; inside of another, it counts alone.

    Yields:
        Nothing.
    """
    _advice.append(advice)
    try:
        yield
    finally:
        _advice.pop()


def raise_interrupted(number: int) -> NoReturn:
    """Raise `Interrupted`; the action of `handle_signals` outside of a training loop.

    While a module is imported the process ends at once instead: torch and NumPy swallow what is raised in their
    imports, or call it a broken installation.

    Args:
        number: The signal.

    Raises:
        Interrupted: Always.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{Interrupted(number)}\n".encode())
            os._exit(128 + number)
        frame = frame.f_back
    raise Interrupted(number)


@contextlib.contextmanager
def handle_signals(
    action: Callable[[int], None] = raise_interrupted, signals: tuple[int, ...] = STOP_SIGNALS
) -> Iterator[None]:
    """Call `action` on a stop signal while inside, and restore the handlers at the end.

    Does nothing outside of the main thread, where Python allows no handlers.

    Args:
        action: Function of the signal's number; it runs between two instructions of the main thread.
        signals: What to handle.

    Yields:
        Nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            _receive_in_child(number)
        elif number not in _received:
            _received.add(number)
            action(number)
        elif number == signal.SIGINT:
            os._exit(128 + number)

    before = {number: signal.getsignal(number) for number in signals}
    _depth.append(owner)
    try:
        for number in (number for number, handler in before.items() if handler != signal.SIG_IGN):
            signal.signal(number, receive)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        _depth.pop()
        if not _depth:
            _received.clear()


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Hold back all of these signals in processes that `multiprocessing` starts inside, for `follow_parent` in them.

    Yields:
        Nothing.
    """
    if not hasattr(signal, "sigtimedwait"):  # Linux has it
        yield
        return
    if multiprocessing.get_start_method(allow_none=True) not in ("fork", None):
        resource_tracker.ensure_running()  # its own start lets signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, *REQUEUE_SIGNALS))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
    """Follow the parent's end instead of stop signals, in a process that was started inside `hold_signals`.

    The process ends when its parent has ended, or tells it to, as `multiprocessing` does by a SIGTERM of the parent's.
    """
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, *REQUEUE_SIGNALS))  # a fork server knows nothing of it
        threading.Thread(target=_wait_for_parent, daemon=True).start()
    else:
        for number in set(STOP_SIGNALS) - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)


def _wait_for_parent() -> None:
    parent, starter = multiprocessing.parent_process(), os.getppid()  # two processes with a fork server
    assert parent is not None
    while parent.is_alive() and os.getppid() == starter:
        received = signal.sigtimedwait((signal.SIGTERM,), _PARENT_SECONDS)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


def watch_stop_file() -> None:
    """Stop this process as by SIGTERM once the file that `SA3_STOP_FILE` names exists; nothing without the variable.

    Whoever started the process asks it to stop that way where no process can send another a signal (Windows).
    """
    if path := os.environ.get(STOP_FILE_VARIABLE):
        threading.Thread(target=_wait_for_file, args=(path,), daemon=True).start()


def _wait_for_file(path: str) -> None:
    while not os.path.exists(path):  # noqa: PTH110
        time.sleep(_STOP_FILE_SECONDS)
    _thread.interrupt_main(signal.SIGTERM)


def describe_signal(number: int) -> str:
    """Describe a signal for users.

    Args:
        number: The signal.

    Returns:
        Ctrl-C, or the signal's name.
    """
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def write_note(text: str) -> None:
    """Write a line to stderr from a signal handler, which may have interrupted another write to it.

    Args:
        text: The line.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


_PARENT_SECONDS = 1.0
"""How often `follow_parent` looks whether the parent is still there."""
_STOP_FILE_SECONDS = 0.2
"""How often `watch_stop_file` looks for its file."""
_received: set[int] = set()
"""Signals that arrived since the outermost `handle_signals`."""
_advice: list[str] = []
"""One entry for each `explain_stop` that is open."""
_depth: list[int] = []
"""One entry for each `handle_signals` that is open."""


def _receive_in_child(number: int) -> None:
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
