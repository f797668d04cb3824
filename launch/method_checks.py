"""What a method needs of the machine and of its rows; needs no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from conf.choices import Keep
from conf.errors import ConfigError, NotBuiltYet
from conf.methods import LoraMethod
from conf.resolve import Arm
from evaluation.mix import Mix
from evaluation.tasks import Task
from launch.placement import Machine
from training.schedule import num_steps, save_steps


def check_quantization(arms: Mapping[str, Arm], machine: Machine) -> None:
    """Refuse 4-bit base weights without an accelerator and the package that multiplies with them.

    Raises:
        ConfigError: no CUDA, or no bitsandbytes.
        NotBuiltYet: a prompted arm on such a base.
    """
    for name, arm in arms.items():
        if not isinstance(arm.method, LoraMethod) or arm.method.quantization is None:
            continue
        above = [other for other, one in arms.items() if one.on == name]
        if above:
            raise NotBuiltYet(
                f"arms.{above[0]}.on={name} (prompts on a base in 4 bits)",
                instead=f"drop the arm (~method@arms.{above[0]}), or write "
                f"arms.{name}.quantization=null",
            )
        missing = []
        if machine.device != "cuda":
            missing.append(f"the device is {machine.device}")
        if importlib.util.find_spec("bitsandbytes") is None:
            missing.append("bitsandbytes is not installed")
        if missing:
            raise ConfigError(
                f"arms.{name}.quantization",
                found=f"{arm.method.quantization.name}, and {', '.join(missing)}",
                expected="CUDA and the package bitsandbytes, or null",
                remedy=f"write arms.{name}.quantization=null",
            )


def check_points(arms: Mapping[str, Arm], task: Task, mixes: Mapping[str, Mix]) -> None:
    """Refuse to choose among more checkpoints than a training has steps.

    Raises:
        ConfigError: with the number of steps.
    """
    for name, arm in arms.items():
        trainer = arm.trainer
        if not arm.is_tuned or trainer.keep is not Keep.best:
            continue
        num_rows = mixes[name].size if name in mixes else len(task.items["train"])
        steps = num_steps(num_rows, trainer=trainer)
        if len(save_steps(steps, num_points=trainer.num_points)) < trainer.num_points:
            raise ConfigError(
                f"arms.{name}.trainer.num_points",
                found=f"{trainer.num_points}, and a training of {steps} optimizer steps",
                expected="no more checkpoints to choose from than there are steps",
                remedy=f"write trainer.num_points={steps}"
                if steps > 1
                else "leave trainer.keep out: a training of one step has one checkpoint",
            )
