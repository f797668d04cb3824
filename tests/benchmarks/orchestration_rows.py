"""A row on orchestration: what a whole run takes beyond its training and its evaluation.

The first five minutes of a new user, as the command: seven arms on the embedded data. Its bill says
what the devices worked for; all else from the command's start to its exit is ours: imports, Ray,
processes, loading, journals, the report.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.records.run_records import read_run
from launch.jsonl import read_lines
from tests.benchmarks.comparing import Setup
from tests.benchmarks.harness import ROOT, Result, ratio_of
from tests.benchmarks.parity import Parity

NUM_RUNS = 2
ALLOWED_SECONDS, ALLOWED_SHARE = 15.0, 0.02
TYPED = ("+exp=compare", "run.name=run", "tracking=none")


@dataclass(kw_only=True, slots=True, frozen=True)
class Run:
    """Seconds of a run. work: of its devices, side by side. stages: before, between, after jobs.

    beside: by kind of job, what its jobs took beyond their work, where one ran at a time.
    """

    seconds: float
    work: float
    stages: Mapping[str, float]
    beside: Mapping[str, float]
    jobs: int

    @property
    def orchestration(self) -> float:
        """All that is neither training nor evaluation."""
        return self.seconds - self.work

    @property
    def allowed(self) -> float:
        """What it may take."""
        return ALLOWED_SECONDS + ALLOWED_SHARE * self.seconds


def orchestration(setup: Setup) -> list[Result]:
    """Whole runs, each from nothing but a converted model."""
    items, rounds = setup.cap(10**9, NUM_RUNS)
    limits = [f"task.limit.test={items}"] if setup.items else []
    runs = [_typed(setup, limits) for _ in range(rounds)]
    result = Result(
        name="orchestration",
        work="seven arms on the embedded data, from the command to its exit, against "
        f"{ALLOWED_SECONDS:g} s + {ALLOWED_SHARE:.0%} of the run",
        ours=float(np.median([run.orchestration for run in runs])),
        peer=float(np.median([run.allowed for run in runs])),
        peer_version="what is allowed",
        ratio=ratio_of([run.orchestration for run in runs], [run.allowed for run in runs]),
        floor=1.0,
        aim=None,
        bound=None,
        unit="seconds",
        parity=Parity(checked=sum(run.jobs for run in runs), ok=True, worst=0.0),
        more={
            "run_seconds": [run.seconds for run in runs],
            "work_seconds": [run.work for run in runs],
            "stages": [dict(run.stages) for run in runs],
            "beside_work_seconds": [dict(run.beside) for run in runs],
        },
    )
    result.judge()
    return [result]


def _typed(setup: Setup, limits: Sequence[str]) -> Run:
    with tempfile.TemporaryDirectory() as root:
        model = ("model=hub", f"model.path={setup.model_dir}")
        command = [sys.executable, "launch.py", *TYPED, *model, *limits, f"run.root={root}"]
        log = Path(root) / "log.txt"
        began = time.time()
        with log.open("wb") as out:
            ended = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        if ended.returncode:
            raise RuntimeError(f"exit code {ended.returncode}: {log.read_text()[-2000:]}")
        run = read_orchestration(Path(root) / "run", began=began, ended=time.time())
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in run.stages.items())
    print(f"  {run.orchestration:.1f} of {run.seconds:.1f} s; outside jobs: {parts}", flush=True)
    return run


def read_orchestration(directory: Path, *, began: float, ended: float) -> Run:
    """From a run's records and when its command started and ended (seconds since the epoch)."""
    records = read_run(directory)
    devices = int(records.hardware["devices"])
    work = {line.job: 0.0 for line in records.spent_now}
    for line in records.spent_now:
        work[line.job] += (line.device_seconds or 0.0) / devices
    spans = _spans(list(read_lines(directory / "journal.jsonl")))
    first = min(start for start, _ in spans.values())
    last = max(end for _, end in spans.values())
    beside: dict[str, float] = {}
    for job, (start, end) in spans.items():
        kind = job.partition(":")[0]
        beside[kind] = beside.get(kind, 0.0) + end - start - work.get(job, 0.0)
    return Run(
        seconds=ended - began,
        work=sum(work.values()),
        stages={"before": first - began, "between": _idle(spans), "after": ended - last},
        beside=beside,
        jobs=len(spans),
    )


def _spans(journal: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Job -> when it started and was done."""
    starts = {e["job"]: float(e["time"]) for e in journal if e["event"] == "job_started"}
    return {
        e["job"]: (starts[e["job"]], float(e["time"]))
        for e in journal
        if e["event"] == "job_done" and e["job"] in starts
    }


def _idle(spans: Mapping[str, tuple[float, float]]) -> float:
    """Seconds between the first start and the last end in which no job ran."""
    idle, until = 0.0, min(start for start, _ in spans.values())
    for start, end in sorted(spans.values()):
        idle += max(0.0, start - until)
        until = max(until, end)
    return idle
