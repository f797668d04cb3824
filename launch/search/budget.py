"""`sweep.budget`: what a search may spend, and so how many settings go on after a rung (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from conf.sweeps import SweepBudgetConfig


def caps_of(budget: SweepBudgetConfig, *, usd_per_device_second: float | None) -> dict[str, float]:
    """The caps there are, by "tokens" and "device_seconds"; money without a price is none."""
    seconds = [budget.max_device_seconds] if budget.max_device_seconds is not None else []
    if budget.max_usd is not None and usd_per_device_second:
        seconds.append(budget.max_usd / usd_per_device_second)
    caps: dict[str, float] = {"device_seconds": min(seconds)} if seconds else {}
    return caps | ({"tokens": budget.max_tokens} if budget.max_tokens is not None else {})


def affordable_settings(
    caps: Mapping[str, float],
    *,
    spent: Mapping[str, float],
    kept: Mapping[str, float],
    num_settings: int,
    share: float,
    following: float,
) -> int:
    """How many settings can go to the next rung, and one of them to the end; at least 1.

    For a search that ends without a whole trial is of no use.

    Args:
        caps: by kind, tokens or device-seconds.
        spent: by kind, of all trials.
        kept: by kind, of those that go on, who are expected to go on spending as they did.
        num_settings: that go on.
        share: where they stand, of the whole.
        following: where the next rung is.
    """
    found = num_settings
    for kind, cap in caps.items():
        going = kept[kind] / num_settings  # mean of a setting, all replicates
        to_next, to_end = going * (following / share - 1), going * (1 / share - 1)
        left = cap - spent[kind] - (to_end - to_next)  # the rest of the one that goes to the end
        found = min(found, math.floor(left / to_next) if to_next > 0 else found)
    return max(1, found)
