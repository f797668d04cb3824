"""A label curve: its plan, and a whole run with the scripted engine in this very process."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conf.errors import ConfigError, NotBuiltYet, Refused
from conf.label_results import LabelCurve, LabelPoint
from conf.records import LedgerLine, Measured
from evaluation.records.run_records import read_run
from launch import cluster, execute, reference_jobs, run, workers
from launch.compose import compose_config
from launch.dry_run import show
from launch.evaluators import Evaluators
from launch.preflight import Checked, check
from launch.reference_jobs import ReferenceWork, _run
from launch.tracking.rows import label_rows

VALUE = Measured(value=0.5, low=0.4, high=0.6, n=100)
TINY = ("+exp=label_curve", "model=tiny", "tracking.wandb=off", "label_curve.sizes=[4,12]")
SCRIPTED = (
    *("~method@arms.lora", "~method@arms.full", "~method@arms.linear_probe"),
    *("engine=scripted", "engine.script=noisy", "engine.latency_requests=2"),
    *("arms.few_shot.num_shots=4", "arms.few_shot_retrieved.num_shots=2"),
    *("task.limit.test=16", "task.limit.validation=6", "label_curve.draws=2"),
)


def planned(root: Path, *overrides: str) -> Checked:
    config = compose_config([*TINY, f"run.root={root}", *overrides])
    return check(config, exp="label_curve", command="again")


def by_arm(checked: Checked, kind: str) -> Counter[str]:
    return Counter((j.arm or "").partition("@")[0] for j in checked.plan.jobs if j.kind == kind)


def test_the_plan_has_every_point_once(tmp_path: Path) -> None:
    checked = planned(tmp_path, "label_curve.draws=3", "label_curve.seeds=2")
    assert checked.labels is not None
    # 2 sizes x 3 draws, times 2 seeds where something trains.
    trained = by_arm(checked, "train")
    assert trained == {"lora": 12, "full": 12}
    answered = {"lora": 12, "full": 12, "few_shot": 6, "few_shot_retrieved": 6, "zero_shot": 1}
    assert by_arm(checked, "evaluate") == answered
    assert by_arm(checked, "reference") == {"tfidf": 6, "linear_probe": 6}
    assert by_arm(checked, "features") == {"linear_probe": 1}
    keys = [job.key for job in checked.plan.jobs if job.kind != "rows"]  # both tuned arms' are one
    assert len(set(keys)) == len(keys)
    places = {(p.arm, p.num_labels, p.draw, p.seed) for p in checked.labels.places}
    assert len(places) == len(checked.labels.places) == 1 + 2 * 12 + 4 * 6
    ids = {job.id for job in checked.plan.jobs}
    assert all(name in ids for job in checked.plan.jobs for name in job.depends_on)
    order = [job.id for job in checked.plan.jobs]
    for job in checked.plan.jobs:
        assert all(order.index(name) < order.index(job.id) for name in job.depends_on)


def test_sets_are_nested_and_arms_see_the_same_ones(tmp_path: Path) -> None:
    checked = planned(tmp_path, "label_curve.draws=2", "label_curve.noise=[0,0.4]")
    assert checked.labels is not None
    tasks = {run.arm.name: run.task for run in checked.labels.runs}
    small, large = tasks["lora@4.d1"].items["train"], tasks["lora@12.d1"].items["train"]
    assert {i.id for i in small} < {i.id for i in large} and len(small) == 4
    assert tasks["tfidf@4.d1"] is tasks["lora@4.d1"]
    noisy = {i.id: i.label for i in tasks["lora@12.d0.e0_4"].items["train"]}
    clean = {i.id: i.label for i in checked.task.items["train"]}
    assert noisy.keys() == clean.keys() and noisy != clean
    for task in tasks.values():
        assert task.items["test"] == checked.task.items["test"]
    shared = {i.sha256 for items in checked.labels.features_task.items.values() for i in items}
    assert {i.sha256 for task in tasks.values() for i in task.items["train"]} <= shared


def test_nothing_is_chosen_on_validation_labels(tmp_path: Path) -> None:
    checked = planned(tmp_path)
    for name in ("zero_shot", "few_shot", "lora"):
        method = checked.arms[name].answering
        assert (method.answer_by.name, method.calibration.name) == ("score", "batch")
    assert not any(job.kind == "curve" for job in checked.plan.jobs)


def test_an_arm_on_a_tuned_one_stands_on_the_same_set(tmp_path: Path) -> None:
    checked = planned(tmp_path, "+method@arms.few_shot_on_lora=few_shot_on_lora")
    assert checked.labels is not None
    found = {p.records: p.on for p in checked.labels.places if p.arm == "few_shot_on_lora"}
    assert found["few_shot_on_lora@4.d2"] == "lora@4.d2"
    job = checked.plan.job("evaluate:few_shot_on_lora@4.d2")
    assert "train:lora@4.d2" in job.depends_on


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("trainer.keep=best", ConfigError, "trainer.keep"),
        ("decision.stop_early=true", ConfigError, "decision.stop_early"),
        ("search=true", NotBuiltYet, "search"),
        ("+method@arms.instruction=instruction", NotBuiltYet, "arms.instruction"),
        ("label_curve.sizes=[4,100000]", ConfigError, "label_curve.sizes"),
    ],
)
def test_what_a_curve_cannot_do_is_refused(
    override: str, error: type[Refused], says: str, tmp_path: Path
) -> None:
    extra = ["trainer.num_points=2"] if override == "trainer.keep=best" else []
    with pytest.raises(error) as raised:
        planned(tmp_path, override, *extra)
    assert says in str(raised.value)


def test_dry_run_lists_the_points(tmp_path: Path) -> None:
    stream = io.StringIO()
    checked = planned(tmp_path, "label_curve.noise=[0,0.25]")
    show(checked, Console(file=stream, width=180))
    text = stream.getvalue()
    rows = [line.split() for line in text.splitlines() if line.startswith("linear_probe ")]
    assert [row[1:4] for row in rows] == [
        [size, noise, "3"] for noise in ("0", "0.25") for size in ("4", "12")
    ]
    assert "@" not in text  # the runs of a point stand together
    needed = [job for job in checked.plan.jobs if job.kind in ("train", "evaluate", "features")]
    assert all(job.estimate.tokens for job in needed)  # also of draws that were not counted


class _Local:
    """An evaluator in this process, where a run would have an actor."""

    def __init__(self) -> None:
        self.evaluator = workers.Evaluator()

    @property
    def answer(self) -> Any:
        return self.evaluator.answer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A run directory, and what the second start of the same command ran."""
    root = tmp_path_factory.mktemp("curve")
    ran: list[str] = []

    def stream(method: Any, work: workers.AnswerWork) -> Iterator[Any]:
        ran.append(work.job)
        for events in method(work):
            yield from events

    def refer(work: ReferenceWork) -> Iterator[Any]:
        ran.append(work.job.id)
        yield from _run(work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "start", lambda *given, **named: None)
        patch.setattr(cluster, "stop", lambda *given, **named: None)
        patch.setattr(execute, "_stream", stream)
        here = _Local()
        patch.setattr(Evaluators, "borrow", lambda *given, **named: here)
        patch.setattr(Evaluators, "give_back", lambda *given, **named: None)
        patch.setattr(Evaluators, "release_idle", lambda *given, **named: None)
        for module in (workers, reference_jobs):  # output is redirected for the whole process
            patch.setattr(module, "logged", lambda *_, **__: contextlib.nullcontext())
        patch.setattr(execute, "reference_events", refer)
        console = Console(file=io.StringIO())
        asked = (*SCRIPTED, "label_curve.noise=[0,0.3]", "run.name=r")
        assert run.execute(planned(root, *asked), console) == 0
        first = list(ran)
        ran.clear()
        # A job that was killed before its end: the same command runs it alone.
        job = planned(root, *asked).plan.job("evaluate:few_shot@4.d1")
        (root / ".cache/jobs" / job.key / "done.json").unlink()
        patch.setattr(run, "report", lambda again: None)  # the first one is looked at
        assert run.execute(planned(root, *asked), console) == 0
        assert len(first) > 10
        yield root / "r", ran


