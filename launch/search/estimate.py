"""What a search is expected to take: trials, the rungs they reach, and what a rung costs (pure)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from conf.errors import ConfigError
from conf.sweeps import HalvingConfig, SweepBudgetConfig
from launch.planned import Estimate
from launch.search.halving import rung_shares
from launch.search.trials import Trial

ADAM_BYTES = 16  # of a trained parameter: itself, its gradient and two moments, in fp32


@dataclass(kw_only=True, slots=True, frozen=True)
class SearchSize:
    """How much of a grid a search trains. trainings: whole ones that its steps add up to.

    scorings: how often a trial is scored. num_trials: all of them.
    """

    trainings: float
    scorings: int
    num_trials: int


def search_size(trials: Sequence[Trial], halving: HalvingConfig) -> SearchSize:
    """The size of a search in which no rank changes and nobody fails."""
    num_settings = len({trial.setting for trial in trials})
    replicates = len(trials) / num_settings
    before, trainings, scorings = 0.0, 0.0, 0
    for share, going in zip(rung_shares(halving), settings_at(num_settings, halving), strict=True):
        trainings += going * replicates * (share - before)
        scorings += round(going * replicates)
        before = share
    return SearchSize(trainings=trainings, scorings=scorings, num_trials=len(trials))


def settings_at(num_settings: int, halving: HalvingConfig) -> tuple[int, ...]:
    """How many settings come to each rung where no rank changes and nobody fails."""
    found, going = [], num_settings
    num_rungs = len(rung_shares(halving))
    for rung in range(num_rungs):
        found.append(going)
        if 0 < rung < num_rungs - 1:
            going = math.ceil(going / halving.eta)
    return tuple(found)


def leg_estimate(
    one: Estimate,
    scored: Estimate,
    trials: Sequence[Trial],
    halving: HalvingConfig,
    *,
    rung: int,
    start_seconds: float,
) -> Estimate:
    """What a leg is expected to take: its steps and its scoring, by the chance that it runs.

    So the legs of a search sum to what is expected of the search.

    Args:
        one: of the trial's whole training.
        scored: of one pass over the validation items.
        trials: of the search.
        halving: its rules.
        rung: where the leg ends.
        start_seconds: of one job; each leg starts one.
    """
    shares = rung_shares(halving)
    share = shares[rung] - (shares[rung - 1] if rung else 0.0)
    num_settings = len({trial.setting for trial in trials})
    chance = settings_at(num_settings, halving)[rung] / num_settings
    size = SearchSize(trainings=share, scorings=1, num_trials=1)
    found = search_estimate(one, scored, size, start_seconds=start_seconds)

    def part(value: float | None) -> float | None:
        return None if value is None else chance * value

    tokens, flops = part(found.tokens), part(found.flops)
    return dataclasses.replace(
        found,
        tokens=None if tokens is None else round(tokens),
        flops=None if flops is None else round(flops),
        seconds=part(found.seconds),
        low_seconds=part(found.low_seconds),
        high_seconds=part(found.high_seconds),
    )


def scoring_tokens(
    *,
    num_items: int,
    num_labels: int,
    prompt: float,
    shared: float,
    completion: float,
    max_tokens: int,
) -> int:
    """Tokens that one trial computes at a rung, as training/item_trees.py lays its items out.

    Args:
        num_items: validation items.
        num_labels: of an item; 0: its answer alone is scored.
        prompt: tokens of a prompt, of which `shared` are those of all prompts.
        shared: computed once in a pass.
        completion: tokens of a label or an answer; the last one predicts nothing.
        max_tokens: of a pass.
    """
    branches = num_labels * max(0.0, completion - 1) if num_labels else completion
    own = num_items * (prompt - shared + branches)
    passes = math.ceil(own / max(1.0, max_tokens - shared))
    return round(own + passes * shared)


def search_estimate(
    one: Estimate, scored: Estimate, size: SearchSize, *, start_seconds: float
) -> Estimate:
    """The estimate of a search.

    Args:
        one: of the arm's own training.
        scored: of one pass over the validation items.
        size: how much of both it takes.
        start_seconds: of one job, which the search starts once.
    """

    def total(name: str, *, start: float = 0.0) -> float | None:
        a, b = getattr(one, name), getattr(scored, name)
        if a is None or b is None:
            return None
        return start + size.trainings * (float(a) - start) + size.scorings * float(b)

    def seconds(name: str) -> float | None:
        return total(name, start=start_seconds)

    memory = one.memory_bytes
    trained = None if one.training is None else one.training.trained_parameters
    if memory is not None and trained is not None:
        memory += (size.num_trials - 1) * ADAM_BYTES * trained
    tokens, flops = total("tokens"), total("flops")
    return dataclasses.replace(
        one,
        tokens=None if tokens is None else round(tokens),
        flops=None if flops is None else round(flops),
        seconds=seconds("seconds"),
        low_seconds=seconds("low_seconds"),
        high_seconds=seconds("high_seconds"),
        memory_bytes=memory,
        is_about=True,
    )


def check_sweep_budget(
    budget: SweepBudgetConfig, searches: Sequence[tuple[Estimate, int]], *, price: float | None
) -> None:
    """Refuse searches whose estimate is over sweep.budget; what is unknown is not counted.

    Args:
        budget: the caps.
        searches: the estimate and devices of each search.
        price: USD of a device-second.
    """
    device_seconds = sum((e.seconds or 0.0) * devices for e, devices in searches)
    totals = {
        "max_tokens": float(sum(e.tokens or 0 for e, _ in searches)),
        "max_device_seconds": device_seconds,
        "max_usd": device_seconds * (price or 0.0),
    }
    for key, total in totals.items():
        cap = getattr(budget, key)
        if cap is not None and total > cap:
            raise ConfigError(
                f"sweep.budget.{key}",
                found=f"{cap:g}, and searches of about {total:.3g}",
                expected="a budget that they fit",
                remedy="raise it, or lower sweep.trials, sweep.replicates or task.limit.*; "
                "dry_run=true shows the plan",
            )
