"""Seconds until an arm can serve, by hand from the lines that the made run bills."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.errors import ConfigError
from conf.run_groups import DecisionConfig
from evaluation.records.run_records import read_run
from evaluation.results.summary import summarise
from tests.evaluation import fake_run


def test_an_arm_is_ready_when_what_it_stands_on_is_trained_and_chosen(tmp_path: Path) -> None:
    names = ("few_shot", "lora", "few_shot_on_lora", "tfidf")
    arms = {name: fake_run.SPAM_ARMS[name] for name in names}
    results = summarise(read_run(fake_run.write_spam_run(tmp_path, arms=arms, num_test=20)))
    ready = {name: arm.ready_seconds for name, arm in results.arms.items()}
    # Two devices; 60 requests of validation, 60 training steps of 1.7 s; no test, no latency.
    validated = {name: 60 * facts[2] / 2 for name, facts in fake_run.SPAM_ARMS.items()}
    assert ready["few_shot"] == pytest.approx(validated["few_shot"])
    trained = 60 * 1.7
    assert ready["lora"] == pytest.approx(trained + validated["lora"])
    both = trained + validated["lora"] + validated["few_shot_on_lora"]
    assert ready["few_shot_on_lora"] == pytest.approx(both)
    assert ready["tfidf"] == pytest.approx(0.6 / 2 + validated["tfidf"])


def test_an_arm_that_failed_is_never_ready(tmp_path: Path) -> None:
    results = summarise(read_run(fake_run.write_orders_run(tmp_path, num_test=10)))
    assert results.arms["full"].ready_seconds is None
    assert results.arms["few_shot"].ready_seconds == 0.0


@pytest.mark.parametrize(
    ("key", "value"),
    [("minimum_consistency", 1.2), ("deadline_hours", -1.0), ("changes_per_month", -0.5)],
)
def test_limits_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"decision.{key}"):
        DecisionConfig(**{key: value})
