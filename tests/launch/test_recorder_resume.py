"""What scheduler and recorder write of a training that is lost and goes on; attempts are made up.

test_training_faults.py does the same to real processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.errors import BudgetReached, JobFailed
from conf.records import JournalEvent, LedgerLine, Progress, TrainRecord, from_dict
from conf.row_meter import RowMeter
from conf.run_groups import BudgetConfig
from evaluation.records.run_records import _ledger
from launch.attempts import stop_path, stream_line, stream_path
from launch.jsonl import read_lines
from tests.launch.test_attempts import step, summary
from tests.launch.training_bench import Bench, at_step
from training.job import TrainingStopped, WorkerLost

TOTAL = 6


@dataclasses.dataclass(kw_only=True)
class Scripted(Bench):
    """Attempts that go from one step to another and end as told; the last one finishes."""

    script: list[tuple[int, int, Exception | None]]
    announced: list[int] = dataclasses.field(default_factory=list)  # rows of each attempt

    def attempt(self) -> Iterator[Any]:
        first, last, error = self.script.pop(0)
        if self.announced:
            meter = RowMeter()
            meter.count_into(self.directory.rows)
            meter.announce(self.announced.pop(0))
        self.directory.points.mkdir(parents=True, exist_ok=True)
        stream = stream_path(self.directory.points, f"{100 - len(self.script):03d}")
        events: list[Any] = [Progress(done=0, total=TOTAL, note="loading")]
        events += [step(n) for n in range(first, last + 1)]
        events += [] if error else [summary(TOTAL, device_seconds=100.0)]
        for event in events:
            with stream.open("a") as file:
                file.write(stream_line(event, devices=2))
            yield event
            if isinstance(error, TrainingStopped) and stop_path(stream).exists():
                raise error
        if error is not None:
            raise error
        final = self.directory.points / "final/checkpoint"
        final.mkdir(parents=True)
        (final / "checkpoint.json").write_text("{}")

    def bills(self) -> tuple[list[LedgerLine], list[LedgerLine]]:
        """The run's bill as the report reads it, and what the last invocation paid."""
        lines = read_lines(self.root / "r/journal.jsonl")
        whole, now = _ledger(tuple(from_dict(JournalEvent, line) for line in lines))
        return list(whole), list(now)


def bench(root: Path, *script: tuple[int, int, Exception | None]) -> Scripted:
    return Scripted(root=root, model_dir=root, script=list(script))


def sums(lines: list[LedgerLine], purpose: str) -> tuple[int, int]:
    """Tokens and whole device-seconds."""
    mine = [line for line in lines if line.purpose == purpose]
    return sum(e.tokens for e in mine), round(sum(e.device_seconds for e in mine))


def test_lost_attempts_leave_each_step_once_and_bill_the_rest(tmp_path: Path) -> None:
    lost = WorkerLost("worker 1 was lost")
    run = bench(tmp_path, (1, 4, lost), (3, 5, lost), (6, 6, None))
    state = run.run()
    assert (state.status, state.attempts) == ("done", 3)
    assert [s.step for s in run.steps()] == [1, 2, 3, 4, 5, 6]
    whole, now = run.bills()
    assert whole == now
    assert sums(whole, "redone") == (30 + 40, 4)
    # Each step is 2 device-seconds, and 100 are the last attempt's own.
    assert sums(whole, "train") == (210, 100 + 5 * 2)
    assert sum("attempt_lost" in str(e) for e in read_lines(tmp_path / "r/journal.jsonl")) == 2


def test_what_a_lost_attempt_announced_and_did_not_record_is_billed(tmp_path: Path) -> None:
    run = bench(tmp_path, (1, 4, WorkerLost("worker 0 was lost")), (3, 6, None))
    run.announced = [100 + 37, 180 + 3]  # of 3 tokens of padding
    assert run.run().status == "done"
    whole, _ = run.bills()
    assert sums(whole, "redone")[0] == 70 + 37
    assert sum(line.tokens for line in whole) == 137 + 183


def test_an_attempt_that_was_not_interrupted_bills_its_own_counts_alone(tmp_path: Path) -> None:
    run = bench(tmp_path, (1, 6, None))
    run.announced = [210 + 37]
    assert run.run().status == "done"
    assert sum(line.tokens for line in run.bills()[0]) == 210 + 3


def test_a_stopped_training_states_what_it_announced_and_bills_it_once(tmp_path: Path) -> None:
    run = bench(tmp_path, (1, 2, JobFailed("the loss is nan")), (1, 6, None))
    run.announced = [30 + 5, 213]
    assert run.run().status == "failed"
    assert sum(line.tokens for line in run.bills()[0]) == 35
    assert run.run().status == "done"
    assert sum(line.tokens for line in run.bills()[0]) == 35 + 213


def test_attempts_end_when_three_get_no_further(tmp_path: Path) -> None:
    lost = WorkerLost("worker 0 was lost")
    run = bench(tmp_path, (1, 4, lost), *[(3, 4, lost)] * 5)
    state = run.run()
    assert (state.status, state.attempts, len(run.script)) == ("failed", 4, 2)
    whole, _ = run.bills()
    assert sums(whole, "train") == (100, 8)
    assert sums(whole, "redone") == (3 * 70, 12)


def test_a_failure_of_its_own_is_not_tried_again_and_stays_on_the_bill(tmp_path: Path) -> None:
    run = bench(tmp_path, (1, 2, JobFailed("step 3: the loss is nan")), (1, 6, None))
    state = run.run()
    assert (state.status, state.attempts, state.reason) == ("failed", 1, "step 3: the loss is nan")
    assert sums(run.bills()[0], "train") == (30, 4)


def test_a_budget_stops_a_training_and_the_next_invocation_pays_only_the_rest(
    tmp_path: Path,
) -> None:
    run = bench(tmp_path, (1, 6, TrainingStopped(3)), (4, 6, None))

    def wait_for_stop(bench: Bench) -> None:
        """The scripted worker asks after each step, faster than the driver ticks."""
        bench.runs.budget.spend(1e9)
        bench.runs.on_tick({"train:a": bench.state()})

    with pytest.raises(BudgetReached, match="max_device_seconds"):
        run.run(at_step(1, wait_for_stop), budget=BudgetConfig(max_device_seconds=1e6))
    before = len(run.steps())
    assert sums(run.bills()[1], "train")[1] == 2 * before
    run.script = [(before + 1, 6, None)]
    assert run.run().status == "done"
    assert [s.step for s in run.steps()] == [1, 2, 3, 4, 5, 6]
    whole, now = run.bills()
    assert sums(whole, "train") == (210, 100 + 2 * before)
    assert sums(now, "train")[1] == 100
    again = bench(tmp_path)
    assert again.run().status == "reused"
    assert sums(again.bills()[0], "train") == (210, 100 + 2 * before)
    assert again.bills()[1] == []
    assert not [e for e in again.directory.events() if isinstance(e, TrainRecord) and e.step > 6]
