"""The plan of one training: stage, bytes, steps, operations; what cannot fit is refused (light)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import ConfigError
from conf.groups import ModelConfig
from conf.hashing import plain
from conf.methods import FullMethod, LoraMethod, PeftMethod
from conf.resolve import Arm
from evaluation.models import ModelPlace
from launch.placement import Machine, model_dtype, threads_of
from launch.planned import TrainingPlan

if TYPE_CHECKING:
    from training.estimate import RowLengths, TrainEstimate
    from training.job import TrainJob
    from training.shapes import ModelSize

FACTS = Path(__file__).resolve().parent.parent / "conf" / "facts"


def model_sizes(model: ModelConfig, place: ModelPlace) -> ModelSize | None:
    """A model's sizes from its directory, or where it is not here from conf/facts; else None.

    Raises:
        ConfigError: model.facts names no file.
        ModelError: a family whose sizes cannot be worked out without its weights.
    """
    from training.estimate import model_size
    from training.shapes import size_of

    if place.kind == "ready":
        return model_size(place.path)
    if model.facts is None:
        return None
    path = FACTS / f"{model.facts}.json"
    if not path.is_file():
        raise ConfigError(
            "model.facts",
            found=model.facts,
            expected=f"one of {', '.join(sorted(p.stem for p in FACTS.glob('*.json')))}, or null",
            remedy="leave it out; a model that is here is read from its own files",
        )
    return size_of(json.loads(path.read_text(encoding="utf-8"))["config"])


def training_job(
    arm: Arm, *, machine: Machine, workers: int, device_memory_bytes: int | None, model_dir: str
) -> TrainJob:
    """The job that would train an arm, as far as its sizes are concerned."""
    from training.job import TrainJob

    method = arm.training
    assert isinstance(method, (FullMethod, LoraMethod, PeftMethod))
    return TrainJob(
        arm_name=arm.name,
        method=method,
        trainer=arm.trainer,
        zero=arm.zero,
        model_dir=model_dir,
        base_model="",
        base_model_sha256="",
        renderer_sha256="",
        prompt_sha256="",
        rows_path="",
        output_dir="",
        dtype=model_dtype(arm.model, machine.device),
        device=machine.device,
        threads=threads_of(workers, machine),
        world_size=workers,
        pad_id=0,
        usd_per_device_second=None,
        device_memory_bytes=device_memory_bytes,
    )


def plan_training(
    size: ModelSize, job: TrainJob, *, num_rows: int, rows: RowLengths
) -> tuple[TrainingPlan, TrainEstimate]:
    """What a training takes, and the plan to show.

    Raises:
        ConfigError: it does not fit the devices.
    """
    from training.estimate import estimate

    found = estimate(size, job=job, num_rows=num_rows, rows=rows)
    memory = found.memory[found.choice.stage]
    if not found.choice.fits:
        raise _does_not_fit(size, job, found, num_rows=num_rows, rows=rows)
    parts = {name: n for name, n in plain(memory).items() if name not in ("host", "update")}
    plan = TrainingPlan(
        workers=job.world_size,
        steps=found.steps,
        examples=found.examples,
        trained_parameters=found.trained_parameters,
        zero_stage=found.choice.stage,
        zero_reason=found.choice.reason,
        memory=parts | {"total": memory.total},
        host_bytes=memory.host,
    )
    return plan, found


def _does_not_fit(
    size: ModelSize, job: TrainJob, found: TrainEstimate, *, num_rows: int, rows: RowLengths
) -> ConfigError:
    """The refusal, with the changes that would make it fit, each tried."""
    from training.estimate import estimate
    from training.zero import gigabytes

    helps = []
    for text, other in _alternatives(job):
        tried = estimate(size, job=other, num_rows=num_rows, rows=rows)
        if tried.choice.fits:
            needed = tried.memory[tried.choice.stage].total
            helps.append(f"{text} ({gigabytes(needed)})")
    parts = plain(found.memory[found.choice.stage])
    largest = sorted(parts.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {gigabytes(n)}" for name, n in largest[:4] if n)
    return ConfigError(
        f"arms.{job.arm_name}",
        found=f"{found.choice.reason} ({shown})",
        expected=f"at most {gigabytes(job.device_memory_bytes or 0)} on each device",
        remedy=f"any of: {'; '.join(helps)}" if helps else "a smaller model, or more devices",
    )


def _alternatives(job: TrainJob) -> list[tuple[str, TrainJob]]:
    """Changes that may help, by what to write."""
    from conf.choices import ZeroStage
    from conf.groups import ZeroConfig

    trainer = job.trainer
    checkpointed = dataclasses.replace(trainer, activation_checkpointing=True)
    one_row = dataclasses.replace(checkpointed, micro_batch_size=1)
    offload = ZeroConfig(stage=ZeroStage.zero3, offload=True)
    found = [
        ("zero.stage=auto", dataclasses.replace(job, zero=ZeroConfig())),
        ("trainer.activation_checkpointing=true", dataclasses.replace(job, trainer=checkpointed)),
        (
            "trainer.activation_checkpointing=true trainer.micro_batch_size=1",
            dataclasses.replace(job, trainer=one_row),
        ),
        ("zero=3_offload", dataclasses.replace(job, zero=offload)),
        (
            "zero=3_offload trainer.activation_checkpointing=true trainer.micro_batch_size=1",
            dataclasses.replace(job, zero=offload, trainer=one_row),
        ),
    ]
    if isinstance(job.method, FullMethod):
        lora = dataclasses.replace(job, method=LoraMethod())
        found.append((f"method@arms.{job.arm_name}=lora", lora))
    for factor in (2, 4, 8, 16):
        size = job.world_size * factor
        batch = dataclasses.replace(trainer, batch_size=max(trainer.batch_size, size))
        more = dataclasses.replace(job, world_size=size, zero=ZeroConfig(), trainer=batch)
        found.append((f"{size} devices instead of {job.world_size}", more))
    return found
