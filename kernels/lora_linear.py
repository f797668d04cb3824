"""A linear layer with a LoRA adapter: x W^T + b + s (x A^T) B^T, with fewest products and passes.

Hu et al. 2021, arXiv 2106.09685. peft's layer makes three more tensors of the output's size (B's
product, the scaled one, the sum); here the low-rank part is added to the output in place. In fp32
it may also be merged into the weight for one product, W + s B A, which costs r x K x M instead of
N x r x M multiplications, and a pass over the weight instead of one over the output. So forward
merges where N > K, and backward, which multiplies by the transposed weight, where N > M. In 16 bits
a merged weight would lose small updates, and nothing is merged.

Kept for backward: x, and the (N, r) product x A^T where forward made it. The gradient of a frozen
weight is never formed.

Legend: N rows, K inputs, M outputs, r the adapter's rank, s its scaling.
For the Triton path see lora_linear_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import choose
from kernels.linear import linear, linear_reference, takes_onednn

Product = Callable[..., Tensor]  # (x, weight, bias) -> x W^T + b
Added = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], Tensor]


def best_product(like: Tensor) -> Product:
    """The product x W^T + b for tensors like this one: oneDNN's where it wins, else torch's own."""
    is_onednn = like.device.type == "cpu" and like.dtype == torch.float32 and takes_onednn()
    return linear if is_onednn else linear_reference


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """The product x W^T + b + s (x A^T) B^T; differentiable once.

    Args:
        x: (..., K).
        weight: (M, K), usually frozen.
        lora_a: (r, K), of the weight's dtype.
        lora_b: (M, r), of the weight's dtype.
        scaling: s, alpha / r or alpha / sqrt(r).
        bias: (M,).
        impl: auto, cpu, triton or reference.

    Returns:
        (..., M).

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        KernelsNotBuilt: an implementation that cannot run on the device.
    """
    rank, (outputs, inputs) = len(lora_a), weight.shape
    if x.shape[-1] != inputs or lora_a.shape[1] != inputs or lora_b.shape != (outputs, rank):
        shapes = [tuple(t.shape) for t in (x, weight, lora_a, lora_b)]
        raise ValueError(f"lora_linear: x, weight, A and B of shapes {shapes}")
    if len({t.dtype for t in (x, weight, lora_a, lora_b)}) > 1:
        dtypes = [t.dtype for t in (x, weight, lora_a, lora_b)]
        raise ValueError(f"lora_linear: x, weight, A and B of dtypes {dtypes}; expected one")
    match choose(impl, x.device.type).impl:
        case "cpu":
            return _lora_linear_cpu(x, weight, lora_a, lora_b, scaling, bias)
        case "triton":
            from kernels.lora_linear_triton import lora_linear_triton

            return lora_linear_triton(x, weight, lora_a, lora_b, scaling, bias)
    return lora_linear_reference(x, weight, lora_a, lora_b, scaling, bias)


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """What is meant, and what peft computes."""
    low = linear_reference(linear_reference(x, lora_a), lora_b)
    return linear_reference(x, weight, bias) + low * scaling


def _lora_linear_cpu(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None,
) -> Tensor:
    result: Tensor = LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, lora_a, lora_b, scaling, bias, added_by(best_product(x))
    )
    return result


def added_by(product: Product) -> Added:
    """The low-rank update added to a product: x W^T + b + s u B^T, of two-dimensional tensors."""

    def added(
        x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        return product(x, weight, bias).addmm_(u, b.t(), alpha=scaling)

    return added


class LoraLinear(torch.autograd.Function):
    """The layer and its gradients over an `added` that computes x W^T + b + s u B^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        bias: Tensor | None,
        added: Added,
    ) -> Tensor:
        """From (..., K) to (..., M)."""
        product = best_product(x)
        flat = x.reshape(-1, x.shape[-1])
        u = None
        if _is_merged(flat, limit=weight.shape[1]):
            y = product(flat, merged(weight, lora_a, lora_b, scaling), bias)
        else:
            u = product(flat, lora_a)
            y = added(flat, weight, bias, u, lora_b, scaling)
        needs_x, needs_weight, needs_a, needs_b, *_ = ctx.needs_input_grad
        # x serves the gradients of W and A, and of B where u was not made.
        keeps_x = needs_weight or needs_a or (needs_b and u is None)
        ctx.save_for_backward(
            flat if keeps_x else None, weight, lora_a, lora_b, u if needs_b else None
        )
        ctx.scaling, ctx.added, ctx.shape = scaling, added, x.shape
        return y.reshape(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, W, A, B and the bias, where they are needed."""
        x, weight, lora_a, lora_b, u = ctx.saved_tensors
        needs_x, needs_weight, needs_a, needs_b, _, needs_bias, _ = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])  # (N, M)
        product = best_product(dy)
        is_merged = _is_merged(dy, limit=weight.shape[0])
        g = product(dy, lora_b.t()) if needs_a or (needs_x and not is_merged) else None  # (N, r)
        dx = da = db = None
        if needs_x and is_merged:
            dx = product(dy, merged(weight, lora_a, lora_b, ctx.scaling).t())
        elif needs_x:
            dx = ctx.added(dy, weight.t(), None, g, lora_a.t(), ctx.scaling)
        if needs_a:
            assert g is not None
            da = product((g * ctx.scaling).t(), x.t())
        if needs_b:
            u = product(x, lora_a) if u is None else u
            # As the transpose of a product of few rows: 49 against 300 microseconds for 386 rows.
            db = product((u * ctx.scaling).t(), dy.t()).t()
        return (
            None if dx is None else dx.reshape(ctx.shape),
            product(dy.t(), x.t()) if needs_weight else None,
            da,
            db,
            None,
            dy.sum(0) if needs_bias else None,
            None,
        )


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """The weight with its adapter, W + s B A, (M, K)."""
    return torch.addmm(weight, lora_b, lora_a, alpha=scaling)


def _is_merged(rows: Tensor, *, limit: int) -> bool:
    """Whether one merged product costs fewer operations: rows (N, .) against K or M."""
    return rows.dtype in (torch.float32, torch.float64) and len(rows) > limit
