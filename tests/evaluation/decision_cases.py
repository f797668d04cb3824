"""Made record sets with a known right answer, for the decision's table tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.label_results import LabelCrossing
from conf.records import AnswerRule, Measured
from conf.results import ArmResult, Cost, Latency, Metric, Pair, Tokens
from conf.run_groups import DecisionConfig
from evaluation.decision.rules import Evidence

SECONDS_PER_USD = 1e5


def arm(
    metric: float | None,
    *,
    kind: str = "prompt",
    fixed: float = 0.0,
    request: float | None = 1e-6,
    p95: float | None = 0.1,
    validity: float | None = None,
    consistency: float | None = None,
    ready_seconds: float | None = None,
    prompt_tokens: float | None = None,
    labels_usd: float = 0.0,
    is_by_device: bool = True,
    by_label: dict[str, Measured] | None = None,
    status: str = "done",
    is_priced: bool = True,
) -> ArmResult:
    """A made arm at 1e-5 USD a device-second, but for what labels cost or a request alone."""
    m = None
    if metric is not None:
        m = Metric(name="accuracy", value=metric, low=metric - 0.03, high=metric + 0.03, n=200)
    answer_by = "score" if validity is None else "generate"
    return ArmResult(
        kind=kind,
        status=status,
        metric=m,
        accuracy=None if m is None else Measured(value=metric, low=m.low, high=m.high, n=200),
        format_validity=None if validity is None else Measured(value=validity, n=200),
        latency=None if p95 is None else Latency(p95_seconds=Measured(value=p95, n=8)),
        cost=Cost(
            fixed_usd=fixed + labels_usd if is_priced else None,
            fixed_device_seconds=fixed * SECONDS_PER_USD if is_by_device else None,
            request_usd=Measured(value=request if is_priced else None, n=8),
            request_device_seconds=Measured(
                value=None if request is None or not is_by_device else request * SECONDS_PER_USD,
                n=8,
            ),
        ),
        consistency=None if consistency is None else Measured(value=consistency, n=200),
        ready_seconds=ready_seconds,
        tokens=None if prompt_tokens is None else Tokens(prompt=Measured(value=prompt_tokens, n=8)),
        by_label=by_label or {},
        answer_rule=AnswerRule(arm="x", answer_by=answer_by),
        error=None if status == "done" else "the loss is not finite",
    )


def pair(
    a: str,
    b: str,
    difference: float,
    half: float,
    *,
    p: float | None = 0.001,
    n: int = 200,
    method: str = "fixed_n",
) -> Pair:
    return Pair(
        a=a,
        b=b,
        difference=difference,
        low=difference - half,
        high=difference + half,
        p_value=p,
        p_adjusted=p,
        n=n,
        method=method,
    )


@dataclass
class Case:
    name: str
    arms: dict[str, ArmResult]
    pairs: list[Pair]
    verdict: str
    arm: str | None
    decision: DecisionConfig = field(default_factory=DecisionConfig)
    says: str = ""
    usd_per_hour: float | None = 3600 / SECONDS_PER_USD
    labels_usd: dict[str, float] = field(default_factory=dict)  # in the arms' fixed cost
    usd_per_prompt_token: dict[str, float] = field(default_factory=dict)
    crossings: tuple[LabelCrossing, ...] = ()

    @property
    def evidence(self) -> Evidence:
        return Evidence(
            arms=self.arms,
            pairs=self.pairs,
            usd_per_device_hour=self.usd_per_hour,
            usd_per_prompt_token=self.usd_per_prompt_token,
            crossings=self.crossings,
        )


CASES = [
    Case(
        "clear winner",
        {"zero_shot": arm(0.5), "lora": arm(0.9, kind="lora", fixed=1.0)},
        [pair("zero_shot", "lora", -0.4, 0.06)],
        "take lora",
        "lora",
        says="lora is better than zero_shot",
    ),
    Case(
        "prompt wins",
        {"few_shot": arm(0.9), "lora": arm(0.7, kind="lora", fixed=1.0)},
        [pair("few_shot", "lora", 0.2, 0.06)],
        "take few_shot",
        "few_shot",
        says="lora is worse than few_shot",
    ),
    Case(
        "equal, take the cheaper",
        {"few_shot": arm(0.9), "lora": arm(0.905, kind="lora", fixed=9.0)},
        [pair("few_shot", "lora", -0.005, 0.01)],
        "practically equal: take the cheaper, few_shot",
        "few_shot",
    ),
    Case(
        "a significant difference inside the margin is still equal",
        {"few_shot": arm(0.9), "lora": arm(0.908, kind="lora", fixed=9.0)},
        [pair("few_shot", "lora", -0.008, 0.004)],
        "practically equal: take the cheaper, few_shot",
        "few_shot",
    ),
    Case(
        "too close",
        {"few_shot": arm(0.86), "lora": arm(0.9, kind="lora", fixed=9.0)},
        [pair("few_shot", "lora", -0.04, 0.06, p=0.2)],
        "too close to call: about",
        None,
        says="Until then few_shot is the cheaper",
    ),
    Case(
        "an open arm that costs more does not stand in the way",
        {"few_shot": arm(0.9), "lora": arm(0.88, kind="lora", fixed=9.0)},
        [pair("few_shot", "lora", 0.02, 0.06, p=0.5)],
        "take few_shot",
        "few_shot",
        says="which cost more",
    ),
    Case(
        "separate but not after Holm",
        {"few_shot": arm(0.84), "lora": arm(0.9, kind="lora", fixed=9.0)},
        [pair("few_shot", "lora", -0.06, 0.055, p=0.09)],
        "too close to call: about",
        None,
    ),
    Case(
        "TF-IDF wins",
        {
            "few_shot": arm(0.6),
            "lora": arm(0.85, kind="lora", fixed=1.0),
            "tfidf": arm(0.95, kind="tfidf", request=1e-9),
        },
        [
            pair("few_shot", "tfidf", -0.35, 0.06),
            pair("lora", "tfidf", -0.1, 0.05),
            pair("few_shot", "lora", -0.25, 0.06),
        ],
        "take tfidf",
        "tfidf",
        says="Neither fine-tuning nor prompting wins here",
    ),
    Case(
        "minimum metric not met",
        {"few_shot": arm(0.6), "lora": arm(0.7, kind="lora")},
        [pair("few_shot", "lora", -0.1, 0.05)],
        "none meets your limits",
        None,
        DecisionConfig(minimum_metric=0.9),
        says="metric 60.0%, at least 90.0% asked",
    ),
    Case(
        "latency limit takes the slower, better arm out",
        {"zero_shot": arm(0.7), "chain_of_thought": arm(0.9, p95=3.0)},
        [pair("zero_shot", "chain_of_thought", -0.2, 0.05)],
        "take zero_shot",
        "zero_shot",
        DecisionConfig(maximum_p95_seconds=1.0),
        says="With decision.maximum_p95_seconds at 3.00 s the answer would be chain_of_thought",
    ),
    Case(
        "latency that was not measured cannot be shown to meet a limit",
        {"zero_shot": arm(0.7, p95=None)},
        [],
        "none meets your limits",
        None,
        DecisionConfig(maximum_p95_seconds=1.0),
        says="not measured",
    ),
    Case(
        "format validity is asked of generated answers only",
        {"scored": arm(0.7), "generated": arm(0.9, validity=0.5)},
        [pair("scored", "generated", -0.2, 0.05)],
        "take scored",
        "scored",
        DecisionConfig(minimum_format_validity=0.9),
    ),
    Case(
        "budget",
        {"zero_shot": arm(0.7), "full": arm(0.9, kind="full", fixed=500.0)},
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take zero_shot",
        "zero_shot",
        DecisionConfig(maximum_total_usd=100.0),
    ),
    Case(
        "errors cheap enough: the cheaper, worse arm",
        {"zero_shot": arm(0.7), "full": arm(0.9, kind="full", fixed=5000.0)},
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take zero_shot",
        "zero_shot",
        DecisionConfig(error_usd=0.001),
    ),
    Case(
        "errors dear enough: the better arm",
        {"zero_shot": arm(0.7), "full": arm(0.9, kind="full", fixed=5000.0)},
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take full",
        "full",
        DecisionConfig(error_usd=1.0),
    ),
    Case(
        "no price: device-seconds decide between equals",
        {
            "few_shot": arm(0.9, request=2e-6, is_priced=False),
            "lora": arm(0.9, kind="lora", is_priced=False),
        },
        [pair("few_shot", "lora", 0.0, 0.01)],
        "practically equal: take the cheaper, lora",
        "lora",
        says="There is no price",
        usd_per_hour=None,
    ),
    Case(
        "nothing finished",
        {"lora": arm(None, kind="lora", status="failed")},
        [],
        "no arm finished",
        None,
        says="lora failed: the loss is not finite",
    ),
    Case(
        "one arm",
        {"zero_shot": arm(0.9)},
        [],
        "take zero_shot",
        "zero_shot",
        says="the only arm left",
    ),
    Case(
        "a failed arm is named and does not win",
        {"zero_shot": arm(0.7), "lora": arm(None, kind="lora", status="failed")},
        [],
        "take zero_shot",
        "zero_shot",
        says="lora failed",
    ),
    Case(
        "no better than the most frequent label",
        {"zero_shot": arm(0.52, by_label={"a": Measured(n=100), "b": Measured(n=100)})},
        [],
        "take zero_shot",
        "zero_shot",
        says="Neither side is useful yet",
    ),
]
