"""peft's LoRA layers with our forward: see kernels/lora_linear.py."""

from __future__ import annotations

from typing import Any, cast

from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from kernels.dispatch import Choice
from kernels.linear import Linear
from kernels.lora_linear import lora_linear
from training.job import TrainJob
from training.loss import usable


class LoraLayer(PeftLinear):
    """peft's layer whose output and gradients are `lora_linear`'s. impl: which of its paths."""

    impl: str

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """From x (..., in) to (..., out); with anything but one plain adapter, peft's own."""
        if args or kwargs or self.disable_adapters or self.merged or not _is_plain(self):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        (name,) = self.active_adapters
        base: Any = self.get_base_layer()
        a, b = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
        return lora_linear(
            x, base.weight, a.weight, b.weight, self.scaling[name], base.bias, impl=self.impl
        )


def swap_lora(model: nn.Module, *, impl: str) -> int:
    """Give every plain LoRA layer of a model our forward, in place; returns how many.

    Parameters, hooks and names stay as they are: only the module's class changes. Layers with
    dropout, a bias, DoRA or another variant, or over anything but a plain nn.Linear keep peft's.
    Not for ZeRO-3, which takes weights away between forward and backward.

    Args:
        model: with adapters.
        impl: auto, cpu, triton or reference.
    """
    count = 0
    for module in model.modules():
        if type(module) is PeftLinear and _is_plain(module):
            module.__class__ = LoraLayer
            module.impl = impl  # type: ignore[assignment]
            count += 1
    return count


def _is_plain(layer: PeftLinear) -> bool:
    """Whether a layer computes x W^T + b + s (x A^T) B^T with one adapter, and nothing else."""
    base: Any = layer.get_base_layer()
    names = layer.active_adapters
    return len(names) == 1 and type(base) in (nn.Linear, Linear) and is_plain_adapter(layer, *names)


def is_plain_adapter(layer: PeftLinear, name: str) -> bool:
    """Whether an adapter of a layer is two matrices of the base's dtype, and nothing else."""
    base: Any = layer.get_base_layer()
    if name not in layer.lora_A or name in layer.lora_variant or layer.fan_in_fan_out:
        return False
    parts: list[Any] = [layer.lora_A[name], layer.lora_B[name]]
    if any(type(part) not in (nn.Linear, Linear) or part.bias is not None for part in parts):
        return False
    if any(part.weight.dtype != base.weight.dtype for part in parts):
        return False
    return isinstance(layer.lora_dropout[name], nn.Identity) and not getattr(base, "packed", None)


def use_lora_kernel(model: nn.Module, job: TrainJob, *, stage: int) -> str:
    """Swap where a job may; what was done, for people, and empty where a model has no such layer.

    Args:
        model: with adapters, or without.
        job: says device, dtype and kernels.impl.
        stage: of ZeRO.
    """
    if not any(type(module) is PeftLinear for module in model.modules()):
        return ""
    choice = usable("lora_linear", job)
    if stage == 3:
        choice = Choice(impl="reference", reason="ZeRO-3 shards the weights")
    if choice.impl == "reference":
        return f"peft's LoRA layers ({choice.reason})"
    count = swap_lora(model, impl=choice.impl)
    return f"lora_linear in {count} layers ({choice.impl}: {choice.reason})"
