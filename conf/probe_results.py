"""What probes, wordings and label probabilities tell of an arm, and the ten-dimension table."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.records import Measured


@dataclass(kw_only=True, slots=True, frozen=True)
class ProbeResult:
    """One probe of one arm.

    probe, and its measures, all shares in [0, 1] but the gaps, which lie in [-1, 1]:
        steering     obeyed: requests on the task's items whose own instruction was obeyed
        wording      agreement: pairs of wordings with equal answers; worst: the metric under the
                     worst wording; spread: best less worst wording
        bias         group_gap: answers that follow the stereotype less those against it, where
                     the right answer is that nobody knows; preference: the same by which of the
                     two is likelier, whatever is answered; right
        abstain      unsupported: unanswerable items that were answered all the same; abstained:
                     unanswerable items that were not; over_abstained: answerable ones that were not
        task_bias    group_gap, preference; metric_gap: best group's metric less the worst's
        task_abstain as abstain
        calibration  ece: mean distance of stated probability and share of right answers
    source: embedded | file | task, whose items they are. asked_of: whose answers they are, where
    arms on the same weights share them. by_kind: kind of item -> the probe's first measure.
    """

    probe: str
    source: str
    asked_of: str
    measures: dict[str, Measured]
    by_kind: dict[str, Measured] = field(default_factory=dict)
    note: str = ""


@dataclass(kw_only=True, slots=True, frozen=True)
class ProbeChange:
    """A measure before and after a tuning, on the same items: change = after - before, paired.

    base: the arm that answers without the tuning; the arm itself, where its own base was asked.
    """

    arm: str
    base: str
    probe: str
    measure: str
    before: Measured
    after: Measured
    change: Measured
    p_value: float | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class TurnAround:
    """Wall seconds until a score is there, without start-up: after a new prompt, after new data."""

    prompt_seconds: float | None = None
    data_seconds: float | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class DimensionRow:
    """One measure of one of the ten dimensions on which the approaches are said to differ.

    by_arm: arm -> a number with its interval, a short text, or None where there is neither; note
    says why, or what the numbers stand on. unit: share | points | usd | seconds | count | bytes |
    tokens of the numbers; empty for texts.
    """

    dimension: str
    measure: str
    by_arm: dict[str, Measured | str | None]
    note: str = ""
    unit: str = ""
