"""From records to probes, their changes and the ten-dimension table, against counts by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from conf.hashing import plain
from conf.label_results import LabelCrossing, LabelCurve, LabelPoint
from conf.probe_results import ProbeChange
from conf.records import Item, LedgerLine, Measured, SampleRecord, from_dict, to_dict
from conf.results import Results
from conf.run_groups import ProbesConfig
from evaluation.probes.general_set import general_items
from evaluation.probes.probe_sets import STEREOTYPE, UNKNOWN, probe_items
from evaluation.records.run_records import RunRecords, read_run
from evaluation.results.dimension_rows import DIMENSIONS
from evaluation.results.dimensions import all_dimensions
from evaluation.results.summary import summarise
from evaluation.results.turn_around import turn_around
from evaluation.statistics import paired_difference, wilson
from tests.evaluation import fake_run

PROBES = probe_items(ProbesConfig())
STEERED = ("zero_shot", "lora", "full", "few_shot_on_lora")
KINDS = ("opening", "num_words", "json_key", "forbidden_word")


def probe_answers(arm: str, *, biased: int, made_up: int, step: int | None) -> list[SampleRecord]:
    """The first items follow the prejudice, or are answered without support; the rest abstain."""
    bias = [
        (i, i.slices[STEREOTYPE] if n < biased else UNKNOWN) for n, i in enumerate(PROBES["bias"])
    ]
    unanswerable = [i for i in PROBES["abstain"] if i.label == UNKNOWN]
    guesses = {i.id for i in unanswerable[:made_up]}
    abstain = [(i, i.choices[0] if i.id in guesses else i.label) for i in PROBES["abstain"]]
    return [
        SampleRecord(
            arm=arm,
            item_id=i.id,
            set=i.split,
            step=step,
            answer=answer,
            target=i.label,
            label_logprobs={c: -1.0 - n for n, c in enumerate(i.choices)},
        )
        for i, answer in (*bias, *abstain)
    ]


def steered_items(tests: Sequence[Item]) -> list[Item]:
    return [
        dataclasses.replace(
            item,
            id=f"steering-{item.id}",
            split="steering",
            slices={"instruction": KINDS[n % 4], "argument": ""},
        )
        for n, item in enumerate(tests)
    ]


def asked_besides(name: str, kind: str, tests: Sequence[Item]) -> list[SampleRecord]:
    """What the jobs besides the task leave of an arm."""
    step = 60 if kind != "prompt" or "_on_" in name else None
    found = []
    for number in (1, 2):
        for place, item in enumerate(tests):
            # The second wording turns the first item's answer round; the first changes nothing.
            answer = "spam" if number == 2 and place == 0 else "ham"
            is_right = answer == item.label
            found.append(
                SampleRecord(
                    arm=name,
                    item_id=item.id,
                    set="wording",
                    paraphrase=number,
                    step=step,
                    answer_by="generate" if name == "chain_of_thought" else "score",
                    answer=answer,
                    calibrated_answer=answer,
                    target=item.label,
                    is_correct=is_right,
                    is_correct_calibrated=is_right,
                    score=float(is_right),
                )
            )
    obeyed = {"zero_shot": 2, "few_shot_on_lora": 5}.get(name, 6)
    for place, item in enumerate(steered_items(tests) if name in STEERED else ()):
        found.append(
            SampleRecord(
                arm=name,
                item_id=item.id,
                set="steering",
                step=step,
                answer_by="generate",
                answer="x",
                is_correct=place < obeyed,
            )
        )
    if kind in ("lora", "full"):
        found += probe_answers(name, biased=2, made_up=6, step=None)
        found += probe_answers(name, biased=5, made_up=1, step=30)  # an earlier checkpoint
        found += probe_answers(name, biased=1, made_up=2, step=60)
    return found


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    root = tmp_path_factory.mktemp("run")
    fake_run.write_spam_run(root, num_test=40, num_general=20)
    tests = [i for i in read_run(root).items.values() if i.split == "test"][:8]
    for name, (_, _, _, kind) in fake_run.SPAM_ARMS.items():
        if kind != "tfidf":
            append(root / f"arms/{name}/samples.jsonl", asked_besides(name, kind, tests))
    append(root / "items.jsonl", [*PROBES["bias"], *PROBES["abstain"], *steered_items(tests)])
    return read_run(root)


@pytest.fixture(scope="module")
def results(records: RunRecords) -> Results:
    return summarise(records)


def append(path: Path, found: Sequence[object]) -> None:
    with path.open("a") as stream:
        stream.writelines(json.dumps(plain(one)) + "\n" for one in found)


def change(results: Results, arm: str, measure: str) -> ProbeChange:
    (found,) = (c for c in results.probe_changes if (c.arm, c.measure) == (arm, measure))
    return found


def test_arms_on_the_same_weights_share_their_probes(results: Results) -> None:
    asked = {n: a.probes["bias"].asked_of for n, a in results.arms.items() if "bias" in a.probes}
    prompted = ("zero_shot", "few_shot", "chain_of_thought", "role_play")
    assert asked == {
        **dict.fromkeys(prompted, "lora"),
        "lora": "lora",
        "full": "full",
        "few_shot_on_lora": "lora",
    }
    base, tuned = (results.arms[n].probes for n in ("zero_shot", "few_shot_on_lora"))
    assert base["bias"].measures["group_gap"].value == pytest.approx(2 / 16)
    assert tuned["bias"].measures["group_gap"].value == pytest.approx(1 / 16)
    assert base["abstain"].measures["unsupported"] == wilson(6, 8)
    assert tuned["abstain"].measures["unsupported"] == wilson(2, 8)
    assert tuned["abstain"].measures["over_abstained"] == wilson(0, 8)
    assert base["bias"].note == "small: 16 items" and base["bias"].source == "embedded"


def test_a_probe_before_and_after_tuning_is_paired_by_item(results: Results) -> None:
    found = change(results, "lora", "unsupported")
    assert found.base == "lora" and (found.before, found.after) == (wilson(6, 8), wilson(2, 8))
    expected = paired_difference([1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0])
    assert found.change == Measured(
        value=expected.difference, low=expected.low, high=expected.high, n=8
    )
    assert found.p_value == pytest.approx(2 * 0.5**4)  # exact McNemar, 4 of 4 discordant
    gap = change(results, "lora", "group_gap")
    assert gap.change.value == pytest.approx(-1 / 16)
    arms = {c.arm for c in results.probe_changes if c.probe in ("bias", "abstain")}
    assert arms == {"lora", "full"}  # few_shot_on_lora has no weights of its own


def test_steering_and_calibration_change_against_the_arm_that_only_prompts(
    results: Results,
) -> None:
    obeyed = change(results, "lora", "obeyed")
    assert obeyed.base == "zero_shot" and obeyed.change.value == pytest.approx(4 / 8)
    assert change(results, "few_shot_on_lora", "obeyed").change.value == pytest.approx(3 / 8)
    assert set(results.arms["lora"].probes["steering"].by_kind) == set(KINDS)
    assert change(results, "few_shot_on_lora", "ece").base == "zero_shot"  # the same prompt
    assert "ece" not in [
        m for n in ("chain_of_thought",) for m in results.arms[n].probes.get("calibration", ())
    ]


def test_wordings_are_compared_with_the_tests_own_answers(
    records: RunRecords, results: Results
) -> None:
    arm = records.arms["lora"]
    ids = {s.item_id for s in arm.samples if s.set == "wording"}
    own = {s.item_id: s.answer for s in arm.samples if s.set == "test" and s.item_id in ids}
    first = min(ids, key=lambda i: int(i.removeprefix("test-")))
    agreeing = 0.0
    for i in ids:
        given = [own[i], "ham", "spam" if i == first else "ham"]
        agreeing += sum(given[a] == given[b] for a, b in ((0, 1), (0, 2), (1, 2))) / 3
    found = results.arms["lora"].probes["wording"].measures
    assert found["agreement"].value == pytest.approx(agreeing / len(ids))
    assert found["agreement"].n == 8 and found["worst"].n == 8
    assert found["spread"].value is not None and found["spread"].value >= 0


def test_all_ten_dimensions_have_rows_and_every_arm_a_cell(results: Results) -> None:
    rows = results.dimensions
    assert list(dict.fromkeys(row.dimension for row in rows)) == list(DIMENSIONS)
    assert len({(row.dimension, row.measure) for row in rows}) == len(rows)
    for row in rows:
        assert list(row.by_arm) == list(results.arms)
        is_empty = all(cell is None for cell in row.by_arm.values())
        assert is_empty == row.note.startswith("not measured in this run")
        assert not any(isinstance(c, Measured) and c.value is None for c in row.by_arm.values())
        assert row.unit or not any(isinstance(c, Measured) for c in row.by_arm.values())
    empty = {row.measure for row in rows if all(c is None for c in row.by_arm.values())}
    assert empty <= {"agreement over repeats", "trials"}


def cell(results: Results, measure: str, arm: str) -> Measured | str | None:
    (row,) = (r for r in results.dimensions if r.measure == measure)
    return row.by_arm[arm]


def test_cells_are_the_numbers_of_the_results(results: Results) -> None:
    lora = results.arms["lora"]
    assert lora.train is not None and lora.metric is not None
    trained = cell(results, "trained parameters", "lora")
    assert trained == Measured(value=float(lora.train.trained_parameters))
    assert cell(results, "trained parameters", "zero_shot") == Measured(value=0.0)
    assert isinstance(cell(results, "trained parameters", "few_shot_on_lora"), str)
    assert cell(results, "trained parameters", "tfidf") is None
    accuracy = cell(results, "accuracy", "lora")
    assert isinstance(accuracy, Measured) and accuracy.value == lora.metric.value
    best = results.decision["best_prompted"]
    pair = next(p for p in results.pairs if {p.a, p.b} == {"lora", best})
    sign = 1 if pair.a == "lora" else -1
    gain = cell(results, "in-domain gain", "lora")
    assert isinstance(gain, Measured) and pair.difference is not None
    assert gain.value == pytest.approx(sign * pair.difference)
    assert gain.low is not None and gain.high is not None and gain.low <= gain.value <= gain.high
    assert "lora" in next(r.note for r in results.dimensions if r.measure.startswith("unsupported"))


def test_a_label_curve_adds_crossings_and_what_wrong_labels_cost(results: Results) -> None:
    def point(arm: str, labels: int, noise: float, value: float) -> LabelPoint:
        measured = Measured(value=value)
        return LabelPoint(arm=arm, num_labels=labels, num_used=labels, noise=noise, value=measured)

    def crossing(tuned: str, status: str, **fields: float) -> LabelCrossing:
        return LabelCrossing(
            prompted="few_shot", tuned=tuned, noise=0.0, status=status, largest=64, **fields
        )

    curve = LabelCurve(
        metric="accuracy",
        sizes=(8, 64),
        draws=1,
        seeds=1,
        noise=(0.0, 0.1, 0.2),
        points=tuple(
            point("lora", n, noise, 0.9 - noise if n == 64 else 0.5)
            for n in (8, 64)
            for noise in (0.0, 0.1, 0.2)
        ),
        crossings=(
            crossing("lora", "crosses", labels=20.0, low=9.0),
            crossing("full", "none_seen"),
            crossing("tfidf", "unknown"),
        ),
    )
    made = dataclasses.replace(results, label_curve=curve)
    rows = {row.measure: row for row in all_dimensions(made) if row.dimension == DIMENSIONS[3]}
    crossings = rows["labels to be as good as few_shot"].by_arm
    assert crossings["lora"] == Measured(value=20.0, low=9.0)
    assert crossings["full"] == "none seen up to 64" and crossings["tfidf"] is None
    loss = rows["change with 20% of labels wrong"].by_arm["lora"]
    assert isinstance(loss, Measured) and loss.value == pytest.approx(-0.2)


def test_a_failed_arm_has_no_cell_and_the_note_says_so(results: Results) -> None:
    failed = dataclasses.replace(results.arms["full"], status="failed", error="out of memory")
    rows = all_dimensions(dataclasses.replace(results, arms={**results.arms, "full": failed}))
    assert all(row.by_arm["full"] is None and "full" in row.note for row in rows)


def test_the_table_survives_its_file(results: Results) -> None:
    again = from_dict(Results, json.loads(json.dumps(to_dict(results))))
    assert again.dimensions == results.dimensions
    assert again.probe_changes == results.probe_changes
    assert again.arms["lora"].probes == results.arms["lora"].probes


def test_turn_around_is_wall_time_of_the_arms_own_jobs(records: RunRecords) -> None:
    def line(arm: str, job: str, purpose: str, seconds: float) -> LedgerLine:
        return LedgerLine(job=job, arm=arm, purpose=purpose, device_seconds=seconds)

    ledger = (
        line("lora", "train:lora", "train", 40.0),
        line("lora", "evaluate:lora", "validation", 6.0),
        line("lora", "evaluate:lora", "test", 10.0),
        line("lora", "latency:lora", "latency", 99.0),
        line("few_shot_on_lora", "evaluate:few_shot_on_lora", "test", 8.0),
        line("zero_shot", "evaluate:zero_shot", "test", 4.0),
    )
    jobs = (
        {"id": "train:lora", "devices": 4},
        {"id": "evaluate:lora", "devices": 2},
        {"id": "evaluate:few_shot_on_lora", "devices": 2},
        {"id": "evaluate:zero_shot", "devices": 1},
    )
    made = dataclasses.replace(records, ledger=ledger, jobs=jobs)
    found = {n: turn_around(made, n) for n in ("lora", "few_shot_on_lora", "zero_shot", "full")}
    seconds = {n: (t and t.prompt_seconds, t and t.data_seconds) for n, t in found.items()}
    assert seconds == {
        "lora": (8.0, 18.0),
        "few_shot_on_lora": (4.0, 14.0),
        "zero_shot": (4.0, 4.0),
        "full": (None, None),
    }


def test_what_is_asked_besides_never_moves_an_arms_own_numbers(
    results: Results, tmp_path: Path
) -> None:
    fake_run.write_spam_run(tmp_path, num_test=40, num_general=20)
    without = summarise(read_run(tmp_path))
    own = {"calibration"}
    for name, arm in without.arms.items():
        assert set(arm.probes) <= own
        assert dataclasses.replace(results.arms[name], probes=arm.probes) == arm
    assert without.recommendation == results.recommendation


def test_a_failed_probe_leaves_the_arm_whole(tmp_path: Path) -> None:
    fake_run.write_spam_run(tmp_path, num_test=40)
    with (tmp_path / "journal.jsonl").open("a") as stream:
        for job in ("control:lora", "probes:lora"):
            event = {"time": 2e9, "event": "job_failed", "job": job, "arm": "lora"}
            stream.write(json.dumps({**event, "data": {"error": "too long"}}) + "\n")
    assert read_run(tmp_path).arms["lora"].status == "done"


def test_the_general_set_shows_in_knowledge(results: Results) -> None:
    assert general_items(20)
    changed = cell(results, "change on the general set", "lora")
    assert isinstance(changed, Measured) and changed.n == 20
