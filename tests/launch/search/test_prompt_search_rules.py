"""The search of a prompted arm as an evaluator runs it: rungs, rules, budget, a second attempt."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.records import LedgerLine, Measured
from conf.resolve import resolve_arms
from conf.sweep_records import RungDecision, RungRecord, SweepChoice, TrialRecord
from conf.sweeps import HalvingConfig, SweepBudgetConfig
from evaluation.tasks import Task
from launch.compose import compose_config
from launch.placement import Machine
from launch.search.halving import decide, rung_shares
from launch.search.prompt_search import (
    MIN_ITEMS,
    STATE,
    Rules,
    affordable,
    prompt_halving,
    why_not_together,
)
from launch.search.trials import check_space
from launch.workers import AnswerWork, Evaluator, SearchWork

CPU = Machine(devices=1, devices_per_node=1, device="cpu", name="1 x test")
WORDINGS = "[Name the topic,What is it about,Say the topic,Topic]"
Make = Callable[..., SearchWork]


@pytest.fixture
def make_work(tiny_model_dir: Path, topic_task: Task, tmp_path: Path) -> Make:
    """make_work(*overrides) -> a search of the zero-shot arm's wordings on the topic task."""

    def make(*overrides: str) -> SearchWork:
        config = compose_config(
            [
                "+exp=zero_shot",
                "model=tiny",
                "sweep=grid",
                f"sweep.space.zero_shot.instruction={WORDINGS}",
                "arms.zero_shot.answer_by=score",
                *overrides,
            ]
        )
        arms = resolve_arms(config)
        trials = check_space(config, arms)["zero_shot"]
        base = AnswerWork(
            job="search:zero_shot",
            arm=arms["zero_shot"],
            sets=(),
            task=topic_task,
            model_dir=tiny_model_dir,
            adapter_dir=None,
            step=None,
            train_seed=None,
            machine=CPU,
            devices=1,
            plugins=(),
            rule=None,
            num_labels=None,
            usd_per_device_second=0.5,
            done=(),
            log_path=tmp_path / "log.txt",
        )
        return SearchWork(
            base=base,
            trials=trials,
            halving=config.sweep.halving,
            budget=config.sweep.budget,
            seed=config.sweep.seed,
            state_path=tmp_path / STATE,
        )

    return make


def run(work: SearchWork) -> list[Any]:
    return [event for part in Evaluator().search(work) for event in part]


