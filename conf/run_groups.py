"""The configuration groups of a run as a whole: what it costs, what decides."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.choices import KernelImpl, ReportText, WandbMode, require


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Weights & Biases."""

    wandb: WandbMode = WandbMode.auto
    project: str = "crossover"
    entity: str | None = None
    upload_text: bool = False
    alert: bool = False  # when a run ends, fails or reaches its budget, by W&B's mail or chat


@dataclass(kw_only=True, slots=True)
class PriceConfig:
    """A price with its range; low and high are null where the source gives one number."""

    usd: float | None = None
    low_usd: float | None = None
    high_usd: float | None = None

    def __post_init__(self) -> None:
        """Prices are not negative, and the range holds the price."""
        for key in ("usd", "low_usd", "high_usd"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"pricing.*.{key}", value, "0 or more, or null")


@dataclass(kw_only=True, slots=True)
class HostedPrice:
    """What a hosted model's tokens cost. Cached input null: the provider gives no discount."""

    input_usd_per_million: float = MISSING
    cached_input_usd_per_million: float | None = None
    output_usd_per_million: float = MISSING
    source: str = MISSING
    date: str = MISSING

    def __post_init__(self) -> None:
        """Prices are not negative."""
        for key in ("input", "cached_input", "output"):
            value = getattr(self, f"{key}_usd_per_million")
            require(
                value is None or value >= 0,
                f"pricing.hosted.*.{key}_usd_per_million",
                value,
                "0 or more",
            )


@dataclass(kw_only=True, slots=True)
class CachedInputPrice:
    """What providers charge for a prompt token that their cache holds; null: no such curve."""

    ratio: float | None = 0.1  # of an uncached token's price: GPT-5 mini, 0.025 / 0.25 USD
    source: str = "nicolalazzari.ai/articles/openai-api-pricing-explained-2026"
    date: str = "2026"

    def __post_init__(self) -> None:
        """A share."""
        ratio = self.ratio
        is_share = ratio is None or 0 <= ratio <= 1
        require(is_share, "pricing.cached_input.ratio", ratio, "a share in [0, 1], or null")


@dataclass(kw_only=True, slots=True)
class PricingConfig:
    """What a device-hour costs. source and date are mandatory: a price without them is refused."""

    name: str = MISSING
    device_hour: PriceConfig = field(default_factory=PriceConfig)
    source: str = MISSING
    date: str = MISSING
    hosted: dict[str, HostedPrice] = field(default_factory=dict)  # by the endpoint's model name
    cached_input: CachedInputPrice = field(default_factory=CachedInputPrice)
    utilisation: float = 1.0  # share of the time that a serving device computes; the rest is idle
    shared_tasks: int = 1  # tasks whose adapters or prompts share one served base model

    def __post_init__(self) -> None:
        """Ranges."""
        shares = 0 < self.utilisation <= 1
        require(shares, "pricing.utilisation", self.utilisation, "a share in (0, 1]")
        require(self.shared_tasks >= 1, "pricing.shared_tasks", self.shared_tasks, "1 or more")

    def hosting(self, *, is_base_shared: bool) -> float:
        """What a busy device-second of serving costs, in device-seconds.

        An idle second is paid as well: 1 / utilisation - 1 of them for each busy one, divided
        among the tasks that share the base model.
        """
        idle = 1 / self.utilisation - 1
        return 1 + idle / (self.shared_tasks if is_base_shared else 1)

    @property
    def usd_per_device_second(self) -> float | None:
        """The price of one device-second; None where there is no price."""
        return None if self.device_hour.usd is None else self.device_hour.usd / 3600.0


