"""Rates of a request against requests made from known rates, and what they cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from evaluation.costs.request_rates import (
    Rates,
    TimedRequest,
    fit_rates,
    held_out_error,
    key_share_of,
    reported,
    work,
)

SMOLLM2 = {
    "num_parameters": 134_515_008,
    "num_layers": 30,
    "hidden": 576,
    "vocabulary": 49_152,
    "tied_head": True,
}
TRUE = (0.05, 0.0016, 0.06)


def request(
    rng: np.random.Generator, *, cached: int, outputs: int = 0, noise: float = 0.0, share: float = 0
) -> TimedRequest:
    computed = int(rng.integers(12, 110))
    amount = work(computed, behind=cached, key_share=share)
    seconds = TRUE[0] + TRUE[1] * amount + TRUE[2] * outputs
    return TimedRequest(
        device_seconds=seconds * float(np.exp(noise * rng.standard_normal())),
        computed_tokens=computed,
        output_tokens=outputs,
        cached_tokens=cached,
    )


def arms(seed: int, *, noise: float, share: float = 0.0) -> dict[str, list[TimedRequest]]:
    rng = np.random.default_rng(seed)
    shapes = {"zero_shot": (40, 0), "few_shot": (393, 0), "chain_of_thought": (56, 32)}
    return {
        name: [
            request(rng, cached=cached, outputs=outputs, noise=noise, share=share) for _ in range(8)
        ]
        for name, (cached, outputs) in shapes.items()
    }


@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 3e-4]))
def test_exact_requests_give_their_rates_back(seed: int, share: float) -> None:
    rates = fit_rates(arms(seed, noise=0.0, share=share), key_share=share)
    assert rates.values == pytest.approx(TRUE, rel=1e-6)
    assert rates.draws.std(axis=0) == pytest.approx(np.zeros(3), abs=1e-6)
    found = rates.device_seconds(computed_tokens=700, output_tokens=5, cached_tokens=100)
    expected = TRUE[0] + TRUE[1] * work(700, behind=100, key_share=share) + TRUE[2] * 5
    assert found == pytest.approx(expected, rel=1e-6)


@given(seed=st.integers(0, 10**6))
def test_each_draw_is_least_squares_of_the_requests_drawn(seed: int) -> None:
    """The normal equations of all draws at once against scipy's solver, draw by draw."""
    requests = arms(seed, noise=0.3)
    rates = fit_rates(requests, seed=seed)
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(8, np.full(8, 1 / 8), size=2000) for _ in requests]
    timed = [r for group in requests.values() for r in group]
    rows = np.array([(1.0, r.computed_tokens, r.output_tokens) for r in timed], dtype=float)
    rows /= np.array([r.device_seconds for r in timed])[:, None]
    for at in (0, 1, 1999):
        weight = np.sqrt(np.concatenate([c[at] for c in counts]))
        expected, _ = nnls(rows * weight[:, None], weight)
        assert rates.draws[at] == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_prompts_that_were_not_fitted_are_predicted_within_15_percent() -> None:
    worst = [held_out_error(arms(seed, noise=0.1), key_share=0.0) for seed in range(40)]
    assert all(error is not None and error <= 0.15 for error in worst)


def test_without_the_keys_a_long_prefix_is_predicted_too_cheap() -> None:
    requests = arms(3, noise=0.0, share=key_share_of(SMOLLM2))
    assert held_out_error(requests, key_share=key_share_of(SMOLLM2)) == pytest.approx(0, abs=1e-6)
    without = held_out_error(requests, key_share=0.0)
    assert without is not None and without > 0.02


def test_key_share_is_the_ratio_of_the_two_products() -> None:
    """QK^T and PV: 2 x 2 x width FLOPs a key and layer; 2 FLOPs a weight that multiplies."""
    weights = 134_515_008 - 49_152 * 576
    assert key_share_of(SMOLLM2) == pytest.approx(4 * 576 * 30 / (2 * weights))
    assert key_share_of({"num_parameters": 5}) == 0.0


def test_intervals_of_a_coefficient_hold_it() -> None:
    hits = 0
    for seed in range(100):
        found = fit_rates(arms(seed, noise=0.1)).coefficient("prompt_token", confidence=0.95)
        assert found.low is not None and found.high is not None
        hits += found.low <= TRUE[1] <= found.high
    assert hits >= 88


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ({}, "0 requests were timed"),
        ({"a": [TimedRequest(device_seconds=1.0, computed_tokens=9, output_tokens=0)]}, "1 req"),
        (
            {
                "a": [
                    TimedRequest(device_seconds=1.0, computed_tokens=90 + i, output_tokens=0)
                    for i in range(9)
                ]
            },
            "1.5 times as many",
        ),
        (
            {
                "a": [
                    TimedRequest(device_seconds=i, computed_tokens=10 * i, output_tokens=i)
                    for i in range(1, 12)
                ]
            },
            "grow together",
        ),
    ],
)
def test_what_requests_cannot_tell_is_said(
    requests: dict[str, list[TimedRequest]], reason: str
) -> None:
    rates = fit_rates(requests)
    assert reason in rates.why_unknown
    assert rates.per_prompt_token is None
    assert rates.device_seconds(computed_tokens=3, output_tokens=0) is None
    assert reported(rates, requests, confidence=0.95).prompt_token_device_seconds.value is None


def test_without_generation_outputs_are_unknown_and_the_rest_is_not() -> None:
    requests = {n: r for n, r in arms(1, noise=0.0).items() if n != "chain_of_thought"}
    rates: Rates = fit_rates(requests)
    assert "generates text" in rates.why_unknown
    assert rates.device_seconds(computed_tokens=10, output_tokens=1) is None
    assert rates.device_seconds(computed_tokens=10, output_tokens=0) == pytest.approx(0.066)
