"""The rate of steps: exact lines are found again, slow steps do not move it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.rate import fit


@given(
    fixed=st.floats(0, 2),
    rate=st.floats(1e9, 1e12),
    flops=st.lists(st.integers(10**9, 10**12), min_size=7, max_size=40),
)
def test_predictions_of_an_exact_line_are_exact(fixed, rate, flops):
    steps = [(f, fixed + f / rate) for f in flops]
    found = fit(steps)
    known = sorted(flops[1:])
    half = len(known) // 2
    if known[-half // 2] < 2 * known[half - 1]:  # all alike: the mean step is still right
        return
    assert found.seconds(flops=5 * 10**11, steps=3) == pytest.approx(
        3 * fixed + 5e11 / rate, rel=1e-3, abs=1e-6
    )


def test_steps_that_are_alike_give_their_mean_rate():
    found = fit([(100, 1.0)] * 8)
    assert found.seconds(flops=200, steps=2) == pytest.approx(2.0)


def test_a_first_step_that_allocates_and_one_that_was_disturbed_move_nothing():
    steps = [(f, 0.5 + f / 1000) for f in range(100, 1100, 50)]
    disturbed = [(200, 60.0), *steps[1:8], (steps[8][0], 30.0), *steps[9:]]
    plain, found = fit(steps), fit(disturbed)
    assert found.seconds(flops=700, steps=1) == pytest.approx(
        plain.seconds(flops=700, steps=1), rel=0.1
    )


def test_too_few_steps_give_no_rate():
    assert fit([(1, 1.0)] * 5) is None
