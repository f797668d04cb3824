"""What a pack of trials reads and leaves: rows that its rungs are judged on, scores, outcomes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.records import RenderedExample, TrainSummary


@dataclass(kw_only=True, slots=True, frozen=True)
class LabelRow(RenderedExample):
    """One label of one validation item: its prompt, and the label's tokens, which are targets.

    A row for each label of an item; one row where the task generates. label: the label's number.
    is_reference: it is right.
    """

    label: int = 0
    is_reference: bool = True


@dataclass(kw_only=True, slots=True, frozen=True)
class RungScore:
    """One trial at one rung.

    step: optimizer steps it had taken. metric: accuracy, or minus_loss. per_item: 1.0 or 0.0, or
    minus the mean loss of the targets, in the order of the items: the same for all trials, so that
    they can be paired. tie_break: larger is better, of trials with equal values; None: no need, the
    metric is fine enough. tokens, device_seconds: spent on it; 0 where two rungs fall on one step.
    """

    trial: int
    rung: int
    step: int
    metric: str
    per_item: tuple[float, ...]
    tokens: int
    tie_break: float | None = None
    device_seconds: float = 0.0

    @property
    def ranked(self) -> tuple[float, ...]:
        """What trials are ranked by: the metric, then what breaks ties."""
        return (self.value,) if self.tie_break is None else (self.value, self.tie_break)

    @property
    def value(self) -> float:
        """The metric, each item counting alike; larger is better."""
        return math.fsum(self.per_item) / len(self.per_item)


@dataclass(kw_only=True, slots=True, frozen=True)
class TrialOutcome:
    """How a trial left its pack.

    status: done (all steps taken, weights saved), dropped or failed. reason: of the latter two.
    checkpoint: its directory, empty where there is none. summary: of the steps it took; what its
    rungs cost stands in scored_tokens, and their seconds in the summary's.
    """

    trial: int
    status: str
    reason: str
    checkpoint: str
    scores: tuple[RungScore, ...]
    scored_tokens: int
    summary: TrainSummary
