"""The live table of arms while jobs run; plain lines where the output is not a terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.text import Text

from conf.records import CurvePoint, LedgerLine, Measured, Progress, SampleRecord, TrainRecord
from evaluation.report.panel import ArmState, live_table
from evaluation.statistics import wilson
from launch.planned import STEPPING_KINDS, Job, Plan
from launch.scheduler import JobState

# Without a terminal, a line this often, so that a log shows life; one that says the same, less so.
LINE_SECONDS, SAME_LINE_SECONDS = 5.0, 30.0
SHARED = "(shared)"


@dataclass(slots=True)
class _Arm:
    """What is known of an arm so far."""

    tokens: int = 0
    device_seconds: float = 0.0
    score_sum: float = 0.0
    num_scores: int = 0
    progress: Progress | None = None
    note: str = ""


class Live:
    """One row per arm: what it is doing, how far, how well so far, and what it has spent."""

    def __init__(
        self, console: Console, plan: Plan, *, usd_per_device_second: float | None
    ) -> None:
        self._console = console
        self._plan = plan
        self._price = usd_per_device_second
        self._states: dict[str, JobState] = {}
        self._arms = {row_of(j): _Arm() for j in plan.jobs}
        self._note = ""
        self._last_line, self._last_told = 0.0, ""
        self._begun = time.monotonic()
        self._rich: RichLive | None = None

    def __enter__(self) -> Live:
        """Take over the screen where there is one."""
        if self._console.is_terminal:
            self._rich = RichLive(
                get_renderable=self._render, console=self._console, refresh_per_second=4
            )
            self._rich.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last table standing."""
        if self._rich is not None:
            self._rich.__exit__(kind, error, trace)

    def note(self, text: str) -> None:
        """Say what happens between jobs."""
        self._note = text
        self._say(text)

    def start(self, state: JobState) -> None:
        """A job started."""
        self._note = ""
        self._states[state.job.id] = state
        arm = self._arms[row_of(state.job)]
        arm.progress, arm.note = None, ""
        self._say(f"> {state.job.id}")

    def event(self, state: JobState, event: Any) -> None:
        """Take progress and numbers out of a job's events."""
        arm = self._arms[row_of(state.job)]
        if isinstance(event, Progress):
            arm.progress = event
        elif isinstance(event, TrainRecord):
            arm.tokens += event.tokens
            arm.device_seconds += event.device_seconds
            rate = event.tokens / max(event.step_seconds, 1e-9)
            arm.note = f"loss {event.loss:.3f}, {rate:.0f} tokens/s"
        elif isinstance(event, CurvePoint) and event.value.value is not None:
            arm.note = f"{event.metric} {event.value.value:.3f} at step {event.step}"
        elif isinstance(event, SampleRecord) and event.score is not None and event.set == "test":
            arm.score_sum += event.score
            arm.num_scores += 1
            arm.note = f"score {arm.score_sum / arm.num_scores:.3f}, n {arm.num_scores}"
        elif isinstance(event, LedgerLine) and state.job.kind not in STEPPING_KINDS:
            arm.tokens += event.tokens
            arm.device_seconds += event.device_seconds

    def end(self, state: JobState) -> None:
        """A job is over."""
        self._states[state.job.id] = state
        arm = self._arms[row_of(state.job)]
        if state.status in ("done", "reused"):
            self._say(f"+ {state.job.id:<28} {state.seconds:6.1f} s  {arm.note}")
        else:
            sign = "x" if state.status == "failed" else "-"
            self._say(f"{sign} {state.job.id:<28} {state.seconds:6.1f} s  {state.reason}")
            arm.note = state.reason
        arm.progress = None

    def tick(self, states: dict[str, JobState]) -> None:
        """Called often; without a terminal it prints a line now and then."""
        self._states = states
        silent_seconds = time.monotonic() - self._last_line
        if self._rich is not None or silent_seconds < LINE_SECONDS:
            return
        running = [s for s in states.values() if s.status == "running"]
        told = "; ".join(f"{s.job.id} {self._far(s)}".rstrip() for s in running) or "waiting"
        if told != self._last_told or silent_seconds >= SAME_LINE_SECONDS:
            self._last_told = told
            self._say(f"  {time.monotonic() - self._begun:5.0f} s  {told}")

    def _say(self, text: str) -> None:
        if self._rich is None:
            self._last_line = time.monotonic()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _far(self, state: JobState) -> str:
        arm = self._arms[row_of(state.job)]
        parts = [arm.note]
        if arm.progress is not None:
            far = f"{arm.progress.done}/{arm.progress.total} {arm.progress.unit}"
            parts = [far, arm.progress.note if arm.progress.note not in arm.note else "", arm.note]
        return ", ".join(p for p in parts if p)

    def _render(self) -> Group:
        names = [n for n in self._arms if n != SHARED or self._status(n)[0] == "running"]
        table = live_table([self._row(name) for name in names])
        spent = f"{time.monotonic() - self._begun:.0f} s"
        return Group(table, Text(f"{spent}  {self._note}".rstrip(), style="dim"))

    def _row(self, name: str) -> ArmState:
        arm = self._arms[name]
        status, state = self._status(name)
        progress = arm.progress
        if state is not None and progress is not None and not progress.note:
            kind = state.job.kind
            progress = Progress(
                done=progress.done, total=progress.total, unit=f"{kind} {progress.unit}"
            )
        return ArmState(
            arm=name,
            state=status,
            progress=progress,
            metric=_metric(arm),
            tokens=arm.tokens or None,
            seconds=self._seconds(name) or None,
            usd=None if self._price is None else (arm.device_seconds * self._price or None),
            note=arm.note or (state.job.kind if state is not None else ""),
        )

    def _status(self, name: str) -> tuple[str, JobState | None]:
        """An arm's state from its jobs': the running one, else a failed one, else what is left."""
        states = [
            self._states[j.id]
            for j in self._plan.jobs
            if row_of(j) == name and j.id in self._states
        ]
        for status in ("running", "failed", "skipped", "stopped", "waiting"):
            found = next((s for s in states if s.status == status), None)
            if found is not None:
                return ("failed" if status == "skipped" else status), found
        if states and all(s.status == "reused" for s in states):
            return "reused", None
        return ("done", None) if states else ("waiting", None)

    def _seconds(self, name: str) -> float:
        total = 0.0
        for job in self._plan.jobs:
            state = self._states.get(job.id)
            if state is None or row_of(job) != name or state.started is None:
                continue
            is_running = state.status == "running"
            total += time.monotonic() - state.started if is_running else state.seconds
        return total


def row_of(job: Job) -> str:
    """The row of a job: its arm's, which the runs of a label curve share."""
    return (job.arm or SHARED).partition("@")[0]


def _metric(arm: _Arm) -> Measured | None:
    return wilson(arm.score_sum, arm.num_scores) if arm.num_scores else None
