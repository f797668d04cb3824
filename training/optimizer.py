"""Which parameters share a rate and a weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from conf.methods import LoraMethod, TunedMethod

RATE_RATIO = "rate_ratio"  # of a group: its rate over the step's


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, method: TunedMethod, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, without empty ones; each has `rate_ratio`.

    The loop sets a group's rate to the step's times its ratio: lora_plus_ratio for LoRA's B (LoRA+,
    arXiv 2402.12354), 1 elsewhere. Norms and biases do not decay, as in transformers: parameters of
    one dimension. Order within a group is that of `named`, so all workers agree.

    Args:
        named: names and parameters of the model, frozen ones too.
        method: the arm's method.
        weight_decay: of the parameters that decay.
    """
    ratio = method.lora_plus_ratio if isinstance(method, LoraMethod) else None
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        is_b = ".lora_B." in name or ".lora_embedding_B." in name
        key = (ratio if is_b and ratio else 1.0, weight_decay if _decays(parameter) else 0.0)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "weight_decay": decay, RATE_RATIO: rate_ratio}
        for (rate_ratio, decay), params in groups.items()
    ]


def _decays(parameter: nn.Parameter) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor here
    return len(shape) > 1
