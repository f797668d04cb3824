"""Start what is ready, within the devices there are; collect, retry, stop. No domain knowledge.

Each running job is a thread that drains the job's iterator into one queue; the main thread alone
handles events, so there is one writer of every file.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from launch.planned import Job, Plan

TICK_SECONDS = 0.25
# Events that wait to be written. A job that is faster than the one writer waits, or what it has
# told would pile up here: 1.5 kB a record.
MAX_WAITING_EVENTS = 256
MAX_ATTEMPTS = 3  # in a row, of which none got further than one before


@dataclass(kw_only=True, slots=True)
class JobState:
    """Where a job is.

    status: waiting | running | done | reused | failed | skipped | stopped | cancelled.

    farthest: the most that any attempt reached; fruitless: attempts since then.
    """

    job: Job
    status: str = "waiting"
    attempts: int = 0
    farthest: int = 0
    fruitless: int = 0
    started: float | None = None
    seconds: float = 0.0
    error: BaseException | None = None
    reason: str = ""

    @property
    def is_over(self) -> bool:
        """Whether the job will not run any more."""
        return self.status not in ("waiting", "running")


class Listener(Protocol):
    """Who is told what happens, always from the main thread."""

    def on_start(self, state: JobState) -> None:
        """A job was started (attempts counts from 1)."""

    def on_event(self, state: JobState, event: Any) -> None:
        """A running job yielded an event."""

    def on_retry(self, state: JobState) -> None:
        """An attempt was lost, and the job waits for the next; reason says how."""

    def on_end(self, state: JobState) -> None:
        """A job is over; status says how."""

    def on_tick(self, states: dict[str, JobState]) -> None:
        """Called a few times a second."""


@dataclass(kw_only=True, slots=True)
class Scheduler:
    """Runs a plan.

    Args:
        plan: jobs with dependencies.
        slots: device slots in all.
        slots_left: how many of them are there now; a cluster can lose nodes.
        run_job: yields the events of a job; raises where it fails. Called in a thread of its own.
        listener: told of everything.
        may_start: None, or why no further job may start (a budget that is spent).
        is_retryable: whether a failure came from the machines and another attempt may mend it.
        is_finished: whether a job's records are in the cache, asked before it would start.
        reached: how far an event shows its job to be, or None where attempts start from nothing.
        why_stopped: why a job was asked to stop, where its error says that it obeyed; else None.
        why_cancelled: why a job is not worth running, asked once all it comes after is over.
    """

    plan: Plan
    slots: int
    run_job: Callable[[Job], Iterator[Any]]
    listener: Listener
    may_start: Callable[[Job], str | None]
    is_retryable: Callable[[BaseException], bool]
    is_finished: Callable[[Job], bool]
    slots_left: Callable[[], int | None] = lambda: None
    reached: Callable[[Any], int | None] = lambda event: None
    why_stopped: Callable[[BaseException], str | None] = lambda error: None
    why_cancelled: Callable[[Job], str | None] = lambda job: None
    states: dict[str, JobState] = field(default_factory=dict)
    stop_reason: str | None = None
    _queue: queue.Queue[tuple[str, JobState, Any]] = field(
        default_factory=lambda: queue.Queue(MAX_WAITING_EVENTS)
    )
    _is_ended: bool = False

    def run(self) -> dict[str, JobState]:
        """Run until every job is over; returns the state of each."""
        for job in self.plan.jobs:
            self.states[job.id] = JobState(job=job)
        try:
            while not all(s.is_over for s in self.states.values()):
                self._skip_hopeless()
                self._start_ready()
                self._drain()
                self.listener.on_tick(self.states)
        finally:
            self._is_ended = True
        return self.states

    def _running(self) -> list[JobState]:
        return [s for s in self.states.values() if s.status == "running"]

    def _skip_hopeless(self) -> None:
        """End jobs whose dependencies cannot be met any more."""
        for state in self.states.values():
            if state.status != "waiting":
                continue
            for name in state.job.depends_on:
                needed = self.states[name]
                if needed.status in ("failed", "skipped", "stopped", "cancelled"):
                    is_passed_on = needed.status in ("stopped", "cancelled")
                    state.status = needed.status if is_passed_on else "skipped"
                    state.reason = needed.reason or f"{name} {needed.status}"
                    self.listener.on_end(state)
                    break

    def _start_ready(self) -> None:
        is_held = False
        for state in self.states.values():
            if state.status != "waiting" or (is_held and state.job.devices):
                continue
            if not all(self.states[name].is_over for name in state.job.after):
                continue
            if state.job.after and self._is_cancelled(state):
                continue
            if self.is_finished(state.job):
                state.status = "reused"
                self.listener.on_end(state)
                continue
            if not self._is_ready(state.job):
                # A job without devices, of a hosted model, needs none to be kept for it.
                is_held = is_held or (bool(state.job.devices) and self._is_imminent(state.job))
                continue
            reason = self.stop_reason or self.may_start(state.job)
            if reason:
                self.stop_reason = reason
                state.status, state.reason = "stopped", reason
                self.listener.on_end(state)
                continue
            self._start(state)

    def _is_cancelled(self, state: JobState) -> bool:
        """End a job that is not worth running, even where it is finished already."""
        reason = self.why_cancelled(state.job)
        if reason is not None:
            state.status, state.reason = "cancelled", reason
            self.listener.on_end(state)
        return reason is not None

    def _is_ready(self, job: Job) -> bool:
        running = self._running()
        if any(s.job.is_exclusive for s in running) or (job.is_exclusive and running):
            return False
        used = sum(s.job.devices for s in running)
        left = self.slots_left()
        slots = self.slots if left is None else max(1, min(left, self.slots))
        if used + min(job.devices, slots) > slots:
            return False
        return all(self.states[name].status in ("done", "reused") for name in job.depends_on)

    def _is_imminent(self, job: Job) -> bool:
        """Whether a job waits only for light jobs that run; later jobs leave it its devices."""
        waits_for = [self.states[n] for n in job.depends_on]
        missing = [s for s in waits_for if s.status not in ("done", "reused")]
        return bool(missing) and all(s.status == "running" and not s.job.devices for s in missing)

    def _start(self, state: JobState) -> None:
        state.status = "running"
        state.attempts += 1
        state.fruitless += 1
        state.started = time.monotonic()
        self.listener.on_start(state)
        threading.Thread(target=self._drive, args=(state,), name=state.job.id, daemon=True).start()

    def _drive(self, state: JobState) -> None:
        try:
            for event in self.run_job(state.job):
                self._put("event", state, event)
        except BaseException as error:  # noqa: BLE001 - reported to the main thread, which decides
            self._put("end", state, error)
        else:
            self._put("end", state, None)

    def _put(self, kind: str, state: JobState, value: Any) -> None:
        """Hand over to the main thread when it has room; what comes after its end is dropped."""
        while not self._is_ended:
            try:
                self._queue.put((kind, state, value), timeout=TICK_SECONDS)
            except queue.Full:
                continue
            return

    def _drain(self) -> None:
        """Handle events for one tick, or until a job ends.

        Not until the queue is empty: a job can tell more than is written, and budgets and Ctrl-C
        are looked at between ticks.
        """
        deadline = time.monotonic() + TICK_SECONDS
        while (wait := deadline - time.monotonic()) > 0:
            try:
                kind, state, value = self._queue.get(timeout=wait)
            except queue.Empty:
                return
            if kind == "event":
                self._note_progress(state, value)
                self.listener.on_event(state, value)
            else:
                self._end(state, value)
                return

    def _note_progress(self, state: JobState, event: Any) -> None:
        """An attempt that gets further than those before makes their number count anew."""
        reached = self.reached(event)
        if reached is not None and reached > state.farthest:
            state.farthest, state.fruitless = reached, 0

    def _end(self, state: JobState, error: BaseException | None) -> None:
        assert state.started is not None
        state.seconds = time.monotonic() - state.started
        if error is None:
            state.status = "done"
        elif (reason := self.why_stopped(error)) is not None:
            state.status, state.reason, self.stop_reason = "stopped", reason, reason
        elif self.is_retryable(error) and state.fruitless < MAX_ATTEMPTS:
            state.status = "waiting"
            state.reason = f"attempt {state.attempts} lost: {_words(error)}"
            self.listener.on_retry(state)
            return
        else:
            state.status, state.error = "failed", _cause(error)
            state.reason = _words(error)
            if self.is_retryable(error):
                tried = f"attempt {state.attempts}, the last of {MAX_ATTEMPTS} without progress"
                state.reason = f"{tried}: {state.reason}"
        self.listener.on_end(state)


def _words(error: BaseException) -> str:
    cause = _cause(error)
    return str(cause) or type(cause).__name__


def _cause(error: BaseException) -> BaseException:
    """The job's own error, where a remote process wrapped it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error
