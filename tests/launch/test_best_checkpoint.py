"""trainer.keep=best: validation chooses one of a training's checkpoints, and all else uses it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from conf.checkpoint_records import CheckpointRecord
from conf.choices import Keep
from conf.errors import ConfigError, JobFailed
from conf.records import CurvePoint, Measured, TrainRecord, TrainSummary, to_dict
from evaluation.records.arm_scores import requests_of
from evaluation.records.run_records import RunRecords, read_run
from evaluation.results.serving import serve_commands
from evaluation.results.summary import summarise
from launch import cluster, evaluators, execute, train_workers, workers
from launch.checkpoints import best_point, point_checkpoint
from launch.compose import compose_config
from launch.finished import find_arm
from launch.preflight import check
from launch.reference_jobs import ReferenceWork
from launch.run import execute as execute_run
from launch.store import write_json
from training.job import TrainJob
from training.schedule import save_steps
from training.state import training_sha256

TUNED = ("lora", "few_shot_on_lora")
STEPS, POINTS = 12, 4  # checkpoints at 3, 6, 9 and 12
RUN = [
    *("+exp=smoke", "+method@arms.lora=lora", "+method@arms.few_shot_on_lora=few_shot_on_lora"),
    *("~method@arms.few_shot", "engine=forest", "engine.latency_requests=2", "general.items=4"),
    *("general.instruction_items=4", f"trainer.max_steps={STEPS}", f"trainer.num_points={POINTS}"),
    *("trainer.epochs=20", "arms.lora.answer_by=score"),
]
# How the answers are scripted at each step: right most often in the middle.
SCRIPTS = {3: "constant", 6: "oracle", 9: "noisy", 12: "constant"}


def point(step: int, value: float | None) -> CurvePoint:
    return CurvePoint(
        arm="lora",
        step=step,
        tokens=step,
        device_seconds=1.0,
        metric="accuracy",
        value=Measured(value=value, n=10),
    )


@pytest.mark.parametrize(
    ("values", "variant"),
    [
        ([0.1, 0.9, 0.5], "step-000006"),
        ([0.9, 0.9, 0.5], "step-000003"),  # of equal ones the earlier
        ([0.5, 0.9, 0.9], "step-000006"),
        ([0.0, 0.0, 0.0], "step-000003"),
        ([0.1, 0.2, 0.3], "final"),
    ],
)
def test_the_best_on_validation_is_chosen_and_of_equal_ones_the_earlier(
    values: list[float], variant: str
) -> None:
    points = {f"curve:lora:{n}": point(3 * (n + 1), v) for n, v in enumerate(values)}
    for order in (list(points), list(points)[::-1]):
        choice = best_point({name: points[name] for name in order})
        assert choice.variant == variant
        assert choice.points[str(choice.step)].value == max(values)
        assert [int(s) for s in choice.points] == [3, 6, 9]


@pytest.mark.parametrize("missing", [None, point(6, None)])
def test_a_checkpoint_without_a_score_stops_the_choice(missing: CurvePoint | None) -> None:
    with pytest.raises(JobFailed, match="curve:lora:1 has no score"):
        best_point({"curve:lora:0": point(3, 0.5), "curve:lora:1": missing})


def test_points_are_found_by_number_and_the_last_without(tmp_path: Path) -> None:
    for name in ("step-000009", "final", "step-000012"):
        (tmp_path / name / "checkpoint").mkdir(parents=True)
    found = [point_checkpoint(tmp_path, n).parent.name for n in (0, 1, None)]
    assert found == ["step-000009", "step-000012", "final"]
    with pytest.raises(JobFailed, match="2 intermediate"):
        point_checkpoint(tmp_path, 2)


def test_there_must_be_something_to_choose_from() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.keep"):
        compose_config(["+exp=lora", "trainer.keep=best", "trainer.num_points=1"])


# --- A whole run: everything real but the training and the script of the engine ------------------


JOBS: list[TrainJob] = []


def fake_training(job: TrainJob, **others: Any) -> Iterator[Any]:
    """Steps, checkpoints and a summary, without weights."""
    JOBS.append(job)
    for step in range(1, STEPS + 1):
        yield TrainRecord(
            arm=job.arm_name,
            step=step,
            examples=8,
            tokens=100,
            target_tokens=8,
            loss=1.0 / step,
            learning_rate=1e-3,
            grad_norm=1.0,
            step_seconds=0.1,
            device_seconds=0.2,
            usd=None,
        )
    for step in save_steps(STEPS, num_points=job.trainer.num_points):
        name = "final" if step == STEPS else f"step-{step:06d}"
        record = CheckpointRecord(
            arm=job.arm_name,
            kind="lora",
            step=step,
            tokens=100 * step,
            base_model=job.base_model,
            base_model_sha256="",
            renderer_sha256=job.renderer_sha256,
            prompt_sha256=job.prompt_sha256,
            files={},
            trained_parameters=7,
        )
        write_json(Path(job.output_dir) / name / "checkpoint/checkpoint.json", to_dict(record))
    yield TrainSummary(
        arm=job.arm_name,
        steps=STEPS,
        trained_parameters=7,
        total_parameters=70,
        checkpoint_bytes=1,
        device_seconds=3.0,
        peak_memory_bytes=None,
        examples=96,
        tokens=1200,
        target_tokens=96,
        padding_tokens=0,
        num_truncated=0,
        learning_rate=1e-3,
        world_size=1,
        zero_stage=0,
        shown_row="",
    )


def answered_here(actor: Any, work: workers.AnswerWork) -> Iterator[Any]:
    """The evaluation room itself, in this process, with a script for each checkpoint."""
    script = "constant" if work.step is None else SCRIPTS[work.step]
    engine = dataclasses.replace(work.arm.engine, name="scripted", script=script)
    work = dataclasses.replace(work, arm=dataclasses.replace(work.arm, engine=engine))
    for records in workers.Evaluator().answer(work):
        yield from records


@pytest.fixture(scope="module")
def faked() -> Iterator[None]:
    """No Ray, no training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "start", lambda *_, **__: None)
        patch.setattr(cluster, "stop", lambda *_, **__: None)
        patch.setattr(train_workers, "run_training", fake_training)
        patch.setattr(workers, "evaluator", lambda machine, *, actors: SimpleNamespace(answer=None))
        patch.setattr(evaluators, "_kill", lambda actor: None)
        patch.setattr(evaluators.Evaluators, "_wait_for", lambda self, actor: None)
        patch.setattr(execute, "_stream", answered_here)
        patch.setattr(execute, "reference_events", reference_answers)
        yield


