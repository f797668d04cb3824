"""One arm's row of the results from its records (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from conf.records import Measured, total
from conf.results import ArmResult, Cost, Latency, Metric, Tokens, TrainCost, Variance
from conf.run_groups import DecisionConfig, PricingConfig
from evaluation.costs import cost
from evaluation.costs.arm_bills import is_base_shared, people_hours
from evaluation.costs.hosted_cost import hosted_cost, requests_usd
from evaluation.costs.request_rates import TimedRequest
from evaluation.records import arm_scores
from evaluation.records.arm_scores import Request
from evaluation.records.run_records import RunRecords
from evaluation.results.item_intervals import ItemRule
from evaluation.results.turn_around import ready_seconds
from evaluation.statistics import macro_f1, mean_interval, quantile_interval
from evaluation.statistics.variance import split_variance

LABEL_KINDS = ("classification", "multiple_choice")


@dataclass(kw_only=True, slots=True, frozen=True)
class Settings:
    """What the numbers are worked out under."""

    decision: DecisionConfig
    pricing: PricingConfig

    @property
    def confidence(self) -> float:
        """Of every interval."""
        return self.decision.confidence


@dataclass(kw_only=True, slots=True, frozen=True)
class ArmSummary:
    """An arm's row, and what comparisons with other arms need."""

    result: ArmResult
    scores: Mapping[str, float]  # item id -> score on the test split
    timed: Sequence[TimedRequest]  # alone on devices of our own
    hosted_usd: Mapping[str, Sequence[float]]  # of requests to a hosted model, by rule for caches
    fixed: cost.FixedCost
    hosting: float  # device-seconds paid for each one that a request is busy
    validation: float | None


@dataclass(kw_only=True, slots=True, frozen=True)
class Quality:
    """How well an arm answers; all None for an arm that did not finish."""

    metric: Metric | None = None
    accuracy: Measured | None = None
    accuracy_calibrated: Measured | None = None
    macro_f1: Measured | None = None
    format_validity: Measured | None = None
    consistency: Measured | None = None
    by_label: dict[str, Measured] = field(default_factory=dict)
    by_slice: dict[str, Measured] = field(default_factory=dict)
    variance: Variance = field(default_factory=Variance)


def is_label_task(records: RunRecords) -> bool:
    """Whether answers are labels scored as right or wrong, so that the metric is accuracy."""
    is_exact = records.task.get("scoring") in (None, "exact")
    return is_exact and records.task.get("kind") in LABEL_KINDS


def is_calibrated(records: RunRecords, name: str) -> bool:
    """Whether the arm's rule answers by calibrated or otherwise normalised label scores."""
    rule = records.arms[name].rule
    return is_label_task(records) and rule is not None and rule.is_calibrated


def answered_requests(records: RunRecords, name: str, *, set_name: str) -> list[Request]:
    """The arm's requests of one set; where its repeats vote, all of an item's are one request."""
    arm = records.arms[name]
    requests = arm_scores.requests_of(arm, set_name=set_name)
    if arm.rule is None or not arm.rule.is_voted:
        return requests
    return arm_scores.voted(requests, is_label=records.task.get("kind") in LABEL_KINDS)


def summarise_arm(records: RunRecords, name: str, *, settings: Settings) -> ArmSummary:
    """One arm's row. A failed or unfinished arm has its error and its bill, and no metric."""
    arm, spec = records.arms[name], records.arm_specs[name]
    is_done = arm.status == "done"
    tests = answered_requests(records, name, set_name="test") if is_done else []
    timed = answered_requests(records, name, set_name="latency") if is_done else []
    scores = test_scores(records, name, tests)
    labels = arm_scores.labels_used(records, name)
    requests = _request_costs(timed, devices=records.latency_devices(name))
    price = settings.pricing.usd_per_device_second
    hours = people_hours(records, name, decision=settings.decision)
    fixed = cost.fixed_cost(
        records.ledger,
        arms=records.base_arms(name),
        usd_per_device_second=price,
        labels_used=labels,
        label_usd=settings.decision.label_usd,
        hours_usd=(hours or 0.0) * (settings.decision.hour_usd or 0.0),
    )
    hosting = settings.pricing.hosting(is_base_shared=is_base_shared(records, name))
    quality = _quality(records, name, tests, scores, confidence=settings.confidence)
    now = sum(line.device_seconds for line in records.spent_now if line.arm == name)
    result = ArmResult(
        kind="both" if spec.method == "prompt" and spec.on is not None else spec.method,
        status=arm.status,
        is_same_base=spec.is_same_base,
        labels_used=labels,
        metric=quality.metric,
        accuracy=quality.accuracy,
        accuracy_calibrated=quality.accuracy_calibrated,
        macro_f1=quality.macro_f1,
        format_validity=quality.format_validity,
        consistency=quality.consistency,
        by_label=quality.by_label,
        by_slice=quality.by_slice,
        variance=quality.variance,
        latency=_latency(timed, confidence=settings.confidence),
        tokens=_tokens(tests, confidence=settings.confidence),
        cost=_cost(records, name, requests, fixed, tests=tests, hosting=hosting, settings=settings),
        train=_train_cost(records, name, price=price),
        answer_rule=arm.rule,
        checkpoint=arm.checkpoint,
        ready_seconds=ready_seconds(records, name),
        people_hours=hours,
        spent_now_device_seconds=now,
        spent_now_usd=None if price is None else now * price,
        is_reused=arm.is_reused,
        error=arm.error,
        prompt_example=_prompt_example(records, name, tests),
    )
    return ArmSummary(
        result=result,
        scores=scores,
        timed=_timed(records, name, timed),
        hosted_usd=_hosted_usd(records, name, tests, pricing=settings.pricing),
        fixed=fixed,
        hosting=hosting,
        validation=_validation(records, name),
    )


