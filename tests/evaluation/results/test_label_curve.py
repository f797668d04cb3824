"""Label curves of made records: points, known crossings, suspects, what the report says."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from conf.label_results import LabelCrossing, LabelPlace
from conf.records import SampleRecord
from evaluation.records.run_records import ArmRecords, RunRecords, read_run
from evaluation.report.labels import _crossing_span, crossing_words, label_charts, label_section
from evaluation.results.arm_summary import Settings, summarise_arm
from evaluation.results.label_curve import summarise_label_curve
from evaluation.results.summary import summarise
from evaluation.results.suspects import suspects
from tests.evaluation import fake_run

SIZES = (8, 32, 128, 512)
DRAWS = 3
CROSSING = 60
SUSPECT = 2  # of the test items, whose label no arm agrees with


def answered(
    name: str, records: RunRecords, share: float, source: np.random.Generator, *, seed: int | None
) -> ArmRecords:
    """An arm that is right with this probability, and never about the suspects."""
    tests = [item for item in records.items.values() if item.split == "test"]
    samples = []
    for place, item in enumerate(tests):
        other = "ham" if item.label == "spam" else "spam"
        is_right = place >= SUSPECT and bool(source.random() < share)
        samples.append(
            SampleRecord(
                arm=name,
                item_id=item.id,
                set="test",
                train_seed=seed,
                answer=item.label if is_right else other,
                target=item.label,
                is_correct=is_right,
                score=float(is_right),
            )
        )
    return ArmRecords(samples=tuple(samples), status="done")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    root = tmp_path_factory.mktemp("run")
    fake_run.write_spam_run(root, num_test=300)
    read = read_run(root)
    source = np.random.default_rng(5)
    names = ("zero_shot", "few_shot", "lora", "tfidf")
    arms = {"zero_shot": answered("zero_shot", read, 0.55, source, seed=None)}
    runs: dict[str, ArmRecords] = {}
    places = [LabelPlace(arm="zero_shot", records="zero_shot", num_labels=0, num_used=0)]
    for arm, size, draw in ((a, s, d) for a in names[1:] for s in SIZES for d in range(DRAWS)):
        rise = 0.09 * math.log(size / CROSSING) if arm != "few_shot" else 0.0
        share = min(0.98, 0.65 + rise + 0.02 * source.normal())
        is_own = size == SIZES[-1] and draw == 0
        name = arm if is_own else f"{arm}@{size}.d{draw}"
        seed = 0 if arm == "lora" else None
        (arms if is_own else runs)[name] = answered(name, read, share, source, seed=seed)
        places.append(LabelPlace(arm=arm, records=name, num_labels=size, num_used=size, draw=draw))
    specs = {name: read.arm_specs[name] for name in names}
    return replace(
        read,
        arm_specs=specs,
        arms=arms,
        label_runs=runs,
        label_places=tuple(places),
        config={**read.config, "label_curve": {"draws": DRAWS, "seeds": 1}},
        items=dict(read.items),
    )


def test_points_are_means_over_draws_and_items(records: RunRecords) -> None:
    curve = summarise(records).label_curve
    assert curve is not None and curve.sizes == SIZES and curve.metric == "accuracy"
    for point in curve.points:
        own = [
            (records.arms | records.label_runs)[p.records]  # type: ignore[operator]
            for p in records.label_places
            if (p.arm, p.num_labels) == (point.arm, point.num_labels)
        ]
        means = [np.mean([s.score for s in arm.samples]) for arm in own]
        assert point.value.value == pytest.approx(np.mean(means), abs=1e-12)
        assert point.by_draw == pytest.approx(means)
        assert point.sd_draws == pytest.approx(np.std(means, ddof=1))
        assert point.value.low is not None and point.value.high is not None
        assert point.value.low < point.value.value < point.value.high
        assert point.num_runs == DRAWS and point.num_missing == 0
    assert curve.constants["zero_shot"].n == 300


def test_the_known_crossing_is_found(records: RunRecords) -> None:
    curve = summarise(records).label_curve
    assert curve is not None
    found = {(c.prompted, c.tuned): c for c in curve.crossings}
    assert set(found) == {("zero_shot", "lora"), ("few_shot", "lora")}  # references do not train
    crossing = found["few_shot", "lora"]
    assert crossing.status == "crosses"
    assert (crossing.low or 0) <= CROSSING <= (crossing.high or math.inf)
    assert 0.5 < (crossing.share_seen or 0) <= 1
    # 0.55 is met at 60 exp(-0.1 / 0.09) labels.
    other = found["zero_shot", "lora"]
    assert (other.low or 0) <= CROSSING * math.exp(-0.1 / 0.09) <= (other.high or math.inf)


def test_a_run_that_is_missing_leaves_its_point_with_fewer_draws(records: RunRecords) -> None:
    runs = dict(records.label_runs)
    runs["lora@32.d1"] = ArmRecords(status="failed", error="lost")
    curve = summarise(replace(records, label_runs=runs)).label_curve
    assert curve is not None
    point = next(p for p in curve.points if (p.arm, p.num_labels) == ("lora", 32))
    assert (point.num_runs, point.num_missing, len(point.by_draw)) == (2, 1, 2)
    assert len(curve.crossings) == 2


def test_suspects_are_the_items_on_which_all_arms_agree_against_the_label(
    records: RunRecords,
) -> None:
    curve = summarise(records).label_curve
    assert curve is not None and curve.num_checked == 300
    tests = [item for item in records.items.values() if item.split == "test"]
    assert {i.id for i in tests[:SUSPECT]} <= {s.item_id for s in curve.suspects}
    for suspect in curve.suspects:
        item = records.items[suspect.item_id]
        assert suspect.label == item.label != suspect.answer
        assert suspect.input == item.input
        assert suspect.num_answers == 1 + 3 * DRAWS
    hidden = summarise(replace(records, shows_text=False)).label_curve
    assert hidden is not None
    assert [s.item_id for s in hidden.suspects] == [s.item_id for s in curve.suspects]
    assert all((s.label, s.answer, s.input) == (None, None, None) for s in hidden.suspects)


def test_two_arms_are_no_witnesses(records: RunRecords) -> None:
    item = next(iter(records.items.values()))
    given = {item.id: ["x"]}
    assert suspects({"a": given, "b": given}, {item.id: item}, shows_text=True) == ([], 0)
    found, checked = suspects(dict.fromkeys("abc", given), {item.id: item}, shows_text=True)
    assert (len(found), checked) == (1, 1)
    one = {**dict.fromkeys("ab", given), "c": {item.id: ["x", None]}}
    assert suspects(one, {item.id: item}, shows_text=True) == ([], 1)


def test_a_run_without_a_curve_has_none(records: RunRecords) -> None:
    plain = replace(records, label_places=(), label_runs={})
    settings = Settings(decision=plain.decision, pricing=plain.pricing)
    arms = {name: summarise_arm(plain, name, settings=settings) for name in plain.arm_specs}
    assert summarise_label_curve(plain, arms, settings=settings) is None


def test_the_section_says_what_was_found(records: RunRecords) -> None:
    results = summarise(records)
    charts = label_charts(results)
    assert [chart.name for chart in charts] == ["label_curve", "label_cost"]  # no noise, no chart
    by_name = {series.name: series for series in charts[0].series}
    assert by_name["lora"].x == SIZES and by_name["zero_shot"].x == (8, 512)
    section = label_section(results, charts)
    assert section is not None
    assert [title for title, _ in section.tables] == ["Crossings", "Points", "Suspected labels"]
    hidden = summarise(replace(records, shows_text=False))
    table = label_section(hidden, charts)
    assert table is not None and table.tables[-1][1].headings == ("item", "answers")


@pytest.mark.parametrize(
    ("status", "labels", "low", "high", "words", "span"),
    [
        ("crosses", 61.7, 31.2, 143.0, "about 62", "31 to 140"),
        ("crosses", 61.7, None, 143.0, "about 62", "under 8 to 140"),
        ("crosses", 61.7, 31.2, None, "about 62", "31 to over 512"),
        ("none_seen", None, 512.0, None, "none seen up to 512", "over 512"),
        ("none_seen", None, 200.0, None, "none seen up to 512", "200 to over 512"),
        ("always", None, None, 8.0, "8 or fewer", "under 8"),
        ("always", None, None, None, "8 or fewer", "under 8 to over 512"),
    ],
)
def test_the_words_of_a_crossing(
    status: str, labels: float | None, low: float | None, high: float | None, words: str, span: str
) -> None:
    crossing = LabelCrossing(
        prompted="a",
        tuned="b",
        noise=0.0,
        status=status,
        labels=labels,
        low=low,
        high=high,
        share_seen=0.9,
        smallest=8,
        largest=512,
    )
    assert (crossing_words(crossing), _crossing_span(crossing)) == (words, span)
