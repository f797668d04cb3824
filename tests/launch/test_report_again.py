"""`launch.report` decides again from records alone, under every key of decision and pricing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from conf.errors import ConfigError
from conf.hashing import plain
from conf.run_groups import DecisionConfig, PricingConfig
from evaluation.records.run_records import read_run
from evaluation.results.summary import summarise
from launch.report import changed_sections, report
from tests.evaluation import fake_run

STORED = {"decision": plain(DecisionConfig()), "pricing": plain(fake_run.CHEAP_PRICE)}


def test_every_key_of_the_decision_applies() -> None:
    typed: dict[str, object] = {f.name: 0.25 for f in dataclasses.fields(DecisionConfig)}
    typed |= {"stop_early": True, "confidence": 0.9}
    overrides = [f"decision.{key}={str(value).lower()}" for key, value in typed.items()]
    decision, pricing = changed_sections(STORED, overrides)
    assert plain(decision) == typed and plain(DecisionConfig()).keys() == typed.keys()
    assert all(value != STORED["decision"][key] for key, value in typed.items())
    assert pricing == fake_run.CHEAP_PRICE


def test_prices_apply_by_key_and_by_preset() -> None:
    typed = ["pricing.device_hour.usd=2.5", "pricing.source=contract", "pricing.date=2026-01-31"]
    _, pricing = changed_sections(STORED, typed)
    assert pricing.device_hour.usd == 2.5 and pricing.source == "contract"
    _, preset = changed_sections(STORED, ["pricing=h100_hour"])
    assert preset.name == "h100_hour" and preset.device_hour.usd != 0.0408
    old = {"decision": {"requests_per_month": 7.0}, "pricing": STORED["pricing"]}
    decision, same = changed_sections(old, ["decision.deadline_hours=2"])
    assert decision == DecisionConfig(requests_per_month=7.0, deadline_hours=2.0)
    assert isinstance(same, PricingConfig) and same == fake_run.CHEAP_PRICE


def test_only_decision_pricing_and_report_apply(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="decision, pricing, report"):
        report([str(tmp_path), "task.seed=1"])


def test_the_verdict_changes_where_the_first_one_said_it_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "evaluation.report.files.write_svg", lambda *_: None
    )  # drawings take seconds
    arms = {name: fake_run.SPAM_ARMS[name] for name in ("few_shot", "lora")}
    run = fake_run.write_spam_run(tmp_path / "r", arms=arms, num_test=60, num_general=10)
    before = summarise(read_run(run)).recommendation
    change = next(c for c in before.changes if c.what == "error_usd")
    assert before.arm == "lora" and change.at is None  # lora is better and cheaper: no price does
    assert report([str(run), "decision.error_usd=0.01", "decision.deadline_hours=0.01"]) == 0
    results = json.loads((run / "results.json").read_text())
    again = results["recommendation"]
    assert again["arm"] == "few_shot"  # lora takes longer than 36 s to train
    deadline = next(c for c in again["changes"] if c["what"] == "deadline_hours")
    assert deadline["arm_then"] == "lora" and deadline["direction"] == "above"
    hours = results["arms"]["lora"]["ready_seconds"] / 3600
    assert deadline["at"] == pytest.approx(hours)
    assert [u["arm"] for u in again["utilities"]] == ["lora", "few_shot"]
    assert len(results["criteria"]) == 11
    later = DecisionConfig(error_usd=0.01, deadline_hours=1.01 * hours)
    assert summarise(read_run(run), decision=later).recommendation.arm == "lora"
