"""What a run says without a terminal: a line for what is new soon, for what is not now and then."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from conf.records import Progress
from launch import live
from launch.live import LINE_SECONDS, SAME_LINE_SECONDS, Live
from launch.planned import Job, Plan
from launch.scheduler import JobState

JOB = Job(id="evaluate:a", kind="evaluate", arm="a", key="k", devices=1)


def test_a_line_that_says_the_same_comes_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    table = Live(Console(file=out), Plan(jobs=(JOB,)), usd_per_device_second=None)
    state = JobState(job=JOB, status="running")
    table.start(state)

    def lines(seconds: int, done: int) -> list[str]:
        """What is said in so many seconds with an unchanged count."""
        before = len(out.getvalue())
        table.event(state, Progress(done=done, total=9, unit="answers"))
        for _ in range(seconds):
            clock[0] += 1.0
            table.tick({JOB.id: state})
        return out.getvalue()[before:].splitlines()

    assert len(lines(int(LINE_SECONDS), 1)) == 1
    assert lines(int(SAME_LINE_SECONDS) - 1, 1) == []
    assert len(lines(1, 1)) == 1, "it is alive"
    changing = [line for done in range(2, 6) for line in lines(int(LINE_SECONDS), done)]
    assert len(changing) == 4 and "5/9 answers" in changing[-1]
