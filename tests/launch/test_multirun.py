"""`-m`: which runs a sweep has, what is refused, and several plans as one. Nothing is started."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import ConfigError, Refused
from conf.run_groups import BudgetConfig, PricingConfig
from launch.budget import Budget
from launch.combinations import Combination, combinations, is_sweep
from launch.compose import compose_config
from launch.multirun import checked_sweep, sweep_name, values
from launch.overrides import experiment_of
from launch.planned import Job, Plan
from launch.preflight import check
from launch.scheduler import Scheduler
from launch.together import Member, Runs, joined
from tests.launch.test_refusals import launch


def found(*arguments: str) -> list[Combination]:
    return combinations(["-m", *arguments], config_loader=None)


VALUES = st.lists(
    st.sampled_from(["1", "2.5", "a", "true", "null", "'x,y'"]), min_size=1, max_size=3
)


@settings(max_examples=20)
@given(st.lists(VALUES, min_size=1, max_size=3))
def test_the_combinations_are_those_of_hydras_own_sweeper(lists: list[list[str]]) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    arguments = [f"k{i}={','.join(dict.fromkeys(vs))}" for i, vs in enumerate(lists)]
    parsed = OverridesParser.create().parse_overrides(arguments)
    (theirs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    ours = found(*arguments)
    read = OverridesParser.create().parse_overrides
    assert [[o.value() for o in read(list(c.overrides))] for c in ours] == [
        [o.value() for o in read(overrides)] for overrides in theirs
    ]
    assert [c.number for c in ours] == list(range(1, len(ours) + 1))
    several = {f"k{i}" for i, vs in enumerate(lists) if len(set(vs)) > 1}
    assert all({key for key, _ in c.swept} == several for c in ours)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("k=range(1,7,2)", ["1", "3", "5"]),
        ("k=choice(a,b)", ["a", "b"]),
        ("k=[1,2],[3]", ["[1,2]", "[3]"]),
        ("+exp=zero_shot,few_shot", ["zero_shot", "few_shot"]),
        ("k=4,4,8", ["4", "8"]),
    ],
)
def test_values_are_read_as_hydra_reads_them(argument: str, expected: list[str]) -> None:
    key = argument.partition("=")[0]
    assert [c.overrides[-1] for c in found("a=1", argument)] == [f"{key}={v}" for v in expected]
    assert [c.swept[0][1] for c in found("a=1", argument)] == expected


def test_numbers_are_numbers_for_an_axis() -> None:
    (_, last) = found("a.rate=1e-4,3e-4", "b=x")
    assert values(last) == {"a.rate": 3e-4}
    assert [values(c) for c in found("k=2,x")] == [{"k": 2}, {"k": "x"}]


def test_a_command_alone_can_be_typed_in_a_shell() -> None:
    (first, _) = found("k='a b',c", "l=1")
    assert shlex.split(first.command)[-1] == "l=1"
    assert shlex.split(first.command)[2] == first.overrides[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["k=interval(0,1)"], "values that can be listed"),
        (["k=range(1,1)"], "which is no value"),
        (["--cfg", "k=1,2"], "overrides only"),
        (["hydra/launcher=joblib", "k=1,2"], "Hydra's own launchers"),
        (["hydra.sweep.dir=x", "k=1,2"], "Hydra's own launchers"),
    ],
)
def test_what_is_no_sweep_is_refused(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        found(*arguments)


def test_both_flags_are_known() -> None:
    assert is_sweep(["+exp=lora", "--multirun"]) and is_sweep(["-m"])
    assert not is_sweep(["+exp=lora", "k=-m"])


def smoke(root: Path, *arguments: str) -> list[str]:
    return ["-m", "+exp=smoke", f"run.root={root}", *arguments]


def test_each_run_is_the_one_its_command_makes_alone(tmp_path: Path) -> None:
    sweep = checked_sweep(smoke(tmp_path, "task.limit.test=8,12", "arms.few_shot.draw=0,1"))
    assert [c.label for c in sweep.combinations] == [
        f"task.limit.test={n} arms.few_shot.draw={d}" for n in (8, 12) for d in (0, 1)
    ]
    for combination, ours in list(zip(sweep.combinations, sweep.checks, strict=True))[1:2]:
        typed = shlex.split(combination.command)[2:]
        alone = check(compose_config(typed), exp=experiment_of(typed), command=combination.command)
        assert ours.name == alone.name and ours.command == alone.command
        assert ours.plan == alone.plan
    assert list(tmp_path.iterdir()) == []


def test_the_order_of_the_values_does_not_rename_a_sweep_and_another_value_does() -> None:
    def name(*runs: str) -> str:
        return sweep_name([cast(Any, SimpleNamespace(name=r, exp="lora")) for r in runs])

    assert name("a", "b") == name("b", "a") != name("a", "c")
    assert name("a", "b").startswith("sweep-lora-")


def test_experiments_and_presets_by_glob_are_values(tmp_path: Path) -> None:
    sweep = checked_sweep(
        ["-m", "+exp=zero_shot,few_shot", "zero=0,2", "model=tiny", f"run.root={tmp_path}"]
    )
    assert [c.exp for c in sweep.checks] == ["zero_shot", "zero_shot", "few_shot", "few_shot"]
    assert [c.config.zero.stage.value for c in sweep.checks] == [0, 2, 0, 2]
    assert sweep.name.startswith("sweep-several-")
    tasks = checked_sweep(smoke(tmp_path, "task=glob(*s*,exclude=[base*,file,hub])"))
    assert {c.task.name for c in tasks.checks} == {"orders", "sms_spam"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["task.limit.test=8,abc"], ["the combination task.limit.test=abc", "abc"]),
        (["trainer.lerning_rate=1,2"], ["trainer.lerning_rate=1", "Did you mean learning_rate"]),
        (["task=sms_spam,nope"], ["the combination task=nope"]),
        (["arms.few_shot.num_shots=2,999"], ["combination arms.few_shot.num_shots=999", "999 sho"]),
        (["cluster.workers=1,2"], ["cluster", "several values"]),
        (["budget.max_usd=1,2"], ["budget", "several values"]),
        (["run.name=x", "task.limit.test=8,9"], ["the same run, x", "leave run.name out"]),
        (["arms.few_shot.prompt=few_shot,'few_shot'"], ["the same run", "leave one of them out"]),
        (["task.limit.test=(8,9"], ["task.limit.test=(8"]),
    ],
)
def test_one_bad_combination_refuses_the_sweep(
    tmp_path: Path, arguments: list[str], says: list[str]
) -> None:
    with pytest.raises(Refused) as refusal:
        checked_sweep(smoke(tmp_path / "out", *arguments))
    for text in says:
        assert text in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_budget_must_fit_all_runs_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def estimated(plan: Plan, **facts: Any) -> Plan:
        jobs = [dataclasses.replace(j, devices=1) for j in plan.jobs]
        return Plan(
            jobs=tuple(
                dataclasses.replace(j, estimate=dataclasses.replace(j.estimate, seconds=10.0))
                for j in jobs
            )
        )

    monkeypatch.setattr("launch.preflight.with_estimates", estimated)
    one = checked_sweep(smoke(tmp_path, "task.limit.test=8"))
    seconds = 10.0 * len(one.checks[0].plan.jobs)
    budget = f"budget.max_device_seconds={seconds * 1.5}"
    with pytest.raises(ConfigError, match="budget that the plan fits"):
        checked_sweep(smoke(tmp_path, "task.limit.test=8,9", budget))


def test_dry_run_counts_shared_jobs_once_and_needs_no_heavy_library(tmp_path: Path) -> None:
    done = launch(*smoke(tmp_path / "out", "arms.few_shot.draw=0,1", "dry_run=true"))
    assert done.code == 0, done.text
    rows = [line.split() for line in done.text.splitlines() if "arms.few_shot.draw=" in line]
    # Of nine jobs, the model's with them, only the few-shot arm's three depend on the draw.
    assert [row[:4] for row in rows] == [
        ["1", "arms.few_shot.draw=0", "9", rows[0][3]],
        ["2", "arms.few_shot.draw=1", "9", "6"],
    ]
    (total,) = [line.split() for line in done.text.splitlines() if line.split()[:1] == ["all"]]
    assert total[1] == "12" and "Nothing was started" in done.text
    assert not (tmp_path / "out").exists()


def job(name: str, key: str, *after: str, devices: int = 1) -> Job:
    return Job(id=name, kind="evaluate", arm="a", key=key, depends_on=after, devices=devices)


def test_joined_plans_keep_their_own_order_and_share_equal_jobs() -> None:
    one = Plan(jobs=(job("t", "T"), job("e", "E1", "t")))
    two = Plan(jobs=(job("t", "T"), job("e", "E2", "t")))
    plan = joined({"1/": one, "2/": two})
    assert [j.id for j in plan.jobs] == ["1/t", "1/e", "2/t", "2/e"]
    assert [j.depends_on for j in plan.jobs] == [(), ("1/t",), ("1/t",), ("2/t",)]
    assert {j.arm for j in plan.jobs} == {"1/a", "2/a"}
    assert joined({"": plan}) == plan


class FakeRecorder:
    """Remembers what its run was told, under the run's own names."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def on_start(self, state: Any) -> None:
        self.told.append(("start", state.job.id))

    def on_event(self, state: Any, event: Any) -> None:
        self.told.append((str(event), state.job.id))

    def on_end(self, state: Any) -> None:
        self.told.append((state.status, state.job.id))

    def has_stepped(self, job: Job) -> bool:
        return False


