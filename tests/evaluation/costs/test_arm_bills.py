"""What an arm's bill takes from its base model: rates, idle hosting, people's hours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conf.records import Measured
from conf.results import Results
from conf.run_groups import DecisionConfig
from evaluation.decision.rules import Evidence
from evaluation.decision.sensitivity import prompt_knob
from evaluation.records.run_records import RunRecords, read_run
from evaluation.report.dimensions import dimension_groups
from evaluation.results.summary import summarise
from tests.evaluation import fake_run
from tests.evaluation.decision_cases import arm

SECONDS, USD_PER_SECOND = (0.05, 0.0016, 0.06), 0.0408 / 3600
BIG_SECONDS = (0.5, 0.016, 0.6)  # of a base model ten times as slow
CACHED = {"zero_shot": 40, "few_shot": 393, "role_play": 60, "lora": 40, "few_shot_on_lora": 393}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.write_spam_run(tmp_path_factory.mktemp("spam"))


@pytest.fixture(scope="module")
def records(run: Path) -> RunRecords:
    """The fake run, whose latency requests take what their tokens say."""
    return timed_by_tokens(read_run(run), big=())


def timed_by_tokens(records: RunRecords, *, big: tuple[str, ...]) -> RunRecords:
    rng = np.random.default_rng(0)
    arms = {}
    for name, wrote in records.arms.items():
        fixed, prompt, output = BIG_SECONDS if name in big else SECONDS
        samples = []
        for s in wrote.samples:
            if s.set == "latency" and name != "tfidf":
                computed = int(rng.integers(12, 110))
                seconds = (fixed + prompt * computed + output * s.completion_tokens) / 2
                s = replace(  # two devices
                    s,
                    computed_tokens=computed,
                    cached_tokens=CACHED.get(name, 40),
                    total_seconds=seconds,
                )
            samples.append(s)
        arms[name] = replace(wrote, samples=tuple(samples))
    return replace(records, arms=arms)


def on_another_base(run: Path, path: Path, *names: str) -> RunRecords:
    """The same run where arms override the model, as their config.json says."""
    path.mkdir()
    for file in run.iterdir():
        (path / file.name).symlink_to(file)
    config = json.loads((run / "config.json").read_text())
    for name in names:
        config["config"]["arms"][name]["model"] = {"name": "big", "note": None}
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(config))
    return timed_by_tokens(read_run(path), big=(*names, "few_shot_on_lora"))


def uncached(results: Results, name: str) -> float:
    """Device-seconds that a request takes more where nothing of its prompt is kept."""
    cost = results.arms[name].cost
    assert cost is not None
    found = [cost.by_cache[c].device_seconds.value for c in ("none", "measured")]
    assert found[0] is not None and found[1] is not None
    return found[0] - found[1]


def test_a_longer_prompt_is_a_solved_change_of_the_run(tmp_path: Path) -> None:
    """With the price of a prompt token from the run's own requests, against the closed form."""
    arms = {name: fake_run.SPAM_ARMS[name] for name in ("few_shot", "lora")}
    run = fake_run.write_spam_run(tmp_path / "r", arms=arms)
    decision = DecisionConfig(equivalence_margin=0.9, requests_per_month=100.0)
    found = summarise(timed_by_tokens(read_run(run), big=()), decision=decision)
    change = next(c for c in found.recommendation.changes if c.what == "prompt_length")
    assert (found.recommendation.arm, change.arm_then) == ("few_shot", "lora")
    few_shot, lora = (found.arms[name] for name in arms)
    fixed, request = (
        lora.cost.fixed_usd - few_shot.cost.fixed_usd,
        lora.cost.request_usd.value - few_shot.cost.request_usd.value,
    )
    more = (fixed / 1200 + request) / (SECONDS[1] * USD_PER_SECOND)
    assert change.direction == "above"
    assert change.at == pytest.approx(few_shot.tokens.prompt.value + more, rel=1e-6)


@pytest.mark.parametrize(
    ("computed", "fewest"), [(41.0, 439.0), (None, 480.0 - 200.0), (300.0, 280.0)]
)
def test_no_more_prompt_tokens_can_be_saved_than_are_computed(
    computed: float | None, fewest: float
) -> None:
    few_shot = arm(0.9, request=1e-6, prompt_tokens=480.0)
    assert few_shot.tokens is not None
    tokens = replace(few_shot.tokens, computed=Measured(value=computed))
    evidence = Evidence(
        arms={"few_shot": replace(few_shot, tokens=tokens)},
        pairs=(),
        usd_per_prompt_token={"few_shot": 5e-9},
    )
    knob = prompt_knob(evidence, DecisionConfig(), arm="few_shot")
    assert knob is not None and knob.low == pytest.approx(fewest)


