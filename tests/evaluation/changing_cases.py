"""Record sets whose verdict changes as something is turned, for the decision's table tests."""

from __future__ import annotations

from conf.label_results import LabelCrossing
from conf.run_groups import DecisionConfig
from tests.evaluation.decision_cases import Case, arm, pair

# 1.2 million requests in all, 3.6e-2 USD a device-hour, unless a case says otherwise.
SAME = [pair("few_shot", "lora", 0.0, 0.01)]
CROSSING = LabelCrossing(
    prompted="few_shot", tuned="lora", noise=0.0, status="crosses", labels=250.0, low=180.0,
    high=400.0, smallest=8, largest=512,
)  # fmt: skip

CHANGING = [
    Case(
        "equals: more volume, or a dearer device, and the cheaper request wins",
        {
            "few_shot": arm(0.9, request=3e-6, prompt_tokens=480.0),
            "lora": arm(0.9, kind="lora", fixed=2.0, labels_usd=10.0, request=1e-6),
        },
        SAME,
        "practically equal: take the cheaper, few_shot",
        "few_shot",
        labels_usd={"lora": 10.0},
        usd_per_prompt_token={"few_shot": 5e-9},
        crossings=(CROSSING,),
    ),
    Case(
        "equals: less volume and a cheaper device, and the cheaper start wins",
        {
            "few_shot": arm(0.9, request=3e-6, prompt_tokens=480.0),
            "lora": arm(0.9, kind="lora", fixed=2.0, labels_usd=10.0, request=1e-6),
        },
        SAME,
        "practically equal: take the cheaper, lora",
        "lora",
        DecisionConfig(requests_per_month=1e6, horizon_months=24),
        labels_usd={"lora": 10.0},
        usd_per_prompt_token={"few_shot": 5e-9},
        crossings=(CROSSING,),
    ),
    Case(
        "equals: data that change every month pay for training every month",
        {
            "few_shot": arm(0.9, request=3e-6),
            "lora": arm(0.9, kind="lora", fixed=0.5, request=1e-6),
        },
        SAME,
        "practically equal: take the cheaper, few_shot",
        "few_shot",
        DecisionConfig(changes_per_month=1.0),  # 13 x 0.5 + 1.2 against 3.6
    ),
    Case(
        "by money: the better, dearer arm from a volume on and from an error's price on",
        {"zero_shot": arm(0.7), "full": arm(0.9, kind="full", fixed=5000.0)},
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take zero_shot",
        "zero_shot",
        DecisionConfig(error_usd=0.001),
    ),
    Case(
        "by money: the worse, cheaper arm below a volume and below an error's price",
        {"zero_shot": arm(0.7), "full": arm(0.9, kind="full", fixed=5000.0)},
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take full",
        "full",
        DecisionConfig(error_usd=1.0),
        says="With wrong answers at 1.00 USD each, full is expected to cost 125,001 USD",
    ),
    Case(
        "by money: errors that cost nothing, until they do",
        {"zero_shot": arm(0.7), "full": arm(0.9, kind="full", fixed=5000.0)},
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take zero_shot",
        "zero_shot",
        DecisionConfig(error_usd=0.0),
    ),
    Case(
        "by money: too close to call between the two",
        {"zero_shot": arm(0.7), "full": arm(0.9, kind="full", fixed=5000.0)},
        [pair("zero_shot", "full", -0.2, 0.05)],
        "too close to call: about",
        None,
        DecisionConfig(error_usd=0.0208, equivalence_margin=0.0),
    ),
    Case(
        "a system paid by the request, and a device whose price would have to fall",
        {
            "given": arm(0.9, kind="given", request=1e-6, is_by_device=False),
            "lora": arm(0.9, kind="lora", request=3e-6),
        },
        [pair("given", "lora", 0.0, 0.01)],
        "practically equal: take the cheaper, given",
        "given",
    ),
    Case(
        "consistency keeps the better arm out",
        {
            "scored": arm(0.7),
            "generated": arm(0.9, validity=0.99, consistency=0.6),
        },
        [pair("scored", "generated", -0.2, 0.05)],
        "take scored",
        "scored",
        DecisionConfig(minimum_consistency=0.8),
        says="generated is out: consistency 60.0%, at least 80.0% asked",
    ),
    Case(
        "consistency met: more of it would put the arm out",
        {
            "scored": arm(0.7),
            "generated": arm(0.9, validity=0.99, consistency=0.6),
        },
        [pair("scored", "generated", -0.2, 0.05)],
        "take generated",
        "generated",
        DecisionConfig(minimum_consistency=0.5),
    ),
    Case(
        "the deadline comes before the better arm is trained",
        {
            "zero_shot": arm(0.7, ready_seconds=0.0),
            "full": arm(0.9, kind="full", ready_seconds=7200.0),
        },
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take zero_shot",
        "zero_shot",
        DecisionConfig(deadline_hours=1.0),
        says="With decision.deadline_hours at 2.0 h the answer would be full",
    ),
    Case(
        "the deadline is met: a tighter one would not be",
        {
            "zero_shot": arm(0.7, ready_seconds=60.0),
            "full": arm(0.9, kind="full", ready_seconds=7200.0),
        },
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take full",
        "full",
        DecisionConfig(deadline_hours=3.0),
    ),
    Case(
        "every limit at once, each of which could be tighter",
        {
            "zero_shot": arm(0.7, validity=0.9, p95=0.1, request=1e-6),
            "full": arm(0.9, kind="full", validity=0.95, p95=0.5, fixed=50.0),
        },
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take full",
        "full",
        DecisionConfig(
            minimum_metric=0.6,
            minimum_format_validity=0.8,
            maximum_p95_seconds=1.0,
            maximum_total_usd=100.0,
        ),
    ),
    Case(
        "the better arm is out: metric",
        {"zero_shot": arm(0.7), "few_shot": arm(0.75, p95=0.5)},
        [pair("zero_shot", "few_shot", -0.05, 0.02)],
        "none meets your limits",
        None,
        DecisionConfig(minimum_metric=0.8),
        says="With decision.minimum_metric at 75.0% the answer would be few_shot",
    ),
    Case(
        "the better arm is out: format",
        {"zero_shot": arm(0.7, validity=0.9), "full": arm(0.9, kind="full", validity=0.5)},
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take zero_shot",
        "zero_shot",
        DecisionConfig(minimum_format_validity=0.8),
    ),
    Case(
        "the better arm is out: latency that was not measured",
        {"zero_shot": arm(0.7), "full": arm(0.9, kind="full", p95=None)},
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take zero_shot",
        "zero_shot",
        DecisionConfig(maximum_p95_seconds=1.0),
        says="Without decision.maximum_p95_seconds the answer would be full",
    ),
    Case(
        "the better arm is out: latency and money",
        {"zero_shot": arm(0.7), "full": arm(0.9, kind="full", p95=2.0, fixed=50.0)},
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take zero_shot",
        "zero_shot",
        DecisionConfig(maximum_p95_seconds=1.0),
    ),
    Case(
        "the better arm is out for money alone: a cheaper device or less volume helps",
        {"zero_shot": arm(0.7), "full": arm(0.9, kind="full", fixed=50.0, request=1e-4)},
        [pair("zero_shot", "full", -0.2, 0.05)],
        "take zero_shot",
        "zero_shot",
        DecisionConfig(maximum_total_usd=100.0),
    ),
    Case(
        "items settle what is too close",
        {"few_shot": arm(0.86), "lora": arm(0.9, kind="lora", fixed=9.0)},
        [pair("few_shot", "lora", -0.04, 0.06, p=0.2)],
        "too close to call: about",
        None,
        says="more test items would settle lora against few_shot",
    ),
    Case(
        "items settle nothing where there is no difference and no margin",
        {"lora": arm(0.9, kind="lora", fixed=9.0), "few_shot": arm(0.9)},
        [pair("lora", "few_shot", 0.0, 0.06, p=1.0)],
        "too close to call",
        None,
        DecisionConfig(equivalence_margin=0.0),
        says="No number of test items can be named",
    ),
    Case(
        "a pair stopped early is judged by its confidence sequence alone",
        {"few_shot": arm(0.8), "lora": arm(0.9, kind="lora", fixed=9.0)},
        [pair("few_shot", "lora", -0.1, 0.09, p=None, method="confidence_sequence")],
        "take lora",
        "lora",
        says="lora is better than few_shot",
    ),
    Case(
        "a pair stopped early that is not decided",
        {"few_shot": arm(0.8), "lora": arm(0.9, kind="lora", fixed=9.0)},
        [pair("few_shot", "lora", -0.1, 0.11, p=None, method="confidence_sequence")],
        "too close to call: about",
        None,
    ),
    Case(
        "a pair stopped early as practically equal",
        {"few_shot": arm(0.9), "lora": arm(0.9, kind="lora", fixed=9.0)},
        [pair("few_shot", "lora", 0.0, 0.015, p=None, method="confidence_sequence")],
        "practically equal: take the cheaper, few_shot",
        "few_shot",
    ),
]