def scheduled(
    plans: dict[str, Plan], *, fails: tuple[str, str] | None = None, slots: int = 2
) -> tuple[dict[str, FakeRecorder], dict[str, str]]:
    """Run plans together on made-up jobs; returns what each run was told, and how jobs ended."""
    recorders = {prefix: FakeRecorder() for prefix in plans}
    finished: set[str] = set()

    def run_job(prefix: str, job: Job) -> Iterator[str]:
        yield "event"
        if (prefix, job.id) == fails:
            raise ValueError("broken")
        finished.add(job.key)

    members = {
        prefix: Member(
            plan=plan,
            recorder=cast(Any, recorders[prefix]),
            run_job=lambda job, prefix=prefix: run_job(prefix, job),  # type: ignore[misc]
        )
        for prefix, plan in plans.items()
    }
    live = SimpleNamespace(**dict.fromkeys(("start", "event", "end", "tick", "note"), ignore))
    runs = Runs(
        members=members,
        budget=Budget(config=BudgetConfig(), pricing=PricingConfig()),
        live=cast(Any, live),
    )
    states = Scheduler(
        plan=joined(plans),
        slots=slots,
        run_job=runs.run_job,
        listener=runs,
        may_start=runs.refusal,
        is_retryable=lambda error: False,
        is_finished=lambda job: job.key in finished,
    ).run()
    return recorders, {name: state.status for name, state in states.items()}


