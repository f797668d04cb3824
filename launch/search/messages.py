"""What a search job reads and leaves: its message to the worker, the setting that was chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from conf.hashing import plain
from conf.methods import LoraMethod
from conf.records import CurvePoint, Measured, TrainRecord
from conf.resolve import Arm
from conf.sweep_records import RungRecord, SweepChoice
from conf.sweeps import SweepConfig
from launch.search.pack_search import PackSearch, TrialFacts
from launch.search.trials import Trial
from training.job import TrainJob

RUNG_ROWS = "rung_rows.jsonl"  # in the directory of a rows job


def packed(
    first: TrainJob, trials: Sequence[Trial], *, rows: Path, sweep: SweepConfig
) -> PackSearch:
    """The search of an arm whose trials pack.

    Args:
        first: the training of the arm itself, in which each trial replaces method and trainer.
        trials: all of them.
        rows: directory of the rows job.
        sweep: its rules.
    """
    return PackSearch(
        jobs=tuple(_job(first, trial) for trial in trials),
        trials={trial.number: facts_of(trial) for trial in trials},
        rung_rows_path=str(rows / RUNG_ROWS),
        halving=sweep.halving,
        budget=sweep.budget,
    )


def _job(first: TrainJob, trial: Trial) -> TrainJob:
    method = trial.arm.training
    assert isinstance(method, LoraMethod), "what packs is LoRA"
    return dataclasses.replace(first, method=method, trainer=trial.arm.trainer, trial=trial.number)


def facts_of(trial: Trial) -> TrialFacts:
    """A trial as its table shows it."""
    return TrialFacts(
        setting=trial.setting,
        seed=trial.seed,
        draw=trial.draw,
        label=trial.label,
        values={field: plain(value) for field, value in trial.values},
    )


def chosen(events: Iterable[Any]) -> SweepChoice | None:
    """The choice among the events of a search job that is over."""
    return next((event for event in events if isinstance(event, SweepChoice)), None)


def chosen_arm(choice: SweepChoice, trials: Sequence[Trial]) -> Arm:
    """The arm as the chosen setting makes it: its first replicate, whichever did best."""
    return next(trial.arm for trial in trials if trial.number == choice.trials[0])


def steps_of(events: Iterable[Any]) -> list[TrainRecord]:
    """The steps that led to the checkpoint: of a search those of the chosen trial."""
    events = list(events)
    choice = chosen(events)
    steps = [event for event in events if isinstance(event, TrainRecord)]
    return steps if choice is None else [s for s in steps if s.trial == choice.trials[0]]


def rung_points(events: Iterable[Any]) -> Iterator[CurvePoint]:
    """The chosen trial's rungs but the last as points of its arm's curve."""
    events = list(events)
    choice = chosen(events)
    if choice is None:
        return
    steps = steps_of(events)
    for event in events:
        is_own = isinstance(event, RungRecord) and event.trial == choice.trials[0]
        if not is_own or event.rung == choice.rung or event.metric != "accuracy":
            continue
        seed = steps[0].train_seed if steps else 0
        yield curve_point(
            event.arm, steps, step=event.step, metric=event.metric, value=event.value, seed=seed
        )


def curve_point(
    arm: str,
    steps: Iterable[TrainRecord],
    *,
    step: int,
    metric: str,
    value: Measured,
    seed: int,
) -> CurvePoint:
    """A score at an optimizer step, beside what training had spent by then."""
    upto = [record for record in steps if record.step <= step]
    return CurvePoint(
        arm=arm,
        step=step,
        tokens=sum(record.tokens for record in upto),
        device_seconds=sum(record.device_seconds for record in upto),
        metric=metric,
        value=value,
        train_seed=seed,
    )
