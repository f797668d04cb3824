"""A table of cases with a known right answer, and sentences that must be there."""

from __future__ import annotations

import pytest

from conf.run_groups import DecisionConfig
from evaluation.decision import decide
from evaluation.decision.gap import metric_gap, more_items, round_up
from evaluation.decision.rules import Evidence, best_on_validation, choose
from tests.evaluation.decision_cases import CASES, Case, arm, pair


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_verdicts(case: Case) -> None:
    made = decide(case.evidence, decision=case.decision)
    assert made.verdict.startswith(case.verdict)
    assert made.arm == case.arm
    text = " ".join((*made.reasons, *made.would_change_if))
    assert case.says in text
    assert "None" not in text and "nan" not in text


def test_the_price_of_a_wrong_answer_is_solved_for() -> None:
    arms = {"zero_shot": arm(0.7), "full": arm(0.9, kind="full", fixed=240_000.0)}
    pairs = [pair("zero_shot", "full", -0.2, 0.05)]
    made = decide(Evidence(arms=arms, pairs=pairs), decision=DecisionConfig())
    # 240,000 USD / (1.2 million requests x 0.25): the most that full can be ahead by
    assert "less than 0.800 USD, the answer would be zero_shot" in " ".join(made.would_change_if)
    for error_usd, expected in ((0.79, "zero_shot"), (1.0, None), (2.0, "full")):
        config = DecisionConfig(error_usd=error_usd, equivalence_margin=0.0)
        assert choose(Evidence(arms=arms, pairs=pairs), decision=config).arm == expected


def test_the_volume_at_which_the_cheaper_arm_changes_is_solved_for() -> None:
    arms = {
        "few_shot": arm(0.9, request=3e-6),
        "lora": arm(0.9, kind="lora", fixed=12.0, request=1e-6),
    }
    pairs = [pair("few_shot", "lora", 0.0, 0.01)]
    made = decide(Evidence(arms=arms, pairs=pairs), decision=DecisionConfig())
    assert made.arm == "few_shot"  # 1.2 million requests: 3.6 USD against 13.2
    assert "Above 6 million requests in all (500,000 a month) the answer would be lora" in " ".join(
        made.would_change_if
    )
    later = decide(Evidence(arms=arms, pairs=pairs), decision=DecisionConfig(horizon_months=61))
    assert later.arm == "lora"
    assert "Below 6 million requests" in " ".join(later.would_change_if)


def test_pairs_count_whichever_way_round_they_are_stored() -> None:
    arms = {"zero_shot": arm(0.5), "lora": arm(0.9, kind="lora")}
    for stored in (pair("zero_shot", "lora", -0.4, 0.06), pair("lora", "zero_shot", 0.4, 0.06)):
        assert choose(Evidence(arms=arms, pairs=[stored]), decision=DecisionConfig()).arm == "lora"


def test_arms_without_common_items_are_not_called_different() -> None:
    arms = {"zero_shot": arm(0.5), "lora": arm(0.9, kind="lora", fixed=1.0)}
    made = decide(Evidence(arms=arms, pairs=[]), decision=DecisionConfig())
    assert made.arm is None and made.verdict == "too close to call"


def test_headline_arms_are_picked_on_validation_not_on_test() -> None:
    arms = {"zero_shot": arm(0.9), "few_shot": arm(0.5), "lora": arm(0.7, kind="lora")}
    evidence = Evidence(
        arms=arms, pairs=[], validation={"zero_shot": 0.6, "few_shot": 0.8, "lora": None}
    )
    assert best_on_validation(evidence, ("prompt",)) == "few_shot"
    assert best_on_validation(evidence, ("weights",)) == "lora"
    assert best_on_validation(evidence, ("reference",)) is None


def test_more_items_by_hand() -> None:
    # sd = 0.0588 / 1.96 x sqrt(100) = 0.3; ((1.96 + 0.8416) x 0.3 / 0.06)^2 = 196.2
    close = pair("a", "b", 0.06, 0.0588, n=100, p=0.05)
    assert more_items(metric_gap(close, margin=0.02), close, confidence=0.95) == 97
    assert round_up(1234) == 1300
    assert round_up(0.2) == 1
