"""Adapters on a model that is about to train: LoRA and its variants, or any other peft method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from conf.errors import ConfigError
from conf.methods import LoraMethod, PeftMethod
from kernels.memory import is_out_of_memory

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def with_adapters(
    model: PreTrainedModel,
    method: LoraMethod | PeftMethod,
    *,
    arm_name: str,
    seed: int,
    adapter: str = "default",
) -> PeftModel:
    """Wrap a model's layers with new adapters, drawn from a seed so that all workers start equal.

    adapter: peft's name for them.

    Raises:
        ConfigError: target_modules that the model does not have, or arguments that peft refuses
            for this model.
    """
    from peft import get_peft_model

    torch.manual_seed(seed)
    # No fp32 copies of bf16 adapters: DeepSpeed keeps the fp32 originals itself.
    if isinstance(method, LoraMethod):
        config = _lora_config(model, method, arm_name=arm_name)
        return get_peft_model(model, config, adapter_name=adapter, autocast_adapter_dtype=False)
    targets = method.peft.get("target_modules")
    if isinstance(targets, list):
        leaves = [name for name, module in model.named_modules() if not list(module.children())]
        check_targets(targets, layers=leaves, key=f"arms.{arm_name}.peft.target_modules")
    try:
        config = _peft_config(method)
        return get_peft_model(model, config, adapter_name=adapter, autocast_adapter_dtype=False)
    except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        arguments = " ".join(f"{k}={v}" for k, v in method.peft.items()) or "its defaults"
        raise ConfigError(
            f"arms.{arm_name}.peft",
            found=f"{method.peft_type} with {arguments}; peft says: {error}",
            expected=f"arguments that fit {type(model).__name__}",
            remedy=f"write arms.{arm_name}.peft.ARGUMENT=VALUE, for example "
            f"arms.{arm_name}.peft.target_modules=all-linear",
        ) from error


def add_adapter(
    model: PeftModel, method: LoraMethod, *, arm_name: str, seed: int, adapter: str
) -> None:
    """One more LoRA adapter on a wrapped model, drawn as it would be on a model of its own.

    Raises:
        ConfigError: target_modules that the model does not have.
    """
    torch.manual_seed(seed)
    base: PreTrainedModel = model.get_base_model()  # type: ignore[assignment]
    config = _lora_config(base, method, arm_name=arm_name)
    model.add_adapter(adapter, config, autocast_adapter_dtype=False)


def _lora_config(model: PreTrainedModel, method: LoraMethod, *, arm_name: str) -> PeftConfig:
    from peft import LoraConfig

    if method.target_modules:
        named = [name for name, module in model.named_modules() if _is_linear(module)]
        # Where there are adapters already, they are linear layers too, and stand around the base's.
        linear = [name.removesuffix(".base_layer") for name in named if ".lora_" not in name]
        check_targets(method.target_modules, layers=linear, key=f"arms.{arm_name}.target_modules")
    return LoraConfig(
        r=method.lora_rank,
        lora_alpha=method.lora_alpha,  # type: ignore[arg-type]  # a float works
        lora_dropout=method.lora_dropout,
        target_modules=list(method.target_modules) or "all-linear",  # the latter skips the head
        use_rslora=method.use_rslora,
        use_dora=method.use_dora,
        task_type="CAUSAL_LM",
    )


def _peft_config(method: PeftMethod) -> PeftConfig:
    from peft import get_peft_config

    given = {"peft_type": method.peft_type, "task_type": "CAUSAL_LM", **method.peft}
    config: PeftConfig = get_peft_config(given)
    return config


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit")


def check_targets(wanted: Sequence[str], *, layers: Sequence[str], key: str) -> None:
    """Refuse target_modules of which any matches no layer that can be adapted.

    peft complains only when none matches, and a partly wrong list trains fewer adapters silently. A
    name matches as in peft: the module's whole path, or its end after a dot.
    """
    missing = [
        name
        for name in wanted
        if not any(path == name or path.endswith(f".{name}") for path in layers)
    ]
    if missing:
        known = sorted({path.rpartition(".")[2] for path in layers})
        raise ConfigError(
            key,
            found=", ".join(missing),
            expected=f"layers of the model: {', '.join(known)}",
            remedy=f"leave {key} out",
        )


def saved_names(model: PeftModel, *, base_tensors: frozenset[int]) -> frozenset[str]:
    """The names in a state dict that make a checkpoint: what trains, and what peft added.

    Frozen additions count too, e.g. the random projections that VeRA shares between its layers.

    Args:
        model: the wrapped model.
        base_tensors: `id` of every tensor of the model before it was wrapped.
    """
    return frozenset(
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.requires_grad or id(tensor) not in base_tensors
    )
