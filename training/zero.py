"""From our configuration to DeepSpeed's, and the choice of a ZeRO stage (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from conf.choices import ZeroStage
from conf.groups import TrainerConfig, ZeroConfig

# Elements per reduction: DeepSpeed's default of 5e8 reserves 2 GB of fp32 in stages 1 and 2.
BUCKET_ELEMENTS = 50_000_000
# Stage 3 keeps parameters below this size whole on every worker (DeepSpeed's default): gathering
# small ones costs more than they weigh. It holds all adapters, and all of a tiny model.
PERSISTED_ELEMENTS = 100_000
# Elements that stage 3 keeps gathered at most (DeepSpeed's default).
LIVE_ELEMENTS = 1_000_000_000
# The share of a device's memory that a plan may fill; the rest is for the allocator and libraries.
USABLE_MEMORY_SHARE = 0.8


def deepspeed_config(
    trainer: TrainerConfig,
    *,
    stage: int,
    offload: bool,
    dtype: str,
    device: str,
    world_size: int,
    nvme_path: str | None = None,
) -> dict[str, Any]:
    """The dictionary for deepspeed.initialize.

    Batch sizes of 1 are nominal: the loop forms its own batches, sets accumulation boundaries
    itself and scales the loss, so DeepSpeed never divides by a number of passes. Stage 0 in fp32
    is clipped by the loop, since DeepSpeed clips there without telling the norm. Offload goes to
    CPU memory, or to a directory on an NVMe disk if nvme_path names one.
    """
    zero: dict[str, Any] = {"stage": stage}
    if stage > 0:
        zero["reduce_bucket_size"] = BUCKET_ELEMENTS
        zero["overlap_comm"] = device == "cuda"  # on CPU there is no stream to overlap with
    if stage in (1, 2):
        zero["allgather_bucket_size"] = BUCKET_ELEMENTS
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTED_ELEMENTS
        zero["stage3_max_live_parameters"] = LIVE_ELEMENTS
    if stage == 3 and offload:
        place: dict[str, Any] = {"device": "cpu", "pin_memory": device == "cuda"}
        if nvme_path is not None:
            place |= {"device": "nvme", "nvme_path": nvme_path}
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


@dataclass(kw_only=True, slots=True, frozen=True)
class StageChoice:
    """The ZeRO stage of a training, and why in a few words.

    fits: whether its bytes are below the device's; True where one of the two is not known.
    """

    stage: int
    reason: str
    fits: bool = True


def choose_stage(
    zero: ZeroConfig,
    *,
    bytes_by_stage: Mapping[int, int],
    device_memory_bytes: int | None,
    world_size: int,
) -> StageChoice:
    """The ZeRO stage to use.

    The user's, or for auto: the smallest that fits a device, 3 if none does. bytes_by_stage:
    estimated bytes per device for stages 0 to 3. With one worker there is nothing to shard, and
    without a known device size nothing to decide: 0. Offload implies 3.
    """
    memory = device_memory_bytes
    usable = None if memory is None else USABLE_MEMORY_SHARE * memory
    if zero.stage is not ZeroStage.auto:
        return _chosen(int(zero.stage.value), bytes_by_stage, memory, "as given")
    if zero.offload:
        return _chosen(3, bytes_by_stage, memory, "offload needs stage 3")
    if memory is None or usable is None:
        return _chosen(0, bytes_by_stage, memory, "the device's memory is not known")
    if world_size == 1:
        return _chosen(0, bytes_by_stage, memory, "one worker, nothing to shard")
    stage = next((stage for stage in (0, 1, 2) if bytes_by_stage[stage] <= usable), 3)
    if stage == 0:
        return _chosen(0, bytes_by_stage, memory, "all fits on each device")
    less = f"stage {stage - 1} would take {gigabytes(bytes_by_stage[stage - 1])}"
    return _chosen(stage, bytes_by_stage, memory, less)


def _chosen(
    stage: int, bytes_by_stage: Mapping[int, int], memory: int | None, why: str
) -> StageChoice:
    """A choice with its reason: `stage 2: 61 GB of 80 GB; stage 1 would take 93 GB`."""
    needed = bytes_by_stage[stage]
    of = "" if memory is None else f" of {gigabytes(memory)}"
    return StageChoice(
        stage=stage,
        reason=f"stage {stage}: {gigabytes(needed)}{of}; {why}",
        fits=memory is None or needed <= memory,
    )


def gigabytes(number: float) -> str:
    """Bytes as people read them: 61 GB, 2.4 GB, 0.13 GB (1 GB is 10^9 bytes)."""
    value = number / 1e9
    return (
        f"{value:.0f} GB" if value >= 10 else f"{value:.1f} GB" if value >= 1 else f"{value:.2g} GB"
    )
