"""Test items wave by wave (pure): which items a wave has, and the jobs that ask them.

All arms answer the items in one random order, so that every two arms can be compared after each
wave (launch/judge.py). The plan has all waves of all arms; those of an arm that leaves are
cancelled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from conf.errors import ConfigError
from conf.hashing import sha256_of
from conf.records import Item
from conf.run_groups import DecisionConfig
from evaluation.statistics.clusters import sources_of
from evaluation.tasks import Task
from launch.planned import Job

# Of the test items, at the end of each wave. A look costs nothing in a test that allows for looks,
# but each wave computes an arm's shared prefix again.
SHARES = (0.125, 0.25, 0.5, 1.0)


def check_waves(decision: DecisionConfig) -> None:
    """Refuse early stopping where what decides is not known on the way.

    Raises:
        ConfigError: with a price of errors, arms are compared in money.
    """
    if decision.stop_early and decision.error_usd is not None:
        raise ConfigError(
            "decision.stop_early",
            found=f"true, with decision.error_usd={decision.error_usd}",
            expected="one of the two: waves are judged by the metric, not by money",
            remedy="write decision.stop_early=false, or set error_usd later, by launch.report",
        )


def waves_of(items: Sequence[Item], *, seed: int) -> tuple[tuple[Item, ...], ...]:
    """The items of each wave, those of a source together, each wave in the order given.

    The order is that of hashes, so that neither the file's order nor another item changes it.

    Args:
        items: the test items.
        seed: of the order.
    """
    sources = sources_of(items) or {item.id: item.id for item in items}
    members: dict[str, list[str]] = {}
    for item in items:
        members.setdefault(sources[item.id], []).append(item.id)
    order = sorted(members, key=lambda name: sha256_of(["wave", seed, name]))
    ends = [share * len(items) for share in SHARES]
    wave_of: dict[str, int] = {}
    for name in order:
        wave = next(k for k, end in enumerate(ends) if len(wave_of) < end)
        wave_of |= dict.fromkeys(members[name], wave)
    return tuple(
        tuple(item for item in items if wave_of[item.id] == wave) for wave in range(len(SHARES))
    )


def wave_task(task: Task, wave: int | None, *, seed: int) -> Task:
    """The task with the test items of one wave; None: with all."""
    if wave is None:
        return task
    own = waves_of(task.items["test"], seed=seed)[wave]
    return dataclasses.replace(task, items={**task.items, "test": own})


def share_of(wave: int | None) -> float:
    """Part of the test items that a wave has; None: all."""
    if wave is None:
        return 1.0
    return SHARES[wave] - (SHARES[wave - 1] if wave else 0.0)


def in_waves(jobs: Iterable[Job], *, seed: int) -> list[Job]:
    """A plan's jobs with each evaluate job as its waves.

    The first keeps its id and also answers validation. A later one waits for the arm's one before,
    and, to be judged, until that wave of all arms, what reference arms answer and what requests
    cost are there, or have failed.
    """
    jobs = list(jobs)
    first = [job for job in jobs if job.kind == "evaluate"]
    waves = {job.id: [_wave(job, 0, seed=seed)] for job in first}
    judged_by = [job.id for job in jobs if job.kind in ("latency", "reference")]
    for wave in range(1, len(SHARES)):
        before = tuple(chain[-1].id for chain in waves.values())
        for job in first:
            later = _wave(job, wave, seed=seed)
            chain = waves[job.id]
            chain.append(
                dataclasses.replace(later, depends_on=(chain[-1].id,), after=(*before, *judged_by))
            )
    kept = [waves[job.id][0] if job.id in waves else job for job in jobs]
    return kept + [waves[j.id][k] for k in range(1, len(SHARES)) for j in first]


def _wave(job: Job, wave: int, *, seed: int) -> Job:
    key = sha256_of({"of": job.key, "wave": wave, "shares": SHARES, "seed": seed})
    return dataclasses.replace(job, id=f"{job.id}:{wave}" if wave else job.id, key=key, wave=wave)
