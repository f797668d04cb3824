"""How an arm is searched: by packed trials, by prompts, or not yet (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from conf.hashing import sha256_of
from conf.methods import LoraMethod, PeftMethod
from conf.resolve import Arm
from launch.placement import Machine, model_dtype
from launch.trials import Trial

PACKED_DTYPES = ("float32", "float64")  # a trial's adapters are their own masters


def why_not_packed(
    trials: Sequence[Trial], *, machine: Machine, workers: int, rows_keys: Mapping[int, str]
) -> str | None:
    """Why an arm's trials cannot train in one pack; None where they can.

    Args:
        trials: of one arm that trains.
        machine: what they train on.
        workers: of one training.
        rows_keys: trial -> the key of its training rows.
    """
    if workers != 1:
        return f"{workers} workers train together, and a pack has one"
    if len({sha256_of(rows_keys[trial.number]) for trial in trials}) > 1:
        return "its trials train on different rows"
    for trial in trials:
        reason = _obstacle(trial.arm, machine)
        if reason is not None:
            return f"{trial.label}: {reason}"
    first = trials[0].arm
    for key in ("model", "zero"):
        if any(getattr(trial.arm, key) != getattr(first, key) for trial in trials):
            return f"its trials differ in {key}"
    if len({trial.arm.trainer.activation_checkpointing for trial in trials}) > 1:
        return "its trials differ in trainer.activation_checkpointing"
    return None


def _obstacle(arm: Arm, machine: Machine) -> str | None:
    """Why one trial cannot train beside others."""
    method = arm.training
    if isinstance(method, PeftMethod):
        return f"method {method.peft_type}, and a pack is of LoRA adapters"
    if not isinstance(method, LoraMethod):
        return f"method {method.kind}, and a pack is of LoRA adapters"
    if method.use_dora or method.quantization is not None or method.lora_dropout > 0:
        return "DoRA, a quantised base or dropout, and a pack is of plain LoRA adapters"
    dtype = model_dtype(arm.model, machine.device)
    if dtype not in PACKED_DTYPES:
        return f"the model is in {dtype}, and a pack keeps no float32 masters"
    return None