def test_another_base_model_has_rates_of_its_own(run: Path, tmp_path: Path) -> None:
    """lora on a slower base takes the prompt on top of it along; the others keep their rates."""
    found = summarise(on_another_base(run, tmp_path / "r", "lora"))
    assert not found.arms["few_shot_on_lora"].is_same_base
    assert uncached(found, "few_shot") == pytest.approx(SECONDS[1] * 393, rel=1e-6)
    assert uncached(found, "lora") == pytest.approx(BIG_SECONDS[1] * 40, rel=1e-6)
    assert uncached(found, "few_shot_on_lora") == pytest.approx(BIG_SECONDS[1] * 393, rel=1e-6)
    rates = found.request_rates
    assert rates is not None and "lora" not in rates.arms
    assert rates.held_out_error == pytest.approx(0.0, abs=1e-6)


def test_without_requests_of_its_own_base_nothing_is_guessed(run: Path, tmp_path: Path) -> None:
    """One length of request cannot tell the rates of a base, and no other base's are taken."""
    records = on_another_base(run, tmp_path / "r", "zero_shot")
    zero_shot = records.arms["zero_shot"]
    same = tuple(
        replace(s, computed_tokens=30) if s.set == "latency" else s for s in zero_shot.samples
    )
    arms = {**records.arms, "zero_shot": replace(zero_shot, samples=same)}
    records = replace(records, arms=arms)
    found = summarise(records)
    cost = found.arms["zero_shot"].cost
    assert cost is not None and set(cost.by_cache) == {"measured"}
    assert {b.cache for b in found.break_even if "zero_shot" in (b.a, b.b)} == {"measured"}


def hosting(results: Results, name: str) -> float:
    """Device-seconds paid for each that a request is busy."""
    cost = results.arms[name].cost
    assert cost is not None
    usd, seconds = cost.request_usd.value, cost.request_device_seconds.value
    assert usd is not None and seconds is not None
    return usd / seconds / USD_PER_SECOND


def test_arms_on_the_runs_base_share_idle_hosting_and_others_do_not(
    run: Path, tmp_path: Path, records: RunRecords
) -> None:
    pricing = replace(fake_run.CHEAP_PRICE, utilisation=0.25, shared_tasks=3)
    found = summarise(records, pricing=pricing)
    for name in ("zero_shot", "few_shot", "lora", "few_shot_on_lora"):
        assert hosting(found, name) == pytest.approx(2.0)  # 1 + 3 idle / 3 tasks
    assert hosting(found, "full") == pytest.approx(4.0)
    apart = summarise(on_another_base(run, tmp_path / "r", "lora", "role_play"), pricing=pricing)
    for name in ("lora", "few_shot_on_lora", "role_play"):
        assert hosting(apart, name) == pytest.approx(4.0)
    assert hosting(apart, "few_shot") == pytest.approx(2.0)


HOURS = DecisionConfig(hour_usd=50.0, tuning_hours=8.0, prompting_hours=3.0)


def test_peoples_hours_are_on_the_bill_of_all_that_stands_on_them(records: RunRecords) -> None:
    plain, found = summarise(records), summarise(records, decision=HOURS)
    expected = {"zero_shot": 3.0, "lora": 8.0, "full": 8.0, "few_shot_on_lora": 11.0, "tfidf": 0.0}
    for name, hours in expected.items():
        usd = [r.arms[name].cost.fixed_usd for r in (found, plain) if r.arms[name].cost]
        assert usd[0] - usd[1] == pytest.approx(50.0 * hours), name
        assert found.arms[name].people_hours == (hours or None)
        assert plain.arms[name].people_hours is None
    unpriced = summarise(records, decision=replace(HOURS, hour_usd=None))
    assert unpriced.arms["lora"].people_hours == 8.0
    assert unpriced.arms["lora"].cost.fixed_usd == plain.arms["lora"].cost.fixed_usd


def test_peoples_hours_stand_under_development_effort(records: RunRecords) -> None:
    rows = dimension_groups(summarise(records, decision=HOURS))
    effort = next(g for g in rows if g.dimension == "development effort")
    cells = next(r for r in effort.rows if r.measure == "people's hours").cells
    arms = list(records.arm_specs)
    assert cells[arms.index("few_shot_on_lora")].value == "11 h"
    assert cells[arms.index("tfidf")].value == "-"
    default = dimension_groups(summarise(records))
    assert not any(r.measure == "people's hours" for g in default for r in g.rows)
