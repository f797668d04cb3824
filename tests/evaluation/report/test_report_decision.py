"""The page's rules equal Python's at random settings, in node and in a real browser."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.records import AnswerRule, Measured
from conf.results import ArmResult, Cost, Latency, Metric, Pair, Recommendation, Results
from conf.run_groups import DecisionConfig
from evaluation.decision.rules import Evidence, choose, loss_usd, total_cost
from evaluation.decision.sensitivity import repriced
from evaluation.decision.words import verdict_of
from evaluation.records.run_records import read_run
from evaluation.report.page_decision import decision_data
from evaluation.results.summary import summarise
from tests.evaluation import fake_run, page_rules

HOUR = fake_run.CHEAP_PRICE.device_hour.usd
LIMITED = DecisionConfig(
    minimum_metric=0.6,
    minimum_format_validity=0.9,
    maximum_p95_seconds=0.15,
    maximum_total_usd=5.0,
    error_usd=1e-5,
    label_usd=0.02,
    changes_per_month=0.5,
)
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"num_test": 60},
    "limits": {"num_test": 60, "decision": LIMITED},
    "money": {"num_test": 60, "decision": DecisionConfig(error_usd=3e-7, label_usd=0.01)},
    "wide margin": {"num_test": 60, "decision": DecisionConfig(equivalence_margin=0.4)},
    "unpriced": {"num_test": 40, "pricing": fake_run.NO_PRICE},
    "nobody": {"num_test": 40, "decision": DecisionConfig(minimum_metric=0.999)},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    found = {}
    for name, options in RUNS.items():
        root = tmp_path_factory.mktemp("run")
        arms = {
            a: fake_run.SPAM_ARMS[a] for a in ("zero_shot", "few_shot", "lora", "full", "tfidf")
        }
        fake_run.write_spam_run(root, arms=arms, **options)
        found[name] = summarise(read_run(root))
    return found


def random_results(draw: random.Random) -> Results:
    """Any finished arms: unknown costs, limits that were not measured, pairs that are missing."""
    names = [f"arm_{i}" for i in range(draw.randint(1, 5))]
    arms = {name: random_arm(draw) for name in names}
    pairs = []
    for i, a in enumerate(names):
        for b in names[:i]:
            if draw.random() < 0.1:
                continue
            x, y = (arms[n].metric for n in (a, b))
            d = None if x is None or y is None else (x.value or 0.0) - (y.value or 0.0)
            half = draw.choice([0.003, 0.02, 0.055, 0.1])
            p = draw.choice([None, 1e-4, 0.04, 0.5])
            pair = Pair(a=a, b=b, difference=d, low=None, high=None, p_value=p, p_adjusted=p, n=80)
            if d is not None:
                below, above = (half * draw.choice([0.6, 1.0, 1.4]) for _ in range(2))
                pair = replace(pair, low=d - below, high=d + above)
            if p is not None:
                pair = replace(pair, p_adjusted=min(1.0, p * draw.choice([1, 2, 3])))
            pairs.append(pair)
    decision = {
        "requests_per_month": 1e5,
        "horizon_months": 12.0,
        "minimum_metric": draw.choice([None, None, None, None, None, 0.5]),
        "minimum_format_validity": draw.choice([None, None, None, None, None, 0.5]),
        "minimum_consistency": draw.choice([None, None, None, None, None, 0.5]),
        "maximum_p95_seconds": draw.choice([None, None, None, None, None, 0.5]),
        "maximum_total_usd": draw.choice([None, None, None, None, 50.0]),
        "deadline_hours": draw.choice([None, None, None, None, None, 0.5]),
        "error_usd": None,
        "changes_per_month": draw.choice([0.0, 0.3]),
        "equivalence_margin": draw.choice([0.0, 0.02, 0.05]),
        "confidence": 0.95,
    }
    return Results(
        run="random",
        task={},
        model={},
        arms=arms,
        pairs=tuple(pairs),
        break_even=(),
        recommendation=Recommendation(arm=None, verdict=""),
        ledger=(),
        pricing={"device_hour": {"usd": HOUR}},
        decision=decision,
    )


def random_arm(draw: random.Random) -> ArmResult:
    def maybe(value: float) -> float | None:
        return None if draw.random() < 0.1 else value

    seconds = draw.uniform(0.01, 2.0)
    measured = Measured(value=seconds, low=maybe(0.9 * seconds), high=maybe(1.2 * seconds), n=8)
    if draw.random() < 0.15:
        measured = Measured()
    usd = seconds * HOUR / 3600
    cost = Cost(
        fixed_usd=maybe(draw.choice([0.0, 1.0, 20.0])),
        fixed_device_seconds=draw.uniform(0, 1e5),
        request_usd=Measured(value=usd, low=0.7 * usd, high=1.1 * usd, n=8),
        request_device_seconds=measured,
    )
    share = draw.choice([0.5, 0.61, 0.62, 0.9])
    metric = Metric(name="accuracy", value=maybe(share), low=share - 0.1, high=share + 0.05, n=80)
    return ArmResult(
        kind=draw.choice(["prompt", "lora", "full", "tfidf", "given"]),
        status=draw.choice(["done", "done", "done", "failed"]),
        metric=metric,
        format_validity=draw.choice([None, Measured(value=0.4, n=80), Measured(value=0.6, n=80)]),
        consistency=draw.choice([None, Measured(value=0.7, n=80)]),
        latency=draw.choice([None, Latency(p95_seconds=Measured(value=seconds))]),
        ready_seconds=maybe(draw.uniform(0, 3600)),
        cost=draw.choice([cost, cost, cost, None]),
        answer_rule=AnswerRule(arm="a", answer_by=draw.choice(["score", "generate"])),
    )


def random_settings(draw: random.Random, *, price: float | None) -> dict[str, float | None]:
    """What four sliders can be set to."""
    return {
        "requests_per_month": float(f"{10 ** draw.uniform(1, 9):.3g}"),
        "horizon_months": float(draw.randint(1, 60)),
        "usd_per_hour": draw.choice([price, price and price * 10 ** draw.uniform(-2, 2)]),
        "error_usd": draw.choice([None, 10 ** draw.uniform(-9, -2), 10 ** draw.uniform(-6, 2)]),
    }


def at_settings(
    results: Results, settings: dict[str, float | None]
) -> tuple[Evidence, DecisionConfig]:
    """The same settings for Python's rules."""
    known = DecisionConfig.__dataclass_fields__
    own = DecisionConfig(**{k: v for k, v in results.decision.items() if k in known})  # type: ignore[arg-type]
    decision = replace(own, **{k: v for k, v in settings.items() if k != "usd_per_hour"})  # type: ignore[arg-type]
    arms, price = dict(results.arms), results.pricing["device_hour"]["usd"]  # type: ignore[index]
    new = settings["usd_per_hour"]
    if price and new and new != price:
        factor, second = new / price, price / 3600
        arms = {n: repriced(r, factor=factor, usd_per_second=second) for n, r in arms.items()}
    return Evidence(arms=arms, pairs=results.pairs), decision


