"""results.json as types: what every report, panel and comparison is made from."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.decision_results import Change, Criterion, Utility
from conf.label_results import LabelCurve
from conf.probe_results import DimensionRow, ProbeChange, ProbeResult, TurnAround
from conf.records import SCHEMA_VERSION, AnswerRule, LedgerLine, Measured, SourceRows
from conf.search_results import SearchResult

CHECKPOINT_CHOSEN = "checkpoint_chosen"  # the journal event whose data are a CheckpointChoice


@dataclass(kw_only=True, slots=True, frozen=True)
class Metric:
    """The arm's headline number under its task's scoring rule."""

    name: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class Latency:
    """Seconds of separate requests at the stated concurrency, alone on the machine."""

    first_token_p50_seconds: Measured = field(default_factory=Measured)
    p50_seconds: Measured = field(default_factory=Measured)
    p95_seconds: Measured = field(default_factory=Measured)
    concurrency: int = 1


@dataclass(kw_only=True, slots=True, frozen=True)
class Tokens:
    """Mean tokens per test item."""

    prompt: Measured = field(default_factory=Measured)
    cached: Measured = field(default_factory=Measured)
    computed: Measured = field(default_factory=Measured)
    completion: Measured = field(default_factory=Measured)
    truncated: Measured = field(default_factory=Measured)  # cut from prompts over the context


@dataclass(kw_only=True, slots=True, frozen=True)
class CacheCost:
    """What one request costs in the mean, under one rule for tokens that a cache holds."""

    usd: Measured = field(default_factory=Measured)
    device_seconds: Measured = field(default_factory=Measured)


@dataclass(kw_only=True, slots=True, frozen=True)
class Cost:
    """Fixed cost is paid once, request cost per item served. None: not measured or no price.

    request_usd and request_device_seconds are of the cache as it was measured. by_cache: the same
    request where cached prompt tokens cost nothing more (measured), a provider's share of the
    price (discount), or all of it (none); a rule whose cost is unknown is left out.
    """

    fixed_usd: float | None = None
    fixed_device_seconds: float | None = None
    request_usd: Measured = field(default_factory=Measured)
    request_device_seconds: Measured = field(default_factory=Measured)
    usd_per_million_tokens: Measured = field(default_factory=Measured)
    by_cache: dict[str, CacheCost] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True, frozen=True)
class RequestRates:
    """Device-seconds of a request: fixed + tokens computed and tokens put out, each at its rate.

    Of one model on one device, fitted to the requests of `arms` that were timed alone.
    held_out_error: the worst relative error of an arm's mean request, predicted from the others'.
    why_unknown: what the timed requests do not tell, and why; empty: nothing.
    """

    fixed_device_seconds: Measured
    prompt_token_device_seconds: Measured
    output_token_device_seconds: Measured
    arms: tuple[str, ...] = ()
    held_out_error: float | None = None
    why_unknown: str = ""


@dataclass(kw_only=True, slots=True, frozen=True)
class Variance:
    """Variance of the metric by source; None where there was one draw or one seed."""

    items: float | None = None
    draws: float | None = None
    seeds: float | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainCost:
    """What the fine-tuned arm changed and spent in training."""

    trained_parameters: int
    checkpoint_bytes: int
    device_seconds: float
    peak_memory_bytes: int | None
    usd: float | None
    steps: int | None = None
    tokens: int | None = None
    learning_rate: float | None = None
    sources: tuple[SourceRows, ...] = ()  # rows prepared, dropped and trained, by source


@dataclass(kw_only=True, slots=True, frozen=True)
class CheckpointChoice:
    """The checkpoint that an arm answers with, the best on validation (trainer.keep=best).

    variant: its directory below arms/<arm>/ of the arm that trained. step: its optimizer step.
    points: step -> score on validation of each that it was chosen from. The best of several is
    flattered by that very choice: the test items, which took no part in it, tell what it is worth.
    """

    variant: str
    step: int
    metric: str
    points: dict[str, Measured]


@dataclass(kw_only=True, slots=True, frozen=True)
class ArmResult:
    """One row of the table."""

    kind: str
    status: str  # done | failed | refused | stopped
    is_same_base: bool = True
    labels_used: int | None = None
    metric: Metric | None = None
    accuracy: Measured | None = None
    accuracy_calibrated: Measured | None = None
    macro_f1: Measured | None = None
    format_validity: Measured | None = None
    consistency: Measured | None = None
    latency: Latency | None = None
    tokens: Tokens | None = None
    cost: Cost | None = None
    by_label: dict[str, Measured] = field(default_factory=dict)
    by_slice: dict[str, Measured] = field(default_factory=dict)
    variance: Variance = field(default_factory=Variance)
    train: TrainCost | None = None
    answer_rule: AnswerRule | None = None
    checkpoint: CheckpointChoice | None = None  # None: the last one, or no training
    ready_seconds: float | None = None  # wall time of all work before the first request
    people_hours: float | None = None  # as decision.tuning_hours and prompting_hours give them
    probes: dict[str, ProbeResult] = field(default_factory=dict)  # by name of the probe
    turn_around: TurnAround | None = None
    spent_now_usd: float | None = None
    spent_now_device_seconds: float | None = None
    is_reused: bool = False
    error: str | None = None
    prompt_example: str | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class Pair:
    """Arms a and b on the same items: difference = a - b, with interval and tests.

    confidence_sequence: the run looked at its scores on the way (decision.stop_early). low and high
    then hold at every look and for all pairs at once, so that they decide alone: there is no p.
    """

    a: str
    b: str
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    p_adjusted: float | None
    n: int
    wins: int = 0
    losses: int = 0
    ties: int = 0
    method: str = "fixed_n"  # fixed_n | clustered | confidence_sequence
    e_value: float | None = None  # of a confidence sequence: against a difference of 0
    num_sources: int | None = None  # where items share sources: how many there are


@dataclass(kw_only=True, slots=True, frozen=True)
class BreakEven:
    """Requests after which b (the higher fixed cost) has cost less in total than a.

    status: crosses | never (b stays dearer) | always (b is cheaper from request 1) | unknown.
    unit: usd | device_seconds. cache: what cached prompt tokens cost, see Cost.by_cache.
    """

    a: str
    b: str
    requests: float | None
    low: float | None
    high: float | None
    status: str
    is_high_unbounded: bool = False
    unit: str = "usd"
    cache: str = "measured"


@dataclass(kw_only=True, slots=True, frozen=True)
class Retraining:
    """How often the data may change before training again each time costs more than prompting.

    months: the shortest interval between changes at which `arm` still costs no more than
    `against`, in USD at the assumed volume; low, high: from the interval of their break-even.
    status: pays (at months or longer) | never | always | unknown.
    """

    arm: str
    against: str
    months: float | None
    low: float | None = None
    high: float | None = None
    status: str = "unknown"


@dataclass(kw_only=True, slots=True, frozen=True)
class Forgetting:
    """The general set before and after a tuning, on the same items.

    base, tuned: share of right answers. change = tuned - base, with the paired interval. lost,
    gained: items that only the base model, or only the tuned one, answers right. by_kind: kind of
    item -> change.
    """

    arm: str
    base: Measured
    tuned: Measured
    change: Measured
    p_value: float | None
    lost: int
    gained: int
    by_kind: dict[str, Measured] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True, frozen=True)
class ServeCommand:
    """How to use an arm outside the run: what it is for, and what to type."""

    arm: str
    title: str
    text: str
    note: str = ""


@dataclass(kw_only=True, slots=True, frozen=True)
class Recommendation:
    """The verdict and why. arm is None where no arm meets the limits or none can be told apart."""

    arm: str | None
    verdict: str
    reasons: tuple[str, ...] = ()
    would_change_if: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()  # the same with numbers, and what could not be solved for
    utilities: tuple[Utility, ...] = ()  # cheapest first; empty without decision.error_usd


@dataclass(kw_only=True, slots=True, frozen=True)
class Results:
    """results.json, whole."""

    run: str
    task: dict[str, object]
    model: dict[str, object]
    arms: dict[str, ArmResult]
    pairs: tuple[Pair, ...]
    break_even: tuple[BreakEven, ...]
    recommendation: Recommendation
    ledger: tuple[LedgerLine, ...]
    pricing: dict[str, object] = field(default_factory=dict)
    decision: dict[str, object] = field(default_factory=dict)
    provenance: dict[str, object] = field(default_factory=dict)
    forgetting: tuple[Forgetting, ...] = ()
    instructions: tuple[Forgetting, ...] = ()  # share of verifiable instructions that are obeyed
    serving: tuple[ServeCommand, ...] = ()
    searches: dict[str, SearchResult] = field(default_factory=dict)  # by arm
    criteria: tuple[Criterion, ...] = ()  # the field's eleven reasons, with this run's evidence
    probe_changes: tuple[ProbeChange, ...] = ()  # probes before and after each tuning
    dimensions: tuple[DimensionRow, ...] = ()  # the ten dimensions, arms as columns
    label_curve: LabelCurve | None = None
    request_rates: RequestRates | None = None  # None: nothing was timed on a device of one's own
    retraining: tuple[Retraining, ...] = ()
    schema_version: int = SCHEMA_VERSION
