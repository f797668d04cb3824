"""How far one arm is ahead of another in what is decided by, and what that settles (pure).

Two ways to decide: by the metric, where a gap is the paired difference; and by money, where it is
the difference of total cost plus wrong answers, in USD over the horizon. Source of the sum's
interval: Zou and Donner 2008 (MOVER: each part brings the half-width of its own interval).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.results import Pair
from evaluation.statistics import items_to_decide, normal_quantile


@dataclass(kw_only=True, slots=True, frozen=True)
class Total:
    """Cost of the whole horizon; None where it is not known.

    low_usd, high_usd: from the measured requests alone. The price's own range is not in them, since
    it moves all arms together: it must not hide which of two is the cheaper.
    """

    usd: float | None
    device_seconds: float | None
    low_usd: float | None = None
    high_usd: float | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class Gap:
    """The leader's lead over an arm, with interval: points of the metric, or USD.

    margin: leads within -margin .. margin are practically none. floor: the part of the interval's
    half-width that more items would leave, that of the measured request costs.
    """

    value: float
    low: float
    high: float
    margin: float
    floor: float = 0.0


def metric_gap(pair: Pair, *, margin: float) -> Gap | None:
    """The paired difference; None where it has no interval."""
    if pair.difference is None or pair.low is None or pair.high is None:
        return None
    return Gap(value=pair.difference, low=pair.low, high=pair.high, margin=margin)


def money_gap(
    pair: Pair, *, ours: Total, theirs: Total, usd_per_point: float, margin: float
) -> Gap | None:
    """USD that the leader saves: the other's cost - its own + wrong answers that it avoids.

    Args:
        pair: leader - other on the same items.
        ours: cost of the leader.
        theirs: cost of the other.
        usd_per_point: USD over the horizon that a difference of 1 in the metric is worth.
        margin: of the metric.
    """
    points = metric_gap(pair, margin=margin)
    if points is None or ours.usd is None or theirs.usd is None:
        return None
    their_low, their_high = _ends(theirs, theirs.usd)
    our_low, our_high = _ends(ours, ours.usd)
    cost_below = math.hypot(theirs.usd - their_low, our_high - ours.usd)
    cost_above = math.hypot(their_high - theirs.usd, ours.usd - our_low)
    value = theirs.usd - ours.usd + usd_per_point * points.value
    return Gap(
        value=value,
        low=value - math.hypot(cost_below, usd_per_point * (points.value - points.low)),
        high=value + math.hypot(cost_above, usd_per_point * (points.high - points.value)),
        margin=usd_per_point * margin,
        floor=max(cost_below, cost_above),
    )


def _ends(total: Total, usd: float) -> tuple[float, float]:
    """The interval of a total; a total without one counts as exact."""
    if total.low_usd is None or total.high_usd is None:
        return usd, usd
    return total.low_usd, total.high_usd


def state_of(gap: Gap | None, *, is_separate: bool) -> str:
    """Of the arm behind the leader: worse | equal | open. is_separate: told from 0 by its test."""
    if gap is None:
        return "open"
    if -gap.margin <= gap.low and gap.high <= gap.margin:
        return "equal"
    return "worse" if gap.low > 0 and is_separate else "open"


def more_items(gap: Gap | None, pair: Pair | None, *, confidence: float) -> int | None:
    """Further test items that would settle a pair, at the spread and gap measured.

    The lower of two: telling the gap from 0 (80% power, at Holm's level for this pair), and
    showing that it lies inside the margin. Rounded up to two figures. A sequential test leaves
    wider intervals than one of fixed n, so there the number errs on the high side.
    """
    if gap is None or pair is None or pair.n < 2 or gap.high <= gap.low:
        return None
    half = (gap.high - gap.low) / 2
    if half <= gap.floor:
        return None  # all of the width is the costs': no item narrows it
    z = normal_quantile(confidence)
    sd = math.sqrt(half**2 - gap.floor**2) / z * math.sqrt(pair.n)
    lead = abs(gap.value)
    totals = []
    if lead > gap.floor:
        rest = math.sqrt(lead**2 - gap.floor**2)
        totals.append(items_to_decide(sd, rest, confidence=holm_level(pair, confidence)))
    if gap.margin - lead > gap.floor:
        rest = math.sqrt((gap.margin - lead) ** 2 - gap.floor**2)
        totals.append(math.ceil((z * sd / rest) ** 2))
    known = [t for t in totals if t is not None]
    return round_up(max(min(known) - pair.n, pair.n / 10)) if known else None


def holm_level(pair: Pair, confidence: float) -> float:
    """The confidence at which Holm tests this pair."""
    if not pair.p_value or not pair.p_adjusted:
        return confidence
    return 1 - (1 - confidence) / max(1.0, pair.p_adjusted / pair.p_value)


def round_up(value: float) -> int:
    """Up to two leading figures: 1234 -> 1300."""
    step = 10 ** max(0, math.floor(math.log10(value)) - 1) if value > 0 else 1
    return math.ceil(value / step) * step
