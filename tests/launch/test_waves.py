"""Waves: their items, their jobs, how scheduler and judge end them, and that a resumed run agrees.

Jobs are made up here; test_waves_run.py has the real command.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ConfigError
from conf.records import AnswerRule, Item, SampleRecord
from evaluation.records.run_records import read_run
from evaluation.results.summary import summarise
from launch.budget import Budget
from launch.compose import compose_config
from launch.evaluators import Evaluators
from launch.jsonl import read_lines
from launch.planned import Job
from launch.preflight import Checked, check
from launch.recorder import is_finished
from launch.run import Run, _member, opened, run_jobs
from launch.scheduler import JobState, Scheduler
from launch.together import Runs, joined
from launch.waves import SHARES, check_waves, share_of, wave_task, waves_of
from tests.launch.test_plan import keys, plan
from tests.launch.test_scheduler import run as schedule

RIGHT = {"zero_shot": 0.3, "few_shot": 0.92, "role_play": 0.35, "other": 0.9, "tfidf": 0.5}


def items(groups: list[str | None]) -> tuple[Item, ...]:
    return tuple(
        Item(id=f"i{k}", split="test", input="x", sha256="", label="a", group=group)
        for k, group in enumerate(groups)
    )


@given(st.integers(1, 60), st.integers(0, 5))
def test_waves_part_the_items_by_their_shares(count: int, seed: int) -> None:
    own = items([None] * count)
    waves = waves_of(own, seed=seed)
    assert sorted(i.id for wave in waves for i in wave) == sorted(i.id for i in own)
    ends = [sum(map(len, waves[: k + 1])) for k in range(len(SHARES))]
    assert all(
        share * count <= end < share * count + 1 for share, end in zip(SHARES, ends, strict=True)
    )
    assert sum(share_of(k) for k in range(len(SHARES))) == share_of(None) == 1
    backwards = waves_of(own[::-1], seed=seed)
    assert [{i.id for i in wave} for wave in backwards] == [{i.id for i in w} for w in waves]


def test_the_seed_makes_the_order_and_sources_stay_together() -> None:
    own = items([None] * 80)
    assert waves_of(own, seed=0)[0] != waves_of(own, seed=1)[0]
    shared = items([f"passage {k // 4}" for k in range(80)])
    for wave in waves_of(shared, seed=0):
        groups = [i.group for i in wave]
        assert all(groups.count(group) == 4 for group in groups)


def test_a_plan_has_all_waves_and_keeps_its_keys_without_them() -> None:
    plain, waved = plan("+exp=compare"), plan("+exp=compare", "decision.stop_early=true")
    before, after = keys(plain), keys(waved)
    assert all(after[name] == before[name] for name in before if not name.startswith("evaluate"))
    jobs = {job.id: job for job in waved.jobs}
    others = {name for name in jobs if name not in before}
    assert others == {n + f":{k}" for n in before if n.startswith("evaluate:") for k in (1, 2, 3)}
    last = jobs["evaluate:lora:2"]
    assert last.depends_on == ("evaluate:lora:1",) and last.wave == 2
    assert {"evaluate:lora:1", "evaluate:few_shot:1", "reference:tfidf"} <= set(last.after)
    assert "latency:few_shot" in last.after
    assert jobs["latency:lora"].depends_on == ("evaluate:lora",)
    evaluations = [key for name, key in after.items() if name.startswith("evaluate")]
    assert len(set(evaluations)) == len(evaluations)
    other_order = keys(plan("+exp=compare", "decision.stop_early=true", "task.seed=1"))
    assert all(other_order[n] != after[n] for n in jobs if n.startswith("evaluate"))


def test_errors_with_a_price_are_refused() -> None:
    config = compose_config(["+exp=compare", "decision.stop_early=true", "decision.error_usd=1"])
    with pytest.raises(ConfigError, match="stop_early"):
        check_waves(config.decision)


def a_job(name: str, *, needs: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> Job:
    return Job(id=name, kind="evaluate", arm=None, key=name, depends_on=needs, after=after)


def test_a_cancelled_job_takes_what_needs_it_along_and_nothing_else() -> None:
    jobs = [
        a_job("a"),
        a_job("broken"),
        a_job("b", needs=("a",), after=("a", "broken")),
        a_job("c", needs=("b",), after=("b",)),
        a_job("d", after=("b",)),
        a_job("done", after=("a",)),
    ]
    asked = []

    def work(job: Job) -> Iterator[str]:
        if job.id == "broken":
            raise ValueError("broken")
        yield job.id

    def why(job: Job) -> str | None:
        asked.append(job.id)
        return "enough" if job.id in ("b", "done") else None

    states, log = schedule(jobs, work, finished=frozenset({"done"}), why_cancelled=why)
    found = {name: state.status for name, state in states.items()}
    assert [name for name, end in found.items() if end == "cancelled"] == ["b", "c", "done"]
    assert (found["a"], found["broken"], found["d"]) == ("done", "failed", "done")
    assert states["c"].reason == "enough" and "a" not in asked
    assert set(log.started) == {"a", "broken", "d"}


# A run of made-up answers, with real scheduler, recorder, judge and report.


def checked_run(root: Path, *overrides: str) -> Checked:
    arms = ("+method@arms.role_play=role_play", "+method@arms.other=few_shot", "arms.other.draw=1")
    command = ["+exp=smoke", *arms, f"run.root={root}", "run.name=r", "task.limit.test=160"]
    config = compose_config([*command, "decision.stop_early=true", *overrides])
    return check(config, exp="smoke", command="test")


def answers(job: Job, checked: Checked) -> Iterator[Any]:
    """What a job leaves: right in a share of the items, the same ones each time."""
    if job.kind not in ("evaluate", "latency", "reference"):
        return
    assert job.arm is not None
    if job.kind == "evaluate" and not job.wave:
        yield AnswerRule(arm=job.arm, answer_by="score")
    task = wave_task(checked.task, job.wave, seed=checked.config.task.seed)
    own = task.items["test"][: 8 if job.kind == "latency" else None]
    for item in own:
        place = int(item.sha256[:6], 16) % 1000 / 1000
        right = place < RIGHT[job.arm]
        yield SampleRecord(
            arm=job.arm,
            item_id=item.id,
            set="latency" if job.kind == "latency" else "test",
            is_correct=right,
            score=float(right),
            target=item.label,
            answer=item.label if right else "?",
            total_seconds=0.01 if job.kind == "latency" else None,
        )


def ignore(*args: Any, **kwargs: Any) -> None:
    pass


def run_made_up(checked: Checked, *, stop_after: int | None = None) -> dict[str, JobState]:
    """One invocation; it is interrupted once so many jobs were started."""
    with opened({"": checked}) as (run,):
        budget = Budget(config=checked.config.budget, pricing=checked.config.pricing)
        started: list[str] = []

        def work(job: Job) -> Iterator[Any]:
            started.append(job.id)
            if stop_after is not None and len(started) > stop_after:
                runs.halt = KeyboardInterrupt("stop")
            yield from answers(job, checked)

        member = _member(run, budget, Evaluators(machine=checked.machine))
        member = dataclasses.replace(member, run_job=work)
        live = SimpleNamespace(start=ignore, event=ignore, end=ignore, tick=ignore, note=ignore)
        runs = Runs(members={"": member}, budget=budget, live=cast(Any, live))
        scheduler = Scheduler(
            plan=joined({"": checked.plan}),
            slots=2,
            run_job=runs.run_job,
            listener=runs,
            may_start=runs.refusal,
            is_retryable=lambda error: False,
            is_finished=lambda job: is_finished(checked.root, job),
            why_cancelled=runs.why_cancelled,
        )
        try:
            return scheduler.run()
        except KeyboardInterrupt:
            return scheduler.states


def told(root: Path, event: str) -> list[dict[str, Any]]:
    found = []
    for line in read_lines(root / "r/journal.jsonl"):
        data = {k: v for k, v in line["data"].items() if k != "inputs_sha256"}
        if line["event"] == event and data not in found:
            found.append(data)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checked, dict[str, JobState]]:
    checked = checked_run(tmp_path_factory.mktemp("waves"))
    return checked, run_made_up(checked)


def status(states: dict[str, JobState]) -> dict[str, str]:
    return {n: "done" if s.status == "reused" else s.status for n, s in states.items()}


def test_arms_behind_leave_and_the_close_ones_go_on(
    whole: tuple[Checked, dict[str, JobState]],
) -> None:
    checked, states = whole
    asked = {
        arm: sum(states[f"evaluate:{arm}{end}"].status == "done" for end in ("", ":1", ":2", ":3"))
        for arm in ("zero_shot", "role_play", "few_shot", "other")
    }
    assert asked["zero_shot"] < asked["few_shot"] and asked["role_play"] < asked["few_shot"]
    judged = told(checked.root, "wave_judged")
    for before, after in itertools.pairwise(judged):
        now = {(c["a"], c["b"]): c for c in after["comparisons"]}
        for pair in before["comparisons"]:
            if {pair["a"], pair["b"]} & set(before["left"]):  # no further item: as it was
                assert now[pair["a"], pair["b"]] == pair | {"trailing": mock.ANY}
    closed = told(checked.root, "comparison_closed")
    pairs = [(c["a"], c["b"]) for c in closed]
    assert len(set(pairs)) == len(pairs) == 10
    different = {(c["a"], c["b"]) for c in closed if c["state"] == "different"}
    assert ("zero_shot", "few_shot") in different
    assert "cancelled" in status(states).values() and "failed" not in status(states).values()


def test_the_report_shows_confidence_sequences_and_no_p(
    whole: tuple[Checked, dict[str, JobState]],
) -> None:
    checked, _ = whole
    results = summarise(read_run(checked.root / "r"))
    assert len(results.pairs) == 10
    for pair in results.pairs:
        assert pair.method == "confidence_sequence" and pair.e_value is not None
        assert pair.p_value is None and pair.p_adjusted is None
    worse = next(p for p in results.pairs if (p.a, p.b) == ("zero_shot", "few_shot"))
    assert worse.high is not None and worse.high < 0 and worse.n < 160
    last = told(checked.root, "wave_judged")[-1]
    found = {(c["a"], c["b"]): c for c in last["comparisons"]}
    for pair in results.pairs:
        judged = found[pair.a, pair.b]
        if {pair.a, pair.b} & set(last["left"]):
            ours = (pair.low, pair.high, pair.n, pair.e_value)
            assert ours == pytest.approx(tuple(judged[k] for k in ("low", "high", "n", "e_value")))


@pytest.mark.parametrize("stop_after", [5, 16])
def test_an_interrupted_run_decides_as_a_whole_one(
    whole: tuple[Checked, dict[str, JobState]], stop_after: int, tmp_path: Path
) -> None:
    first, states = whole
    checked = checked_run(tmp_path)
    cut = run_made_up(checked, stop_after=stop_after)
    assert not all(state.is_over for state in cut.values())
    again = run_made_up(checked)
    assert status(again) == status(states)
    for event in ("comparison_closed", "wave_judged"):
        assert told(checked.root, event) == told(first.root, event)


def test_the_same_command_again_runs_nothing(
    whole: tuple[Checked, dict[str, JobState]],
) -> None:
    checked, states = whole
    for _ in range(2):
        with opened({"": checked}) as (run,):
            assert run.num_pending == 0
            run_jobs([cast(Run, run)], cast(Any, None))
            left_out = {job.id for job in run.cancelled}
            assert left_out == {n for n, s in states.items() if s.status == "cancelled"}
    with opened({"": checked_run(checked.root, "decision.confidence=0.99")}) as (run,):
        assert run.num_pending == len(left_out)  # other rules may need them


def test_a_failed_arm_holds_nobody_up(tmp_path: Path) -> None:
    checked = checked_run(tmp_path)
    real = dict(RIGHT)
    try:
        del RIGHT["other"]  # its answers fail
        states = run_made_up(checked)
    finally:
        RIGHT.update(real)
    assert states["evaluate:other"].status == "failed"
    assert states["evaluate:other:1"].status == "skipped"
    assert states["evaluate:few_shot:1"].status in ("done", "cancelled")
    assert all("other" not in (c["a"], c["b"]) for c in told(tmp_path, "comparison_closed"))
    assert json.loads((tmp_path / "r/config.json").read_text())["config"]["decision"]["stop_early"]