def of(events: Sequence[Any], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_an_evaluator_searches_wordings(make_work: Make) -> None:
    work = make_work()
    events = run(work)
    trials = of(events, TrialRecord)
    assert [t.values for t in trials] == [{"instruction": t.arm.answering.instruction}
                                          for t in work.trials]  # fmt: skip
    assert {t.status for t in trials} == {"done", "dropped"}
    assert all("go on" in t.reason for t in trials if t.status == "dropped")
    (choice,) = of(events, SweepChoice)
    assert choice.trained_parameters == 0 and trials[choice.setting].status == "done"
    loading, *lines = of(events, LedgerLine)
    assert loading.purpose == "padding" and 0 < loading.tokens < 100
    assert sum(t.tokens for t in trials) == sum(line.tokens for line in lines) > 0
    sizes = [r.value.n for r in of(events, RungRecord) if r.trial == choice.setting]
    assert sizes == sorted(sizes) and sizes[-1] == 28 and sizes[1] >= MIN_ITEMS
    assert events[-1] is choice


def test_a_second_attempt_goes_on(make_work: Make) -> None:
    work = make_work()
    whole = run(work)
    done = tuple(whole[: whole.index(of(whole, RungDecision)[1]) + 1])
    again = run(dataclasses.replace(work, done=done))
    assert len(of(again, LedgerLine)) == 1, "answers were saved; the model is loaded again"
    assert of(again, SweepChoice) == of(whole, SweepChoice)
    assert of([*done, *again], RungDecision) == of(whole, RungDecision)
    assert of(again, TrialRecord) == of(whole, TrialRecord)


def test_a_budget_leaves_out_what_it_cannot_pay(make_work: Make) -> None:
    whole = run(make_work("sweep.halving.eta=2"))
    first = of(whole, RungDecision)[1]
    assert len(first.keep) == 2
    cheap = make_work("sweep.halving.eta=2", "sweep.budget.max_tokens=1")
    cheap.state_path.unlink()
    events = run(cheap)
    assert [len(d.keep) for d in of(events, RungDecision)][1] == 1
    reasons = [t.reason for t in of(events, TrialRecord) if t.status == "dropped"]
    assert sum("sweep.budget pays for 1 more" in reason for reason in reasons) == 1
    assert len(of(events, SweepChoice)) == 1


def rung_record(trial: int, rung: int, tokens: int) -> RungRecord:
    return RungRecord(
        arm="a", trial=trial, rung=rung, step=0, metric="accuracy", value=Measured(value=0.5),
        tokens=tokens,
    )  # fmt: skip


def test_what_a_budget_pays_for_by_hand() -> None:
    halving = HalvingConfig(first_rung=0.1, eta=3)  # rungs at 0.05, 0.1, 0.3 and 1
    assert rung_shares(halving) == pytest.approx((0.05, 0.1, 0.3, 1.0))
    records = [rung_record(t, rung, 50) for t in range(6) for rung in (0, 1)]  # 600 tokens
    decision = RungDecision(arm="a", rung=1, keep=(0, 1, 2), drop=(3, 4, 5), failed=(), reasons={})

    def limit(**caps: float) -> int | None:
        rules = Rules(arm="a", settings={t: t for t in range(6)}, halving=halving, caps=caps)
        return affordable(records, decision, rules)

    # To the next rung 200 tokens a setting, and 700 more for the one that goes to the end.
    assert limit(tokens=600 + 700 + 3 * 200 + 1) == 3  # shares are floats
    assert limit(tokens=600 + 700 + 3 * 200 - 1) == 2
    assert limit(tokens=10) == 1
    assert limit() is None
    before = dataclasses.replace(decision, rung=0)
    rules = Rules(arm="a", settings={t: t for t in range(6)}, halving=halving, caps={"tokens": 1})
    assert affordable(records, before, rules) is None, "the next rung is paid for already"


@pytest.mark.parametrize(("num_items", "first"), [(400, 0.07), (48, 5 / 48), (6, 0.5), (1, 0.5)])
def test_rungs_of_prompts(num_items: int, first: float) -> None:
    halving = prompt_halving(HalvingConfig(), num_items=num_items)
    assert halving.first_rung == pytest.approx(first)
    assert halving.min_correlation == -1, "no grace"
    shares = rung_shares(halving)
    assert list(shares) == sorted(shares) and shares[-1] == 1.0


def test_twenty_wordings_cost_four_of_one() -> None:
    """By items alone: what prefixes add is measured by the benchmark."""
    shares = rung_shares(prompt_halving(HalvingConfig(), num_items=1000))
    cost, before, live = 0.0, 0.0, 20
    for rung, share in enumerate(shares):
        cost += live * (share - before)
        before, live = share, live if rung == 0 else -(-live // 3)
    assert cost == pytest.approx(4.0, abs=0.05)


def test_without_halving_all_are_asked_about_everything(make_work: Make) -> None:
    events = run(make_work("sweep.halving.enabled=false"))
    assert {t.status for t in of(events, TrialRecord)} == {"done"}
    assert [r.value.n for r in of(events, RungRecord)] == [28] * 4


def test_trials_need_one_engine(make_work: Make) -> None:
    work = make_work()
    assert why_not_together(work.trials) is None
    other = work.trials[1]
    model = dataclasses.replace(other.arm.model, layout="chat")
    arm = dataclasses.replace(other.arm, model=model)
    trials = (work.trials[0], dataclasses.replace(other, arm=arm))
    assert "differ in model" in (why_not_together(trials) or "")
    assert SweepBudgetConfig() == work.budget


def searched_well(halving: HalvingConfig, *, num_items: int, spread: float, times: int) -> float:
    """Share of made searches of 20 prompts that end within a standard error of the best.

    An item is right where prompt + item + noise are above 0; spread: of the prompts' accuracies.
    """
    source = np.random.default_rng(0)
    members = {trial: trial for trial in range(20)}
    found = 0
    for _ in range(times):
        prompts, items = source.normal(1, 5 * spread, 20), source.normal(0, 1, num_items)
        right = prompts[:, None] + items + source.normal(0, 0.7, (20, num_items)) > 0
        live, scores = members, []
        for share in rung_shares(halving):
            count = math.ceil(share * num_items)
            scores.append({trial: float(right[trial, :count].mean()) for trial in live})
            kept = decide("a", scores, members=live, halving=halving).keep
            live = {trial: trial for trial in kept}
        last, best = scores[-1], float(right.mean(axis=1).max())
        error = math.sqrt(best * (1 - best) / num_items)
        found += max(last.values()) >= best - error
    return found / times


@pytest.mark.parametrize(
    ("num_items", "spread", "half", "whole"), [(200, 0.03, 0.75, 0.9), (400, 0.08, 0.88, 0.96)]
)
def test_what_half_the_first_rung_costs_in_quality(
    num_items: int, spread: float, half: float, whole: float
) -> None:
    rules = prompt_halving(HalvingConfig(), num_items=num_items)
    case: dict[str, Any] = {"num_items": num_items, "spread": spread, "times": 200}
    assert searched_well(rules, **case) >= half
    assert searched_well(dataclasses.replace(rules, first_rung=0.14), **case) >= whole
