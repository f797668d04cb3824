"""The cost table of a paper, recomputed: Liu et al. 2022 (T-Few, arXiv 2205.05638), section 4.2.

Its accounting: 2 operations per parameter and token of a decoder, half of that for an encoder-
decoder, three times as much in training; 41 shots of 98 tokens, 103 tokens of query and choices.
"""

from __future__ import annotations

import pytest

from evaluation.costs.crossover import Side, break_even_device_seconds
from training.flops import PassShape, StepCost

QUERY, SHOTS = 103, 41 * 98
T0_PARAMETERS, GPT3_PARAMETERS = 11e9, 175e9
TRAINED_EXAMPLES = 1000 * 8  # steps x batch


def operations(parameters: float, *, tokens: int, is_decoder: bool) -> int:
    """Of a forward pass, attention not counted, as the paper has it."""
    per_token = int((2 if is_decoder else 1) * parameters)
    cost = StepCost(per_token=per_token, per_pair=0, per_target=0)
    return cost.flops(PassShape.of([tokens], shared=0, targets=0))


TUNED_REQUEST = operations(T0_PARAMETERS, tokens=QUERY, is_decoder=False)
TRAINING = 3 * TUNED_REQUEST * TRAINED_EXAMPLES
PROMPTED_REQUEST = operations(GPT3_PARAMETERS, tokens=SHOTS + QUERY, is_decoder=True)


@pytest.mark.parametrize(
    ("found", "published"),
    [(TUNED_REQUEST, "1.1e+12"), (TRAINING, "2.7e+16"), (PROMPTED_REQUEST, "1.4e+15")],
)
def test_the_table_to_rounding(found: int, published: str) -> None:
    assert f"{found:.1e}" == published


def sides(prompted_request: float) -> tuple[Side, Side]:
    prompted = Side(arm="gpt3_in_context", fixed=0.0, requests=[prompted_request] * 2)
    return prompted, Side(arm="t_few", fixed=float(TRAINING), requests=[float(TUNED_REQUEST)] * 2)


def test_training_costs_about_20_queries_in_context() -> None:
    found = break_even_device_seconds(*sides(PROMPTED_REQUEST))
    assert found.requests is not None and round(found.requests, -1) == 20


def test_with_the_shots_cached_it_costs_forty_times_as_many() -> None:
    """The paper notes that a cache cuts a request by about its 41 shots, and tabulates without."""
    cached = operations(GPT3_PARAMETERS, tokens=QUERY, is_decoder=True)
    without, found = (
        break_even_device_seconds(*sides(r)).requests for r in (PROMPTED_REQUEST, cached)
    )
    assert without is not None and found is not None
    assert found / without == pytest.approx(
        (PROMPTED_REQUEST - TUNED_REQUEST) / (cached - TUNED_REQUEST)
    )
    assert 38 < found / without < 44
