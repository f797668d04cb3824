"""Break-even against closed forms and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.costs.crossover import (
    Side,
    break_even_device_seconds,
    break_even_usd,
    saving_per_request,
)


def test_crossing_is_recovered_exactly() -> None:
    a = Side(arm="few_shot", fixed=10.0, requests=[3.0] * 6)
    b = Side(arm="lora", fixed=110.0, requests=[1.0] * 6)
    found = break_even_device_seconds(a, b)
    assert (found.status, found.requests, found.low, found.high) == ("crosses", 50.0, 50.0, 50.0)
    usd = break_even_usd(a, b, prices=(0.01, 0.01, 0.01))
    assert usd.requests == pytest.approx(50.0)  # the price cancels
    assert usd.unit == "usd" and found.unit == "device_seconds"


def test_labels_enter_in_usd_only_and_carry_the_price_range() -> None:
    a = Side(arm="zero_shot", fixed=0.0, requests=[2.0] * 4)
    b = Side(arm="lora", fixed=100.0, requests=[1.0] * 4, people_usd=50.0)
    usd = break_even_usd(a, b, prices=(0.5, 0.25, 1.0))
    # (100 x 0.5 + 50) / (1 x 0.5) = 200; at 1.0: 150; at 0.25: 300
    assert (usd.requests, usd.low, usd.high) == pytest.approx((200.0, 150.0, 300.0))
    assert break_even_device_seconds(a, b).requests == 100.0


def test_never_when_the_dearer_start_stays_dearer() -> None:
    a = Side(arm="zero_shot", fixed=0.0, requests=[1.0] * 4)
    b = Side(arm="lora", fixed=9.0, requests=[1.5] * 4)
    found = break_even_device_seconds(a, b)
    assert (found.status, found.requests, found.high) == ("never", None, None)
    assert not found.is_high_unbounded


def test_equal_request_costs_never_cross() -> None:
    a = Side(arm="zero_shot", fixed=0.0, requests=[1.0] * 4)
    b = Side(arm="lora", fixed=9.0, requests=[1.0] * 4)
    assert break_even_device_seconds(a, b).status == "never"


def test_always_when_cheaper_at_first_and_per_request() -> None:
    a = Side(arm="searched", fixed=50.0, requests=[2.0] * 3)
    b = Side(arm="lora", fixed=50.0, requests=[1.0] * 3)
    assert break_even_device_seconds(a, b).status == "always"
    assert break_even_device_seconds(a, b).requests == 0.0


def test_the_arm_with_the_higher_fixed_cost_becomes_b() -> None:
    prompted = Side(arm="searched", fixed=100.0, requests=[1.0] * 3)
    tuned = Side(arm="lora", fixed=20.0, requests=[3.0] * 3)
    found = break_even_device_seconds(prompted, tuned)
    assert (found.a, found.b, found.requests) == ("lora", "searched", 40.0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Side(arm="a", fixed=0.0), Side(arm="b", fixed=1.0, requests=[1.0])),
        (Side(arm="a", fixed=None, requests=[1.0]), Side(arm="b", fixed=1.0, requests=[1.0])),
    ],
)
def test_unmeasured_is_unknown(a: Side, b: Side) -> None:
    found = break_even_device_seconds(a, b)
    assert (found.status, found.requests) == ("unknown", None)


def test_no_price_is_unknown_in_usd() -> None:
    a, b = Side(arm="a", fixed=0.0, requests=[2.0]), Side(arm="b", fixed=1.0, requests=[1.0])
    assert break_even_usd(a, b, prices=None).status == "unknown"
    one = break_even_device_seconds(a, b)
    assert (one.status, one.low, one.high) == ("crosses", None, None)  # one request: no interval


def test_an_interval_that_reaches_zero_is_unbounded_above() -> None:
    rng = np.random.default_rng(1)
    a = Side(arm="a", fixed=0.0, requests=list(rng.normal(1.02, 0.2, 8)))
    b = Side(arm="b", fixed=10.0, requests=list(rng.normal(1.0, 0.2, 8)))
    found = break_even_device_seconds(a, b)
    assert found.is_high_unbounded and found.high is None and found.low is not None
    saving = saving_per_request(a, b)
    assert saving is not None and saving.low is not None and saving.low < 0 < saving.high


def test_the_interval_covers_the_true_volume() -> None:
    rng = np.random.default_rng(4)
    true, covered, runs = 100 / 0.5, 0, 300
    for i in range(runs):
        a = Side(arm="a", fixed=0.0, requests=list(rng.gamma(25, 1.5 / 25, 12)))
        b = Side(arm="b", fixed=100.0, requests=list(rng.gamma(25, 1.0 / 25, 12)))
        found = break_even_device_seconds(a, b, seed=i)
        assert found.low is not None
        covered += found.low <= true and (found.high is None or true <= found.high)
    assert covered / runs >= 0.93
