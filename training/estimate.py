"""What a training will take, before it starts: parameters, tokens, steps, bytes, seconds.

Light: no torch. Sizes come from config.json and the headers of safetensors files.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.choices import ZeroStage
from conf.groups import TrainerConfig
from conf.methods import FullMethod, LoraMethod
from training.job import TrainJob
from training.schedule import num_steps, steps_per_epoch
from training.zero import choose_stage

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}
ADAM_BYTES = 8  # two fp32 moments per trained parameter
# Values kept per token, layer and unit of hidden width until the backward pass: the inputs of the
# norms, projections, attention and gate (Korthikanti et al. 2022, arXiv 2205.05198, count 34 bytes
# in 16 bits for a plain block; gated blocks keep more). Checkpointing keeps the block's input only.
VALUES_PER_TOKEN_LAYER = 24


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelSize:
    """Sizes of a model. linear_shapes: path of a linear layer, not the head -> (out, in)."""

    num_parameters: int
    num_layers: int
    hidden: int
    vocabulary: int
    linear_shapes: Mapping[str, tuple[int, int]]


@dataclass(kw_only=True, slots=True, frozen=True)
class MemoryBytes:
    """Bytes on one device, by what holds them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainEstimate:
    """What a training takes. tokens: without padding. seconds: None without a known rate."""

    steps: int
    examples: int
    tokens: int
    trained_parameters: int
    zero_stage: int
    memory: MemoryBytes
    seconds: float | None


def trained_parameters(method: FullMethod | LoraMethod, *, size: ModelSize) -> int:
    """Parameters that train: all, or rank x (inputs + outputs) of every adapted layer."""
    if isinstance(method, FullMethod):
        return size.num_parameters
    wanted = method.target_modules
    return sum(
        method.lora_rank * (outputs + inputs)
        for path, (outputs, inputs) in size.linear_shapes.items()
        if not wanted or any(path == name or path.endswith(f".{name}") for name in wanted)
    )


def memory_bytes(
    size: ModelSize,
    *,
    trained: int,
    is_lora: bool,
    tokens_per_pass: int,
    dtype: str,
    stage: int,
    world_size: int,
    activation_checkpointing: bool,
) -> MemoryBytes:
    """Bytes per device under a ZeRO stage: each stage shards one part more over the workers.

    bf16 training keeps an fp32 copy of what it trains beside the optimizer's moments.
    """
    value = BYTES_PER_VALUE[dtype]
    master = 4 if dtype != "float32" else 0
    total_parameters = size.num_parameters + (trained if is_lora else 0)
    shard = {part: world_size if stage >= part else 1 for part in (1, 2, 3)}
    width = 1 if activation_checkpointing else VALUES_PER_TOKEN_LAYER
    per_token = size.num_layers * size.hidden * width
    if activation_checkpointing:
        per_token += size.hidden * VALUES_PER_TOKEN_LAYER  # the block being recomputed
    return MemoryBytes(
        weights=math.ceil(total_parameters * value / shard[3]),
        gradients=math.ceil(trained * value / shard[2]),
        optimizer=math.ceil(trained * (ADAM_BYTES + master) / shard[1]),
        activations=tokens_per_pass * per_token * value,
    )


def estimate(
    size: ModelSize,
    *,
    method: FullMethod | LoraMethod,
    trainer: TrainerConfig,
    row_lengths: Sequence[int],
    dtype: str,
    stage: int,
    world_size: int,
    rows_per_pass: int,
    tokens_per_second: float | None = None,
) -> TrainEstimate:
    """Everything the plan shows for one training; tokens_per_second: of all workers together."""
    steps = num_steps(len(row_lengths), trainer=trainer)
    per_epoch = steps_per_epoch(len(row_lengths), batch_size=trainer.batch_size)
    epochs, rest = divmod(steps, per_epoch)
    examples = epochs * len(row_lengths) + rest * trainer.batch_size
    tokens = round(examples * sum(row_lengths) / len(row_lengths))
    trained = trained_parameters(method, size=size)
    return TrainEstimate(
        steps=steps,
        examples=examples,
        tokens=tokens,
        trained_parameters=trained,
        zero_stage=stage,
        memory=memory_bytes(
            size,
            trained=trained,
            is_lora=isinstance(method, LoraMethod),
            tokens_per_pass=rows_per_pass * max(row_lengths),
            dtype=dtype,
            stage=stage,
            world_size=world_size,
            activation_checkpointing=trainer.activation_checkpointing,
        ),
        seconds=None if tokens_per_second is None else tokens / tokens_per_second,
    )


def resolve_stage(job: TrainJob, *, longest_row: int) -> int:
    """The ZeRO stage of a job: the user's, or the smallest that fits this machine's devices."""
    if job.zero.stage is not ZeroStage.auto:
        return int(job.zero.stage.value)
    size = model_size(Path(job.model_dir))
    by_stage = {
        stage: memory_bytes(
            size,
            trained=trained_parameters(job.method, size=size),
            is_lora=isinstance(job.method, LoraMethod),
            tokens_per_pass=job.tokens_per_pass(longest_row),
            dtype=job.dtype,
            stage=stage,
            world_size=job.world_size,
            activation_checkpointing=job.trainer.activation_checkpointing,
        ).total
        for stage in (0, 1, 2, 3)
    }
    return choose_stage(
        job.zero,
        bytes_by_stage=by_stage,
        device_memory_bytes=job.device_memory_bytes,
        world_size=job.world_size,
    )


def model_size(model_dir: Path) -> ModelSize:
    """Sizes of a local transformers directory, from config.json and safetensors headers."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        shapes |= _header_shapes(path)
    return ModelSize(
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        num_layers=int(config.get("num_hidden_layers") or config["n_layer"]),
        hidden=int(config.get("hidden_size") or config["n_embd"]),
        vocabulary=int(config["vocab_size"]),
        linear_shapes={
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2 and not _is_vocabulary_layer(name)
        },
    )


def _header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes of one safetensors file: 8 bytes of header length, then JSON."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: tuple(t["shape"]) for name, t in header.items() if name != "__metadata__"}


def _is_vocabulary_layer(name: str) -> bool:
    """Whether a 2-D weight is an embedding or the head, by the names transformers gives them."""
    return any(word in name for word in ("embed", "lm_head", "wte", "wpe", "embd"))
