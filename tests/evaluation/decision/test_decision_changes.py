"""Every change that the decision names is made, and the decision taken again."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from conf.decision_results import Change
from conf.results import ArmResult, Pair, Recommendation
from conf.run_groups import DecisionConfig
from evaluation.costs.cost import scaled
from evaluation.decision import decide
from evaluation.decision.rules import LIMITS, total_cost
from evaluation.decision.sensitivity import Knob, switches
from evaluation.statistics import normal_quantile
from tests.evaluation.changing_cases import CHANGING
from tests.evaluation.decision_cases import CASES, Case, arm, pair

ALL = [*CASES, *CHANGING]
NEAR = 1e-6
_DECIDED: dict[str, Recommendation] = {}


def decided(case: Case) -> Recommendation:
    """The recommendation as the case stands, made once."""
    if case.name not in _DECIDED:
        _DECIDED[case.name] = decide(case.evidence, decision=case.decision)
    return _DECIDED[case.name]


@pytest.mark.parametrize("case", CHANGING, ids=[c.name for c in CHANGING])
def test_verdicts_of_the_sets_that_change(case: Case) -> None:
    made = decided(case)
    assert made.verdict.startswith(case.verdict)
    assert made.arm == case.arm
    assert case.says in " ".join((*made.reasons, *made.would_change_if))


@pytest.mark.parametrize("case", ALL, ids=[c.name for c in ALL])
def test_what_would_change_it_does(case: Case) -> None:
    now = decided(case)
    ways = set()
    for change in now.changes:
        if change.at is None or change.what in ("items", "labels"):
            continue
        assert change.arm_then is None or change.arm_then != now.arm
        there = applied(case, change, is_beyond=True)
        assert (there.arm, there.verdict) == (change.arm_then, change.verdict_then), change
        if (change.what, change.direction) not in ways:  # the nearest one: up to it all is as now
            before = applied(case, change, is_beyond=False)
            assert before.arm == now.arm
            assert before.verdict.split(":")[0] == now.verdict.split(":")[0]
        ways.add((change.what, change.direction))


def applied(case: Case, change: Change, *, is_beyond: bool) -> Recommendation:
    """Decide again with the change made, just beyond or just short of where it was found."""
    assert change.at is not None
    is_above = change.direction == "above"
    at = change.at * (1 + (NEAR if is_above == is_beyond else -NEAR))
    evidence, decision = case.evidence, case.decision
    if change.what in LIMITS:
        # A limit is met by its own value, so beyond a looser one begins at the value itself.
        is_looser = is_above != change.what.startswith("minimum")
        if is_looser == is_beyond:
            at = change.at
        decision = replace(decision, **{change.what: at})
    match change.what:
        case "volume":
            decision = replace(decision, requests_per_month=at / decision.horizon_months)
        case "error_usd":
            decision = replace(decision, error_usd=at)
            if case.decision.error_usd is None and not is_beyond:
                return decide(evidence, decision=case.decision)
        case "device_price":
            assert case.usd_per_hour is not None
            arms = {n: at_price(case, n, a, usd_per_hour=at) for n, a in case.arms.items()}
            evidence = replace(evidence, arms=arms, usd_per_device_hour=at)
        case "prompt_length":
            name = "few_shot"
            result = case.arms[name]
            assert result.cost is not None and result.tokens is not None
            usd = result.cost.request_usd.value
            more = case.usd_per_prompt_token[name] * (at - (result.tokens.prompt.value or 0))
            assert usd is not None
            cost = replace(result.cost, request_usd=scaled(result.cost.request_usd, 1 + more / usd))
            evidence = replace(evidence, arms={**case.arms, name: replace(result, cost=cost)})
    return decide(evidence, decision=decision)


def at_price(case: Case, name: str, result: ArmResult, *, usd_per_hour: float) -> ArmResult:
    """The arm's cost from its device-seconds at this price, and what labels cost beside it."""
    cost = result.cost
    if cost is None or cost.request_device_seconds.value is None:
        return result
    price = usd_per_hour / 3600
    assert cost.fixed_device_seconds is not None
    fixed = cost.fixed_device_seconds * price + case.labels_usd.get(name, 0.0)
    request = scaled(cost.request_device_seconds, price)
    return replace(result, cost=replace(cost, fixed_usd=fixed, request_usd=request))


def test_the_table_reaches_every_verdict_and_every_change() -> None:
    made = [decided(case) for case in ALL]
    assert len({case.name for case in ALL}) == len(ALL) >= 12
    verdicts = {m.verdict.split(" ")[0] for m in made}
    assert verdicts == {"take", "practically", "too", "none", "no"}
    assert any(m.verdict == "too close to call" for m in made)
    assert any(m.verdict.startswith("too close to call: about") for m in made)
    assert any("Neither fine-tuning nor prompting wins" in r for m in made for r in m.reasons)
    found = {(c.what, c.direction) for m in made for c in m.changes if c.at is not None}
    both = {(what, way) for what in ("volume", "error_usd", "device_price", "labels", *LIMITS)
            for way in ("above", "below")}  # fmt: skip
    assert found >= both | {("items", "above"), ("prompt_length", "below")}
    assert any(c.direction == "without" and c.what in LIMITS for m in made for c in m.changes)


