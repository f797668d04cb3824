"""What a training will take, before it starts: steps, tokens, bytes by stage, operations, seconds.

Light: no torch. Sizes come from config.json, and where weights are here from their headers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.groups import TrainerConfig
from training.flops import PassShape, train_cost
from training.job import TrainJob
from training.memory import BYTES_PER_VALUE as BYTES_PER_VALUE
from training.memory import MemoryBytes, Settings, memory_of
from training.memory import trained_parameters as trained_parameters
from training.schedule import num_steps, steps_per_epoch
from training.shapes import ModelSize, Shapes, size_of
from training.zero import StageChoice, choose_stage

STAGES = (0, 1, 2, 3)


@dataclass(kw_only=True, slots=True, frozen=True)
class RowLengths:
    """What is known of training rows before they are rendered, in tokens.

    mean and longest: of a row. shared: leading tokens that all rows share. targets: mean per row.
    """

    mean: float
    longest: int
    shared: int
    targets: float


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainEstimate:
    """What a training takes.

    tokens: computed, a shared prefix once per pass. flops: needed, flops_spent: with what
    activation checkpointing computes again. memory: by ZeRO stage.
    """

    steps: int
    examples: int
    tokens: int
    trained_parameters: int | None
    flops: int
    flops_spent: int
    memory: Mapping[int, MemoryBytes]
    choice: StageChoice


def estimate(size: ModelSize, *, job: TrainJob, num_rows: int, rows: RowLengths) -> TrainEstimate:
    """What training on `num_rows` rows takes. The job's paths and hashes are not looked at."""
    trainer = job.trainer
    steps = num_steps(num_rows, trainer=trainer)
    examples = num_examples(num_rows, trainer=trainer)
    per_pass = max(1, min(job.max_rows, _rows_that_fit(rows, job=job)))
    passes = -(-examples // per_pass)
    shared = min(rows.shared, int(rows.mean))
    shape = _mean_pass(rows, shared=shared, num_rows=examples / passes)
    cost = train_cost(job.method, size=size)
    spent = train_cost(job.method, size=size, recomputes=trainer.activation_checkpointing)
    memory = memory_by_stage(
        size, job=job, tokens=job.tokens_per_pass(rows.longest), targets=per_pass * rows.targets
    )
    return TrainEstimate(
        steps=steps,
        examples=examples,
        tokens=round(shape.tokens * passes),
        trained_parameters=trained_parameters(job.method, size=size),
        flops=round(cost.flops(shape) * passes),
        flops_spent=round(spent.flops(shape) * passes),
        memory=memory,
        choice=choose_stage(
            job.zero,
            bytes_by_stage={stage: part.total for stage, part in memory.items()},
            device_memory_bytes=job.device_memory_bytes,
            world_size=job.world_size,
        ),
    )


def num_examples(num_rows: int, *, trainer: TrainerConfig) -> int:
    """Rows that all steps see; the last batch of an epoch may be smaller."""
    steps = num_steps(num_rows, trainer=trainer)
    per_epoch = steps_per_epoch(num_rows, batch_size=trainer.batch_size)
    epochs, rest = divmod(steps, per_epoch)
    return epochs * num_rows + min(num_rows, rest * trainer.batch_size)


def _rows_that_fit(rows: RowLengths, *, job: TrainJob) -> int:
    """Rows of the mean length that a packed pass holds."""
    rest = max(1.0, rows.mean - rows.shared)
    return int((job.tokens_per_pass(rows.longest) - rows.shared) / rest)


def _mean_pass(rows: RowLengths, *, shared: int, num_rows: float) -> PassShape:
    """A pass of rows that all have the mean length."""
    rest = rows.mean - shared
    own_pairs = rest * shared + rest * (rest + 1) / 2
    return PassShape(
        tokens=round(shared + num_rows * rest),
        pairs=round(shared * (shared + 1) / 2 + num_rows * own_pairs),
        targets=round(num_rows * rows.targets),
    )


def memory_by_stage(
    size: ModelSize, *, job: TrainJob, tokens: int, targets: float
) -> dict[int, MemoryBytes]:
    """Bytes per device under each ZeRO stage, of a pass with so many tokens and targets."""
    return {
        stage: memory_of(
            size,
            Settings(
                method=job.method,
                dtype=job.dtype,
                stage=stage,
                world_size=job.world_size,
                tokens=tokens,
                targets=round(targets),
                checkpointing=job.trainer.activation_checkpointing,
                is_masked=job.device == "cuda",
                offload=job.zero.offload and stage == 3,
                overlaps=job.device == "cuda",
            ),
        )
        for stage in STAGES
    }


def choose(job: TrainJob, *, longest_row: int, most_targets: int | None = None) -> StageChoice:
    """The ZeRO stage of a job whose model is here: the user's, or the smallest that fits.

    Args:
        job: what is trained, on devices of job.device_memory_bytes.
        longest_row: tokens of the longest row.
        most_targets: target tokens of the row that has most; None: all of its tokens.
    """
    most = longest_row if most_targets is None else most_targets
    memory = memory_by_stage(
        model_size(Path(job.model_dir)),
        job=job,
        tokens=job.tokens_per_pass(longest_row),
        targets=job.max_rows * most,
    )
    return choose_stage(
        job.zero,
        bytes_by_stage={stage: part.total for stage, part in memory.items()},
        device_memory_bytes=job.device_memory_bytes,
        world_size=job.world_size,
    )


def resolve_stage(job: TrainJob, *, longest_row: int) -> int:
    """The number of the stage that `choose` takes."""
    return choose(job, longest_row=longest_row).stage


def model_size(model_dir: Path) -> ModelSize:
    """Sizes of a local transformers directory, from config.json and safetensors headers."""
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    shapes: Shapes = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        shapes |= _header_shapes(path)
    return size_of(config, shapes or None)


def _header_shapes(path: Path) -> Shapes:
    """Tensor shapes of one safetensors file: 8 bytes of header length, then JSON."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: tuple(t["shape"]) for name, t in header.items() if name != "__metadata__"}