def test_scores(records: RunRecords, name: str, tests: Sequence[Request]) -> dict[str, float]:
    """Item id -> the value that the arm's metric averages."""
    return arm_scores.item_scores(
        tests, is_label_task=is_label_task(records), is_calibrated=is_calibrated(records, name)
    )


def _quality(
    records: RunRecords,
    name: str,
    tests: Sequence[Request],
    scores: Mapping[str, float],
    *,
    confidence: float,
) -> Quality:
    if not scores:
        return Quality()
    repeats = arm_scores.requests_of(records.arms[name], set_name="test")
    with_labels, calibrated = is_label_task(records), is_calibrated(records, name)
    values = [
        arm_scores.is_right(r.final, is_calibrated=calibrated)
        if with_labels
        else arm_scores.score_of(r.final)
        for r in tests
    ]
    rule = ItemRule.of(records, confidence=confidence)
    replicates = arm_scores.by_replicate(tests, values)
    variance = split_variance(replicates, sources=rule.sources)
    headline = rule.pooled(scores, variance, replicates)
    label_of = {
        i: [item.label]
        for i, item in records.items.items()
        if item.label is not None and records.task.get("kind") == "classification"
    }
    return Quality(
        metric=Metric(
            name="accuracy" if with_labels else str(records.task.get("scoring") or "score"),
            value=headline.value,
            low=headline.low,
            high=headline.high,
            n=headline.n,
        ),
        accuracy=_accuracy(tests, is_calibrated=False, rule=rule),
        accuracy_calibrated=(
            _accuracy(tests, is_calibrated=True, rule=rule) if with_labels else None
        ),
        macro_f1=_macro_f1(tests, is_calibrated=calibrated, confidence=confidence)
        if label_of
        else None,
        format_validity=arm_scores.format_validity(repeats, confidence=confidence),
        consistency=arm_scores.consistency(repeats, confidence=confidence),
        by_label=arm_scores.sliced(scores, label_of, confidence=confidence),
        by_slice=arm_scores.sliced(
            scores, arm_scores.slices_of(records.items), confidence=confidence
        ),
        variance=variance,
    )


def _accuracy(tests: Sequence[Request], *, is_calibrated: bool, rule: ItemRule) -> Measured | None:
    """Share of right answers; None where no answer is right or wrong."""
    if all(_right(r, is_calibrated) is None for r in tests):
        return None
    right = arm_scores.by_item(
        (r.final.item_id, arm_scores.is_right(r.final, is_calibrated=is_calibrated)) for r in tests
    )
    return rule.mean(right)


def _right(request: Request, is_calibrated: bool) -> bool | None:
    final = request.final
    return final.is_correct_calibrated if is_calibrated else final.is_correct


def _macro_f1(
    tests: Sequence[Request], *, is_calibrated: bool, confidence: float
) -> Measured | None:
    known = [r.final for r in tests if r.final.target is not None]
    if not known:
        return None
    targets = [s.target for s in known if s.target is not None]
    answers = [s.calibrated_answer if is_calibrated else s.answer for s in known]
    measured = macro_f1(targets, answers, confidence=confidence)
    num_items = len({s.item_id for s in known})
    return Measured(value=measured.value, low=measured.low, high=measured.high, n=num_items)


def _tokens(tests: Sequence[Request], *, confidence: float) -> Tokens | None:
    if not tests:
        return None

    def mean(values: Sequence[int | None]) -> Measured:
        if None in values:  # an endpoint that does not tell
            return Measured(n=len(values))
        return mean_interval([float(v) for v in values if v is not None], confidence=confidence)

    return Tokens(
        prompt=mean([r.prompt_tokens for r in tests]),
        cached=mean([r.cached_tokens for r in tests]),
        computed=mean([r.computed_tokens for r in tests]),
        completion=mean([r.completion_tokens for r in tests]),
        truncated=mean([r.truncated_tokens for r in tests]),
    )