def test_the_same_command_runs_what_is_missing(finished: tuple[Path, list[str]]) -> None:
    assert finished[1] == ["evaluate:few_shot@4.d1"]


def test_the_curve_is_in_the_results(finished: tuple[Path, list[str]]) -> None:
    path = finished[0]
    results = json.loads((path / "results.json").read_text())
    curve = results["label_curve"]
    assert set(curve) == {f for f in LabelCurve.__dataclass_fields__}
    points = {(p["arm"], p["num_labels"], p["noise"]): p for p in curve["points"]}
    assert len(points) == len(curve["points"]) == 3 * 2 * 2
    assert all(p["num_runs"] == 2 and p["num_missing"] == 0 for p in points.values())
    records = read_run(path)
    for arm, size in (("few_shot", 4), ("tfidf", 12), ("few_shot_retrieved", 12)):
        places = [
            p for p in records.label_places if (p.arm, p.num_labels, p.noise) == (arm, size, 0)
        ]
        means = []
        for place in places:
            own = records.arms.get(place.records) or records.label_runs[place.records]
            rule = own.rule
            right = [
                s.is_correct_calibrated if rule and rule.is_calibrated else s.is_correct
                for s in own.samples
                if s.set == "test"
            ]
            assert len(right) == 16
            means.append(sum(map(bool, right)) / 16)
        assert points[arm, size, 0.0]["value"]["value"] == pytest.approx(sum(means) / len(means))
        assert points[arm, size, 0.0]["by_draw"] == pytest.approx(means)
    # Shots end at num_shots: more labels are the same answers.
    assert points["few_shot", 4, 0.0]["value"] == points["few_shot", 12, 0.0]["value"]
    assert points["few_shot", 12, 0.0]["num_used"] == 4
    assert (
        points["tfidf", 12, 0.3]["share_flipped"] > 0 == points["tfidf", 12, 0.0]["share_flipped"]
    )
    assert list(curve["constants"]) == ["zero_shot"]
    assert curve["num_checked"] == 16
    assert results["arms"]["few_shot"]["labels_used"] == 4
    assert results["arms"]["few_shot_retrieved"]["labels_used"] == 12


