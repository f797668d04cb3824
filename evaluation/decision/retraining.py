"""How often data may change before training again each time is dearer than prompting (pure).

A tuned arm pays its fixed cost at every change, a prompted one follows new data by itself. Over one
interval between changes the volume must reach the break-even of the two, so the shortest interval
that pays is break-even / requests per month.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from conf.results import ArmResult, BreakEven, Retraining
from conf.run_groups import DecisionConfig
from evaluation.decision.rules import PAID_ONCE


def all_retraining(
    break_evens: Sequence[BreakEven], arms: Mapping[str, ArmResult], *, decision: DecisionConfig
) -> tuple[Retraining, ...]:
    """One for each break-even in USD, under the measured cache, of a prompted arm and a tuned one.

    Where the tuned arm is the one with the lower fixed cost (after a dear search of prompts) there
    is no interval to speak of: its status is `always`, or `never` from the break-even on.
    """
    found = []
    for b in break_evens:
        if b.unit != "usd" or b.cache != "measured":
            continue
        tuned, prompted = (b.b, b.a) if arms[b.a].kind in PAID_ONCE else (b.a, b.b)
        found.append(_retraining(b, tuned, prompted, per_month=decision.requests_per_month))
    return tuple(found)


def _retraining(b: BreakEven, tuned: str, prompted: str, *, per_month: float) -> Retraining:
    status = {"crosses": "pays"}.get(b.status, b.status)
    if tuned != b.b:  # the tuned arm costs less at first: what it saves it saves from the start
        status = "always" if b.status == "never" else "unknown"
        return Retraining(arm=tuned, against=prompted, months=None, status=status)

    def months(requests: float | None) -> float | None:
        return None if requests is None else requests / per_month

    return Retraining(
        arm=tuned,
        against=prompted,
        months=months(b.requests),
        low=months(b.low),
        high=months(b.high),
        status=status,
    )
