"""The layers of a plain Llama-like model as one loop over their packed weights.

transformers' own modules compute the same in twice as many small operations, which cost more to
start than to run when few rows decode. Here they are few, and in place where nobody else reads.

    x  = x + o(attention(rotated q, rotated k, v))     of the normed x
    x  = x + down(silu(gate) * up)                     of the normed x

Used where the model is of a class known to be of this form, with every linear layer packed; what
it computes is compared with the model's own forward when that is loaded.
Shapes: T rows, D width, Hq and Hkv heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from kernels.linear import Linear, Packed

PLAIN = ("LlamaModel", "MistralModel", "Qwen2Model")
# Attention of a layer: its number, queries (Hq, T, d), keys and values (Hkv, T, d), scale.
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(kw_only=True, slots=True, frozen=True)
class _Norm:
    """x w / sqrt(mean(x^2) + epsilon). weight: w sqrt(D); floor: sqrt(epsilon D)."""

    weight: Tensor
    floor: Tensor

    @classmethod
    def of(cls, module: Any) -> Self:
        weight = module.weight.detach()
        width = weight.numel()
        floor = weight.new_tensor((module.variance_epsilon * width) ** 0.5)
        return cls(weight=weight * width**0.5, floor=floor)

    def __call__(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.div(x, torch.hypot(size, self.floor)).mul_(self.weight)


@dataclass(kw_only=True, slots=True, frozen=True)
class _Layer:
    """The weights of one layer."""

    before_attention: _Norm
    q: Packed
    k: Packed
    v: Packed
    o: Packed
    before_mlp: _Norm
    gate: Packed
    up: Packed
    down: Packed
    scale: float

    @classmethod
    def of(cls, layer: Any) -> Self | None:
        """None where a linear layer is wrapped, or not packed."""
        attention, mlp = layer.self_attn, layer.mlp
        modules = {name: getattr(attention, f"{name}_proj") for name in ("q", "k", "v", "o")}
        modules |= {name: getattr(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
        packed = {
            name: module.packed
            for name, module in modules.items()
            if type(module) is Linear and module.packed is not None
        }
        if len(packed) < len(modules) or not _is_silu(mlp.act_fn):
            return None
        return cls(
            before_attention=_Norm.of(layer.input_layernorm),
            before_mlp=_Norm.of(layer.post_attention_layernorm),
            scale=attention.scaling,
            **packed,
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class PlainLayers:
    """Embedding, layers and last norm of a model; its weights as they were when this was made."""

    embedding: nn.Module
    rotation: nn.Module
    layers: tuple[_Layer, ...]
    last: _Norm
    head_width: int

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """From a model without a head; None where it is not of the known form."""
        kind = type(model)
        if kind.__name__ not in PLAIN or not kind.__module__.startswith("transformers.models."):
            return None
        layers = tuple(layer for layer in map(_Layer.of, model.layers) if layer is not None)
        head_width = model.layers[0].self_attn.head_dim
        is_all_turned = 2 * model.rotary_emb.inv_freq.numel() == head_width
        if len(layers) < len(model.layers) or not is_all_turned:
            return None
        return cls(
            embedding=model.embed_tokens,
            rotation=model.rotary_emb,
            layers=layers,
            last=_Norm.of(model.norm),
            head_width=head_width,
        )

    def hidden(self, tokens: Tensor, places: Tensor, attend: Attend) -> Tensor:
        """Last hidden states (T, D) of tokens (T,) at positions (T,)."""
        x: Tensor = self.embedding(tokens)
        halves = (len(x), 1, 2, self.head_width // 2)
        cos, sin = (part.view(halves) for part in self.rotation(x[None], places[None]))
        sin = torch.stack([-sin[:, :, 0], sin[:, :, 1]], dim=2)
        for index, layer in enumerate(self.layers):
            x = self._after_attention(index, layer, x, cos, sin, attend)
            normed = layer.before_mlp(x)
            inner = nn.functional.silu(layer.gate(normed), inplace=True).mul_(layer.up(normed))
            x = layer.down(inner).add_(x)
        return self.last(x)

    def _after_attention(
        self, index: int, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend
    ) -> Tensor:
        normed, rows = layer.before_attention(x), len(x)
        halves = (rows, -1, 2, self.head_width // 2)
        query, key = (_rotated(part(normed).view(halves), cos, sin) for part in (layer.q, layer.k))
        value = layer.v(normed).view(rows, -1, self.head_width).transpose(0, 1)
        out = attend(index, query, key, value, layer.scale)
        return layer.o(out.transpose(0, 1).reshape(rows, -1)).add_(x)


def _rotated(halves: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads (T, H, 2, d / 2), pairing an element of one half with its twin: (H, T, d).

    cos, sin: (T, 1, 2, d / 2); sin is negative in the first half.
    """
    turned = torch.addcmul(halves * cos, halves.flip(2), sin)
    return turned.flatten(2).transpose(0, 1)


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