def _latency(timed: Sequence[Request], *, confidence: float) -> Latency | None:
    totals = [r.total_seconds for r in timed if r.total_seconds is not None]
    firsts = [r.first_token_seconds for r in timed if r.first_token_seconds is not None]
    if not totals:
        return None
    return Latency(
        first_token_p50_seconds=quantile_interval(firsts, share=0.5, confidence=confidence),
        p50_seconds=quantile_interval(totals, share=0.5, confidence=confidence),
        p95_seconds=quantile_interval(totals, share=0.95, confidence=confidence),
    )


def _request_costs(timed: Sequence[Request], *, devices: int) -> list[cost.RequestCost]:
    return [
        cost.RequestCost(
            device_seconds=r.total_seconds * devices,
            tokens=total([r.prompt_tokens, r.completion_tokens]) or 0,
        )
        for r in timed
        if r.total_seconds is not None
    ]


def _timed(records: RunRecords, name: str, timed: Sequence[Request]) -> list[TimedRequest]:
    """The arm's requests on devices of our own; none where one does not tell its tokens."""
    if records.arm_specs[name].hosted_model is not None:
        return []
    devices = records.latency_devices(name)
    return [
        TimedRequest(
            device_seconds=r.total_seconds * devices,
            computed_tokens=r.computed_tokens or 0,
            output_tokens=r.completion_tokens or 0,
            cached_tokens=r.cached_tokens or 0,
        )
        for r in timed
        if r.total_seconds is not None
    ]


def _hosted_usd(
    records: RunRecords, name: str, tests: Sequence[Request], *, pricing: PricingConfig
) -> dict[str, list[float]]:
    model = records.arm_specs[name].hosted_model
    price = None if model is None else pricing.hosted.get(model)
    return {} if price is None else requests_usd(tests, price=price)


def _cost(
    records: RunRecords,
    name: str,
    requests: Sequence[cost.RequestCost],
    fixed: cost.FixedCost,
    *,
    tests: Sequence[Request],
    hosting: float,
    settings: Settings,
) -> Cost:
    spec = records.arm_specs[name]
    if spec.method == "given":
        return Cost(
            fixed_usd=spec.given_fixed_usd,
            request_usd=Measured(value=spec.given_request_usd),
        )
    if spec.hosted_model is not None:
        return hosted_cost(
            tests,
            [line for line in records.ledger if line.arm == name],
            fixed,
            price=settings.pricing.hosted.get(spec.hosted_model),
            confidence=settings.confidence,
        )
    device_seconds = cost.request_device_seconds(requests, confidence=settings.confidence)
    price = settings.pricing.usd_per_device_second
    return Cost(
        fixed_usd=fixed.usd,
        fixed_device_seconds=fixed.device_seconds,
        request_usd=cost.request_usd(device_seconds, pricing=settings.pricing, hosting=hosting),
        request_device_seconds=device_seconds,
        usd_per_million_tokens=cost.usd_per_million_tokens(
            requests,
            usd_per_device_second=None if price is None else hosting * price,
            confidence=settings.confidence,
        ),
    )


def _train_cost(records: RunRecords, name: str, *, price: float | None) -> TrainCost | None:
    summary = records.arms[name].train_summary
    if summary is None:
        return None
    return TrainCost(
        trained_parameters=summary.trained_parameters,
        checkpoint_bytes=summary.checkpoint_bytes,
        device_seconds=summary.device_seconds,
        peak_memory_bytes=summary.peak_memory_bytes,
        usd=None if price is None else summary.device_seconds * price,
        steps=summary.steps,
        tokens=summary.tokens,
        learning_rate=summary.learning_rate,
        sources=data.sources if (data := records.arms[name].training_data) else (),
    )


def _validation(records: RunRecords, name: str) -> float | None:
    """The arm's score on validation under its rule, else its validation answers' mean."""
    arm = records.arms[name]
    if arm.rule is not None:
        chosen = arm.rule.validation.get(arm.rule.name)
        if chosen is not None and chosen.value is not None:
            return chosen.value
    answered = answered_requests(records, name, set_name="validation")
    scores = test_scores(records, name, answered)
    if scores:
        return fmean(scores.values())
    points = sorted(arm.curve, key=lambda p: p.step)
    return points[-1].value.value if points else None


def _prompt_example(records: RunRecords, name: str, tests: Sequence[Request]) -> str | None:
    """One rendered prompt of the arm, where texts may be shown."""
    if not records.shows_text:
        return None
    hashes = {r.final.prompt_sha256 for r in tests[:1]}
    mine = [p for p in records.prompts if p.arm == name]
    shown = [p.text for p in records.prompts if p.prompt_sha256 in hashes] + [p.text for p in mine]
    return shown[0] if shown else None
