"""The decision's outcomes and limits in words: one place for the verdict and what changes it."""

from __future__ import annotations

from evaluation import wording
from evaluation.decision.rules import Choice

LIMIT_WORDS = {
    "minimum_metric": "metric",
    "minimum_format_validity": "format validity",
    "minimum_consistency": "consistency",
    "maximum_p95_seconds": "p95 latency",
    "maximum_total_usd": "total cost",
    "deadline_hours": "time to the first request",
}
STATES = {
    "open": "it would be too close to call",
    "none": "no arm would meet your limits",
    "nothing": "there would be nothing to compare",
}


def verdict_of(choice: Choice) -> str:
    """The verdict as the report writes it."""
    match choice.state:
        case "take":
            return f"take {choice.arm}"
        case "equal":
            return f"practically equal: take the cheaper, {choice.arm}"
        case "open" if choice.more_items is not None:
            return f"too close to call: about {choice.more_items:,} more items"
        case "open":
            return "too close to call"
        case "none":
            return "none meets your limits"
    return "no arm finished: nothing to compare"


def outcome_of(choice: Choice) -> str:
    """What a choice comes to, as the end of a sentence."""
    return STATES.get(choice.state) or f"the answer would be {choice.arm}"


def limit_value(limit: str, value: float) -> str:
    """A limit's value in its unit."""
    match limit:
        case "maximum_p95_seconds":
            return wording.seconds(value)
        case "maximum_total_usd":
            return f"{wording.usd(value)} USD"
        case "deadline_hours":
            return wording.seconds(3600 * value)
    return wording.percent(value)
