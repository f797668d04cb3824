"""From our configuration to DeepSpeed's, and the choice of a ZeRO stage (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conf.choices import ZeroStage
from conf.groups import TrainerConfig, ZeroConfig

# Elements per reduction: DeepSpeed's default of 5e8 reserves 2 GB of fp32 in stages 1 and 2.
BUCKET_ELEMENTS = 50_000_000
# Stage 3 keeps parameters below this size whole on every worker (DeepSpeed's default): gathering
# small ones costs more than they weigh. It holds all adapters, and all of a tiny model.
PERSISTED_ELEMENTS = 100_000
# The share of a device's memory that a plan may fill; the rest is for the allocator and libraries.
USABLE_MEMORY_SHARE = 0.8


def deepspeed_config(
    trainer: TrainerConfig, *, stage: int, offload: bool, dtype: str, device: str, world_size: int
) -> dict[str, Any]:
    """The dictionary for deepspeed.initialize.

    Batch sizes of 1 are nominal: the loop forms its own batches, sets accumulation boundaries
    itself and scales the loss, so DeepSpeed never divides by a number of passes. Stage 0 in fp32
    is clipped by the loop, since DeepSpeed clips there without telling the norm.
    """
    zero: dict[str, Any] = {"stage": stage}
    if stage > 0:
        zero["reduce_bucket_size"] = BUCKET_ELEMENTS
        zero["overlap_comm"] = device == "cuda"  # on CPU there is no stream to overlap with
    if stage in (1, 2):
        zero["allgather_bucket_size"] = BUCKET_ELEMENTS
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTED_ELEMENTS
    if stage == 3 and offload:
        place = {"device": "cpu", "pin_memory": device == "cuda"}
        zero["offload_param"] = place
        zero["offload_optimizer"] = place
    is_clipped_here = clips_in_loop(stage=stage, dtype=dtype)
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0 if is_clipped_here else trainer.clip_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW needs no compiler
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def clips_in_loop(*, stage: int, dtype: str) -> bool:
    """Whether the loop clips gradients itself: plain fp32 data parallelism."""
    return stage == 0 and dtype == "float32"


def choose_stage(
    zero: ZeroConfig,
    *,
    bytes_by_stage: Mapping[int, int],
    device_memory_bytes: int | None,
    world_size: int,
) -> int:
    """The ZeRO stage to use.

    The user's, or for auto: the smallest that fits a device, 3 if none does. bytes_by_stage:
    estimated bytes per device for stages 0 to 2 at least. With one worker there is nothing to
    shard, and without a known device size nothing to decide: 0. Offload implies 3.
    """
    if zero.stage is not ZeroStage.auto:
        return int(zero.stage.value)
    if zero.offload:
        return 3
    if world_size == 1 or device_memory_bytes is None:
        return 0
    usable = USABLE_MEMORY_SHARE * device_memory_bytes
    return next((stage for stage in (0, 1, 2) if bytes_by_stage[stage] <= usable), 3)
