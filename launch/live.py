"""The live table while jobs run; plain lines where the output is not a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from conf.records import CurvePoint, Progress, SampleRecord, TrainRecord
from launch.plan import Plan
from launch.scheduler import JobState

# Without a terminal, a line at least this often, so that a log shows life.
LINE_SECONDS = 5.0
SIGNS = {
    "waiting": " ",
    "running": ">",
    "done": "+",
    "reused": "=",
    "failed": "x",
    "skipped": "-",
    "stopped": "-",
}


class Live:
    """Shows every job: status, how far, a number that says how well, and seconds."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self._console = console
        self._plan = plan
        self._states: dict[str, JobState] = {}
        self._progress: dict[str, Progress] = {}
        self._numbers: dict[str, str] = {}
        self._correct: dict[str, list[float]] = {}
        self._note = ""
        self._last_line = 0.0
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
        self._say(f"> {state.job.id}")

    def event(self, state: JobState, event: Any) -> None:
        """Take progress and numbers out of a job's events."""
        name = state.job.id
        if isinstance(event, Progress):
            self._progress[name] = event
        elif isinstance(event, TrainRecord):
            rate = event.tokens / max(event.step_seconds, 1e-9)
            self._numbers[name] = f"loss {event.loss:.3f}, {rate:.0f} tokens/s"
        elif isinstance(event, CurvePoint) and event.value.value is not None:
            self._numbers[name] = f"{event.metric} {event.value.value:.3f} at step {event.step}"
        elif isinstance(event, SampleRecord) and event.score is not None and event.set == "test":
            scores = self._correct.setdefault(name, [])
            scores.append(event.score)
            self._numbers[name] = f"score {sum(scores) / len(scores):.3f}, n {len(scores)}"

    def end(self, state: JobState) -> None:
        """A job is over."""
        self._states[state.job.id] = state
        reason = f"  {state.reason}" if state.status not in ("done", "reused") else ""
        number = self._numbers.get(state.job.id, "")
        sign = SIGNS[state.status]
        self._say(f"{sign} {state.job.id:<28} {state.seconds:6.1f} s  {number}{reason}")

    def tick(self, states: dict[str, JobState]) -> None:
        """Called often; without a terminal it prints a line now and then."""
        self._states = states
        if self._rich is None and time.monotonic() - self._last_line >= LINE_SECONDS:
            running = [s for s in states.values() if s.status == "running"]
            text = "; ".join(f"{s.job.id} {self._far(s.job.id)}".rstrip() for s in running)
            self._say(f"  {time.monotonic() - self._begun:5.0f} s  {text or 'waiting'}")

    def _say(self, text: str) -> None:
        if self._rich is None:
            self._last_line = time.monotonic()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _far(self, name: str) -> str:
        progress = self._progress.get(name)
        if progress is None:
            return ""
        far = f"{progress.done}/{progress.total} {progress.unit}"
        parts = [far, progress.note, self._numbers.get(name, "")]
        return ", ".join(p for p in parts if p)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("", "job", "progress", "s"):
            table.add_column(column, justify="right" if column == "s" else "left", no_wrap=True)
        for job in self._plan.jobs:
            state = self._states.get(job.id)
            status = state.status if state else "waiting"
            seconds = self._seconds(state)
            text = state.reason if state and state.status in ("failed", "skipped") else ""
            far = text.splitlines()[0] if text else self._far(job.id)
            style = {"running": "bold", "waiting": "dim", "failed": "red"}.get(status, "")
            table.add_row(SIGNS[status], job.id, far, seconds, style=style)
        spent = f"{time.monotonic() - self._begun:.0f} s"
        return Group(table, Text(f"{spent}  {self._note}".rstrip(), style="dim"))

    @staticmethod
    def _seconds(state: JobState | None) -> str:
        if state is None or state.started is None:
            return ""
        now = time.monotonic() - state.started if state.status == "running" else state.seconds
        return f"{now:.0f}"
