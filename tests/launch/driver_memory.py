"""What the driver holds while a run's records pass through it, by their number.

    python -m tests.launch.driver_memory 1000000

An evaluation is made up, and everything from the scheduler's thread to the files is real. Its first
attempt is lost after a third of the items, its first invocation is interrupted after two thirds;
the next one goes on, and a last one finds the job finished. Prompts are all different, as a task's
are. Prints the most memory of this process in each part. A million take about half an hour.

Not in it, since they hold what they read: the report at the end of a run (about 1 kB a record of
two labels, tests/evaluation/records/test_record_memory.py), the judgements of decision.stop_early,
tracking.upload_text, the items of the task itself, and the steps of a training.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from rich.console import Console

from conf.records import AnswerRule, LedgerLine, Progress, PromptText, SampleRecord
from conf.run_groups import BudgetConfig, PricingConfig
from launch.budget import Budget
from launch.elsewhere.copies import Copier
from launch.live import Live
from launch.planned import Job, Plan
from launch.recorder import Recorder, is_finished, replay
from launch.scheduler import JobState, Scheduler
from launch.spending import Spending
from launch.store import RunDirectory
from launch.together import Member, Runs
from training.job import WorkerLost

JOB = Job(id="evaluate:a", kind="evaluate", arm="a", key="k", devices=1)
RECORDS_AT_ONCE = 32  # as the asker's, evaluation/answering/runner.py


@dataclass(kw_only=True)
class DriverBench:
    """One evaluation of num_records answers, over as many invocations as it takes."""

    root: Path
    num_records: int
    told: int = 0  # how many answers the attempts have given so far
    state: JobState | None = None
    _runs: Runs = field(init=False)

    def answers(self, *, until: int) -> Iterator[Any]:
        """What an evaluator streams: prompts, then batches of answers behind what they cost."""
        first = self.told
        for number in range(first, until):
            yield PromptText(prompt_sha256=_sha256(number), arm="a", text=f"prompt {number}")
        if first == 0:
            yield AnswerRule(arm="a", answer_by="score", calibration="none", validation={})
        for start in range(first, until, RECORDS_AT_ONCE):
            batch = range(start, min(start + RECORDS_AT_ONCE, until))
            tokens = 100 * len(batch)
            yield LedgerLine(
                job=JOB.id, arm="a", purpose="test", tokens=tokens, device_seconds=0.01
            )
            yield from map(_answer, batch)
            self.told = batch.stop
            yield Progress(done=self.told, total=self.num_records, unit="answers")

    def invoke(self, *, until: int, is_lost_at: int | None = None) -> None:
        """Type the command: answers until so many are told, and is interrupted if it is not all."""

        def run_job(job: Job) -> Iterator[Any]:
            if is_lost_at is not None and self.told < is_lost_at:
                yield from self.answers(until=is_lost_at)
                raise WorkerLost("the evaluator was killed")
            yield from self.answers(until=until)
            if until < self.num_records:
                raise _Interrupted

        run = RunDirectory(self.root, "r")
        run.open()
        scheduler = self._scheduler(run, run_job)
        run.journal("run_started")
        try:
            self.state = scheduler.run()[JOB.id]
        finally:
            run.close()

    def replay(self) -> None:
        """Type it once more: the job is finished."""
        run = RunDirectory(self.root, "r")
        run.open()
        run.journal("run_started")
        replay(cast(Any, SimpleNamespace(root=self.root)), run, JOB)
        run.close()

    def _scheduler(self, run: RunDirectory, run_job: Any) -> Scheduler:
        plan = Plan(jobs=(JOB,))
        budget = Budget(config=BudgetConfig(), pricing=PricingConfig(), spending=Spending(run.path))
        recorder = Recorder(
            checked=cast(Any, SimpleNamespace(root=self.root)),
            run=run,
            tracker=cast(Any, SimpleNamespace(event=lambda *args, **kwargs: None)),
            budget=budget,
            copier=Copier(None, run.path),
            hardware="test",
        )
        live = Live(Console(quiet=True), plan, usd_per_device_second=None)
        members = {"": Member(plan=plan, recorder=recorder, run_job=run_job)}
        together = Runs(members=members, budget=budget, live=live)
        return Scheduler(
            plan=plan,
            slots=1,
            run_job=together.run_job,
            listener=together,
            may_start=together.refusal,
            is_retryable=lambda error: isinstance(error, WorkerLost),
            is_finished=lambda job: is_finished(self.root, job),
        )

    def parts(self) -> Iterator[str]:
        """Do it all, a part at a time; yields the name of each when it is over."""
        third = self.num_records // 3
        self.invoke(until=2 * third, is_lost_at=third)
        yield "a run with a lost attempt"
        self.invoke(until=self.num_records)
        assert self.state is not None and self.state.status == "done"
        yield "resumed"
        self.replay()
        yield "reused"


class _Interrupted(Exception):
    """What ends the first invocation: the job counts as failed, and starts again."""


def _sha256(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def _answer(number: int) -> SampleRecord:
    return SampleRecord(
        arm="a",
        item_id=f"item-{number}",
        set="test",
        prompt_sha256=_sha256(number),
        prompt_tokens=110,
        computed_tokens=100,
        label_logprobs={"ham": -0.1, "spam": -2.3},
        answer="ham",
        target="ham",
        is_correct=True,
        score=float(number % 3 > 0),
    )


def traced_bytes(root: Path, num_records: int) -> dict[str, int]:
    """The most that Python's allocator held in each part, over what it held before."""
    bench = DriverBench(root=root, num_records=num_records)
    found, parts = {}, bench.parts()
    tracemalloc.start()
    try:
        while True:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            name = next(parts, None)
            if name is None:
                return found
            found[name] = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def main(num_records: int) -> None:
    """Print the most memory of this process so far, after each part."""
    with tempfile.TemporaryDirectory() as root:
        bench = DriverBench(root=Path(root), num_records=num_records)
        found = {}
        for name in bench.parts():
            found[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps({"num_records": num_records, "part": name, "bytes": found[name]}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
