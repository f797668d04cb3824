"""From steps that were taken to the seconds of steps that were not (pure)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MIN_STEPS = 6
WARM_STEPS = 1  # left out: the first step allocates
# Below this ratio of the largest to the smallest step a slope would be made of noise.
MIN_SPREAD = 1.3


@dataclass(kw_only=True, slots=True, frozen=True)
class StepRate:
    """Seconds of a step: fixed_seconds + operations / flops_per_second.

    What is fixed is the optimizer's update, which full fine-tuning spends on all parameters, and
    what each pass costs whatever its length. steps: that it stands on.
    """

    fixed_seconds: float
    flops_per_second: float
    steps: int

    def seconds(self, *, flops: float, steps: int) -> float:
        """Seconds of so many steps that need so many operations together."""
        return steps * self.fixed_seconds + flops / self.flops_per_second


def fit(steps: Sequence[tuple[int, float]]) -> StepRate | None:
    """The rate of steps, each (operations, seconds) in the order taken; None of too few.

    The line through the medians of the smaller and of the larger half: a few slow steps, during
    which something else ran, move neither. Where all steps are alike, or small ones are not faster,
    nothing is fixed.
    """
    known = sorted(steps[WARM_STEPS:])
    if len(known) < MIN_STEPS - WARM_STEPS:
        return None
    half = len(known) // 2
    (small, short), (large, long) = _middle(known[:half]), _middle(known[-half:])
    if large >= MIN_SPREAD * small and long > short:
        per_flop = (long - short) / (large - small)
        fixed = short - per_flop * small
        if fixed >= 0:
            return StepRate(fixed_seconds=fixed, flops_per_second=1 / per_flop, steps=len(known))
    total, seconds = _middle(known)
    return StepRate(fixed_seconds=0.0, flops_per_second=total / seconds, steps=len(known))


def _middle(steps: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Medians of operations and of seconds."""
    return statistics.median(f for f, _ in steps), statistics.median(s for _, s in steps)