def test_the_report_shows_it_and_the_bill_is_whole(finished: tuple[Path, list[str]]) -> None:
    path = finished[0]
    page, text = (path / "report.html").read_text(), (path / "report.md").read_text()
    assert 'id="label-curve"' in page and "plot-label_curve" in page and "plot-label_noise" in page
    assert "## Labels" in text and "12 (4 used)" in text
    assert (path / "figures/label_curve.svg").is_file()
    records = read_run(path)
    lines: list[LedgerLine] = list(records.ledger)
    samples = [
        s for arm in (*records.arms.values(), *records.label_runs.values()) for s in arm.samples
    ]
    shared = sum(line.tokens for line in lines if line.purpose in ("shared", "padding"))
    own = sum(line.tokens for line in lines) - shared
    assert own == sum(s.computed_tokens for s in samples)


def test_tracking_gets_each_point_against_its_labels() -> None:
    points = (
        LabelPoint(arm="lora", num_labels=8, num_used=8, noise=0.0, value=VALUE, fixed_usd=0.25),
        LabelPoint(arm="lora", num_labels=8, num_used=8, noise=0.1, value=VALUE),
        LabelPoint(arm="lora", num_labels=32, num_used=32, noise=0.0, value=VALUE),
    )
    curve = LabelCurve(
        metric="accuracy", sizes=(8, 32), draws=1, seeds=1, noise=(0.0, 0.1), points=points
    )
    accuracy = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6}
    assert list(label_rows(curve)) == [
        ("lora", {"progress/labels": 8.0, "progress/usd": 0.25, **accuracy}),
        ("lora", {"progress/labels": 32.0, **accuracy}),
    ]
    assert list(label_rows(None)) == []
