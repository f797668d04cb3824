"""What a training holds on one device, by part and ZeRO stage, counted from shapes (pure).

Sharded state is what DeepSpeed 0.19 was seen to keep, tensor by tensor, on 1 and 2 workers.
Activations are what autograd was seen to save of a Llama-like block; tests compare both with the
tensors themselves. What is not counted: libraries, the allocator's gaps, other processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from conf.methods import FullMethod, LoraMethod, PeftMethod
from training.shapes import ModelSize
from training.zero import BUCKET_ELEMENTS, LIVE_ELEMENTS

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}
ADAM_BYTES = 8  # two fp32 moments per trained parameter
FP32_BYTES = 4
PEFT_RANK = 8  # of LoRA, which stands for a peft method whose size is known only when it is built
# What the loss of target rows holds for a moment, see kernels/linear_cross_entropy.py: a tile of
# logits, and where the head trains the exponentials of a block of rows.
LOSS_TILE_BYTES = 16 * 2**20
LOSS_KEPT_BYTES = 64 * 2**20


@dataclass(kw_only=True, slots=True, frozen=True)
class Settings:
    """What besides the model decides on memory.

    tokens, targets: of the largest pass, padding included. is_masked: packed passes attend under a
    T x T mask (on a GPU). offload: parameters and optimizer lie outside the device.
    """

    method: FullMethod | LoraMethod | PeftMethod
    dtype: str
    stage: int
    world_size: int
    tokens: int
    targets: int
    checkpointing: bool = False
    is_masked: bool = False
    offload: bool = False
    overlaps: bool = False

    @property
    def is_full(self) -> bool:
        """Whether all parameters train."""
        return isinstance(self.method, FullMethod)


@dataclass(kw_only=True, slots=True, frozen=True)
class MemoryBytes:
    """Bytes on one device, by what holds them.

    optimizer: moments, and the fp32 copy of what trains. buffers: of reductions, and layers that
    ZeRO-3 gathered. update: gradients in fp32 while the optimizer steps; activations and loss are
    gone by then. host: what offload moved out of the device, for each device.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int = 0
    buffers: int = 0
    update: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """The most that is held on the device at once."""
        state = self.weights + self.gradients + self.optimizer + self.buffers
        return state + max(self.activations + self.loss, self.update)


def trained_parameters(
    method: FullMethod | LoraMethod | PeftMethod, *, size: ModelSize
) -> int | None:
    """Parameters that train: all, or rank x (inputs + outputs) of every adapted layer.

    DoRA trains a magnitude per output too. None for other peft methods: known once built.
    """
    return None if isinstance(method, PeftMethod) else _trained(method, size=size)


def _trained(method: FullMethod | LoraMethod | PeftMethod, *, size: ModelSize) -> int:
    """The same, with other peft methods taken for LoRA of a small rank."""
    if isinstance(method, FullMethod):
        return size.num_parameters
    adapted = [size.linear_shapes[name] for name in adapted_layers(method, size=size)]
    lora_rank = adapter_rank(method)
    magnitudes = sum(out for out, _ in adapted) if getattr(method, "use_dora", False) else 0
    return sum(lora_rank * (out + inputs) for out, inputs in adapted) + magnitudes


def adapter_rank(method: FullMethod | LoraMethod | PeftMethod) -> int:
    """Width of the adapters; 0 where all parameters train."""
    if isinstance(method, FullMethod):
        return 0
    return method.lora_rank if isinstance(method, LoraMethod) else PEFT_RANK


def adapted_layers(
    method: FullMethod | LoraMethod | PeftMethod, *, size: ModelSize
) -> tuple[str, ...]:
    """Paths of the linear layers that have adapters: those wanted, as peft matches names."""
    wanted = method.target_modules if isinstance(method, LoraMethod) else []
    return tuple(
        path
        for path in size.linear_shapes
        if not wanted or any(path == name or path.endswith(f".{name}") for name in wanted)
    )


def memory_of(size: ModelSize, settings: Settings) -> MemoryBytes:
    """Bytes per device while training; each ZeRO stage shards one part more over the workers."""
    value, stage = BYTES_PER_VALUE[settings.dtype], settings.stage
    trained = _trained(settings.method, size=size)
    all_parameters = size.num_parameters + (0 if settings.is_full else trained)
    share = {part: settings.world_size if stage >= part else 1 for part in (1, 2, 3)}
    # An fp32 copy of what trains: of 16-bit weights, and in stages 1 to 3 always.
    master = FP32_BYTES if settings.dtype != "float32" or stage > 0 else 0
    weights = math.ceil(all_parameters * value / share[3])
    gradients = math.ceil(trained * value / share[2])
    optimizer = math.ceil(trained * (ADAM_BYTES + master) / share[1])
    update = math.ceil(trained * FP32_BYTES / share[1]) if settings.dtype != "float32" else 0
    moved = weights + gradients + optimizer if settings.offload else 0
    return MemoryBytes(
        weights=0 if settings.offload else weights,
        gradients=0 if settings.offload else gradients,
        optimizer=0 if settings.offload else optimizer,
        activations=activation_bytes(size, settings),
        loss=loss_bytes(size, settings),
        buffers=_buffer_bytes(settings, trained=trained, all_parameters=all_parameters),
        update=0 if settings.offload else update,
        host=moved,
    )


