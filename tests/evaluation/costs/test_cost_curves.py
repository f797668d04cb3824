"""Three rules for cached tokens against closed forms; intervals of crossings against truth."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import pytest

from conf.records import SampleRecord
from conf.results import BreakEven
from conf.run_groups import (
    CachedInputPrice,
    DecisionConfig,
    HostedPrice,
    PriceConfig,
    PricingConfig,
)
from evaluation.costs.cost_curves import by_cache, priced, share_paid
from evaluation.costs.crossover import Side, break_even_device_seconds, break_even_usd
from evaluation.costs.hosted_cost import requests_usd
from evaluation.costs.request_rates import TimedRequest, fit_rates, work
from evaluation.decision.retraining import all_retraining
from evaluation.records.arm_scores import Request
from tests.evaluation.decision_cases import arm

PRICING = PricingConfig(
    name="core", device_hour=PriceConfig(usd=3.6), source="made up", date="2026-11-23"
)
FIXED, PROMPT, OUTPUT = 0.05, 0.0016, 0.06
CACHED = {"few_shot": 393, "lora": 40, "cot": 56}
OUTPUTS = {"few_shot": 0, "lora": 0, "cot": 32}


def timed(seed: int, *, noise: float, n: int = 12) -> dict[str, list[TimedRequest]]:
    rng = np.random.default_rng(seed)
    found = {}
    for name, cached in CACHED.items():
        tokens = rng.integers(12, 110, size=n)
        seconds = FIXED + PROMPT * tokens + OUTPUT * OUTPUTS[name]
        seconds = seconds * rng.gamma(1 / noise**2, noise**2, size=n) if noise else seconds
        found[name] = [
            TimedRequest(
                device_seconds=float(s),
                computed_tokens=int(t),
                output_tokens=OUTPUTS[name],
                cached_tokens=cached,
            )
            for s, t in zip(seconds, tokens, strict=True)
        ]
    return found


def test_costs_equal_the_closed_form_under_each_rule() -> None:
    requests = timed(0, noise=0.0)
    rates = fit_rates(requests)
    own = np.mean([r.device_seconds for r in requests["few_shot"]])
    found = by_cache(requests["few_shot"], rates, pricing=PRICING, hosting=1.0, confidence=0.95)
    for cache, share in (("measured", 0.0), ("discount", 0.1), ("none", 1.0)):
        seconds = own + share * PROMPT * 393
        assert found[cache].device_seconds.value == pytest.approx(seconds, rel=1e-6)
        assert found[cache].usd.value == pytest.approx(seconds / 1000, rel=1e-6)


def test_a_cached_prefix_costs_what_computing_it_first_would() -> None:
    requests = timed(0, noise=0.0)
    rates = fit_rates(requests, key_share=1e-3)
    at = priced(requests["few_shot"], rates, share=1.0)
    assert at is not None
    more = at.requests[0] - requests["few_shot"][0].device_seconds
    assert more == pytest.approx(rates.values[1] * work(393, behind=0, key_share=1e-3))


def test_a_rule_that_cannot_be_worked_out_is_left_out() -> None:
    few = timed(0, noise=0.0)["few_shot"][:3]
    unknown = fit_rates({"few_shot": few})
    found = by_cache(few, unknown, pricing=PRICING, hosting=1.0, confidence=0.95)
    assert set(found) == {"measured"}
    bare = [replace(r, cached_tokens=0) for r in few]  # nothing cached: all rules agree
    found = by_cache(bare, unknown, pricing=PRICING, hosting=1.0, confidence=0.95)
    assert found["none"].usd == found["measured"].usd
    assert by_cache([], unknown, pricing=PRICING, hosting=1.0, confidence=0.95) == {}
    without = replace(PRICING, cached_input=CachedInputPrice(ratio=None))
    assert share_paid("discount", without) is None


def test_a_hosted_request_without_its_cache_is_at_the_full_price() -> None:
    price = HostedPrice(
        input_usd_per_million=0.25,
        cached_input_usd_per_million=0.025,
        output_usd_per_million=2.0,
        source="made up",
        date="2026",
    )
    request = Request(
        final=cast(SampleRecord, None),  # a bill reads the counts alone
        prompt_tokens=1000,
        cached_tokens=800,
        computed_tokens=None,
        completion_tokens=10,
        truncated_tokens=0,
        first_token_seconds=None,
        total_seconds=None,
    )
    found = requests_usd([request], price=price)
    assert found["none"] == pytest.approx([(1000 * 0.25 + 10 * 2.0) / 1e6])
    assert found["discount"] == pytest.approx([(200 * 0.25 + 800 * 0.025 + 10 * 2.0) / 1e6])
    assert found["measured"] == found["discount"]


def crossing(seed: int, *, cache: str, noise: float, error_usd: float = 0.0) -> BreakEven:
    """Few-shot against LoRA; where errors cost money LoRA is right 6 points more often."""
    requests = timed(seed, noise=noise)
    rates = fit_rates(requests)
    rng = np.random.default_rng(seed + 10**6)
    right = {"few_shot": 0.84, "lora": 0.90}
    sides = {}
    for name, fixed in (("few_shot", 10.0), ("lora", 5000.0)):
        at = priced(requests[name], rates, share=share_paid(cache, PRICING))
        assert at is not None
        scores = {str(i): float(rng.random() < right[name]) for i in range(400)}
        sides[name] = Side(
            arm=name,
            fixed=fixed,
            requests=at.requests,
            rate_draws=at.rate_draws,
            scores=scores,
        )
    if not error_usd:
        return break_even_device_seconds(sides["few_shot"], sides["lora"], seed=seed)
    prices = (1e-3, 1e-3, 1e-3)
    return break_even_usd(
        sides["few_shot"], sides["lora"], prices=prices, error_usd=error_usd, seed=seed
    )


def coverage(num: int, *, cache: str, error_usd: float) -> float:
    share = share_paid(cache, PRICING)
    assert share is not None
    saving = share * PROMPT * (CACHED["few_shot"] - CACHED["lora"]) + 1000 * error_usd * 0.06
    truth, hits = 4990.0 / saving, 0
    for seed in range(num):
        found = crossing(seed, cache=cache, noise=0.15, error_usd=error_usd)
        is_above = found.low is not None and found.low <= truth
        hits += is_above and (found.is_high_unbounded or (found.high or 0.0) >= truth)
    return hits / num


CASES = [("none", 0.0), ("discount", 0.0), ("none", 0.01), ("measured", 0.01)]


@pytest.mark.parametrize(("cache", "error_usd"), CASES)
def test_the_interval_of_the_crossing_holds_the_truth(cache: str, error_usd: float) -> None:
    """Nominal 95%; 100 tasks here, at least 93% less two standard errors."""
    assert coverage(100, cache=cache, error_usd=error_usd) >= 0.93 - 2 * (0.93 * 0.07 / 100) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "error_usd"), CASES)
def test_the_interval_holds_the_truth_in_1000_tasks(cache: str, error_usd: float) -> None:
    assert coverage(1000, cache=cache, error_usd=error_usd) >= 0.93


def test_errors_that_cost_money_bring_the_crossing_nearer() -> None:
    scores = {str(i): 0.0 for i in range(10)}
    better = {**scores, "0": 1.0}
    a = Side(arm="few_shot", fixed=0.0, requests=[2.0] * 4, scores=scores)
    b = Side(arm="lora", fixed=100.0, requests=[1.0] * 4, scores=better)
    prices = (0.5, 0.5, 0.5)
    # 100 x 0.5 / ((2 - 1) x 0.5 + 0.1 x 2.0)
    assert break_even_usd(a, b, prices=prices, error_usd=2.0).requests == pytest.approx(50 / 0.7)
    nowhere = replace(b, scores={})
    assert break_even_usd(a, nowhere, prices=prices, error_usd=2.0).status == "unknown"


def test_a_hosted_arm_meets_one_of_our_own() -> None:
    a = Side(arm="gpt", fixed=0.0, people_usd=1.0, requests_usd=[0.003] * 4)
    b = Side(arm="lora", fixed=100.0, requests=[1.0] * 4)
    assert break_even_usd(a, b, prices=(0.001, 0.001, 0.002)).status == "always"
    dear = replace(a, people_usd=0.0)
    found = break_even_usd(dear, b, prices=(0.001, 0.001, 0.002))
    # at 0.001: 0.1 / 0.002 = 50; at 0.002: 0.2 / 0.001 = 200
    assert (found.requests, found.low, found.high) == pytest.approx((50.0, 50.0, 200.0))
    assert break_even_device_seconds(dear, b).status == "unknown"


@pytest.mark.parametrize(
    ("utilisation", "tasks", "shared", "own"),
    [(1.0, 1, 1.0, 1.0), (0.25, 1, 4.0, 4.0), (0.25, 3, 2.0, 4.0), (0.5, 10, 1.1, 2.0)],
)
def test_idle_hosting_is_divided_among_the_tasks_on_one_base(
    utilisation: float, tasks: int, shared: float, own: float
) -> None:
    pricing = replace(PRICING, utilisation=utilisation, shared_tasks=tasks)
    assert pricing.hosting(is_base_shared=True) == pytest.approx(shared)
    assert pricing.hosting(is_base_shared=False) == pytest.approx(own)


def test_hosting_multiplies_usd_and_leaves_device_seconds() -> None:
    a = Side(arm="few_shot", fixed=0.0, requests=[2.0] * 4, hosting=2.0)
    b = Side(arm="full", fixed=100.0, requests=[1.0] * 4, hosting=3.0)
    assert break_even_usd(a, b, prices=(1.0, 1.0, 1.0)).requests == pytest.approx(100 / (4 - 3))
    assert break_even_device_seconds(a, b).requests == pytest.approx(100.0)


def test_retraining_pays_where_the_crossing_is_reached_between_changes() -> None:
    arms = {"few_shot": arm(0.8, kind="prompt"), "lora": arm(0.9, kind="lora")}
    base = BreakEven(
        a="few_shot", b="lora", requests=3e5, low=1e5, high=6e5, status="crosses", unit="usd"
    )
    entries = [
        base,
        replace(base, cache="none"),
        replace(base, unit="device_seconds"),
        replace(base, status="never", requests=None, low=None, high=None),
        replace(base, a="lora", b="few_shot", status="never", requests=None),
    ]
    found = all_retraining(entries, arms, decision=DecisionConfig(requests_per_month=1e5))
    assert [(r.arm, r.months, r.low, r.high, r.status) for r in found[:2]] == [
        ("lora", 3.0, 1.0, 6.0, "pays"),
        ("lora", None, None, None, "never"),
    ]
    assert (found[2].arm, found[2].status) == ("lora", "always")
    assert len(found) == 3
