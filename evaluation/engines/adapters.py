"""Put an adapter on a model and take it off again; the base model's weights are never written.

An adapter on packed linear layers is merged into their packed copies, by peft's own merge on a
copy of the weight, so that a tuned model answers at the base model's speed. Where a layer cannot be
merged, or computes something else merged, the adapter wraps its layers, as peft does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from conf.errors import ModelError
from evaluation.engines.loading import load_adapter, unload_adapter
from kernels.linear import Linear, Packed
from kernels.memory import is_out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel

CHECKED_ROWS = 4
# Relative, of the largest output. Merging only rounds: 1e-6 over all mergeable methods of peft.
MAX_MERGE_ERROR = 1e-4


class Adapters:
    """The adapter of one model; at most one at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        """The base model answers until `set` says otherwise."""
        self._model = model
        self._modules = dict(model.named_modules())
        self._wrapped: PeftModel | None = None
        self._merged: list[Linear] = []

    @property
    def is_wrapped(self) -> bool:
        """Whether an adapter stands around layers now, rather than merged into their packs."""
        return self._wrapped is not None

    @torch.no_grad()
    def set(self, path: Path | None) -> None:
        """Answer with the adapter in a directory; None: with the base model."""
        if self._wrapped is not None:
            self._take_off(self._wrapped)
        for layer in self._merged:
            layer.packed = Packed(layer.weight, layer.bias)
        self._merged = []
        if path is None:
            return
        with _torch_linear(self._model):
            self._wrapped = load_adapter(self._model, path)
        merged = _merge_all(self._wrapped)
        if merged is None:
            return
        for base, packed in merged:
            base.packed = packed
            self._merged.append(base)
        self._take_off(self._wrapped)

    def _take_off(self, adapted: PeftModel) -> None:
        unload_adapter(self._model, adapted, modules=self._modules)
        self._wrapped = None


@contextmanager
def _torch_linear(model: nn.Module) -> Iterator[None]:
    """Linear layers as torch's own class: some methods of peft take no subclass of it."""
    swapped = [module for module in model.modules() if type(module) is Linear]
    for module in swapped:
        module.__class__ = nn.Linear  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in swapped:
            module.__class__ = Linear


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    """What a linear layer multiplies with, the adapter on it included.

    Raises:
        ModelError: an adapter that has no such weight.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        layer = layer.modules_to_save["default"]
    if isinstance(layer, BaseTunerLayer):
        merged = _merged(layer)
        if merged is None:
            raise ModelError(
                "the adapter",
                found=f"{type(layer).__module__} on the output head, which cannot be merged",
                expected="adapters on the layers below the head",
                remedy="type engine=transformers",
            )
        return merged
    return layer.weight, getattr(layer, "bias", None)


def _merge_all(adapted: PeftModel) -> list[tuple[Linear, Packed]] | None:
    """Packed layers with the adapter in them; None where one of its parts cannot be merged."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    found: list[tuple[Linear, Packed]] = []
    for module in list(adapted.modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            return None
        if not isinstance(module, BaseTunerLayer):
            continue
        base: Any = module.get_base_layer()
        if not isinstance(base, Linear) or base.packed is None:
            return None
        merged = _merged(module)
        if merged is None:
            return None
        packed = Packed(*merged)
        if not _computes_the_same(module, packed):
            return None
        found.append((base, packed))
    return found


def _merged(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias that peft's merge gives, None where it has none; the layer stays as is.

    The base layer gets copies for the time of the merge: unmerging would leave rounding errors.
    """
    base = layer.get_base_layer()
    kept = {name: getattr(base, name, None) for name in ("weight", "bias")}
    try:
        for name, tensor in kept.items():
            if tensor is not None:
                setattr(base, name, nn.Parameter(tensor.detach().clone(), requires_grad=False))
        layer.merge()
        if not layer.merged:
            return None
        bias = getattr(base, "bias", None)
        return base.weight.detach(), None if bias is None else bias.detach()
    except (NotImplementedError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return None  # how peft says that it cannot; the adapter then stays around its base
    finally:
        layer.merged_adapters = []
        for name, tensor in kept.items():
            setattr(base, name, tensor)


def _computes_the_same(layer: Any, packed: Packed) -> bool:
    """Whether a merged layer gives what the adapter around its base gives, on random rows."""
    source = torch.Generator().manual_seed(0)
    weight = layer.get_base_layer().weight
    x = torch.randn(CHECKED_ROWS, weight.shape[1], generator=source, dtype=weight.dtype)
    expected = layer(x)
    worst: float = (packed(x) - expected).abs().max().item()
    return worst <= MAX_MERGE_ERROR * max(1.0, float(expected.abs().max()))
