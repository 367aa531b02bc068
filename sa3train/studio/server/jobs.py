"""A queue of jobs in a thread of its own, which continue when the page is closed or reloaded.

A cancelled job is over at once for the page: its thread leaves at the next progress report, and its result is dropped.
"""

import itertools
import queue
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from sa3train.core.errors import SA3Error
from sa3train.core.log import get_logger
from sa3train.studio.server.widgets import get_error_message
from sa3train.studio.server.workspace import StudioError

logger = get_logger(__name__)

State = Literal["waiting", "running", "done", "failed", "cancelled"]
MAX_WAITING = 20
MAX_JOBS = 50


class Cancelled(Exception):
    """Raised inside a job that was cancelled."""


@dataclass(eq=False)
class Job:
    """Something to do, its progress and its outcome.

    Args:
        title: What the page calls it.
        run: Function that does it and returns the result.
        number: ID of the job.
        state: Where it is: waiting, running, done, failed or cancelled.
        message: Progress while running, the error when failed.
        progress: Fraction done, from 0 to 1.
        result: What `run` returned.
        finished: Set when the job is over.
    """

    title: str
    run: Callable[["Job"], Any]
    number: int = field(default_factory=itertools.count(1).__next__)
    state: State = "waiting"
    message: str = ""
    progress: float = 0.0
    result: Any = None
    finished: threading.Event = field(default_factory=threading.Event)

    def report_progress(self, message: str, progress: float) -> None:
        """Report progress from inside the job.

        Args:
            message: What is being done.
            progress: Fraction done, from 0 to 1.

        Raises:
            Cancelled: The job was cancelled.
        """
        if self.state == "cancelled":
            raise Cancelled
        self.message, self.progress = message, progress

    @property
    def is_pending(self) -> bool:
        """Whether the job is waiting or running."""
        return self.state in ("waiting", "running")


class Worker:
    """Runs jobs one by one, in order."""

    def __init__(self) -> None:
        _workers.add(self)
        self._jobs: list[Job] = []
        self._queue: queue.Queue[Job] = queue.Queue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, title: str, run: Callable[[Job], Any]) -> Job:
        """Queue a job.

        Args:
            title: What the page calls it.
            run: Function that does it and returns the result.

        Returns:
            The job.

        Raises:
            StudioError: Too many jobs are waiting.
        """
        with self._lock:
            if len(self.pending) >= MAX_WAITING:
                raise StudioError(f"{MAX_WAITING} jobs are waiting already. Let some finish or cancel them.")
            job = Job(title, run)
            self._jobs = [*self._jobs[-MAX_JOBS:], job]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run_jobs, name="studio-worker", daemon=True)
                self._thread.start()
        self._queue.put(job)
        return job

    @property
    def jobs(self) -> list[Job]:
        """The latest jobs, oldest first."""
        return list(self._jobs)

    @property
    def pending(self) -> list[Job]:
        """Jobs that are waiting or running."""
        return [job for job in self._jobs if job.is_pending]

    def count_ahead(self, job: Job) -> int:
        """Count the jobs that come before a job.

        Args:
            job: The job.

        Returns:
            How many jobs are running or wait before it.
        """
        return sum(other.number < job.number for other in self.pending)

    def cancel(self, number: int) -> Job:
        """Cancel a waiting or running job, or dismiss one that has failed.

        Args:
            number: ID of the job.

        Returns:
            The job.

        Raises:
            StudioError: There is no such job.
        """
        job = next((job for job in self._jobs if job.number == number), None)
        if job is None:
            raise StudioError(f"There is no job {number} any more. Reload the page.")
        with self._lock:
            if not job.is_pending:
                self._jobs = [other for other in self._jobs if other is not job]
        self._close(job, "cancelled", "cancelled")
        return job

    def forget_failed(self) -> None:
        """Forget the jobs that have failed, as their messages would stand beside those of the next one."""
        with self._lock:
            self._jobs = [job for job in self._jobs if job.state != "failed"]

    def _run_jobs(self) -> None:
        while True:
            job = self._queue.get()
            with self._lock:
                if job.state != "waiting":
                    continue
                job.state = "running"
            try:
                job.result = job.run(job)
                self._close(job, "done", "")
            except Cancelled:
                self._close(job, "cancelled", "cancelled")
            except Exception as error:
                if not isinstance(error, SA3Error):
                    logger.exception("a job of the studio failed")
                self._close(job, "failed", get_error_message(error))

    def _close(self, job: Job, state: State, message: str) -> None:
        with self._lock:
            if job.is_pending:
                job.state, job.message = state, message
                job.finished.set()


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


def finish_jobs() -> list[Job]:
    """Cancel the jobs of all workers that wait, at the end of the studio.

    Returns:
        The running ones, whose results are saved when they are `finished`.
    """
    running = []
    for worker in _workers:
        for job in reversed(worker.pending):
            if job.state == "waiting":
                worker.cancel(job.number)
            else:
                running.append(job)
    return running