def run(root: Path, *overrides: str) -> RunRecords:
    """Run the experiment; returns its records."""
    config = compose_config([*RUN, f"run.root={root}", *overrides])
    checked = check(config, exp="smoke", command="python launch.py")
    code = execute_run(checked, Console(file=StringIO()))
    path = root / config.run.name
    assert code == 0, [e for e in journal(path) if e["event"] == "job_failed"]
    return read_run(path)


@pytest.fixture(scope="module")
def best(faked: None, tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    """A run whose middle checkpoint is the best."""
    return run(tmp_path_factory.mktemp("best"), "run.name=best", "trainer.keep=best")


def reference_answers(work: ReferenceWork) -> Iterator[Any]:
    yield from workers.run_reference(work.job.id, work.arm, work.task, (), work.log_path)


def journal(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]


def steps_of(records: RunRecords, arm: str, set_name: str) -> set[int | None]:
    return {s.step for s in records.arms[arm].samples if s.set == set_name}


def test_the_middle_checkpoint_is_best_and_everything_uses_it(best: RunRecords) -> None:
    records = best
    curve = {p.step: p.value.value for p in records.arms["lora"].curve}
    assert sorted(curve) == [3, 6, 9, 12]
    assert curve[6] == 1.0 and max(v for s, v in curve.items() if s != 6) < 1.0
    assert steps_of(records, "lora", "validation") == {3, 6, 9, 12}
    for name in TUNED:
        assert steps_of(records, name, "test") == steps_of(records, name, "latency") == {6}
        choice = records.arms[name].checkpoint
        assert choice is not None and (choice.step, choice.variant) == (6, "step-000006")
        assert {int(s): m.value for s, m in choice.points.items()} == curve
    for name in ("general", "instructions", "bias", "abstain"):
        assert steps_of(records, "lora", name) == {None, 6}  # the base model and the tuned one
    for name in ("steering", "wording"):
        assert steps_of(records, "lora", name) == {6}
    assert records.arms["zero_shot"].checkpoint is None

    counted = requests_of(records.arms["lora"], set_name="validation")
    assert {r.final.step for r in counted} == {6}
    results = summarise(records)
    assert results.arms["lora"].accuracy.value == 1.0
    assert results.arms["lora"].checkpoint == records.arms["lora"].checkpoint
    report = (records.path / "report.md").read_text()
    assert "lora: step 6, best on validation (step 3: " in report
    for name in TUNED:  # what predict and export take
        found = find_arm(records.path, name, with_reference=False, usage="")
        assert found.checkpoint == (records.path / "arms/lora/step-000006/checkpoint").resolve()
        assert found.checkpoint_record is not None and found.checkpoint_record.step == 6
    recommended = dataclasses.replace(results.recommendation, arm="lora")
    commands = serve_commands(dataclasses.replace(results, recommendation=recommended), records)
    assert all("final/checkpoint" not in c.text for c in commands)


def test_a_training_goes_on_whichever_checkpoint_will_answer(best: RunRecords) -> None:
    (job,) = JOBS
    assert job.trainer.keep is Keep.best

    def sha256(**changes: Any) -> str:
        trainer = dataclasses.replace(job.trainer, **changes)
        return training_sha256(dataclasses.replace(job, trainer=trainer))

    assert sha256(keep=Keep.last) == sha256() != sha256(seed=1)


def test_the_same_run_with_the_last_checkpoint_trains_nothing_again(best: RunRecords) -> None:
    path = best.path.with_name("again")
    shutil.copytree(best.path, path)
    first = len(journal(path))
    records = run(path.parent, "run.name=again", "trainer.keep=last")
    started = {e["job"] for e in journal(path)[first:] if e["event"] == "job_started"}
    kinds = ("evaluate", "latency", "control")
    answered = {f"{kind}:{arm}" for kind in kinds for arm in TUNED}
    assert started == answered | {"general:lora", "instructions:lora", "probes:lora"}
    obeyed = summarise(records).arms["lora"].probes["steering"].measures["obeyed"]
    mine = [s for s in records.arms["lora"].samples if s.set == "steering"]
    assert {s.step for s in mine} == {12} and obeyed.n == len(mine)
    assert obeyed.value == fmean(bool(s.is_correct) for s in mine)
    assert records.arms["lora"].checkpoint is None  # though an earlier command chose one
    assert steps_of(records, "lora", "test") == {12}
    found = find_arm(path, "lora", with_reference=False, usage="")
    assert found.checkpoint == (path / "arms/lora/final/checkpoint").resolve()
