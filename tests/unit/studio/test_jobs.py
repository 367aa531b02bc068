"""Jobs run one by one, can be cancelled at once, and say what became of them."""

import threading

import pytest

from sa3train.core.errors import GenerationError
from sa3train.studio.play.cards import render_status
from sa3train.studio.server.jobs import MAX_WAITING, Job, Worker, finish_jobs
from sa3train.studio.server.workspace import StudioError


class Gate:
    """A job that waits until it is let go, reporting steps meanwhile."""

    def __init__(self) -> None:
        self.running, self.go = threading.Event(), threading.Event()

    def __call__(self, job: Job) -> str:
        job.report_progress("step 1 of 2", 0.5)
        self.running.set()
        assert self.go.wait(10)
        job.report_progress("step 2 of 2", 1.0)
        return "made"


def test_a_job_is_done() -> None:
    job = Worker().submit("a", lambda job: 7)
    assert job.finished.wait(10)
    assert (job.state, job.result) == ("done", 7)


def test_a_second_one_waits_and_says_so() -> None:
    worker, gate = Worker(), Gate()
    first, second = worker.submit("first", gate), worker.submit("second", lambda job: "b")
    assert gate.running.wait(10)
    assert (first.state, second.state, worker.count_ahead(second)) == ("running", "waiting", 1)
    shown = render_status(worker.jobs)
    assert "step 1 of 2" in shown
    assert "next to start" in shown
    gate.go.set()
    assert second.finished.wait(10)
    assert [job.state for job in worker.jobs] == ["done", "done"]
    assert render_status(worker.jobs) == ""


def test_cancelling_is_immediate_and_drops_what_is_made() -> None:
    worker, gate = Worker(), Gate()
    first, second = worker.submit("first", gate), worker.submit("second", lambda job: "b")
    assert gate.running.wait(10)
    worker.cancel(first.number)
    assert first.state == "cancelled"
    gate.go.set()
    assert second.finished.wait(10)
    assert (first.state, first.result, second.result) == ("cancelled", None, "b")


def test_at_the_end_the_running_job_is_finished_and_the_others_are_cancelled() -> None:
    worker, gate = Worker(), Gate()
    first, second = worker.submit("first", gate), worker.submit("second", lambda job: "b")
    assert gate.running.wait(10)
    assert first in finish_jobs() and second.state == "cancelled"
    gate.go.set()
    assert first.finished.wait(10)
    assert first.result == "made" and first not in finish_jobs()


def test_a_waiting_job_can_be_cancelled() -> None:
    worker, gate = Worker(), Gate()
    worker.submit("first", gate)
    second = worker.submit("second", lambda job: "b")
    worker.cancel(second.number)
    gate.go.set()
    third = worker.submit("third", lambda job: "c")
    assert third.finished.wait(10)
    assert (second.state, second.result) == ("cancelled", None)


def test_failures_are_kept_with_their_message() -> None:
    def wrong(job: Job) -> None:
        raise GenerationError("cfg_scale <b>must</b> be a number")

    def broken(job: Job) -> None:
        raise KeyError("x")

    worker = Worker()
    job = worker.submit("a", wrong)
    assert job.finished.wait(10)
    assert job.state == "failed"
    assert "CFG scale &lt;b&gt;must" in render_status(worker.jobs)
    other = worker.submit("b", broken)
    assert other.finished.wait(10)
    assert other.message.startswith("KeyError")


def test_too_many_are_refused() -> None:
    worker, gate = Worker(), Gate()
    for _ in range(MAX_WAITING):
        worker.submit("a", gate)
    with pytest.raises(StudioError, match="waiting already"):
        worker.submit("b", gate)
    for job in worker.pending:
        worker.cancel(job.number)
    gate.go.set()


def test_cancelling_what_is_gone_is_told() -> None:
    with pytest.raises(StudioError, match="no job"):
        Worker().cancel(10**9)


def test_a_failed_job_can_be_dismissed() -> None:
    def refuse(job: Job) -> None:
        raise GenerationError("no such file")

    worker = Worker()
    job = worker.submit("a", refuse)
    assert job.finished.wait(10)
    assert "Dismiss" in render_status(worker.jobs)
    worker.cancel(job.number)
    assert render_status(worker.jobs) == ""


def test_what_failed_is_forgotten_when_something_else_is_asked_for() -> None:
    worker = Worker()
    failed = worker.submit("broken", lambda job: 1 / 0)
    assert failed.finished.wait(10) and "broken" in render_status(worker.jobs)
    worker.forget_failed()
    assert render_status(worker.jobs) == ""
