"""Legs as jobs, and who goes on after a rung: pure, against `decide` on the whole table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from conf.choices import TaskKind
from conf.errors import JobFailed, MachineFailed
from conf.records import LedgerLine, Measured, TrainRecord
from conf.resolve import resolve_arms
from conf.schema import RunConfig
from conf.sweep_records import RungRecord, TrialRecord
from conf.sweeps import SweepBudgetConfig
from launch import leg_jobs
from launch.compose import compose_config
from launch.placement import Machine
from launch.plan import build_plan
from launch.planned import Job, ModelSource, Plan, TaskFacts
from launch.search.halving import decide, rung_shares
from launch.search.leg_run import step_at
from launch.search.leg_search import LegSearch, choice_of, decided, last_rows, trial_row
from launch.search.trials import check_space
from launch.store import JobDirectory

TYPED = (
    *(
        "+exp=full",
        "sweep=grid",
        "sweep.halving.first_rung=0.4",
        "sweep.halving.min_correlation=-1",
    ),
    "+sweep.space.full={trainer.learning_rate:[1e-5,3e-5,1e-4,3e-4]}",
)
CPU = Machine(devices=2, devices_per_node=2, device="cpu", name="2 x test")


@functools.cache
def composed(*overrides: str) -> RunConfig:
    return compose_config([*TYPED, *overrides])


@functools.cache
def plan_of(*overrides: str) -> Plan:
    return planned(composed(*overrides), machine=CPU)


def planned(config: RunConfig, *, machine: Machine) -> Plan:
    arms = resolve_arms(config)
    return build_plan(
        config,
        arms,
        task=TaskFacts(sha256="t", kind=TaskKind.classification),
        models={name: ModelSource(key="m", is_ready=True) for name in arms},
        plugins=(),
        machine=machine,
        searches=check_space(config, arms),
    )


def search_of(**changes: Any) -> LegSearch:
    config = composed()
    trials = check_space(config, resolve_arms(config))["full"]
    search = LegSearch(
        arm="full",
        trials=trials,
        halving=config.sweep.halving,
        budget=SweepBudgetConfig(),
        usd_per_device_second=1.0,
    )
    return dataclasses.replace(search, **changes)


def leg(trial: int, rung: int, value: float) -> list[Any]:
    """What a leg leaves: a step of 100 tokens, 10 for the rung, 5 of padding, the bill of both."""
    step = TrainRecord(
        arm="full",
        step=rung + 1,
        examples=1,
        tokens=100,
        target_tokens=1,
        loss=1.0,
        learning_rate=1e-3,
        grad_norm=1.0,
        step_seconds=1.0,
        device_seconds=1.0,
        usd=None,
        train_seed=0,
        trial=trial,
    )
    score = RungRecord(
        arm="full",
        trial=trial,
        rung=rung,
        step=rung + 1,
        metric="accuracy",
        value=Measured(value=value),
        per_item=(value,),
        tokens=10,
        device_seconds=0.5,
    )
    lines = [
        LedgerLine(job="", arm="full", purpose="padding", tokens=5),
        LedgerLine(job="", arm="full", purpose="sweep", device_seconds=2.0),
        LedgerLine(job="", arm="full", purpose="sweep", tokens=110, device_seconds=1.5),
    ]
    return [step, *lines, score]


VALUES = {0: (0.5, 0.6, 0.7), 1: (0.4, 0.9, 0.8), 2: (0.9, 0.1, 0.2), 3: (0.3, 0.2, 0.1)}


@pytest.mark.parametrize("zero", ["auto", "2", "3"])
def test_a_pack_takes_all_devices_and_a_base_that_is_sharded_goes_in_legs(zero: str) -> None:
    gpus = Machine(devices=4, devices_per_node=2, device="cuda", name="4 x test")
    plan = planned(compose_config(["+exp=sweep", f"zero.stage={zero}"]), machine=gpus)
    assert bool(plan.legs("lora")) == (zero == "3")
    training = [job for job in plan.jobs if job.id.startswith(("search:lora", "leg:lora"))]
    assert {job.devices for job in training if job.id != "search:lora" or zero != "3"} == {4}


def test_a_trial_is_a_chain_of_legs_and_a_rung_waits_for_all_of_the_one_before() -> None:
    plan = plan_of()
    legs = plan.legs("full")
    assert [(job.trial, job.rung) for job in legs] == [(t, r) for r in range(3) for t in range(4)]
    for job in legs:
        own = f"leg:full:{job.trial}:{(job.rung or 0) - 1}"
        assert (own in job.depends_on) == bool(job.rung)
        before = {f"leg:full:{t}:{job.rung - 1}" for t in range(4)} if job.rung else set()
        assert set(job.after) == before and job.devices == 2
    search = plan.training("full")
    assert search.id == "search:full" and set(search.after) == {job.id for job in legs}
    assert not any(job.id.startswith("train:") for job in plan.jobs)
    assert plan.job("evaluate:full").depends_on == ("search:full",)


def test_a_leg_is_known_by_what_its_records_depend_on() -> None:
    def keys(*overrides: str) -> dict[str, str]:
        return {job.id: job.key for job in plan_of(*overrides).jobs if job.arm == "full"}

    before = keys()
    assert len(set(before.values())) == len(before)
    other_rules = keys("sweep.halving.min_correlation=0.9")
    changed = {name for name in before if before[name] != other_rules[name]}
    assert not any(name.startswith("leg") for name in changed) and "search:full" in changed
    other_rungs = keys("sweep.halving.first_rung=0.5")
    assert all(other_rungs[n] != before[n] for n in before if n.startswith("leg"))
    longer = keys("trainer.epochs=9")
    assert all(longer[name] != before[name] for name in before if name.startswith("leg"))


def test_rungs_lie_at_the_steps_of_a_pack() -> None:
    assert [step_at(share, total_steps=30) for share in (0.0, 0.01, 0.1, 1)] == [0, 1, 3, 30]


def test_decisions_are_those_of_the_rules_and_nobody_asks_for_a_leg_that_was_dropped() -> None:
    search, asked = search_of(), set[tuple[int, int]]()

    def events_of(trial: int, rung: int) -> list[Any]:
        asked.add((trial, rung))
        return leg(trial, rung, VALUES[trial][rung])

    found = decided(search, events_of)
    rungs = [{t: (VALUES[t][r],) for t in VALUES} for r in range(2)]
    members = dict.fromkeys(VALUES, 0) | {t: t for t in VALUES}
    wanted = [
        decide("full", rungs[:1], members=members, halving=search.halving),
        decide("full", rungs, members=members, halving=search.halving),
    ]
    assert found[:2] == wanted and len(found) == 3 == len(rung_shares(search.halving))
    assert found[0].drop == () and found[1].keep == (0, 1) and found[2].keep == (0, 1)
    assert asked == {(t, r) for t in VALUES for r in range(2)} | {(0, 2), (1, 2)}
    assert decided(search, events_of, upto=0) == found[:1]


def test_a_rung_is_open_until_its_last_leg_is_over() -> None:
    def events_of(trial: int, rung: int) -> list[Any] | None:
        return None if (trial, rung) == (3, 1) else leg(trial, rung, VALUES[trial][rung])

    assert len(decided(search_of(), events_of)) == 1


def test_a_failed_trial_is_a_row_and_the_best_of_the_rest_is_chosen() -> None:
    search = search_of()
    failed = TrialRecord(
        arm="full", trial=1, setting=1, seed=0, draw=0, label="", status="failed", reason="nan"
    )

    def events_of(trial: int, rung: int) -> list[Any]:
        return [failed] if trial == 1 and rung else leg(trial, rung, VALUES[trial][rung])

    decisions = decided(search, events_of)
    assert decisions[1].failed == (1,) and decisions[1].keep == (0, 3)
    kept = {0: 3, 1: 2, 2: 2, 3: 3}
    legs = {t: [e for r in range(n) for e in events_of(t, r)] for t, n in kept.items()}
    rows = {row.trial: row for row in last_rows(search, decisions, legs, {})}
    assert {t: row.status for t, row in rows.items()} == {
        0: "done",
        3: "done",
        1: "failed",
        2: "dropped",
    }
    assert rows[1].reason == "nan" and "place" in rows[2].reason
    choice = choice_of(search, list(rows.values()), legs)
    assert choice is not None and choice.trials == (0,) and choice.rung == 2


def test_a_row_counts_steps_rungs_and_the_rest_once() -> None:
    events = [e for rung in range(2) for e in leg(0, rung, 0.5)]
    row = trial_row(search_of(), 0, events, status="unfinished", summary=None)
    assert (row.tokens, row.device_seconds, row.usd) == (230, 7.0, 7.0)
    assert (row.steps, row.rung) == (2, 1)


@pytest.mark.parametrize(("max_tokens", "kept"), [(10_000, (0, 1, 2, 3)), (1_000, (2,))])
def test_the_budget_of_the_sweep_lets_so_many_go_on_as_it_pays_for(
    max_tokens: int, kept: tuple[int, ...]
) -> None:
    # 460 tokens are spent; the best trial needs 115 to the next rung and 345 from there to the end.
    search = search_of(budget=SweepBudgetConfig(max_tokens=max_tokens))
    (found,) = decided(search, lambda t, r: leg(t, r, VALUES[t][r]), upto=0)
    assert found.keep == kept
    assert all("sweep.budget pays for 1 more" in why for why in found.reasons.values())


@pytest.mark.parametrize("error", [JobFailed("the loss is nan"), MachineFailed("the disk is full")])
def test_a_leg_is_a_failed_row_unless_the_machine_failed(
    error: JobFailed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is kept for good; what the machine did is mended, and the leg is run again."""
    job = Job(id="leg:0.0", kind="leg", arm="full", key="k", devices=1, trial=0, rung=0)
    search = search_of()

    def trained(*arguments: Any) -> Iterator[Any]:
        raise error
        yield

    executor = SimpleNamespace(
        trial_of=lambda job: search.trials[0],
        leg_search=lambda arm: search,
        plan=SimpleNamespace(legs=lambda arm: [job]),
        directory=lambda job: JobDirectory(tmp_path, job.key),
        train_job=lambda job, arm: (None, tmp_path),
        trained=trained,
    )
    monkeypatch.setattr(leg_jobs, "as_leg", lambda train_job, trial: train_job)
    events = leg_jobs.leg_events(cast(Any, executor), job)
    if isinstance(error, MachineFailed):
        with pytest.raises(MachineFailed, match="the disk is full"):
            list(events)
    else:
        (row,) = events
        assert (row.status, row.reason) == ("failed", "the loss is nan")