def assert_equal(
    results: Results, settings: list[dict[str, float | None]], answers: list[Any]
) -> list[str]:
    """Every answer of the page against Python's; the states that were met."""
    states = []
    for setting, answer in zip(settings, answers, strict=True):
        evidence, decision = at_settings(results, setting)
        choice = choose(evidence, decision=decision)
        expected = (choice.state, choice.arm, choice.leader, choice.rival, choice.more_items)
        given = tuple(answer[k] for k in ("state", "arm", "leader", "rival", "more_items"))
        assert given == expected, setting
        assert answer["verdict"] == verdict_of(choice)
        assert answer["standings"] == {s.arm: s.state for s in choice.standings}
        assert answer["rejected"] == {a: list(limits) for a, limits in choice.rejected.items()}
        for result, total, loss in zip(
            evidence.arms.values(), answer["totals"], answer["losses"], strict=True
        ):
            assert_close(total, total_cost(result, decision=decision).usd)
            assert_close(loss, loss_usd(result, decision=decision))
        states.append(choice.state)
    return states


def assert_close(given: float | None, expected: float | None) -> None:
    if expected is None:
        assert given is None
    else:
        assert given == pytest.approx(expected, rel=1e-12)


def case(results: Results, settings: list[dict[str, float | None]]) -> dict[str, Any]:
    pair = [results.decision.get(k) for k in ("best_prompted", "best_tuned")]
    return {
        "data": json.loads(json.dumps(decision_data(results), allow_nan=False)),
        "settings": settings,
        "pair": pair if all(pair) else None,
    }


