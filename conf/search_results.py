"""What results.json says of the search of an arm: settings, trials, rungs, fields and the bill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conf.records import Measured
from conf.sweep_records import SweepChoice


@dataclass(kw_only=True, slots=True, frozen=True)
class RungValue:
    """A trial, or a setting, at a rung; step: optimizer steps it had taken, 0 for a prompt."""

    rung: int
    step: int
    value: Measured


@dataclass(kw_only=True, slots=True, frozen=True)
class TrialResult:
    """One trial as it ended, and how it stood at each rung it came to."""

    trial: int
    setting: int
    seed: int
    draw: int
    status: str  # done | dropped | failed | unfinished
    reason: str
    steps: int
    tokens: int
    device_seconds: float
    usd: float | None
    rungs: tuple[RungValue, ...] = ()


@dataclass(kw_only=True, slots=True, frozen=True)
class SettingResult:
    """One setting, its replicates pooled.

    place: 1 is the best; by the rung that was reached, then by the value there. rung: the last one
    at which all its replicates were scored; None: none. value: there, the mean over items and
    replicates, its interval over items; replicate_values: each one's own; rungs: the same at every
    rung. is_told_apart: whether it differs from the chosen one; None: not compared to the end.
    """

    setting: int
    place: int
    label: str
    values: dict[str, Any]
    status: str  # chosen | done | dropped | failed | unfinished
    reason: str
    rung: int | None
    value: Measured
    replicate_values: tuple[float, ...]
    seeds: int
    draws: int
    tokens: int
    device_seconds: float
    usd: float | None
    trained_parameters: int | None
    is_told_apart: bool | None = None
    rungs: tuple[RungValue, ...] = ()


@dataclass(kw_only=True, slots=True, frozen=True)
class DecisionResult:
    """A rung: what became of its trials, by number.

    correlation: of ranks (Spearman) with the rung before, n: settings; its interval is Bonett and
    Wright's (2000, doi:10.1007/BF02294183). is_grace: nobody was dropped since ranks had changed.
    """

    rung: int
    keep: tuple[int, ...]
    drop: tuple[int, ...]
    failed: tuple[int, ...]
    reasons: dict[str, str]
    correlation: Measured
    is_grace: bool


@dataclass(kw_only=True, slots=True, frozen=True)
class FieldResult:
    """A searched field, and how much of the settings' order it explains alone.

    share: of the variance of ranks, adjusted for the number of groups (epsilon squared); None:
    too few settings, or every one with a value of its own. chance_high: what 95% of shufflings stay
    below. p_value: of shufflings, those that explain as much. n: settings.
    """

    field: str
    is_log: bool
    num_values: int
    share: float | None
    chance_high: float | None
    p_value: float | None
    n: int


@dataclass(kw_only=True, slots=True, frozen=True)
class SearchPoint:
    """After a rung: what all trials had spent, and the best setting's value at it."""

    rung: int
    num_settings: int
    setting: int
    value: Measured
    tokens: int
    device_seconds: float
    usd: float | None


@dataclass(kw_only=True, slots=True, frozen=True)
class SearchTotals:
    """What the search spent.

    unit: steps of a training, or items asked of a prompt. taken: of all trials; full: what they
    would have taken had each gone to the end, None where that is not known of all.
    """

    settings: int
    trials: int
    tokens: int
    device_seconds: float
    usd: float | None
    unit: str
    taken: int
    full: int | None
    share_of_grid: float | None


@dataclass(kw_only=True, slots=True, frozen=True)
class SearchResult:
    """The search of one arm. metric: larger is better; choice: None where it has not ended."""

    arm: str
    metric: str | None
    settings: tuple[SettingResult, ...]  # the best first
    trials: tuple[TrialResult, ...]
    decisions: tuple[DecisionResult, ...]
    choice: SweepChoice | None
    totals: SearchTotals
    fields: tuple[FieldResult, ...]
    best_so_far: tuple[SearchPoint, ...]
    rungs: dict[str, int] = field(default_factory=dict)  # rung -> most steps, or items, at it

    @property
    def chosen(self) -> SettingResult | None:
        """The setting that was chosen."""
        return next((s for s in self.settings if s.status == "chosen"), None)
