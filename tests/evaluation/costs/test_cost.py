"""Costs by hand."""

from __future__ import annotations

import pytest

from conf.records import LedgerLine, Measured
from conf.run_groups import PriceConfig, PricingConfig
from evaluation.costs import cost


def pricing(
    usd: float | None, low: float | None = None, high: float | None = None
) -> PricingConfig:
    price = PriceConfig(usd=usd, low_usd=low, high_usd=high)
    return PricingConfig(name="x", device_hour=price, source="s", date="d")


def test_request_usd_spans_the_price_range() -> None:
    seconds = Measured(value=2.0, low=1.0, high=3.0, n=8)
    plain = cost.request_usd(seconds, pricing=pricing(3600.0))
    assert (plain.value, plain.low, plain.high, plain.n) == (2.0, 1.0, 3.0, 8)
    ranged = cost.request_usd(seconds, pricing=pricing(3600.0, 1800.0, 7200.0))
    assert (ranged.value, ranged.low, ranged.high) == (2.0, 0.5, 6.0)
    assert cost.request_usd(seconds, pricing=pricing(None)).value is None


def test_per_million_tokens_is_a_ratio_of_sums() -> None:
    requests = [
        cost.RequestCost(device_seconds=1.0, tokens=100),
        cost.RequestCost(device_seconds=3.0, tokens=900),
    ]
    measured = cost.usd_per_million_tokens(requests, usd_per_device_second=0.01)
    assert measured.value == pytest.approx(0.04 / 1000 * 1e6)
    assert measured.low <= measured.value <= measured.high
    assert cost.usd_per_million_tokens(requests, usd_per_device_second=None).value is None
    free = [cost.RequestCost(device_seconds=1.0, tokens=0)]
    assert cost.usd_per_million_tokens(free, usd_per_device_second=0.01).value is None


def test_fixed_cost_takes_the_lines_that_come_before_the_first_request() -> None:
    def line(arm: str, job: str, purpose: str, seconds: float) -> LedgerLine:
        return LedgerLine(job=job, arm=arm, purpose=purpose, device_seconds=seconds)

    ledger = [
        line("lora", "train", "train", 100),
        line("lora", "train", "padding", 10),
        line("lora", "train", "redone", 5),
        line("lora", "eval", "validation", 2),
        line("lora", "eval", "padding", 1000),  # of an evaluation: not fixed
        line("lora", "eval", "test", 1000),
        line("lora", "eval", "latency", 1000),
        line("on_lora", "eval2", "calibration", 3),
        line("other", "train", "train", 1000),
    ]
    mine = cost.fixed_cost(
        ledger, arms=("lora",), usd_per_device_second=0.5, labels_used=10, label_usd=2.0
    )
    assert (mine.device_seconds, mine.usd, mine.people_usd) == (117, 78.5, 20.0)
    inherited = cost.fixed_cost(
        ledger, arms=("on_lora", "lora"), usd_per_device_second=None, labels_used=0, label_usd=None
    )
    assert (inherited.device_seconds, inherited.usd) == (120, None)
