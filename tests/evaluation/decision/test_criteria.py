"""Each of the eleven criteria speaks for the side that its numbers are on, and for none without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest

from conf.hashing import plain
from conf.label_results import LabelCrossing, LabelCurve
from conf.probe_results import ProbeChange
from conf.records import Measured
from conf.results import ArmResult, BreakEven, Forgetting, Latency, Pair, Recommendation, Results
from conf.run_groups import DecisionConfig
from evaluation.decision.criteria import REASONS, all_criteria
from tests.evaluation.decision_cases import arm, pair

TEXTS = [text for _, text, _ in REASONS]


def run(
    arms: Mapping[str, ArmResult],
    pairs: tuple[Pair, ...],
    *,
    prompted: str | None = "few_shot",
    tuned: str | None = "lora",
    forgetting: tuple[Forgetting, ...] = (),
    break_even: tuple[BreakEven, ...] = (),
    probe_changes: tuple[ProbeChange, ...] = (),
    curve: LabelCurve | None = None,
) -> Results:
    decision = plain(DecisionConfig())
    return Results(
        run="r",
        task={"facts": {"near_duplicates": 3}},
        model={},
        arms=dict(arms),
        pairs=pairs,
        break_even=break_even,
        recommendation=Recommendation(arm=None, verdict=""),
        ledger=(),
        decision={**decision, "best_prompted": prompted, "best_tuned": tuned},
        forgetting=forgetting,
        probe_changes=probe_changes,
        label_curve=curve,
    )


def timed(result: ArmResult, *, p50: float, request: float, half: float = 0.05) -> ArmResult:
    """With latency and request cost that have intervals."""
    assert result.cost is not None
    usd = Measured(value=request, low=request * (1 - half), high=request * (1 + half), n=8)
    latency = Latency(p50_seconds=Measured(value=p50, low=p50 * 0.95, high=p50 * 1.05, n=8))
    return replace(result, cost=replace(result.cost, request_usd=usd), latency=latency)


def sides(
    difference: float, half: float, *, labels: tuple[int, int] = (8, 240)
) -> tuple[dict[str, ArmResult], tuple[Pair, ...]]:
    """A prompted and a tuned arm; difference: lora - few_shot."""
    arms = {
        "zero_shot": replace(arm(0.5), labels_used=0),
        "few_shot": replace(arm(0.7), labels_used=labels[0], ready_seconds=4.0),
        "lora": replace(
            arm(0.7 + difference, kind="lora", fixed=2.0),
            labels_used=labels[1],
            ready_seconds=100.0,
        ),
    }
    pairs = (
        pair("few_shot", "lora", -difference, half),
        pair("lora", "zero_shot", 0.2 + difference, half),
        pair("few_shot", "zero_shot", 0.2, half),
    )
    return arms, pairs


def says(results: Results, text: str) -> tuple[str, str]:
    line = next(c for c in all_criteria(results) if text in c.text)
    return line.says, line.evidence


@dataclass
class Row:
    text: str
    results: Results
    expected: str
    words: str


BETTER, ALIKE, WORSE = sides(0.2, 0.05), sides(0.0, 0.015), sides(-0.2, 0.05)
UNSURE = sides(0.03, 0.05)


def general(low: float, high: float) -> tuple[Forgetting, ...]:
    change = Measured(value=(low + high) / 2, low=low, high=high, n=60)
    return (Forgetting(arm="lora", base=Measured(value=0.8, n=60), tuned=Measured(value=0.7, n=60),
                       change=change, p_value=0.04, lost=7, gained=1),)  # fmt: skip


def crossing(status: str, low: float | None, high: float | None) -> tuple[BreakEven, ...]:
    return (BreakEven(a="few_shot", b="lora", requests=low, low=low, high=high, status=status),)


def served(p50: tuple[float, float], usd: tuple[float, float]) -> dict[str, ArmResult]:
    arms = dict(BETTER[0])
    arms["few_shot"] = timed(arms["few_shot"], p50=p50[0], request=usd[0])
    arms["lora"] = timed(arms["lora"], p50=p50[1], request=usd[1])
    return arms


def valid(prompted: float, tuned: float) -> dict[str, ArmResult]:
    def share(value: float) -> Measured:
        return Measured(value=value, low=value - 0.03, high=value + 0.03, n=200)

    arms = dict(BETTER[0])
    arms["few_shot"] = replace(arms["few_shot"], format_validity=share(prompted))
    arms["lora"] = replace(arms["lora"], format_validity=share(tuned))
    return arms


def unsupported(low: float, high: float) -> tuple[ProbeChange, ...]:
    middle = (low + high) / 2
    return (
        ProbeChange(arm="lora", base="zero_shot", probe="abstain", measure="unsupported",
                    before=Measured(value=0.6, n=16), after=Measured(value=0.6 + middle, n=16),
                    change=Measured(value=middle, low=low, high=high, n=16)),
    )  # fmt: skip


def larger(difference: float) -> tuple[dict[str, ArmResult], tuple[Pair, ...]]:
    """With a prompted arm on another base; difference: lora - big."""
    arms, pairs = dict(BETTER[0]), BETTER[1]
    arms["big"] = replace(arm(0.9 - difference), is_same_base=False)
    return arms, (*pairs, pair("lora", "big", difference, 0.05))


CURVE = LabelCurve(
    metric="accuracy", sizes=(8, 512), draws=3, seeds=1, noise=(0.0,), points=(),
    crossings=(LabelCrossing(prompted="few_shot", tuned="lora", noise=0.0, status="crosses",
                             labels=150.0, low=100.0, high=200.0),),
)  # fmt: skip

ROWS = [
    Row("flexible", run(*BETTER, forgetting=general(-0.2, -0.02)), "prompting", "-11.0 points"),
    Row("flexible", run(*BETTER, forgetting=general(-0.1, 0.1)), "neither", "n = 60"),
    Row("flexible", run(*BETTER), "not_measured", "was not asked of lora"),
    Row("resources are limited", run(*BETTER), "prompting", "240 labels"),
    Row("resources", run(*sides(0.2, 0.05, labels=(300, 240))), "neither", "300 labels"),
    Row("Extreme precision", run(*ALIKE), "prompting", "+0.0 points (-1.5 to +1.5; n = 200)"),
    Row("Extreme precision", run(*BETTER), "fine_tuning", "+20.0 points"),
    Row("Extreme precision", run(*UNSURE), "neither", "+3.0 points"),
    Row("prototype", run(*BETTER), "prompting", "few_shot can serve 4.00 s after"),
    Row("largest models", run(*BETTER), "not_measured", "another base model"),
    Row("largest models", run(*larger(-0.2)), "prompting", "-20.0 points"),
    Row("largest models", run(*larger(0.2)), "fine_tuning", "against big"),
    Row("largest models", run(*larger(0.0)), "neither", "n = 200"),
    Row("High accuracy", run(*BETTER), "fine_tuning", "lora reaches 90.0% (87.0 to 93.0; n = 200)"),
    Row("High accuracy", run(*WORSE), "prompting", "-20.0 points"),
    Row("High accuracy", run(*ALIKE), "neither", "+0.0 points"),
    Row("Domain knowledge", run(*BETTER), "fine_tuning", "few_shot gains +20.0 points"),
    Row("Domain knowledge", run(*sides(-0.2, 0.05)), "neither", "Over zero_shot"),
    Row(
        "high volume",
        run(served((0.2, 0.1), (3e-6, 1e-6)), BETTER[1], break_even=crossing("crosses", 1e4, 2e4)),
        "fine_tuning",
        "pays back its start after 10,000 requests (10,000 to 20,000) of 1.2 million planned",
    ),
    Row(
        "high volume",
        run(served((0.2, 0.1), (3e-6, 1e-6)), BETTER[1], break_even=crossing("crosses", 2e6, None)),
        "neither",
        "no upper bound",
    ),
    Row(
        "high volume",
        run(served((0.1, 0.2), (1e-6, 3e-6)), BETTER[1], break_even=crossing("never", None, None)),
        "prompting",
        "never pays back",
    ),
    Row("high volume", run(served((0.1, 0.2), (3e-6, 1e-6)), BETTER[1]), "neither", "not known"),
    Row("format", run(*BETTER), "not_measured", "cannot miss a format"),
    Row("format", run(valid(0.5, 0.9), BETTER[1]), "fine_tuning", "90.0% (87.0 to 93.0; n = 200)"),
    Row("format", run(valid(0.9, 0.5), BETTER[1]), "prompting", "Valid answers"),
    Row("format", run(valid(0.9, 0.92), BETTER[1]), "neither", "Valid answers"),
    Row("Hallucinations", run(*BETTER), "not_measured", "without an answer"),
    Row(
        "Hallucinations",
        run(*BETTER, probe_changes=unsupported(-0.5, -0.1)),
        "fine_tuning",
        "n = 16",
    ),
    Row("Hallucinations", run(*BETTER, probe_changes=unsupported(0.1, 0.3)), "prompting", "+20.0"),
    Row("Hallucinations", run(*BETTER, probe_changes=unsupported(-0.1, 0.3)), "neither", "60.0%"),
    Row("labelled set", run(*BETTER, curve=CURVE), "fine_tuning", "catches up at about 150 labels"),
    Row("labelled set", run(*WORSE), "prompting", "3 near-duplicates"),
    Row("labelled set", run(*ALIKE), "neither", "With 240 labels"),
]


@pytest.mark.parametrize("row", ROWS, ids=[f"{r.text}: {r.expected}" for r in ROWS])
def test_a_criterion_says_what_its_numbers_say(row: Row) -> None:
    found, evidence = says(row.results, row.text)
    assert (found, row.words in evidence) == (row.expected, True), evidence
    assert not {"None", "nan", "n/a"} & set(evidence.replace("(", " ").split())


def test_there_are_the_field_s_five_and_six() -> None:
    lines = all_criteria(run(*BETTER))
    assert [c.side for c in lines] == ["prompting"] * 5 + ["fine_tuning"] * 6
    assert len({c.text for c in lines}) == 11
    covered = {text for text in TEXTS if any(row.text in text for row in ROWS)}
    assert covered == set(TEXTS)


def test_a_run_of_one_side_has_measured_none() -> None:
    arms, pairs = BETTER
    for results in (run(arms, pairs, tuned=None), run(arms, pairs, prompted=None)):
        lines = all_criteria(results)
        assert len(lines) == 11 and {c.says for c in lines} == {"not_measured"}


def test_a_difference_that_holm_does_not_confirm_speaks_for_none() -> None:
    arms, pairs = BETTER
    weak = tuple(replace(p, p_adjusted=0.2) for p in pairs)
    assert says(run(arms, weak), "High accuracy")[0] == "neither"
