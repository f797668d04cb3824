"""The legs of trials that train one by one: a job for each trial and rung (pure).

The plan has all of them, and what a rung decides cancels the rest of a trial that left
(leg_search.py). A leg comes after all legs of the rung before, whatever became of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from conf.hashing import sha256_of
from conf.resolve import Arm
from conf.sweeps import HalvingConfig
from launch.planned import LEG, Job
from launch.search.halving import rung_shares
from launch.search.trials import Trial


def leg_jobs(
    trials: Sequence[Trial], train: Callable[[Arm], Job], *, halving: HalvingConfig
) -> list[Job]:
    """All legs, rung by rung.

    Args:
        trials: of one arm.
        train: makes the job that would train one of them whole.
        halving: where the rungs are. Who goes on is not in a key: a leg's records do not depend
            on it, so that a search with other rules finds the legs that it has in common.
    """
    shares = rung_shares(halving)
    legs: list[Job] = []
    before: dict[int, Job] = {}
    for rung in range(len(shares)):
        here = {
            trial.number: _leg(
                trial,
                train(trial.arm),
                rung=rung,
                shares=shares[: rung + 1],
                before=before,
            )
            for trial in trials
        }
        legs += here.values()
        before = here
    return legs


def after_legs(search: Job, legs: Sequence[Job]) -> Job:
    """The search whose legs these are: it reads what they left, and needs no device for that."""
    return dataclasses.replace(search, devices=0, after=tuple(leg.id for leg in legs))


def _leg(
    trial: Trial,
    training: Job,
    *,
    rung: int,
    shares: Sequence[float],
    before: Mapping[int, Job],
) -> Job:
    key = {
        "kind": LEG,
        "training": training.key,
        "trial": [trial.number, trial.setting],
        "shares": list(shares),
    }
    depends_on = training.depends_on
    if trial.number in before:
        depends_on = (*depends_on, before[trial.number].id)
    return dataclasses.replace(
        training,
        id=f"{LEG}:{trial.arm.name}:{trial.number}:{rung}",
        kind=LEG,
        key=sha256_of(key),
        depends_on=depends_on,
        after=tuple(job.id for job in before.values()),
        trial=trial.number,
        rung=rung,
    )
