"""What the decision leaves in results.json beside its verdict."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.records import Measured


@dataclass(kw_only=True, slots=True, frozen=True)
class Change:
    """One thing that would change the verdict, found by solving for it.

    what: volume | device_price | error_usd | labels | prompt_length | items | a limit's key.
    at: where the verdict changes, in the unit of `what` (requests over the horizon, USD per
    device-hour, USD per wrong answer, labels, prompt tokens, further test items, the limit's own
    unit); None where nothing was found. direction: above | below that value; without: where the
    limit is lifted, or for want of a price; never: no value in the range that was searched;
    not_measured: this run cannot tell. arm_then: what would be taken
    there; None where no arm could be.
    """

    what: str
    at: float | None
    direction: str
    arm_then: str | None
    sentence: str
    verdict_then: str = ""


@dataclass(kw_only=True, slots=True, frozen=True)
class Utility:
    """What an arm is expected to cost over the horizon, errors included: lower is better.

    expected_usd = cost_usd (fixed + requests) + wrong_usd (wrong answers at decision.error_usd).
    """

    arm: str
    expected_usd: Measured = field(default_factory=Measured)
    expected_usd_per_month: Measured = field(default_factory=Measured)
    cost_usd: Measured = field(default_factory=Measured)
    wrong_usd: Measured = field(default_factory=Measured)


@dataclass(kw_only=True, slots=True, frozen=True)
class Criterion:
    """One reason that the field gives for an approach, with what this run measured of it.

    side: prompting | fine_tuning, for which the field gives it. says: prompting | fine_tuning |
    neither | not_measured, what the evidence speaks for.
    """

    side: str
    text: str
    evidence: str
    says: str