def settings_of(results: Results, seed: int, count: int) -> list[dict[str, float | None]]:
    draw, price = random.Random(seed), results.pricing["device_hour"]["usd"]  # type: ignore[index]
    return [random_settings(draw, price=price) for _ in range(count)]


@pytest.mark.skipif(page_rules.NODE is None, reason="no node on PATH")
def test_the_pages_rules_equal_python_in_node(made: dict[str, Results]) -> None:
    runs = list(made.values())
    draw = random.Random(7)
    runs += [random_results(draw) for _ in range(250)]
    settings = [settings_of(r, i, 60 if i < len(made) else 12) for i, r in enumerate(runs)]
    answers = page_rules.in_node([case(r, s) for r, s in zip(runs, settings, strict=True)])
    met: set[str] = set()
    for results, setting, given in zip(runs, settings, answers, strict=True):
        met |= set(assert_equal(results, setting, given))
    assert met == {"take", "equal", "open", "none", "nothing"}


@pytest.mark.skipif(page_rules.BROWSER is None, reason="no chromium on PATH")
def test_the_pages_rules_equal_python_in_a_browser(
    made: dict[str, Results], tmp_path: Path
) -> None:
    settings = [settings_of(r, 100 + i, 50) for i, r in enumerate(made.values())]
    cases = [case(r, s) for r, s in zip(made.values(), settings, strict=True)]
    answers = page_rules.in_chromium(tmp_path, cases)
    for results, setting, given in zip(made.values(), settings, answers, strict=True):
        assert_equal(results, setting, given)


@pytest.mark.skipif(page_rules.NODE is None, reason="no node on PATH")
def test_break_even_moves_with_the_price_as_a_new_summary_says(tmp_path: Path) -> None:
    """Labels and wrong answers at a price: break-even depends on the device's, all made anew."""
    arms = {a: fake_run.SPAM_ARMS[a] for a in ("few_shot", "lora")}
    decision = DecisionConfig(label_usd=0.001)
    fake_run.write_spam_run(tmp_path, num_test=40, arms=arms, decision=decision)
    records = read_run(tmp_path)
    results = summarise(records)
    settings = [
        {**settings_of(results, 0, 1)[0], "usd_per_hour": HOUR * factor} for factor in (0.1, 1, 10)
    ]
    answers = page_rules.in_node([case(results, settings)])[0]
    found = []
    for setting, answer in zip(settings, answers, strict=True):
        device_hour = replace(records.pricing.device_hour, usd=setting["usd_per_hour"])
        again = summarise(
            records,
            pricing=replace(records.pricing, device_hour=device_hour),
            decision=replace(decision, error_usd=setting["error_usd"]),
        )
        expected = next(b for b in again.break_even if b.unit == "usd")
        given = answer["break_even"]
        assert (given["a"], given["b"], given["status"]) == (
            expected.a,
            expected.b,
            expected.status,
        )
        assert given["requests"] == pytest.approx(expected.requests, rel=1e-9)
        found.append(given["requests"])
    assert found[0] > found[1] > found[2] > 0 and math.isfinite(found[0])
