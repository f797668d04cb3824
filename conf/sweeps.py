"""The configuration group `sweep`: what is searched, how trials are drawn, halved and limited."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from conf.choices import require

SWEEPS = ("none", "grid", "random")


@dataclass(kw_only=True, slots=True)
class ReplicatesConfig:
    """Trials of one setting that differ by chance alone; they are judged by their mean."""

    seeds: int = 1  # of training; for arms that train
    draws: int = 1  # of the shots; for settings with shots

    def __post_init__(self) -> None:
        """Counts."""
        for key in ("seeds", "draws"):
            value = getattr(self, key)
            require(value > 0, f"sweep.replicates.{key}", value, "a positive count")


@dataclass(kw_only=True, slots=True)
class HalvingConfig:
    """Successive halving: at each rung the best 1/eta of the settings go on (search/halving.py).

    Rungs lie at first_rung of the steps, eta times that, and so on; 16 settings take a third of
    what a grid does. Where ranks change much between two rungs, nobody is dropped at the second.
    """

    enabled: bool = True  # false: every trial takes all its steps
    eta: int = 3  # the reduction factor of Hyperband (Li et al. 2018, arXiv 1603.06560)
    first_rung: float = 0.14  # share of the steps before which nobody is dropped
    min_correlation: float = 0.5  # of ranks (Spearman); -1: drop whatever the ranks do

    def __post_init__(self) -> None:
        """Ranges."""
        require(self.eta >= 2, "sweep.halving.eta", self.eta, "a whole number of at least 2")
        require(
            0 < self.first_rung < 1, "sweep.halving.first_rung", self.first_rung, "a share in (0,1)"
        )
        require(
            -1 <= self.min_correlation <= 1,
            "sweep.halving.min_correlation",
            self.min_correlation,
            "a rank correlation in [-1, 1]",
        )


@dataclass(kw_only=True, slots=True)
class SweepBudgetConfig:
    """Caps on the search alone; null: none. max_trials is of all arms, replicates included."""

    max_trials: int | None = None
    max_tokens: int | None = None
    max_device_seconds: float | None = None
    max_usd: float | None = None

    def __post_init__(self) -> None:
        """Caps are positive."""
        for key in ("max_trials", "max_tokens", "max_device_seconds", "max_usd"):
            value = getattr(self, key)
            require(value is None or value > 0, f"sweep.budget.{key}", value, "positive, or null")


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """Hyperparameter search over fields of arms.

    space: arm -> field -> a list of values, or a range (conf/space.py says which, with examples).
    trials: settings that a random search draws for an arm; a grid has as many as it has.
    """

    name: str = "none"  # none | grid | random
    space: dict[str, Any] = field(default_factory=dict)
    trials: int = 8
    seed: int = 0
    replicates: ReplicatesConfig = field(default_factory=ReplicatesConfig)
    halving: HalvingConfig = field(default_factory=HalvingConfig)
    budget: SweepBudgetConfig = field(default_factory=SweepBudgetConfig)

    def __post_init__(self) -> None:
        """A search that there is, and a positive count of settings."""
        require(self.name in SWEEPS, "sweep.name", self.name, " or ".join(SWEEPS))
        require(self.trials > 0, "sweep.trials", self.trials, "a positive count")
