"""Whether an arm can be searched as asked: trials share a pack, rows, or an engine (pure)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from conf.choices import Keep, ZeroStage
from conf.errors import ConfigError, NotBuiltYet
from conf.hashing import plain
from conf.methods import LoraMethod, PeftMethod, TunedMethod
from conf.resolve import Arm
from launch.search.prompt_search import why_not_together
from launch.search.trials import Trial

BY_HAND = "give the values: python launch.py -m +exp=NAME KEY=A,B"


def check_search(arm: Arm, trials: Sequence[Trial]) -> None:
    """Refuse a search that cannot be run.

    Args:
        arm: as it is without the search.
        trials: of it.

    Raises:
        ConfigError: a checkpoint is to be chosen among those of a training (trainer.keep=best).
        NotBuiltYet: trainings on different rows, or prompts for different engines.
    """
    if not arm.is_tuned:
        reason = why_not_together(trials)
        if reason is not None:
            raise NotBuiltYet(
                f"sweep.space.{arm.name}: trials that one engine cannot answer ({reason})",
                instead=BY_HAND,
            )
        return
    if any(trial.arm.trainer.keep is Keep.best for trial in trials):
        raise ConfigError(
            f"arms.{arm.name}.trainer.keep",
            found="best, for an arm that is searched",
            expected="last: its trials are compared at shares of their steps, and at the end",
            remedy="leave it out",
        )
    reason = _other_rows(trials)
    if reason is not None:
        raise NotBuiltYet(
            f"sweep.space.{arm.name}: trials that train on different rows or models ({reason})",
            instead=BY_HAND,
        )


def _other_rows(trials: Sequence[Trial]) -> str | None:
    """Why trials cannot be prepared and judged on the same rows; None where they can.

    What differs may be what trains, and how: trials that no pack can hold train one by one.
    """
    first = trials[0].arm
    names = {field.name for field in dataclasses.fields(TunedMethod)} - {"kind", "trainer", "zero"}
    for trial in trials:
        own, other = plain(trial.arm.method), plain(first.method)
        for name in sorted(names):
            if own[name] != other[name]:
                return f"its trials differ in {name}"
        if trial.arm.model != first.model:
            return "its trials differ in model"
    return None


def why_not_packed(trials: Sequence[Trial]) -> str | None:
    """Why an arm's trials cannot train in one pack; None where they can."""
    for trial in trials:
        reason = _obstacle(trial.arm)
        if reason is not None:
            return f"{trial.label}: {reason}"
    first = trials[0].arm
    for trial in trials:
        for name, value in _common(trial.arm).items():
            if value != _common(first)[name]:
                return f"its trials differ in {name}"
    return None


def _common(arm: Arm) -> dict[str, object]:
    """What the trials of a pack have one of: all but what is LoRA's or the trainer's."""
    every, not_own = (
        {f.name for f in dataclasses.fields(cls)} for cls in (LoraMethod, TunedMethod)
    )
    free = every - not_own | {"trainer"}
    shared = {name: value for name, value in plain(arm.method).items() if name not in free}
    return shared | {
        "model": arm.model,
        "zero": arm.zero,
        "trainer.activation_checkpointing": arm.trainer.activation_checkpointing,
    }


def _obstacle(arm: Arm) -> str | None:
    """Why one trial cannot train beside others."""
    method = arm.training
    if isinstance(method, PeftMethod):
        return f"method {method.peft_type}, and a pack is of LoRA adapters"
    if not isinstance(method, LoraMethod):
        return f"method {method.kind}, and a pack is of LoRA adapters"
    if method.use_dora or method.quantization is not None or method.lora_dropout > 0:
        return "DoRA, a quantised base or dropout, and a pack is of plain LoRA adapters"
    if arm.zero.stage is ZeroStage.zero3 or arm.zero.offload:
        return "ZeRO-3 shards the base, and under a pack it is whole on each worker"
    return None
