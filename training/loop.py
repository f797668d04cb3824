"""Train one arm: the same loop for full fine-tuning and LoRA, one worker or many, CPU or GPU."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from conf.errors import ClusterError, JobFailed, MachineFailed
from conf.records import Progress, RenderedExample, TrainRecord, TrainSummary
from training import engine as engines
from training.agree import peers_named, text_from_rank_0
from training.checkpoint import directory_bytes, gathered_state, write_checkpoint
from training.data import num_targets, read_rows
from training.estimate import BYTES_PER_VALUE, choose
from training.job import (
    FINAL,
    Runtime,
    TrainJob,
    checkpoint_directory,
    point_name,
)
from training.packing import Layout
from training.passes import Passes
from training.probe import probe
from training.saver import STATE_BYTES, StateSaver, find_state, no_room, require_room
from training.schedule import learning_rate_at, num_steps, save_steps
from training.sharding import Step
from training.state import SavedState
from training.telemetry import Telemetry, peak_memory_bytes


@dataclass(kw_only=True, slots=True)
class _Totals:
    """What has been trained so far, over all workers."""

    examples: int = 0
    tokens: int = 0
    target_tokens: int = 0
    padding_tokens: int = 0
    probe_tokens: int = 0
    redone_tokens: int = 0  # in passes that ran out of memory


@dataclass(kw_only=True, slots=True, frozen=True)
class _Training:
    """What the steps of one training share."""

    job: TrainJob
    runtime: Runtime
    rows: tuple[RenderedExample, ...]
    total_steps: int
    until: int  # the step to end after, with the state saved; total_steps: a whole training
    totals: _Totals = field(default_factory=_Totals)

    def rows_of(self, part: Sequence[int]) -> list[RenderedExample]:
        """The rows with these indices."""
        return [self.rows[index] for index in part]


def train(
    job: TrainJob,
    runtime: Runtime,
    *,
    until: int | None = None,
    judge: Callable[[engines.Engine], None] | None = None,
) -> TrainSummary:
    """Train an arm to its final checkpoint; called by every worker with the same job.

    Args:
        job: the training.
        runtime: of this worker.
        until: end after this step, with the state saved for a call that goes on; None: train to
            the final checkpoint.
        judge: called on all workers with the model as it stands at the end.

    Goes on from the newest state below job.output_dir, on any number of workers, so that weights
    and records are those of a training that was never interrupted: exactly on CPU and as many
    workers, to rounding on another number. Steps of earlier attempts are not reported again. The
    states stay until training.state.remove_states is called, when the results are safe.

    torch.distributed must be initialised (gloo on CPU, nccl on GPU) with RANK, LOCAL_RANK,
    WORLD_SIZE and MASTER_* in the environment. Reports go out on global rank 0. Returns the same
    summary on all workers but for its device_seconds, which are this call's, loading and saving
    included.

    Raises:
        DataError: rows that cannot be trained on, before anything is loaded.
        ConfigError, ModelError: a model or LoRA targets that do not fit.
        JobFailed: a loss or gradient norm that is not finite; no memory for one row; states of
            which none is whole. The states saved before stay.
        MachineFailed: no room for a checkpoint.
        TrainingStopped: the runtime asked for it; the state is saved.
        WorkerLost: another worker died or hangs: start all of them again.
    """
    assert dist.is_initialized(), "initialise torch.distributed before training"
    assert runtime.world_size == job.world_size == dist.get_world_size()
    started = time.perf_counter()
    torch.set_num_threads(job.threads)
    rows = read_rows(Path(job.rows_path))
    total_steps = num_steps(len(rows), trainer=job.trainer)
    training = _Training(
        job=job,
        runtime=runtime,
        rows=rows,
        total_steps=total_steps,
        until=total_steps if until is None else until,
    )
    _note(training, "loading")
    choice = choose(
        job,
        longest_row=max(len(row.input_ids) for row in rows),
        most_targets=max(num_targets(row) for row in rows),
    )
    stage = choice.stage
    saved = _newest_state(training)
    with engines.started(job, stage=stage, local_rank=runtime.local_rank, saved=saved) as engine:
        layout = engine.trainee.layout
        passes = "packed" if layout.is_packed else "padded"
        loss = engine.trainee.loss.choice
        _note(
            training,
            f"ZeRO {choice.reason}; "
            f"{passes} passes ({layout.reason}); linear: {engine.trainee.linear}; "
            f"loss: {loss.impl} ({loss.reason})",
        )
        _run_steps(training, engine, saved=saved)
        if judge is not None:
            judge(engine)
        dist.barrier()  # nobody returns before the final checkpoint is there
        return _summary(training, engine, stage=stage, seconds=time.perf_counter() - started)


def _newest_state(training: _Training) -> SavedState | None:
    """The state to go on from, on all workers; the totals become its totals."""
    runtime = training.runtime
    saved = find_state(
        training.job,
        runtime=runtime,
        device=f"cuda:{runtime.local_rank}" if training.job.device == "cuda" else "cpu",
        note=lambda text: _note(training, text),
    )
    if saved is not None:
        for name, value in saved.totals.items():
            setattr(training.totals, name, value)
        _note(training, f"resumed at step {saved.step}", done=saved.step)
    return saved


def _run_steps(training: _Training, engine: engines.Engine, *, saved: SavedState | None) -> None:
    job, last = training.job, training.total_steps
    points = save_steps(last, num_points=job.trainer.num_points)
    done = 0 if saved is None else saved.step
    _require_room(training, engine, points=sum(point > done for point in points))

    def note(text: str) -> None:
        _note(training, text, done=done)

    passes = Passes(job=job, runtime=training.runtime, rows=training.rows, engine=engine, note=note)
    telemetry = Telemetry(job, rows=training.rows, device=engine.device)
    saver = StateSaver(job=job, runtime=training.runtime, engine=engine, note=note, resumed=saved)
    for step in passes.steps(first=done + 1, last=last):
        with peers_named(
            f"step {step.step}",
            global_rank=training.runtime.global_rank,
            world_size=job.world_size,
        ):
            record = _take_step(
                step, training=training, engine=engine, passes=passes, telemetry=telemetry
            )
            done = step.step
            _report(training, record)
            _note(training, f"loss {record.loss:.3f}", done=done)
            if done in points:
                _save(done, training=training, engine=engine)
            if done < last:
                totals = dataclasses.asdict(training.totals)
                is_end = done == training.until
                saver.after(done, totals=totals, is_point=done in points, is_end=is_end)
        if done == training.until:
            break


def _require_room(training: _Training, engine: engines.Engine, *, points: int) -> None:
    """Refuse on all workers what the disk cannot hold; rank 0 looks."""
    job, trainee = training.job, engine.trainee
    is_whole = trainee.saved_names is None
    parameters = trainee.total_parameters if is_whole else trainee.trained_parameters
    failure = ""
    if training.runtime.global_rank == 0:
        try:
            remark = require_room(
                job,
                trainee_bytes=parameters * BYTES_PER_VALUE[job.dtype],
                state_bytes=STATE_BYTES * trainee.trained_parameters,
                points=points,
            )
        except ClusterError as error:
            failure = str(error)
        else:
            if remark:
                _note(training, remark)
    failure = text_from_rank_0(failure, device=engine.device)
    if failure:
        raise MachineFailed(failure)


def _take_step(
    step: Step,
    *,
    training: _Training,
    engine: engines.Engine,
    passes: Passes,
    telemetry: Telemetry,
) -> TrainRecord:
    """One optimizer step over all workers, and its record."""
    started = time.perf_counter()
    job = training.job
    items = [training.rows[row].item_id for row in step.rows]
    target_tokens = sum(num_targets(training.rows[row]) for row in step.rows)
    redone_before = passes.redone_tokens
    step, loss = passes.backward(step, target_tokens=target_tokens)
    training.totals.redone_tokens += passes.redone_tokens - redone_before
    _require_finite(loss, "loss", step=step.step, items=items)
    rate = learning_rate_at(
        step.step, total_steps=training.total_steps, peak=job.learning_rate, trainer=job.trainer
    )
    grad_norm = engine.step(learning_rate=rate)
    if grad_norm is not None:
        _require_finite(grad_norm, "gradient norm", step=step.step, items=items)
    tokens = _count(step, training=training, layout=passes.layout)
    training.totals.target_tokens += target_tokens
    flops = telemetry.flops(step, layout=passes.layout)
    memory = telemetry.peak_memory_bytes()
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
        flops=flops,
        flops_share=telemetry.share_of_peak(flops, seconds=seconds),
        peak_memory_bytes=memory,
    )


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
    probed = probe(training.rows, engine=engine, layout=engine.trainee.layout, pad_id=job.pad_id)
    probe_rows = sum(len(item.prompt_ids) + len(item.target_ids) for item in probed)
    training.totals.probe_tokens += probe_rows * job.world_size
    state = gathered_state(model, names=engine.trainee.saved_names, keep=is_writer)
    directory = checkpoint_directory(
        job.output_dir, point_name(step, total_steps=training.total_steps)
    )
    failure = ""
    if is_writer:
        try:
            write_checkpoint(
                directory,
                job=job,
                model=model,
                state=state,
                step=step,
                tokens=training.totals.tokens,
                trained_parameters=engine.trainee.trained_parameters,
                probe=probed,
            )
        except (OSError, SafetensorError) as error:
            needed = sum(tensor.nbytes for tensor in state.values())
            failure = f"checkpoint of step {step} not saved: {no_room(directory, needed, error)}"
    failure = text_from_rank_0(failure, device=engine.device)
    if failure:
        raise MachineFailed(f"{failure}; the same command goes on from the newest state")


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
    is_written = training.runtime.global_rank == 0 and training.until == training.total_steps
    written = directory_bytes(final) if is_written else 0
    return TrainSummary(
        arm=job.arm_name,
        steps=training.until,
        trained_parameters=engine.trainee.trained_parameters,
        total_parameters=engine.trainee.total_parameters,
        checkpoint_bytes=_largest(written, device=engine.device),
        device_seconds=seconds * job.devices,
        peak_memory_bytes=_largest(peak_memory_bytes(engine.device), device=engine.device),
        examples=totals.examples,
        tokens=totals.tokens,
        target_tokens=totals.target_tokens,
        padding_tokens=totals.padding_tokens,
        probe_tokens=totals.probe_tokens,
        redone_tokens=totals.redone_tokens,
        num_truncated=job.num_truncated,
        learning_rate=job.learning_rate,
        world_size=job.world_size,
        zero_stage=stage,
        shown_row=job.shown_row,
    )


def _largest(value: int, *, device: str) -> int:
    """The largest of all workers' values."""
    largest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
