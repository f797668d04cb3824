"""A linear layer under many LoRA adapters, each on rows of its own; the base's product is one.

    y[rows of g] = x_g W^T + b + s_g (x_g A_g^T) B_g^T,    rows of g: starts[g] to starts[g + 1]

So adapters train inside one base model: the weight is read once for all of them, as in multi-LoRA
serving (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285). Ranks may differ, and a group may have
no adapter here. Groups never meet: what is not a number stays in the rows of its own group.

Kept for backward: x, and the thin products x_g A_g^T. Weight and bias are frozen. Unlike
`lora_linear` nothing is merged: a merged weight would serve one group only.

Legend: N rows, K inputs, M outputs, G groups, r_g an adapter's rank, s_g its scaling.
For the Triton path see grouped_lora_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import choose
from kernels.linear import linear_reference
from kernels.lora_linear import Product, best_product


class Adapter(NamedTuple):
    """Of one group: A (r, K), B (M, r), of the weight's dtype, and s."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


class LowRank(NamedTuple):
    """What is added to the rows start to end: s u B^T, with u (end - start, r) and B (M, r)."""

    start: int
    end: int
    u: Tensor
    lora_b: Tensor
    scaling: float


# (x, weight, bias, updates) -> x W^T + b with the updates, of two-dimensional tensors
Added = Callable[[Tensor, Tensor, Tensor | None, Sequence[LowRank]], Tensor]


def grouped_lora(
    x: Tensor,
    weight: Tensor,
    starts: Sequence[int],
    adapters: Sequence[Adapter | None],
    bias: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """The layer's output, differentiable once by x and by each A and B.

    Args:
        x: (..., K), N rows in all.
        weight: (M, K), frozen.
        starts: G + 1 row numbers, ascending from 0 to N.
        adapters: G; None for rows that the base alone serves.
        bias: (M,), frozen.
        impl: auto, cpu, triton or reference.

    Returns:
        (..., M).

    Raises:
        ValueError: shapes, dtypes or row numbers that do not fit together; a base that trains.
        KernelsNotBuilt: an implementation that cannot run on the device.
    """
    _check(x, weight, starts, adapters, bias)
    match choose(impl, x.device.type).impl:
        case "cpu":
            return apply(_grouped_lora_cpu, x, weight, starts, adapters, bias)
        case "triton":
            from kernels.grouped_lora_triton import grouped_lora_triton

            return grouped_lora_triton(x, weight, starts, adapters, bias)
    return grouped_lora_reference(x, weight, starts, adapters, bias)


def grouped_lora_reference(
    x: Tensor,
    weight: Tensor,
    starts: Sequence[int],
    adapters: Sequence[Adapter | None],
    bias: Tensor | None = None,
) -> Tensor:
    """What is meant: each group's layer by itself."""
    flat = x.reshape(-1, x.shape[-1])
    parts = []
    for (start, end), adapter in zip(pairwise(starts), adapters, strict=True):
        part = linear_reference(flat[start:end], weight, bias)
        if adapter is not None:
            low = linear_reference(flat[start:end], adapter.lora_a)
            part = part + linear_reference(low, adapter.lora_b) * adapter.scaling
        parts.append(part)
    return torch.cat(parts).reshape(*x.shape[:-1], len(weight))


def apply(
    added: Added,
    x: Tensor,
    weight: Tensor,
    starts: Sequence[int],
    adapters: Sequence[Adapter | None],
    bias: Tensor | None,
) -> Tensor:
    """The layer as one differentiable step over an `added`."""
    spans = [
        (start, end, adapter)
        for (start, end), adapter in zip(pairwise(starts), adapters, strict=True)
        if adapter is not None
    ]
    rows = tuple((start, end, adapter.scaling) for start, end, adapter in spans)
    factors = [factor for *_, adapter in spans for factor in (adapter.lora_a, adapter.lora_b)]
    result: Tensor = _GroupedLora.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, rows, added, *factors
    )
    return result


