"""What a search leaves behind: how its trials stood at each rung, who went on, what was chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conf.records import Measured


@dataclass(kw_only=True, slots=True, frozen=True)
class RungRecord:
    """One trial at one rung, on the validation items that all trials of the arm share.

    step: optimizer steps it had taken. value: of the metric, larger is better; without a value
    where the trial failed before. per_item: its parts, in the order of the items, so that trials
    can be paired. tie_break: larger is better, of trials with equal values; None where there is no
    need. tokens, device_seconds: spent to score it; those of its training stand elsewhere.
    """

    arm: str
    trial: int
    rung: int
    step: int
    metric: str
    value: Measured
    per_item: tuple[float, ...] = ()
    tie_break: float | None = None
    tokens: int = 0
    device_seconds: float = 0.0

    @property
    def ranked(self) -> tuple[float, ...] | None:
        """What trials are ranked by: the value, then what breaks ties; None: it failed."""
        if self.value.value is None:
            return None
        return (self.value.value,) if self.tie_break is None else (self.value.value, self.tie_break)


@dataclass(kw_only=True, slots=True, frozen=True)
class RungDecision:
    """What became of the trials that a rung judged.

    keep, drop, failed: every trial that was judged, in one of them, by number. reasons: trial ->
    why, for those that leave. correlation: of ranks with the rung before, over num_ranked settings;
    None where there is none. is_grace: nobody was dropped since ranks changed too much.
    """

    arm: str
    rung: int
    keep: tuple[int, ...]
    drop: tuple[int, ...]
    failed: tuple[int, ...]
    reasons: dict[str, str]
    correlation: float | None = None
    num_ranked: int = 0
    is_grace: bool = False


UNFINISHED = "unfinished"  # status of a trial that trains, or whose search was stopped


@dataclass(kw_only=True, slots=True, frozen=True)
class TrialRecord:
    """One trial of a search: a row of the table of trials; of several records the last one counts.

    setting: equal for trials that differ by chance alone (seed, draw). label, values: the setting,
    for people and by field. status: done (it went all the way), dropped or failed; reason: of the
    latter two; unfinished where it went on after `rung`, and nothing after that is in the row.
    rung: the last one it was scored at, None where it came to none. steps: optimizer steps; 0 for a
    prompt. tokens, device_seconds: all that it spent, its rungs included.
    """

    arm: str
    trial: int
    setting: int
    seed: int
    draw: int
    label: str
    values: dict[str, Any] = field(default_factory=dict)
    status: str = "done"
    reason: str = ""
    rung: int | None = None
    steps: int = 0
    tokens: int = 0
    device_seconds: float = 0.0
    usd: float | None = None
    trained_parameters: int | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class SweepChoice:
    """The setting that a search ends with.

    setting, trials: its number and replicates. rung: the last one that any setting reached; all
    settings there were compared. value: the mean over items and replicates. not_told_apart: other
    settings of that rung whose paired difference could be 0. Its value is flattered by being the
    largest of several: the test items, which took no part, tell what it is worth.
    """

    arm: str
    setting: int
    trials: tuple[int, ...]
    rung: int
    metric: str
    value: Measured
    trained_parameters: int
    not_told_apart: tuple[int, ...] = ()


# What each is called in the journal.
SEARCH_EVENTS: dict[type, str] = {
    RungRecord: "rung_scored",
    RungDecision: "rung_decided",
    TrialRecord: "trial_ended",
    SweepChoice: "sweep_chosen",
}
