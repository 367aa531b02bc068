"""One thing after another, in a thread of its own: what the page asked for goes on when the page is closed or reloaded.

A job is waiting, running, done, failed or cancelled. A cancelled one is over at once for the page; its thread leaves at
the next step, and what it made by then is dropped.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from sa3train.core.errors import SA3Error
from sa3train.core.log import get_logger
from sa3train.studio.server.widgets import message_of
from sa3train.studio.server.workspace import StudioError

logger = get_logger(__name__)

State = Literal["waiting", "running", "done", "failed", "cancelled"]
MOST_WAITING = 20
KEPT = 50


class Cancelled(Exception):
    """Raised inside a job that is no longer wanted."""


@dataclass(eq=False)
class Job:
    """Something to do, how far it is, and what became of it: `result` when done, `message` when failed."""

    title: str
    run: Callable[["Job"], Any]
    number: int = field(default_factory=itertools.count(1).__next__)
    state: State = "waiting"
    message: str = ""
    share: float = 0.0
    started: float | None = None
    result: Any = None
    over: threading.Event = field(default_factory=threading.Event)

    def tell(self, message: str, share: float) -> None:
        """Report progress, `share` from 0 to 1. Raises `Cancelled` when the job is no longer wanted."""
        if self.state == "cancelled":
            raise Cancelled
        self.message, self.share = message, share

    @property
    def pending(self) -> bool:
        """Whether it is waiting or running."""
        return self.state in ("waiting", "running")


class Worker:
    """Runs jobs one by one, in order."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._queue: queue.Queue[Job] = queue.Queue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, title: str, run: Callable[[Job], Any]) -> Job:
        """Queue a job. Raises `StudioError` when too many wait already."""
        with self._lock:
            if sum(job.pending for job in self._jobs) >= MOST_WAITING:
                raise StudioError(f"{MOST_WAITING} generations are waiting already: let some finish, or cancel them.")
            job = Job(title, run)
            self._jobs = [*(old for old in self._jobs[-KEPT:]), job]
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="studio-worker", daemon=True)
                self._thread.start()
        self._queue.put(job)
        return job

    @property
    def jobs(self) -> list[Job]:
        """The latest jobs, oldest first."""
        return list(self._jobs)

    @property
    def pending(self) -> list[Job]:
        """Those that wait or run."""
        return [job for job in self._jobs if job.pending]

    def ahead(self, job: Job) -> int:
        """How many jobs come before it."""
        return sum(other.pending and other.number < job.number for other in self._jobs)

    def cancel(self, number: int) -> Job:
        """End the job `number`, whether it runs or waits. Raises `StudioError` when there is none."""
        job = next((job for job in self._jobs if job.number == number), None)
        if job is None:
            raise StudioError(f"there is no job {number} any more.")
        self._close(job, "cancelled", "cancelled")
        return job

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            with self._lock:
                if job.state != "waiting":
                    continue
                job.state, job.started = "running", time.monotonic()
            try:
                job.result = job.run(job)
                self._close(job, "done", "")
            except Cancelled:
                self._close(job, "cancelled", "cancelled")
            except SA3Error as error:
                self._close(job, "failed", message_of(error))
            except Exception as error:
                logger.exception("a job of the studio failed")
                self._close(job, "failed", message_of(error))

    def _close(self, job: Job, state: State, message: str) -> None:
        with self._lock:
            if job.pending:
                job.state, job.message = state, message
                job.over.set()
