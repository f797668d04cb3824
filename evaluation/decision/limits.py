"""How much looser or tighter a limit would have to be for another answer (pure)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace

from conf.decision_results import Change
from conf.run_groups import DecisionConfig
from evaluation.decision.rules import LIMITS, Choice, Evidence, choose, measured_for
from evaluation.decision.words import limit_value, outcome_of, verdict_of


def limit_changes(
    choice: Choice, evidence: Evidence, *, decision: DecisionConfig
) -> Iterator[Change]:
    """For each limit that is set: how much looser, and how much tighter, gives another answer.

    A limit only counts by whom it leaves out, so its steps are the arms' own measured values.
    """
    for limit in LIMITS:
        bound = getattr(decision, limit)
        if bound is None:
            continue
        steps = _Steps(evidence, decision, limit, bound)
        yield from (c for c in (steps.looser(choice), steps.tighter(choice)) if c is not None)


def _with_limit(decision: DecisionConfig, limit: str, bound: float | None) -> DecisionConfig:
    changed = copy(decision)
    setattr(changed, limit, bound)
    return changed


class _Steps:
    """One limit, the values that arms have under it, and the choice at each."""

    def __init__(
        self, evidence: Evidence, decision: DecisionConfig, limit: str, bound: float
    ) -> None:
        self.evidence, self.decision = evidence, decision
        self.limit, self.bound = limit, bound
        self.is_minimum = limit.startswith("minimum")
        known = (measured_for(limit, r, decision=decision) for r in evidence.arms.values())
        self.values: Sequence[float] = sorted(
            {v for v in known if v is not None}, reverse=self.is_minimum
        )

    def choice(self, bound: float | None) -> Choice:
        """What is chosen under another bound; None: without the limit."""
        return choose(self.evidence, decision=_with_limit(self.decision, self.limit, bound))

    def looser(self, now: Choice) -> Change | None:
        """The nearest value that lets another arm win; without the limit where it has none."""
        outside = [
            v for v in self.values if (v < self.bound if self.is_minimum else v > self.bound)
        ]
        for value in outside:
            then = self.choice(value)
            if then.arm not in (None, now.arm):
                sentence = f"With decision.{self.limit} at {limit_value(self.limit, value)}"
                return self._made(value, then, sentence, is_looser=True)
        then = self.choice(None)
        if then.arm in (None, now.arm):
            return None
        change = self._made(None, then, f"Without decision.{self.limit}", is_looser=True)
        return replace(change, direction="without")

    def tighter(self, now: Choice) -> Change | None:
        """The nearest value at which the arm that is taken would have to go."""
        if now.arm is None:
            return None
        towards = math.inf if self.is_minimum else -math.inf
        inside = [
            v for v in self.values if (v >= self.bound if self.is_minimum else v <= self.bound)
        ]
        for value in reversed(inside):
            if value == (1.0 if self.is_minimum else 0.0):
                continue  # nothing can be asked beyond
            then = self.choice(math.nextafter(value, towards))
            if then.arm != now.arm:
                side = "above" if self.is_minimum else "below"
                sentence = f"With decision.{self.limit} {side} {limit_value(self.limit, value)}"
                return self._made(value, then, sentence, is_looser=False)
        return None

    def _made(self, at: float | None, then: Choice, sentence: str, *, is_looser: bool) -> Change:
        return Change(
            what=self.limit,
            at=at,
            direction="below" if is_looser == self.is_minimum else "above",
            arm_then=then.arm,
            sentence=f"{sentence} {outcome_of(then)}.",
            verdict_then=verdict_of(then),
        )
