"""Our side of the training benchmarks: the loop's own steps on one worker, without files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.choices import Schedule, ZeroStage
from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import FullMethod, LoraMethod
from conf.records import RenderedExample
from tests.benchmarks.training_data import BATCH
from training import engine as engines
from training import loop
from training.data import make_batch, num_targets
from training.job import TrainJob
from training.passes import Passes
from training.telemetry import Telemetry


@dataclass(kw_only=True, slots=True)
class Quiet:
    """A Runtime of one worker that tells nobody."""

    global_rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    def report(self, record: Any) -> None:
        """Nothing."""

    def should_save(self) -> bool:
        """Never."""
        return False


@dataclass(kw_only=True, slots=True)
class Ours:
    """A started engine that takes the loop's steps on rows of any round."""

    job: TrainJob
    engine: engines.Engine
    losses: list[float] = field(default_factory=list)

    def seconds(self, rows: Sequence[RenderedExample]) -> float:
        """Wall seconds of one step per batch of 8 rows, but for the first step, which warms up."""
        total_steps = len(rows) // BATCH
        training = loop._Training(
            job=self.job, runtime=Quiet(), rows=tuple(rows), total_steps=total_steps
        )
        passes = Passes(
            job=self.job, runtime=Quiet(), rows=rows, engine=self.engine, note=lambda text: None
        )
        telemetry = Telemetry(self.job, rows=rows, device=self.engine.device)
        started = 0.0
        for step in passes.steps(first=1, last=total_steps):
            record = loop._take_step(
                step, training=training, engine=self.engine, passes=passes, telemetry=telemetry
            )
            self.losses.append(record.loss)
            started = started or time.perf_counter()
        return time.perf_counter() - started

    def timed_rows(self, rows: Sequence[RenderedExample]) -> list[RenderedExample]:
        """The rows that `seconds` has in its clock."""
        passes = Passes(
            job=self.job, runtime=Quiet(), rows=rows, engine=self.engine, note=lambda text: None
        )
        steps = passes.steps(first=2, last=len(rows) // BATCH)
        return [rows[index] for step in steps if step.step > 1 for index in step.rows]

    def loss_and_norm(self, rows: Sequence[RenderedExample]) -> tuple[float, float]:
        """Mean loss of one batch and the norm of its gradients; the weights stay."""
        layout = self.engine.trainee.layout
        targets = sum(map(num_targets, rows))
        batch = make_batch(rows, layout=layout, pad_id=self.job.pad_id)
        total = self.engine.run_pass(batch, scale=1 / targets, is_last=True)
        trained = [p for p in self.engine.trainee.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        self.engine.forget_gradients()
        return float(total) / targets, float(norm)


@contextmanager
def ours(
    model_dir: Path,
    *,
    kind: str,
    threads: int,
    output_dir: Path,
    trainer: TrainerConfig | None = None,
) -> Iterator[Ours]:
    """Our training of one kind (lora with rank 16, or full) on one worker and ZeRO-0.

    trainer: None is the default rate, without warm-up and decay.
    """
    constant = TrainerConfig(batch_size=BATCH, schedule=Schedule.constant, warmup_fraction=0.0)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed looks for them
    os.environ |= place
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    job = TrainJob(
        arm_name=kind,
        method=LoraMethod() if kind == "lora" else FullMethod(),
        trainer=trainer or constant,
        zero=ZeroConfig(stage=ZeroStage.zero0),
        model_dir=str(model_dir),
        base_model="",
        base_model_sha256="",
        renderer_sha256="",
        prompt_sha256="",
        rows_path="",
        output_dir=str(output_dir),
        dtype="float32",
        device="cpu",
        threads=threads,
        world_size=1,
        pad_id=0,
        usd_per_device_second=None,
    )
    with engines.started(job, stage=0, local_rank=0) as engine:
        for name in place:  # or the peer would wrap its model for several processes
            del os.environ[name]
        yield Ours(job=job, engine=engine)
