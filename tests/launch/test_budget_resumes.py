"""`budget.*` over kills and resumes: all invocations of a run together keep to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.records import LedgerLine, TrainRecord
from conf.run_groups import BudgetConfig, PricingConfig
from launch.attempts import stream_line, stream_path
from launch.budget import Budget
from launch.elsewhere.copies import Copier
from launch.planned import Job
from launch.recorder import Recorder
from launch.scheduler import JobState
from launch.spending import SPENT_FILE, Spending, read_spent
from launch.store import RunDirectory

STEP_SECONDS = 2.0


def step(number: int, *, loss: float) -> TrainRecord:
    return TrainRecord(
        arm="a",
        train_seed=0,
        trial=None,
        num_labels=8,
        step=number,
        examples=1,
        tokens=10,
        target_tokens=1,
        loss=loss,
        learning_rate=0.1,
        grad_norm=1.0,
        step_seconds=STEP_SECONDS,
        device_seconds=STEP_SECONDS,
        usd=None,
    )


@dataclasses.dataclass(slots=True)
class Killed:
    """A run whose driver is killed again and again; each invocation goes on from a saved state.

    done: device-seconds that any worker has spent, as only a bystander could know.
    """

    root: Path
    cap: float
    done: float = 0.0
    reached: int = 0

    def invoke(self, steps: int, *, unread: int, saved_every: int) -> bool:
        """One invocation; returns whether the budget ended it.

        steps: that the driver lives to read. unread: that the worker makes after its death.
        """
        run = RunDirectory(self.root, "r")
        run.open()
        budget = Budget(
            config=BudgetConfig(max_device_seconds=self.cap),
            pricing=PricingConfig(),
            spending=Spending(run.path),
        )
        recorder = Recorder(
            checked=cast(Any, SimpleNamespace(root=self.root)),
            run=run,
            tracker=cast(Any, SimpleNamespace(event=lambda *a, **k: None)),
            budget=budget,
            copier=Copier(None, run.path),
            hardware="test",
        )
        state = JobState(job=Job(id="train:a", kind="train", arm="a", key="k"), attempts=1)
        recorder.on_start(state)
        stream = stream_path(self.root / ".cache/jobs/k/points", f"{self.done}")
        stream.parent.mkdir(parents=True, exist_ok=True)
        stream.touch()
        first = self.reached - self.reached % saved_every + 1
        is_over = budget.excess() is not None
        for i in range(0 if is_over else steps + unread):
            record = step(first + i, loss=self.done)  # no two alike
            with stream.open("a") as lines:
                lines.write(stream_line(record, devices=1))
            self.done += STEP_SECONDS
            self.reached = first + i
            if i < steps:
                recorder.on_event(state, record)
                if budget.excess() is not None:
                    is_over = True
                    break
        recorder._jobs["train:a"].close()  # nothing else is said
        run.close()
        return is_over


@settings(max_examples=40)  # each writes files of ten invocations
@given(
    kills=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=4, unique=False
    ),
    cap=st.integers(1, 40),
    saved_every=st.integers(1, 3),
)
def test_a_run_that_is_killed_keeps_to_its_budget_and_one_step(
    kills: list[tuple[int, int]],
    cap: int,
    saved_every: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    run = Killed(root=tmp_path_factory.mktemp("run"), cap=float(cap))
    unseen = 0
    for steps, unread in kills:
        if run.invoke(steps, unread=unread, saved_every=saved_every):
            break
        unseen = unread
    else:
        assert run.invoke(10**6, unread=0, saved_every=saved_every)
    # What a worker does after its driver's death nobody can stop; the next start counts it.
    assert run.done <= cap + STEP_SECONDS * (1 + unseen)
    assert run.invoke(5, unread=0, saved_every=saved_every), "the same command spends nothing more"
    spent = read_spent(run.root / "r")
    assert spent is not None
    assert spent.device_seconds == pytest.approx(run.done, abs=0.1)  # the streams' own overhead


def test_prices_of_hosted_models_and_the_time_add_up_as_well(tmp_path: Path) -> None:
    config = BudgetConfig(max_usd=1.0, max_wall_seconds=1e6)
    for paid in (0.4, 0.4, 0.4):
        budget = Budget(config=config, pricing=PricingConfig(), spending=Spending(tmp_path))
        assert budget.excess() is None
        line = LedgerLine(job="j", arm="a", purpose="test", tokens=1, usd=paid)
        budget.spend_line(line, job="k")
    again = Budget(config=config, pricing=PricingConfig(), spending=Spending(tmp_path))
    reason = again.excess()
    assert reason is not None and "budget.max_usd=1: 1.2000 USD" in reason
    with (tmp_path / SPENT_FILE).open("a") as stream:
        stream.write('{"time": 0, "job": null, "device_seconds": 0, "hosted_usd": 0, ')
        stream.write('"wall_seconds": 1000001}\n{"time": 0, "jo')  # a kill cut the last line
    late = Budget(
        config=BudgetConfig(max_wall_seconds=1e6),
        pricing=PricingConfig(),
        spending=Spending(tmp_path),
    )
    assert "budget.max_wall_seconds" in (late.excess() or "")
    assert (tmp_path / SPENT_FILE).read_bytes().endswith(b"}\n")


def test_what_another_run_left_of_a_job_is_not_this_runs_expense(tmp_path: Path) -> None:
    spending = Spending(tmp_path)
    assert spending.unseen("k", 50.0) == 0.0
    spending.begin("k")
    spending.add(job="k", device_seconds=20.0)
    assert Spending(tmp_path).unseen("k", 50.0) == 30.0
