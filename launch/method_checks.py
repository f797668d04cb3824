"""What a method needs of the machine; needs no torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from conf.errors import ConfigError, NotBuiltYet
from conf.methods import LoraMethod
from conf.resolve import Arm
from launch.placement import Machine


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