@dataclass(kw_only=True, slots=True)
class DecisionConfig:
    """What the answer is decided by. Null limits do not apply."""

    requests_per_month: float = 100_000.0
    horizon_months: float = 12.0
    minimum_metric: float | None = None
    minimum_format_validity: float | None = None
    minimum_consistency: float | None = None  # share of repeats that agree
    maximum_p95_seconds: float | None = None
    maximum_total_usd: float | None = None
    deadline_hours: float | None = None  # from labels to the first request served
    error_usd: float | None = None  # cost of one wrong answer
    label_usd: float | None = None  # cost of one labelled example
    hour_usd: float | None = None  # of a person's work; null: hours are not on the bill
    tuning_hours: float = 0.0  # of people, for each arm that was trained
    prompting_hours: float = 0.0  # of people, for each arm that was prompted
    changes_per_month: float = 0.0  # of the task's data, each paid for by training again
    equivalence_margin: float = 0.02  # differences below this are practically equal
    confidence: float = 0.95
    stop_early: bool = False  # close comparisons wave by wave, by tests that allow for the looks

    def __post_init__(self) -> None:
        """Ranges."""
        for key in ("requests_per_month", "horizon_months"):
            require(getattr(self, key) > 0, f"decision.{key}", getattr(self, key), "positive")
        for key in ("minimum_metric", "minimum_format_validity", "minimum_consistency"):
            value = getattr(self, key)
            require(
                value is None or 0 <= value <= 1,
                f"decision.{key}",
                value,
                "a share in [0, 1] or null",
            )
        amounts: tuple[str, ...] = ("maximum_p95_seconds", "maximum_total_usd", "deadline_hours")
        amounts += ("tuning_hours", "prompting_hours", "hour_usd")
        for key in (*amounts, "error_usd", "label_usd", "changes_per_month"):
            value = getattr(self, key)
            require(value is None or value >= 0, f"decision.{key}", value, "0 or more, or null")
        require(
            0 <= self.equivalence_margin < 1,
            "decision.equivalence_margin",
            self.equivalence_margin,
            "a share in [0, 1)",
        )
        require(
            0.5 < self.confidence < 1,
            "decision.confidence",
            self.confidence,
            "a share in (0.5, 1), e.g. 0.95",
        )


@dataclass(kw_only=True, slots=True)
class BudgetConfig:
    """Caps on the whole run; null: none."""

    max_usd: float | None = None
    max_device_seconds: float | None = None
    max_wall_seconds: float | None = None

    def __post_init__(self) -> None:
        """Caps are positive."""
        for key in ("max_usd", "max_device_seconds", "max_wall_seconds"):
            value = getattr(self, key)
            require(value is None or value > 0, f"budget.{key}", value, "positive, or null")


@dataclass(kw_only=True, slots=True)
class RunSection:
    """Where the run directory lies; null name: <exp>-<task>-<model>-<8 hex of the config>."""

    root: str = "outputs"
    name: str | None = None


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """What the report shows."""

    text: ReportText = ReportText.full


@dataclass(kw_only=True, slots=True)
class GeneralConfig:
    """The general set: what a model could do before it was tuned, and can still."""

    items: int = 60  # asked of each tuned model and of its base; 0: none, 120: all
    instruction_items: int = 0  # requests whose obedience a program verifies, asked of both too

    def __post_init__(self) -> None:
        """As many as there are."""
        require(0 <= self.items <= 120, "general.items", self.items, "a count from 0 to 120")
        require(
            0 <= self.instruction_items <= 250,
            "general.instruction_items",
            self.instruction_items,
            "a count from 0 to 250",
        )


@dataclass(kw_only=True, slots=True)
class KernelsConfig:
    """Which kernels run."""

    impl: KernelImpl = KernelImpl.auto


@dataclass(kw_only=True, slots=True)
class ProbeSetConfig:
    """One probe: how many of its items are asked, and where they come from."""

    items: int = 16  # of those there are; 0: none
    path: str | None = None  # the user's own file; null: those written for this project

    def __post_init__(self) -> None:
        """A count."""
        require(self.items >= 0, "probes.*.items", self.items, "a count, or 0 for none")


@dataclass(kw_only=True, slots=True)
class WordingProbeConfig:
    """The same test items under other wordings of the instruction."""

    items: int = 6
    wordings: int = 3  # in all, the task's own one included

    def __post_init__(self) -> None:
        """Counts; one wording shows nothing."""
        require(self.items >= 0, "probes.wording.items", self.items, "a count, or 0 for none")
        require(self.wordings >= 2, "probes.wording.wordings", self.wordings, "2 or more")


@dataclass(kw_only=True, slots=True)
class SteeringProbeConfig:
    """Test items with an instruction of their own: is the arm still steered by a request?"""

    items: int = 8

    def __post_init__(self) -> None:
        """A count."""
        require(self.items >= 0, "probes.steering.items", self.items, "a count, or 0 for none")


@dataclass(kw_only=True, slots=True)
class ProbesConfig:
    """What is asked besides the task, so that each of the ten dimensions has a number."""

    bias: ProbeSetConfig = field(default_factory=ProbeSetConfig)
    abstain: ProbeSetConfig = field(default_factory=ProbeSetConfig)
    steering: SteeringProbeConfig = field(default_factory=SteeringProbeConfig)
    wording: WordingProbeConfig = field(default_factory=WordingProbeConfig)
