"""Train one arm: the same loop for full fine-tuning and LoRA, one worker or many, CPU or GPU."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from conf.errors import JobFailed
from conf.records import Progress, RenderedExample, TrainRecord, TrainSummary
from training import engine as engines
from training.checkpoint import directory_bytes, gathered_state, write_checkpoint
from training.data import make_batch, num_targets, read_rows
from training.estimate import resolve_stage
from training.job import FINAL, Runtime, TrainJob, checkpoint_directory, point_name
from training.packing import Layout
from training.schedule import learning_rate_at, num_steps, save_steps
from training.sharding import Step, plan_steps


@dataclass(kw_only=True, slots=True)
class _Totals:
    """What has been trained so far, over all workers."""

    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    padding_tokens: int = 0


@dataclass(kw_only=True, slots=True, frozen=True)
class _Training:
    """What the steps of one training share."""

    job: TrainJob
    runtime: Runtime
    rows: tuple[RenderedExample, ...]
    total_steps: int
    totals: _Totals = field(default_factory=_Totals)

    def rows_of(self, part: Sequence[int]) -> list[RenderedExample]:
        """The rows with these indices."""
        return [self.rows[index] for index in part]


def train(job: TrainJob, runtime: Runtime) -> TrainSummary:
    """Train an arm to its final checkpoint; called by every worker with the same job.

    torch.distributed must be initialised (gloo on CPU, nccl on GPU) with RANK, LOCAL_RANK,
    WORLD_SIZE and MASTER_* in the environment. Reports go out on global rank 0. Returns the same
    summary on all workers but for its device_seconds, which are this call's, loading and saving
    included.

    Raises:
        DataError: rows that cannot be trained on, before anything is loaded.
        ConfigError, ModelError: a model or LoRA targets that do not fit.
        JobFailed: a loss or gradient norm that is not finite; nothing is saved as final.
    """
    assert dist.is_initialized(), "initialise torch.distributed before training"
    assert runtime.world_size == job.world_size == dist.get_world_size()
    started = time.perf_counter()
    torch.set_num_threads(job.threads)
    rows = read_rows(Path(job.rows_path))
    training = _Training(
        job=job,
        runtime=runtime,
        rows=rows,
        total_steps=num_steps(len(rows), trainer=job.trainer),
    )
    _note(training, "loading")
    stage = resolve_stage(job, longest_row=max(len(row.input_ids) for row in rows))
    with engines.started(job, stage=stage, local_rank=runtime.local_rank) as engine:
        # Dropout differs between workers; the weights were drawn before, equal on all.
        torch.manual_seed(job.trainer.seed + 1 + runtime.global_rank)
        layout = engine.trainee.layout
        passes = "packed" if layout.is_packed else "padded"
        _note(training, f"{passes} passes ({layout.reason}); linear: {engine.trainee.linear}")
        _run_steps(training, engine)
        dist.barrier()  # nobody returns before the final checkpoint is there
        return _summary(training, engine, stage=stage, seconds=time.perf_counter() - started)


def _run_steps(training: _Training, engine: engines.Engine) -> None:
    job = training.job
    points = save_steps(training.total_steps, num_points=job.trainer.num_points)
    layout = engine.trainee.layout
    plan = plan_steps(
        [len(row.input_ids) for row in training.rows],
        batch_size=job.trainer.batch_size,
        fits=lambda part: layout.fits(training.rows_of(part)),
        world_size=job.world_size,
        seed=job.trainer.seed,
        total_steps=training.total_steps,
    )
    for step in plan:
        record = _take_step(step, training=training, engine=engine)
        _report(training, record)
        _note(training, f"loss {record.loss:.3f}", done=step.step)
        if step.step in points:
            _save(step.step, training=training, engine=engine)


def _take_step(step: Step, *, training: _Training, engine: engines.Engine) -> TrainRecord:
    """One optimizer step over all workers, and its record."""
    started = time.perf_counter()
    job = training.job
    items = [training.rows[row].item_id for row in step.rows]
    target_tokens = sum(num_targets(training.rows[row]) for row in step.rows)
    loss = _backward(step, training=training, engine=engine, target_tokens=target_tokens)
    _require_finite(loss, "loss", step=step.step, items=items)
    rate = learning_rate_at(
        step.step, total_steps=training.total_steps, peak=job.learning_rate, trainer=job.trainer
    )
    grad_norm = engine.step(learning_rate=rate)
    if grad_norm is not None:
        _require_finite(grad_norm, "gradient norm", step=step.step, items=items)
    tokens = _count(step, training=training, layout=engine.trainee.layout)
    training.totals.target_tokens += target_tokens
    seconds = time.perf_counter() - started
    price = job.usd_per_device_second
    return TrainRecord(
        arm=job.arm_name,
        step=step.step,
        examples=len(step.rows),
        tokens=tokens,
        target_tokens=target_tokens,
        loss=loss,
        learning_rate=rate,
        grad_norm=grad_norm,
        step_seconds=seconds,
        device_seconds=seconds * job.devices,
        usd=None if price is None else seconds * job.devices * price,
        train_seed=job.trainer.seed,
        trial=job.trial,
        num_labels=job.num_labels,
    )


def _backward(
    step: Step, *, training: _Training, engine: engines.Engine, target_tokens: int
) -> float:
    """All passes of a step on all workers; the mean loss over the global batch's targets."""
    job = training.job
    # DeepSpeed averages gradients over workers; the loss is a sum over the global batch's targets.
    scale = job.world_size / target_tokens
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    passes = step.shares[training.runtime.global_rank]
    for number, share in enumerate(passes, start=1):
        rows = training.rows_of(share)
        batch = make_batch(rows, layout=engine.trainee.layout, pad_id=job.pad_id).to(engine.device)
        total += engine.run_pass(batch, scale=scale, is_last=number == len(passes))
    dist.all_reduce(total)
    return float(total) / target_tokens


