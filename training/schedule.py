"""How many optimizer steps, at which learning rate, and after which of them to save (pure)."""

from __future__ import annotations

import math

from conf.choices import Schedule
from conf.groups import TrainerConfig


def steps_per_epoch(num_rows: int, *, batch_size: int) -> int:
    """Optimizer steps that see every row once; the last may be a smaller batch."""
    return math.ceil(num_rows / batch_size)


def num_steps(num_rows: int, *, trainer: TrainerConfig) -> int:
    """Optimizer steps of a training: its epochs, cut at max_steps; at least 1."""
    # The small term keeps 0.1 * 30 = 3.0000000000000004 at 3 steps.
    wanted = math.ceil(
        trainer.epochs * steps_per_epoch(num_rows, batch_size=trainer.batch_size) - 1e-9
    )
    return max(1, wanted if trainer.max_steps is None else min(wanted, trainer.max_steps))


def learning_rate_at(step: int, *, total_steps: int, peak: float, trainer: TrainerConfig) -> float:
    """The learning rate of optimizer step 1..total_steps.

    Linear warm-up to the peak over warmup_fraction of the steps, then the schedule. The decays
    would reach zero one step after the last, so that no step is spent at rate zero.
    """
    warmup = math.ceil(trainer.warmup_fraction * total_steps)
    if step < warmup:
        return peak * step / warmup
    first = max(warmup, 1)  # the step at the peak
    progress = (step - first) / (total_steps - first + 1)
    match trainer.schedule:
        case Schedule.constant:
            return peak
        case Schedule.linear:
            return peak * (1.0 - progress)
        case Schedule.cosine:
            return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def save_steps(total_steps: int, *, num_points: int) -> tuple[int, ...]:
    """The steps after which a checkpoint is saved: evenly spaced, ascending, the last included."""
    points = {math.ceil(total_steps * k / num_points) for k in range(1, num_points + 1)}
    return tuple(sorted(points))
