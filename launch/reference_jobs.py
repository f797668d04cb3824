"""What the jobs of reference arms do, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.records import LedgerLine
from conf.resolve import Arm
from conf.row_meter import METER
from evaluation.answering.linear_probe import FEATURES_FILE
from evaluation.tasks import Task
from launch.logs.worker_log import logged
from launch.placement import Machine, dtype_name
from launch.planned import Job
from launch.workers import run_reference


@dataclass(kw_only=True, slots=True, frozen=True)
class ReferenceWork:
    """What a process needs.

    model_dir: a transformers directory; None where the arm has no model. features: the directory of
    the features job, which leaves its file there; None where there is none.
    """

    job: Job
    arm: Arm
    task: Task
    model_dir: Path | None
    machine: Machine
    plugins: tuple[str, ...]
    usd_per_device_second: float | None
    features: Path | None
    log_path: Path
    rows_dir: Path  # where rows are announced, see conf/row_meter.py


def reference_events(work: ReferenceWork) -> Iterator[Any]:
    """The records of a job of a reference arm."""
    import ray

    is_forward = work.job.kind == "features"
    threads = work.job.devices if is_forward and work.machine.device == "cpu" else 1
    is_gpu = is_forward and work.machine.device != "cpu"
    remote = ray.remote(_run).options(
        num_cpus=threads,
        num_gpus=1 if is_gpu else 0,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    )
    yield from ray.get(remote.remote(work))


def _run(work: ReferenceWork) -> list[Any]:
    if work.features is None:
        return run_reference(work.job.id, work.arm, work.task, work.plugins, work.log_path)
    from evaluation.plugins import load_plugins

    run: Callable[[ReferenceWork, Path], list[Any]]
    run = _features if work.job.kind == "features" else _fitted
    with logged(work.log_path):
        METER.count_into(work.rows_dir)
        load_plugins(list(work.plugins))
        return run(work, work.features / FEATURES_FILE)


def _features(work: ReferenceWork, path: Path) -> list[Any]:
    import torch

    from evaluation.answering.linear_probe import compute_features
    from evaluation.engines.loading import load_model
    from evaluation.prompts.rendering import Renderer

    arm, device, model_dir = work.arm, work.machine.device, work.model_dir
    assert model_dir is not None, "a probe has a model"
    if device == "cpu":
        torch.set_num_threads(work.job.devices)
    layout, max_length = arm.model.layout, arm.model.max_length
    before = METER.rows
    model = load_model(model_dir, dtype=dtype_name(arm, device), device=device)
    loading = LedgerLine(
        job=work.job.id, arm=arm.name, purpose="padding", tokens=METER.rows - before
    )
    events = compute_features(
        work.job.id,
        arm,
        task=work.task,
        model=model,
        renderer=Renderer.load(model_dir, layout=layout, max_length=max_length),
        devices=work.job.devices,
        usd_per_device_second=work.usd_per_device_second,
        path=path,
    )
    return [loading, *events]


def _fitted(work: ReferenceWork, path: Path) -> list[Any]:
    from evaluation.answering.linear_probe import linear_probe

    return list(linear_probe(work.job.id, work.arm, task=work.task, features=path))