def _count(step: Step, *, training: _Training, layout: Layout) -> int:
    """Add a step to the totals; its computed tokens without padding, over all workers."""
    passes = [training.rows_of(part) for share in step.shares for part in share]
    tokens = sum(layout.num_tokens(rows) for rows in passes)
    totals = training.totals
    totals.examples += len(step.rows)
    totals.tokens += tokens
    totals.padding_tokens += sum(layout.num_padding(rows) for rows in passes)
    return tokens


def _require_finite(value: float, name: str, *, step: int, items: Sequence[str]) -> None:
    """Stop all workers: the value is the same on each, so none is left waiting."""
    if not math.isfinite(value):
        raise JobFailed(
            f"step {step}: the {name} is {value}, on items {', '.join(items)}; "
            "no final checkpoint was saved. Try a smaller trainer.learning_rate, and look at "
            "these items."
        )


def _save(step: int, *, training: _Training, engine: engines.Engine) -> None:
    job = training.job
    is_writer = training.runtime.global_rank == 0
    model = engine.trainee.model
    state = gathered_state(model, trainable_only=job.method.kind == "lora", keep=is_writer)
    if not is_writer:
        return
    name = point_name(step, total_steps=training.total_steps)
    write_checkpoint(
        checkpoint_directory(job.output_dir, name),
        job=job,
        model=model,
        state=state,
        step=step,
        tokens=training.totals.tokens,
        trained_parameters=engine.trainee.trained_parameters,
    )


def _note(training: _Training, note: str, *, done: int = 0) -> None:
    total = training.total_steps
    _report(training, Progress(done=done, total=total, unit="steps", note=note))


def _report(training: _Training, record: TrainRecord | Progress) -> None:
    if training.runtime.global_rank == 0:
        training.runtime.report(record)


def _summary(
    training: _Training, engine: engines.Engine, *, stage: int, seconds: float
) -> TrainSummary:
    job, totals = training.job, training.totals
    final = checkpoint_directory(job.output_dir, FINAL)
    written = directory_bytes(final) if training.runtime.global_rank == 0 else 0
    return TrainSummary(
        arm=job.arm_name,
        steps=training.total_steps,
        trained_parameters=engine.trainee.trained_parameters,
        total_parameters=engine.trainee.total_parameters,
        checkpoint_bytes=_largest(written, device=engine.device),
        device_seconds=seconds * job.devices,
        peak_memory_bytes=_largest(_peak_memory_bytes(engine.device), device=engine.device),
        examples=totals.examples,
        tokens=totals.tokens,
        target_tokens=totals.target_tokens,
        padding_tokens=totals.padding_tokens,
        num_truncated=job.num_truncated,
        learning_rate=job.learning_rate,
        world_size=job.world_size,
        zero_stage=stage,
        shown_row=job.shown_row,
    )


def _peak_memory_bytes(device: str) -> int:
    """This worker's peak: resident memory of the process, or allocated on its GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _largest(value: int, *, device: str) -> int:
    """The largest of all workers' values."""
    largest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