def ignore(*args: Any) -> None:
    pass


def test_each_run_is_told_of_its_own_jobs_and_equal_ones_run_once() -> None:
    plans = {f"{n}/": Plan(jobs=(job("t", "T"), job("e", f"E{n}", "t"))) for n in range(1, 4)}
    recorders, statuses = scheduled(plans)
    assert statuses["1/t"] == "done" and statuses["2/t"] == statuses["3/t"] == "reused"
    assert recorders["1/"].told[:3] == [("start", "t"), ("event", "t"), ("done", "t")]
    for prefix in ("2/", "3/"):
        assert ("reused", "t") in recorders[prefix].told and ("done", "e") in recorders[prefix].told
    starts = [name for r in recorders.values() for what, name in r.told if what == "start"]
    assert sorted(starts) == ["e", "e", "e", "t"]


def test_a_failure_ends_nothing_of_other_runs() -> None:
    plans = {f"{n}/": Plan(jobs=(job("t", f"T{n}"), job("e", f"E{n}", "t"))) for n in range(1, 4)}
    _, statuses = scheduled(plans, fails=("2/", "t"))
    assert [statuses[f"{n}/e"] for n in (1, 2, 3)] == ["done", "skipped", "done"]
    assert statuses["2/t"] == "failed"


def test_runs_go_on_at_the_same_time_as_far_as_devices_allow() -> None:
    import threading

    together = threading.Barrier(2, timeout=30)

    def run_job(job: Job) -> Iterator[str]:
        together.wait()  # passes only where two jobs are in it at once
        yield "event"

    plans = {f"{n}/": Plan(jobs=(job("t", f"T{n}"),)) for n in range(1, 5)}
    members = {
        p: Member(plan=plan, recorder=cast(Any, FakeRecorder()), run_job=run_job)
        for p, plan in plans.items()
    }
    live = SimpleNamespace(**dict.fromkeys(("start", "event", "end", "tick", "note"), ignore))
    budget = Budget(config=BudgetConfig(), pricing=PricingConfig())
    runs = Runs(members=members, budget=budget, live=cast(Any, live))
    states = Scheduler(
        plan=joined(plans),
        slots=2,
        run_job=runs.run_job,
        listener=runs,
        may_start=runs.refusal,
        is_retryable=lambda error: False,
        is_finished=lambda job: False,
    ).run()
    assert {s.status for s in states.values()} == {"done"}
