"""The Triton path of `linear_cross_entropy`: one kernel between products of the vendor's library.

    cross_entropy_kernel   takes a block of rows of raw logits to their losses and, in the same
                           place, to the loss's gradient by raw logits

A block of rows has at most TILE_BYTES of fp32 logits, over all of the vocabulary. Its gradients go
through two more products, in the weight's dtype as in a plain backward. A frozen head takes one.
No GPU was at hand: see shared_prefix_attention_triton.py for what was checked without one.

Legend: R rows of a block, D width, V vocabulary.
"""
# Triton compiles the source of its functions: their arguments have no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.linear_cross_entropy import LossAndGradients, Shaping
from kernels.triton_tools import DTYPES, Instance, refuse_interpreted_bf16

TILE_BYTES = 256 * 2**20  # of fp32 logits; 512 rows at a vocabulary of 131,072
BLOCK, WARPS = 4096, 8  # tokens of the vocabulary at a time


@triton.jit
def _logit(
    row_ptr,
    bias_ptr,
    token,
    is_token,
    scale,
    soft_cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """The logits z of some tokens and their slopes dz / d raw; tanh x = 2 sigmoid(2x) - 1."""
    z = tl.load(row_ptr + token, mask=is_token, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + token, mask=is_token, other=0.0).to(tl.float32)
    z = z * scale
    slope = tl.zeros_like(z) + scale
    if HAS_CAP:
        capped = 2.0 * tl.sigmoid(2.0 * z / soft_cap) - 1.0
        slope = scale * (1.0 - capped * capped)
        z = soft_cap * capped
    return z, slope


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # (R, V) fp32, raw
    bias_ptr,  # (V,), or anything where there is none
    targets_ptr,  # (R,) int64
    loss_ptr,  # (R,) fp32
    grad_ptr,  # (R, V), may be the logits
    vocabulary,
    scale,
    soft_cap,
    label_smoothing,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: rows. A target out of range gives nan."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * vocabulary
    target = tl.load(targets_ptr + row)
    is_inside = (target >= 0) & (target < vocabulary)
    # First of all: gradients will lie where logits do, and only reductions hold warps together.
    hit, _ = _logit(
        row_ptr, bias_ptr, target, is_inside, scale, soft_cap, HAS_BIAS=HAS_BIAS, HAS_CAP=HAS_CAP
    )
    share = label_smoothing / vocabulary
    maximum = tl.full([BLOCK], -1e30, tl.float32)  # finite: a block of -inf logits adds nothing
    total, plain = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        is_token = token < vocabulary
        z, slope = _logit(
            row_ptr, bias_ptr, token, is_token, scale, soft_cap, HAS_BIAS=HAS_BIAS, HAS_CAP=HAS_CAP
        )
        plain += tl.where(is_token, z, 0.0)
        z = tl.where(is_token, z, float("-inf"))
        risen = tl.maximum(maximum, z)
        total = total * tl.exp(maximum - risen) + tl.exp(z - risen)  # nan stays here
        maximum = risen
    highest = tl.max(maximum, axis=0)
    lse = highest + tl.log(tl.sum(total * tl.exp(maximum - highest), axis=0))
    loss = lse - (1.0 - label_smoothing) * hit
    if label_smoothing > 0.0:  # 0 times an infinite sum would be nan
        loss -= share * tl.sum(plain, axis=0)
    tl.store(loss_ptr + row, tl.where(is_inside, loss, float("nan")))
    if HAS_GRAD:
        for start in range(0, vocabulary, BLOCK):
            token = start + tl.arange(0, BLOCK)
            is_token = token < vocabulary
            z, slope = _logit(
                row_ptr, bias_ptr, token, is_token, scale, soft_cap, HAS_BIAS=HAS_BIAS,
                HAS_CAP=HAS_CAP,
            )  # fmt: skip
            wanted = tl.where(token == target, 1.0 - label_smoothing, 0.0) + share
            grad = (tl.exp(z - lse) - wanted) * slope
            at = grad_ptr + row * vocabulary + token
            tl.store(at, grad.to(grad_ptr.dtype.element_ty), mask=is_token)


def linear_cross_entropy_triton(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    shaping: Shaping,
    needs: tuple[bool, ...],
) -> LossAndGradients:
    """See `linear_cross_entropy`; fp32 logits, other products in the weight's dtype."""
    refuse_interpreted_bf16(weight.dtype)
    out = LossAndGradients.zeros(hidden, weight, bias, needs=needs)
    size = max(1, TILE_BYTES // (4 * len(weight)))
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        x = hidden[rows].to(weight.dtype)
        losses, grad = _block(x, weight, targets[rows], bias, shaping, has_grad=any(needs))
        out.losses[rows] = losses
        if out.hidden is not None:
            out.hidden[rows] = grad @ weight
        if out.weight is not None:
            out.weight += grad.t() @ x
        if out.bias is not None:
            out.bias += grad.sum(0, dtype=out.bias.dtype)
    return out


def _block(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    shaping: Shaping,
    *,
    has_grad: bool,
) -> tuple[Tensor, Tensor]:
    """R losses, and the gradient of their sum by raw logits, (R, V), in the weight's dtype."""
    logits = _logits(x, weight)
    losses = logits.new_empty(len(x))
    is_in_place = not has_grad or weight.dtype == logits.dtype
    grad = logits if is_in_place else torch.empty_like(logits, dtype=weight.dtype)
    cap = 0.0 if shaping.soft_cap is None else shaping.soft_cap
    cross_entropy_kernel[(len(x),)](
        logits, logits if bias is None else bias, targets.contiguous(), losses, grad,
        len(weight), shaping.scale, cap, shaping.label_smoothing,
        HAS_BIAS=bias is not None, HAS_CAP=shaping.soft_cap is not None, HAS_GRAD=has_grad,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return losses, grad


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """The product x W^T in fp32: 16-bit logits above 16 would be off by up to 0.06."""
    if x.dtype == torch.float32:
        return x @ weight.t()
    if x.is_cuda:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return x.float() @ weight.float().t()  # in the interpreter


def instances(dtype: str) -> list[Instance]:
    """What is compiled ahead of time: with all that may happen to a logit."""
    assert dtype in DTYPES
    numbers = dict.fromkeys(("scale", "soft_cap", "label_smoothing"), "fp32")
    pointers = {"bias_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}", "targets_ptr": "*i64"}
    return [
        Instance(
            kernel=cross_entropy_kernel,
            types={"logits_ptr": "*fp32", "loss_ptr": "*fp32", "vocabulary": "i32"}
            | pointers
            | numbers,
            constants={"HAS_BIAS": True, "HAS_CAP": True, "HAS_GRAD": True, "BLOCK": BLOCK},
            num_warps=WARPS,
        )
    ]