def _buffer_bytes(settings: Settings, *, trained: int, all_parameters: int) -> int:
    """Buffers of reductions, and in stage 3 of gathered layers; one worker reduces nothing."""
    value, stage = BYTES_PER_VALUE[settings.dtype], settings.stage
    if stage == 0:
        return trained * value if settings.world_size > 1 else 0
    bucket = min(BUCKET_ELEMENTS, trained) * value * (2 if settings.overlaps else 1)
    if stage < 3:
        return bucket
    gathers = settings.world_size > 1 or settings.offload
    return bucket + (min(LIVE_ELEMENTS, all_parameters) * value if gathers else 0)


def loss_bytes(size: ModelSize, settings: Settings) -> int:
    """What the loss holds: no logits of all targets, but their hidden rows and a tile of logits.

    A head that trains has its gradient formed at once, beside the one that is kept.
    """
    value = BYTES_PER_VALUE[settings.dtype]
    logits = settings.targets * size.vocabulary * FP32_BYTES
    held = settings.targets * size.hidden * (value + FP32_BYTES) + min(logits, LOSS_TILE_BYTES)
    if settings.is_full:
        held += min(logits, LOSS_KEPT_BYTES) + size.vocabulary * size.hidden * value
    return held


def activation_bytes(size: ModelSize, settings: Settings) -> int:
    """What autograd saves of a pass for its backward pass, but for the loss.

    With checkpointing: the inputs of the blocks, and the block that is being computed again.
    """
    value, tokens = BYTES_PER_VALUE[settings.dtype], settings.tokens
    # The first block's input has no gradient where the embedding is frozen: nothing of its first
    # norm is kept for that.
    block = block_bytes(size, settings)
    first = 0 if settings.is_full else -(size.hidden * FP32_BYTES + FP32_BYTES)
    final_norm = size.hidden * (FP32_BYTES + (value if settings.is_full else 0)) + FP32_BYTES
    places = 2 * (size.query // size.heads) * value  # cosines and sines of the positions
    ids = 8 if settings.is_full else 0
    mask = tokens * tokens * value if settings.is_masked else 0
    if settings.checkpointing:
        kept = size.num_layers * size.hidden * value + block
    else:
        kept = size.num_layers * block + first
    return tokens * (kept + final_norm + places + ids) + mask


def block_bytes(size: ModelSize, settings: Settings) -> int:
    """Bytes that one block saves for a token."""
    value = BYTES_PER_VALUE[settings.dtype]
    adapted = _first_block(adapted_layers(settings.method, size=size))
    is_full = settings.is_full
    if size.is_gated:  # RMS norms compute in fp32; what they normalised is kept for their weights
        norm = FP32_BYTES * size.hidden + FP32_BYTES + (value * size.hidden if is_full else 0)
    else:  # LayerNorm is one operation, with mean and deviation in fp32
        norm = value * size.hidden + 2 * FP32_BYTES
    keys = size.query if settings.is_masked else size.key  # repeated for each head under a mask
    attention = value * (2 * size.query + 2 * keys) + FP32_BYTES * size.heads
    if size.has_qk_norms:
        heads = size.query + size.key
        attention += heads * (FP32_BYTES + (value if is_full else 0))
        attention += FP32_BYTES * (heads * size.heads // size.query)
    # Gate, its activation, the other product; or, without a gate, the five steps of a GELU by
    # tanh, the last of which is the input of the next layer.
    inner = (3 if size.is_gated else 4) * value * size.feed_forward
    linear = value * _linear_inputs(size, adapted, is_full=is_full)
    return size.norms * norm + attention + inner + linear + value * _adapter_values(size, settings)


def _first_block(paths: Sequence[str]) -> tuple[str, ...]:
    """Names of the layers of one block, without the block's number."""
    return tuple(dict.fromkeys(".".join(path.split(".")[-2:]) for path in paths))


READS_FIRST_NORM = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn")
READS_SECOND_NORM = ("gate_proj", "up_proj", "gate_up_proj", "c_fc")
READS_INNER = ("down_proj", "mlp.c_proj")


def _linear_inputs(size: ModelSize, adapted: Sequence[str], *, is_full: bool) -> int:
    """Values kept for a token since a linear layer or its adapter needs its input again.

    The input of attention's output layer is kept by attention itself.
    """
    widths = (
        (READS_FIRST_NORM, size.hidden),
        (READS_SECOND_NORM, size.hidden),
        (READS_INNER, size.feed_forward),
    )
    return sum(
        width
        for names, width in widths
        if is_full or any(layer.endswith(name) for layer in adapted for name in names)
    )


def _adapter_values(size: ModelSize, settings: Settings) -> int:
    """Values that a block's adapters keep for a token: x A^T; with dropout also x and a mask.

    What is dropped out is kept for each layer; the input that layers share is then kept no more.
    """
    method = settings.method
    if isinstance(method, FullMethod):
        return 0
    adapted = adapted_layers(method, size=size)
    values = len(adapted) * adapter_rank(method)
    if isinstance(method, LoraMethod) and method.lora_dropout > 0:
        values += 2 * sum(size.linear_shapes[name][1] for name in adapted)
        shared = _linear_inputs(size, _first_block(adapted), is_full=False)
        values -= size.num_layers * shared
    return math.ceil(values / size.num_layers)
