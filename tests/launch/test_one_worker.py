"""Training with one worker: Ray Train's local mode in a Ray task. test_tiny_run.py takes two.

Faults are in test_training_faults.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.errors import JobFailed
from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import FullMethod
from conf.records import Progress, TrainRecord, TrainSummary
from launch import cluster
from launch.placement import Machine
from launch.train_workers import run_training
from training.job import TrainJob, checkpoint_directory

pytestmark = pytest.mark.all_cores

CPU = Machine(devices=2, devices_per_node=2, device="cpu", name="2 x test")


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    """A private Ray with two CPUs, started as a run starts it."""
    before = dict(os.environ)
    cluster.start(CPU)
    yield
    cluster.stop()
    os.environ.clear()
    os.environ.update(before)


def make_job(model_dir: Path, root: Path, *, targets: int = 1) -> TrainJob:
    rows = [
        {"item_id": f"row-{n}", "input_ids": [5, 6, 7 + n, 8], "target_mask": [0, 0, 0, targets]}
        for n in range(6)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainJob(
        arm_name="full",
        method=FullMethod(),
        trainer=TrainerConfig(epochs=1, batch_size=2, num_points=1),
        zero=ZeroConfig(),
        model_dir=str(model_dir),
        base_model="tiny",
        base_model_sha256="",
        renderer_sha256="",
        prompt_sha256="",
        rows_path=str(root / "rows.jsonl"),
        output_dir=str(root / "points"),
        dtype="float32",
        device="cpu",
        threads=2,
        world_size=1,
        pad_id=0,
        usd_per_device_second=None,
    )


def attempt(job: TrainJob, root: Path) -> Iterator[Any]:
    return run_training(job, machine=CPU, log_dir=root / "logs", collective_timeout_seconds=300.0)


def test_records_come_one_by_one_and_the_checkpoint_is_there(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    job = make_job(tiny_model_dir, tmp_path)
    events: list[Any] = list(attempt(job, tmp_path))
    assert [e.step for e in events if isinstance(e, TrainRecord)] == [1, 2, 3]
    assert [e.note for e in events if isinstance(e, Progress)][0] == "loading"
    summary = events[-1]
    assert isinstance(summary, TrainSummary)
    assert (summary.examples, summary.world_size) == (6, 1)
    assert (checkpoint_directory(job.output_dir, "final") / "checkpoint.json").is_file()
    log = (tmp_path / "logs/0.log").read_text()
    assert "packed passes" in log and "3/3 steps: loss" in log


def test_a_refusal_in_the_worker_keeps_its_words(tiny_model_dir: Path, tmp_path: Path) -> None:
    job = make_job(tiny_model_dir, tmp_path, targets=0)
    with pytest.raises(JobFailed, match=r"rows\.jsonl:1.*(?s:.*)no target token"):
        list(attempt(job, tmp_path))
