"""Floating-point operations of a training step, by shapes (pure).

Counted is what a step needs, two for each multiplication with its addition in a matrix product:
forward, gradients of inputs, gradients of weights where they train, attention over the pairs of
tokens that see each other, the head on target rows alone. Not counted: element-wise work, pairs
under a mask, padding; what activation checkpointing computes again only where asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conf.methods import FullMethod, LoraMethod, PeftMethod
from training.memory import adapted_layers, adapter_rank
from training.shapes import ModelSize

# Places of a block in the order in which they compute; the names are those of their layers.
BLOCK = (
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn"),
    ("o_proj", "attn.c_proj"),
    ("gate_proj", "up_proj", "gate_up_proj", "c_fc"),
    ("down_proj", "mlp.c_proj"),
)


@dataclass(kw_only=True, slots=True, frozen=True)
class PassShape:
    """One pass: tokens computed, pairs (token, token it sees), target tokens."""

    tokens: int
    pairs: int
    targets: int

    @staticmethod
    def of(lengths: Sequence[int], *, shared: int, targets: int) -> PassShape:
        """Rows of these lengths, of which `shared` leading tokens are computed once."""
        rests = [length - shared for length in lengths]
        pairs = triangle(shared) + sum(rest * shared + triangle(rest) for rest in rests)
        return PassShape(tokens=shared + sum(rests), pairs=pairs, targets=targets)


def triangle(length: int) -> int:
    """Pairs of a row in which each token sees itself and those before it."""
    return length * (length + 1) // 2


@dataclass(kw_only=True, slots=True, frozen=True)
class StepCost:
    """Operations of training a model with a method, per unit of a pass."""

    per_token: int
    per_pair: int
    per_target: int

    def flops(self, shape: PassShape) -> int:
        """Operations of a pass."""
        return (
            self.per_token * shape.tokens
            + self.per_pair * shape.pairs
            + self.per_target * shape.targets
        )


def forward_cost(size: ModelSize) -> StepCost:
    """Operations of a forward pass."""
    return StepCost(
        per_token=2 * size.body,
        per_pair=4 * size.query * size.num_layers,  # scores, and their sum over values
        per_target=2 * size.vocabulary * size.hidden,
    )


def train_cost(
    method: FullMethod | LoraMethod | PeftMethod,
    *,
    size: ModelSize,
    recomputes: bool = False,
) -> StepCost:
    """Operations of forward and backward.

    Args:
        method: what trains.
        size: of the base model.
        recomputes: count what activation checkpointing computes a second time.
    """
    forward = forward_cost(size)
    is_full = isinstance(method, FullMethod)
    adapted = set(adapted_layers(method, size=size))
    lora_rank = adapter_rank(method)
    first = 0 if is_full else _first_place(size, adapted)
    linear = 0
    adapters = 0
    for path, (out, inputs) in size.linear_shapes.items():
        has_input_gradient = is_full or not _is_before(path, size=size, first=first)
        linear += out * inputs * (int(has_input_gradient) + int(is_full))
        if path in adapted and not is_full:
            # x A^T and its product with B, the gradients of both, dY B, and that times A.
            adapters += lora_rank * (2 * (out + inputs) + out + inputs * int(has_input_gradient))
    again = 1 if recomputes else 0
    # The first block's attention has a backward pass only where something before it trains.
    attending = size.num_layers - (0 if is_full or first == 0 else 1)
    return StepCost(
        per_token=(1 + again) * forward.per_token
        + 2 * (linear + adapters)
        + again * 2 * lora_rank * sum(sum(size.linear_shapes[p]) for p in adapted if not is_full),
        per_pair=(1 + again) * forward.per_pair + 8 * size.query * attending,
        per_target=(3 if is_full else 2) * forward.per_target,
    )


def _first_place(size: ModelSize, adapted: set[str]) -> int:
    """The first place of block 0 that has an adapter: no gradient goes back beyond it."""
    places = [_place(path) for path in adapted if _block_of(path) == _first_block_of(size)]
    return min(places, default=len(BLOCK))


def _is_before(path: str, *, size: ModelSize, first: int) -> bool:
    """Whether a layer's input depends on nothing that trains."""
    return _block_of(path) == _first_block_of(size) and _place(path) <= first


def _place(path: str) -> int:
    return next((k for k, names in enumerate(BLOCK) if path.endswith(names)), len(BLOCK))


def _block_of(path: str) -> int:
    """The number of the block that a layer is in; -1 outside blocks."""
    return next((int(part) for part in path.split(".") if part.isdigit()), -1)


def _first_block_of(size: ModelSize) -> int:
    return min((_block_of(path) for path in size.linear_shapes), default=0)
