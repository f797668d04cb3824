"""Put an adapter on a model and take it off again; the base model's weights are never written.

A plain LoRA on packed linear layers is merged into their packed copies (W + scale B A), so that a
tuned model answers at the base model's speed. Any other adapter wraps its layers, as peft does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from evaluation.engines.loading import load_adapter
from kernels.linear import Linear, Packed

if TYPE_CHECKING:
    from peft import PeftModel


class Adapters:
    """The adapter of one model; at most one at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        """The base model answers until `set` says otherwise."""
        self._model = model
        self._wrapped: PeftModel | None = None
        self._merged: list[Linear] = []

    @torch.no_grad()
    def set(self, path: Path | None) -> None:
        """Answer with the adapter in a directory; None: with the base model."""
        if self._wrapped is not None:
            self._wrapped.unload()
            self._wrapped = None
        for layer in self._merged:
            layer.packed = Packed(layer.weight, layer.bias)
        self._merged = []
        if path is None:
            return
        self._wrapped = load_adapter(self._model, path)
        layers = _mergeable(self._wrapped)
        if layers is None:
            return
        for layer in layers:
            base = layer.get_base_layer()
            weight = base.weight + layer.get_delta_weight("default").to(base.weight.dtype)
            base.packed = Packed(weight, base.bias)
            self._merged.append(base)
        self._wrapped.unload()
        self._wrapped = None


def _mergeable(adapted: PeftModel) -> list[Any] | None:
    """The LoRA layers, if the adapter is nothing but plain LoRA on packed layers; else None."""
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    layers: list[Any] = []
    modules: list[Any] = list(adapted.modules())
    for module in modules:
        if isinstance(module, AuxiliaryTrainingWrapper):
            return None
        if isinstance(module, BaseTunerLayer):
            is_plain = type(module) is LoraLinear and not module.lora_variant
            base = module.get_base_layer()
            if not is_plain or not isinstance(base, Linear) or base.packed is None:
                return None
            if getattr(module, "lora_bias", {}).get("default"):
                return None
            layers.append(module)
    return layers
