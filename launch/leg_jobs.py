"""What the jobs of a search in legs do: train a trial to its next rung; choose among the trials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import JobFailed, MachineFailed
from conf.records import TrainSummary
from conf.sweep_records import UNFINISHED, RungDecision, RungRecord
from launch.attempts import each_step_once
from launch.planned import Job
from launch.search.halving import rung_shares
from launch.search.leg_run import Leg, as_leg, summary_of
from launch.search.leg_search import choice_of, decided, last_rows, trial_row, whole_summary
from launch.search.messages import RUNG_ROWS, chosen_arm, rung_points
from launch.search.pack_search import put_whole
from launch.trained_rows import training_data
from training.job import FINAL, checkpoint_directory
from training.state import remove_states

if TYPE_CHECKING:
    from launch.execute import Executor


def leg_events(executor: Executor, job: Job) -> Iterator[Any]:
    """Train a trial from the rung before to the next; a trial that fails is a row.

    Raises:
        MachineFailed: the trial can do nothing for it, and goes on with the same command.
    """
    assert job.arm is not None and job.rung is not None, "legs lead to a rung of an arm's trial"
    trial, search = executor.trial_of(job), executor.leg_search(job.arm)
    rungs = rung_shares(search.halving)
    legs = [leg for leg in executor.plan.legs(job.arm) if leg.trial == trial.number]
    earlier = [executor.directory(leg) for leg in legs[: job.rung]]
    previous = earlier[-1].points.resolve() if earlier else None
    train_job, rows = executor.train_job(job, trial.arm)
    leg = Leg(
        rung=job.rung,
        share=rungs[job.rung],
        share_before=rungs[job.rung - 1] if earlier else 0.0,
        previous="" if previous is None else str(previous),
        rung_rows_path=str(rows / RUNG_ROWS),
    )
    events, failure = list(executor.directory(job).events()), ""
    if not any(isinstance(e, RungRecord) for e in events):  # it is the last of a leg's records
        try:
            for event in executor.trained(job, as_leg(train_job, trial=trial.number), leg):
                events.append(event)
                yield event
        except MachineFailed:
            raise
        except JobFailed as error:
            failure = str(error)
    if previous is not None:
        remove_states(previous)
    going = "done" if job.rung == len(rungs) - 1 else UNFINISHED
    yield trial_row(
        search,
        trial.number,
        [*(e for before in earlier for e in before.events()), *each_step_once(events)],
        status="failed" if failure else going,
        reason=failure,
        summary=summary_of(executor.directory(job).points),
    )


@dataclass(kw_only=True, slots=True, frozen=True)
class _Legs:
    """What the legs of all trials left. points: by trial, where its last leg did."""

    events: Mapping[int, list[Any]]
    points: Mapping[int, Path]

    def summaries(self) -> dict[int, TrainSummary]:
        """By trial, of its last leg; a trial that failed in its first one has none."""
        found = {trial: summary_of(points) for trial, points in self.points.items()}
        return {trial: summary for trial, summary in found.items() if summary is not None}


def choice_events(executor: Executor, job: Job) -> Iterator[Any]:
    """End a search: the best trial, which is trained already, is the arm's checkpoint.

    Raises:
        JobFailed: every trial failed.
    """
    arm = executor.arm_of(job)
    search = executor.leg_search(arm.name)
    decisions = decided(search, executor.leg_events(arm.name))
    yield from decisions
    legs = _legs_of(executor, arm.name, decisions)
    summaries = legs.summaries()
    rows = {r.trial: r for r in last_rows(search, decisions, legs.events, summaries)}
    yield from rows.values()
    choice = choice_of(search, list(rows.values()), legs.events)
    if choice is None:
        reasons = "; ".join(f"{row.label}: {row.reason}" for row in rows.values())
        raise JobFailed(f"all {len(rows)} trials failed: {reasons}")
    points, winner = executor.directory(job).points, choice.trials[0]
    whole = [trial for trial, row in rows.items() if row.status == "done"]
    places = {points / "trials" / str(trial): trial for trial in whole} | {points: winner}
    for place, trial in places.items():
        trained = checkpoint_directory(legs.points[trial], FINAL)
        put_whole(trained, checkpoint_directory(place, FINAL))
    for leg in executor.plan.legs(arm.name):
        remove_states(executor.directory(leg).points)
    yield choice
    yield whole_summary(summaries[winner], rows[winner])
    _, prepared = executor.train_job(job, arm)
    yield training_data(arm.name, prepared, trainer=chosen_arm(choice, search.trials).trainer)
    yield from rung_points([*(e for of in legs.events.values() for e in of), choice])


def _legs_of(executor: Executor, arm: str, decisions: list[RungDecision]) -> _Legs:
    """The legs that were run, by the decisions; others may lie there from another search."""
    events: dict[int, list[Any]] = {t.number: [] for t in executor.searches[arm]}
    points: dict[int, Path] = {}
    for leg in executor.plan.legs(arm):
        assert leg.trial is not None and leg.rung is not None, "legs lead to a rung of a trial"
        directory = executor.directory(leg)
        kept = leg.rung == 0 or leg.trial in decisions[leg.rung - 1].keep
        if leg.rung < len(decisions) and kept and directory.done() is not None:
            events[leg.trial] += directory.events()
            points[leg.trial] = directory.points
    return _Legs(events=events, points=points)
