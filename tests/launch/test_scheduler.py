"""The scheduler against made-up jobs: order, capacity, exclusiveness, failures, retries, stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from launch.planned import Job, Plan
from launch.scheduler import JobState, Scheduler


class Log:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.events: list[tuple[str, Any]] = []
        self.ended: list[tuple[str, str]] = []
        self.retried: list[tuple[str, str]] = []
        self.threads: set[int] = set()

    def on_start(self, state: JobState) -> None:
        self.started.append(state.job.id)
        self.threads.add(threading.get_ident())

    def on_event(self, state: JobState, event: Any) -> None:
        self.events.append((state.job.id, event))
        self.threads.add(threading.get_ident())

    def on_retry(self, state: JobState) -> None:
        self.retried.append((state.job.id, state.reason))

    def on_end(self, state: JobState) -> None:
        self.ended.append((state.job.id, state.status))

    def on_tick(self, states: dict[str, JobState]) -> None:
        self.threads.add(threading.get_ident())


class Lost(Exception):
    pass


def job(name: str, *after: str, devices: int = 1, is_exclusive: bool = False) -> Job:
    return Job(
        id=name,
        kind="evaluate",
        arm=None,
        key=name,
        depends_on=after,
        devices=devices,
        is_exclusive=is_exclusive,
    )


def run(
    jobs: list[Job],
    work: Callable[[Job], Iterator[Any]],
    *,
    slots: int = 2,
    may_start: Callable[[Job], str | None] = lambda job: None,
    finished: frozenset[str] = frozenset(),
    **further: Callable[..., Any],
) -> tuple[dict[str, JobState], Log]:
    log = Log()
    scheduler = Scheduler(
        plan=Plan(jobs=tuple(jobs)),
        slots=slots,
        run_job=work,
        listener=log,
        may_start=may_start,
        is_retryable=lambda error: isinstance(error, Lost),
        is_finished=lambda job: job.id in finished,
        **further,
    )
    return scheduler.run(), log


def quick(job: Job) -> Iterator[str]:
    yield f"{job.id}-1"
    yield f"{job.id}-2"


def test_all_events_arrive_in_order_and_on_one_thread() -> None:
    states, log = run([job("a"), job("b", "a")], quick)
    assert [e for _, e in log.events] == ["a-1", "a-2", "b-1", "b-2"]
    assert {s.status for s in states.values()} == {"done"}
    assert len(log.threads) == 1


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_capacity_order_and_exclusiveness_hold_for_any_plan(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 7))
    slots = data.draw(st.integers(1, 4))
    jobs = []
    for i in range(count):
        after = data.draw(st.lists(st.integers(0, i - 1), unique=True)) if i else []
        jobs.append(
            job(
                str(i),
                *map(str, after),
                devices=data.draw(st.integers(0, 5)),
                is_exclusive=data.draw(st.booleans()),
            )
        )
    guard, running, done = threading.Lock(), set[str](), set[str]()
    wrong: list[str] = []

    def work(job: Job) -> Iterator[int]:
        with guard:
            others = [j for j in jobs if j.id in running]
            running.add(job.id)
            if not set(job.depends_on) <= done:
                wrong.append(f"{job.id} before what it depends on")
            if any(j.is_exclusive for j in others) or (job.is_exclusive and others):
                wrong.append(f"{job.id} beside an exclusive job")
            if sum(min(j.devices, slots) for j in [*others, job]) > slots:
                wrong.append(f"{job.id} over capacity")
        yield 1
        time.sleep(0.002)
        with guard:
            running.discard(job.id)
            done.add(job.id)

    states, _ = run(jobs, work, slots=slots)
    assert not wrong
    assert all(s.status == "done" for s in states.values())


def test_a_failure_skips_only_what_depends_on_it() -> None:
    def work(job: Job) -> Iterator[int]:
        if job.id == "a":
            raise ValueError("bad weights")
        yield 1

    states, log = run([job("a"), job("b", "a"), job("c", "b"), job("d")], work)
    assert {n: s.status for n, s in states.items()} == {
        "a": "failed",
        "b": "skipped",
        "c": "skipped",
        "d": "done",
    }
    assert states["c"].reason == "bad weights"
    assert ("c", "skipped") in log.ended


def test_lost_processes_are_retried_and_three_in_a_row_end_the_job() -> None:
    attempts: list[str] = []

    def work(job: Job) -> Iterator[int]:
        attempts.append(job.id)
        if job.id == "always" or attempts.count(job.id) == 1:
            raise Lost("node died")
        if job.id == "own":
            raise ValueError("bad")
        yield 1

    states, log = run([job("once"), job("always"), job("own")], work)
    assert states["once"].status == "done"
    assert states["always"].status == states["own"].status == "failed"
    assert states["always"].reason == "attempt 3, the last of 3 without progress: node died"
    assert states["own"].reason == "bad"
    assert [attempts.count(n) for n in ("once", "always", "own")] == [2, 3, 2]
    assert ("once", "attempt 1 lost: node died") in log.retried


def test_attempts_that_get_further_do_not_count() -> None:
    """It dies after steps 1-2, 2-4, 4-6, ... and ends at 12: five deaths, none without progress."""
    done = 0

    def work(job: Job) -> Iterator[int]:
        nonlocal done
        first = max(done, 1)
        for step in range(first, first + 3):
            yield step
            done = step
            if step == 12:
                return
        raise Lost("again")

    def reached(event: int) -> int:
        return event

    states, log = run([job("a")], work, reached=reached)
    assert states["a"].status == "done"
    assert len(log.retried) == 5
    done = 0
    states, log = run([job("a")], work)
    assert states["a"].status == "failed" and len(log.retried) == 2


def test_a_job_that_stops_as_asked_is_stopped_with_what_waits_for_it() -> None:
    def work(job: Job) -> Iterator[int]:
        yield 1
        raise Lost("saved at step 3")

    states, log = run(
        [job("a", devices=2), job("b", "a"), job("c", devices=2)],
        work,
        why_stopped=lambda error: f"budget; {error}",
    )
    assert [s.status for s in states.values()] == ["stopped", "stopped", "stopped"]
    assert states["a"].reason == "budget; saved at step 3"
    assert log.started == ["a"] and not log.retried


def test_a_spent_budget_stops_what_has_not_started() -> None:
    spent: list[str] = []

    def work(job: Job) -> Iterator[int]:
        spent.append(job.id)
        yield 1

    states, _ = run(
        [job("a", devices=2), job("b", "a"), job("c", "b")],
        work,
        may_start=lambda job: "budget.max_usd" if spent else None,
    )
    assert [s.status for s in states.values()] == ["done", "stopped", "stopped"]
    assert states["c"].reason == "budget.max_usd"


def test_finished_jobs_are_not_run_and_count_as_met() -> None:
    states, log = run([job("a"), job("b", "a")], quick, finished=frozenset({"a"}))
    assert log.started == ["b"]
    assert states["a"].status == "reused"


def test_a_second_job_of_the_same_key_reuses_the_first() -> None:
    done: set[str] = set()

    def work(job: Job) -> Iterator[int]:
        yield 1
        done.add(job.key)

    log = Log()
    jobs = [job("a"), Job(id="b", kind="evaluate", arm=None, key="a", depends_on=("a",), devices=1)]
    states = Scheduler(
        plan=Plan(jobs=tuple(jobs)),
        slots=2,
        run_job=work,
        listener=log,
        may_start=lambda job: None,
        is_retryable=lambda error: False,
        is_finished=lambda job: job.key in done,
    ).run()
    assert [s.status for s in states.values()] == ["done", "reused"]
    assert log.started == ["a"]


def test_devices_are_left_to_a_job_that_waits_for_a_light_one() -> None:
    jobs = [job("rows", devices=0), job("train", "rows", devices=2), job("test", devices=2)]
    _, log = run(jobs, quick)
    assert log.started == ["rows", "train", "test"]