def test_the_items_named_settle_the_pair() -> None:
    for case in ALL:
        now = decided(case)
        more = next((c for c in now.changes if c.what == "items"), None)
        if now.arm is not None or more is None or more.at is None:
            continue
        pairs = [with_items(p, more.at) for p in case.pairs]
        later = decide(replace(case.evidence, pairs=pairs), decision=case.decision)
        assert later.arm is not None, case.name


def with_items(p: Pair, more: float) -> Pair:
    """The pair with so many more items at the same difference and spread, and its p-value."""
    assert p.difference is not None and p.low is not None and p.high is not None
    half = (p.high - p.low) / 2 * math.sqrt(p.n / (p.n + more))
    z = abs(p.difference) / (half / normal_quantile(0.95))
    p_value = math.erfc(z / math.sqrt(2))
    if p.p_value is None or p.p_adjusted is None:
        return replace(p, n=round(p.n + more), low=p.difference - half, high=p.difference + half)
    factor = p.p_adjusted / p.p_value
    return replace(
        p,
        n=round(p.n + more),
        low=p.difference - half,
        high=p.difference + half,
        p_value=p_value,
        p_adjusted=p_value * factor,
    )


def change_of(made: Recommendation, what: str, direction: str) -> Change:
    return next(c for c in made.changes if (c.what, c.direction) == (what, direction))


def test_the_crossings_equal_their_closed_forms() -> None:
    case = CHANGING[0]
    made = decided(case)
    # fixed 12 USD more, 2e-6 USD a request less
    assert change_of(made, "volume", "above").at == pytest.approx(12 / 2e-6, rel=1e-9)
    # labels 10 USD; at f times the price: 10 + 2 f = 2e-6 f x 1.2e6 requests, f = 25
    assert change_of(made, "device_price", "above").at == pytest.approx(25 * 0.036, rel=1e-9)
    # 12 + 1.2 = 1.2e6 x (3e-6 + 5e-9 (tokens - 480)): the few-shot prompt at 2,080 tokens
    assert change_of(made, "prompt_length", "above").at == pytest.approx(2080, rel=1e-9)
    assert change_of(made, "labels", "above").at == 250.0


def test_money_crossings_equal_their_closed_forms() -> None:
    case = next(c for c in CHANGING if "from an error's price on" in c.name)
    made = decided(case)
    # zero_shot is out where 5000 USD = 1.2e6 x usd x what full is ahead by, at the least or most;
    # the margin makes no arm equal here, since the interval is wider than it.
    ats = [c.at for c in made.changes if c.what == "error_usd"]
    assert ats == pytest.approx([5000 / 1.2e6 / 0.25, 5000 / 1.2e6 / 0.15], rel=1e-9)
    volumes = [c.at for c in made.changes if c.what == "volume"]
    assert volumes == pytest.approx([5000 / 1e-3 / 0.25, 5000 / 1e-3 / 0.15], rel=1e-9)
    assert [c.arm_then for c in made.changes if c.what == "volume"] == [None, "full"]


def test_several_switches_within_one_step_are_found_in_order() -> None:
    arms = {name: arm(0.9, fixed=f, request=r) for name, f, r in
            (("a", 0.0, 3e-6), ("b", 1.0, 2e-6), ("c", 2.1, 1e-6))}  # fmt: skip
    pairs = [pair(x, y, 0.0, 0.01) for x, y in (("a", "b"), ("a", "c"), ("b", "c"))]
    case = Case("three equals", arms, pairs, "", None)

    def setting(requests: float) -> tuple[object, DecisionConfig]:
        return case.evidence, DecisionConfig(requests_per_month=requests / 12)

    knob = Knob(what="volume", now=1e5, low=1.0, high=1e9, setting=setting)  # type: ignore[arg-type]
    found = list(switches(knob, is_upward=True))
    assert [s.choice.arm for s in found] == ["b", "c"]
    assert [s.at for s in found] == pytest.approx([1.0 / 1e-6, 1.1 / 1e-6], rel=1e-9)
    assert not list(switches(knob, is_upward=False))


def test_training_again_at_every_change_of_the_data() -> None:
    tuned, prompt = arm(0.9, kind="lora", fixed=2.0, request=1e-6), arm(0.9, fixed=2.0)
    for monthly, paid in ((0.0, 1), (0.5, 7), (2.0, 25)):
        decision = DecisionConfig(changes_per_month=monthly)
        assert total_cost(tuned, decision=decision).usd == pytest.approx(2.0 * paid + 1.2)
        assert total_cost(prompt, decision=decision).usd == pytest.approx(2.0 + 1.2)


def test_what_this_run_cannot_tell_is_said_and_is_no_number() -> None:
    made = decide(CASES[0].evidence, decision=DecisionConfig())
    for what in ("labels", "prompt_length"):
        change = change_of(made, what, "not_measured")
        assert change.at is None and change.arm_then is None
        assert change.sentence not in made.would_change_if