class _GroupedLora(torch.autograd.Function):
    """The layer and its gradients; rows: start, end and scaling of each group with an adapter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: tuple[tuple[int, int, float], ...],
        added: Added,
        *factors: Tensor,
    ) -> Tensor:
        """From (..., K) to (..., M). factors: A and B of each group, in turns."""
        product = best_product(x)
        flat = x.reshape(-1, x.shape[-1])
        updates = [
            LowRank(start, end, product(flat[start:end], a), b, scaling)
            for (start, end, scaling), a, b in zip(rows, factors[::2], factors[1::2], strict=True)
        ]
        y = added(flat, weight, bias, updates)
        trains = any(ctx.needs_input_grad[5:])
        thin = [update.u for update in updates] if trains else []
        ctx.save_for_backward(flat if trains else None, weight, *factors, *thin)
        ctx.rows, ctx.added, ctx.shape = rows, added, x.shape
        return y.reshape(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of each A and B, where they are needed."""
        x, weight, *rest = ctx.saved_tensors
        factors, thin = rest[: 2 * len(ctx.rows)], rest[2 * len(ctx.rows) :]
        needs_x, needs_factors = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        dy = grad.reshape(-1, grad.shape[-1])  # (N, M)
        product = best_product(dy)
        updates: list[LowRank] = []
        gradients: list[Tensor | None] = []
        for place, (start, end, scaling) in enumerate(ctx.rows):
            a, b = factors[2 * place], factors[2 * place + 1]
            needs_a, needs_b = needs_factors[2 * place], needs_factors[2 * place + 1]
            g = product(dy[start:end], b.t()) if needs_x or needs_a else None  # (rows of g, r)
            if needs_x and g is not None:
                updates.append(LowRank(start, end, g, a.t(), scaling))
            gradients.append(_thin(product, g, x, ctx.rows[place]) if needs_a else None)
            by_b = _thin(product, thin[place], dy, ctx.rows[place]).t() if needs_b else None
            gradients.append(by_b)
        dx = ctx.added(dy, weight.t(), None, updates).reshape(ctx.shape) if needs_x else None
        return dx, None, None, None, None, *gradients


def _thin(
    product: Product, low: Tensor | None, wide: Tensor, rows: tuple[int, int, float]
) -> Tensor:
    """The gradient s low^T wide of one group's rows, (r, .), of low (rows, r) and wide (N, .)."""
    assert low is not None
    start, end, scaling = rows
    return product((low * scaling).t(), wide[start:end].t())


def _grouped_lora_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[LowRank]
) -> Tensor:
    """One product for all rows, and each group's update added to its rows in place."""
    y = best_product(x)(x, weight, bias)
    for start, end, u, lora_b, scaling in updates:
        y[start:end].addmm_(u, lora_b.t(), alpha=scaling)
    return y


def _check(
    x: Tensor,
    weight: Tensor,
    starts: Sequence[int],
    adapters: Sequence[Adapter | None],
    bias: Tensor | None,
) -> None:
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs:
        raise ValueError(f"grouped_lora: x {tuple(x.shape)}, weight {tuple(weight.shape)}")
    num_rows = x.numel() // inputs
    is_ascending = all(start <= end for start, end in pairwise(starts))
    if len(starts) < 2 or starts[0] != 0 or starts[-1] != num_rows or not is_ascending:
        raise ValueError(
            f"grouped_lora: starts {list(starts)}; expected to ascend from 0 to {num_rows} rows"
        )
    if len(adapters) != len(starts) - 1:
        raise ValueError(f"grouped_lora: {len(adapters)} adapters of {len(starts) - 1} groups")
    for number, adapter in enumerate(adapters):
        if adapter is None:
            continue
        lora_a, lora_b, _ = adapter
        if lora_a.shape[1:] != (inputs,) or lora_b.shape != (outputs, len(lora_a)):
            shapes = [tuple(t.shape) for t in (weight, lora_a, lora_b)]
            raise ValueError(f"grouped_lora: weight, A and B of group {number} of shapes {shapes}")
        if len({t.dtype for t in (x, weight, lora_a, lora_b)}) > 1:
            dtypes = [t.dtype for t in (x, weight, lora_a, lora_b)]
            raise ValueError(
                f"grouped_lora: x, weight, A and B of group {number} of dtypes {dtypes}; "
                "expected one"
            )
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("grouped_lora: weight and bias are frozen; expected requires_grad=False")
