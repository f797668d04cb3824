"""The Triton path of `token_logprobs`: two kernels, and a log-sum-exp over a few numbers a row.

    row_lse_kernel         takes rows and one slab of the vocabulary, block by block, and leaves
                           the slab's log-sum-exp: (rows, slabs), never (rows, vocabulary)
    target_logits_kernel   takes wanted (row, token) pairs and forms only their dot products

Slabs let many programs work on few rows; one logsumexp joins them. Sums are fp32, and fp32 products
are "ieee" (TF32 would be off by 1e-3). A target's logit is summed in another order than inside the
log-sum-exp, which costs a rounding and saves a search.
No GPU was at hand: see shared_prefix_attention_triton.py for what was checked without one.

Legend: R rows, D width, V vocabulary, K wanted pairs.
"""
# Triton compiles the source of its functions: their arguments have no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.token_logprobs import Head
from kernels.triton_tools import DTYPES, Instance, refuse_interpreted_bf16

ROWS, COLUMNS, WIDTH, WARPS = 64, 64, 32, 4  # of a program's tile
PAIRS, PAIR_WIDTH = 16, 128


@triton.jit
def _shaped(logits, scale, soft_cap, HAS_CAP: tl.constexpr):
    """soft_cap * tanh(scale * logits / soft_cap); tanh x = 2 sigmoid(2x) - 1."""
    logits = logits * scale
    if HAS_CAP:
        logits = soft_cap * (2.0 * tl.sigmoid(2.0 * logits / soft_cap) - 1.0)
    return logits


@triton.jit
def row_lse_kernel(
    hidden_ptr,  # (R, D) contiguous
    weight_ptr,  # (V, D) contiguous
    bias_ptr,  # (V,), or anything where there is none
    lse_ptr,  # (R, slabs) fp32
    num_rows,
    vocabulary,
    slab,  # tokens of a slab
    scale,
    soft_cap,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: (blocks of rows, slabs)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    maximum = tl.full([ROWS], -1e30, tl.float32)  # finite: a block of -inf logits adds nothing
    total = tl.zeros([ROWS], tl.float32)
    first = tl.program_id(1) * slab
    for start in range(first, tl.minimum(first + slab, vocabulary), COLUMNS):
        token = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        is_token = token < tl.minimum(first + slab, vocabulary)
        logits = tl.zeros([ROWS, COLUMNS], tl.float32)
        for left in range(0, D, WIDTH):
            place = left + tl.arange(0, WIDTH)
            is_place = place[None, :] < D
            at = row[:, None] * D + place[None, :]
            x = tl.load(hidden_ptr + at, mask=is_row[:, None] & is_place, other=0.0)
            at = token[:, None] * D + place[None, :]
            w = tl.load(weight_ptr + at, mask=is_token[:, None] & is_place, other=0.0)
            logits = tl.dot(x, tl.trans(w), acc=logits, input_precision="ieee")
        if HAS_BIAS:
            logits += tl.load(bias_ptr + token, mask=is_token, other=0.0).to(tl.float32)[None, :]
        logits = _shaped(logits, scale, soft_cap, HAS_CAP)
        logits = tl.where(is_token[None, :], logits, float("-inf"))
        risen = tl.maximum(maximum, tl.max(logits, axis=1))
        total = total * tl.exp(maximum - risen) + tl.sum(tl.exp(logits - risen[:, None]), axis=1)
        maximum = risen
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(lse_ptr + at, maximum + tl.log(total), mask=is_row)


@triton.jit
def target_logits_kernel(
    hidden_ptr,  # (R, D) contiguous
    weight_ptr,  # (V, D) contiguous
    bias_ptr,  # (V,), or anything where there is none
    rows_ptr,  # (K,) int64
    tokens_ptr,  # (K,) int64
    logits_ptr,  # (K,) fp32
    num_pairs,
    num_rows,
    vocabulary,
    scale,
    soft_cap,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_WIDTH: tl.constexpr,
):
    """Grid: blocks of pairs. A pair out of range gives nan."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    is_pair = pair < num_pairs
    row = tl.load(rows_ptr + pair, mask=is_pair, other=-1)
    token = tl.load(tokens_ptr + pair, mask=is_pair, other=-1)
    is_inside = (row >= 0) & (row < num_rows) & (token >= 0) & (token < vocabulary)
    logits = tl.zeros([PAIRS], tl.float32)
    for left in range(0, D, PAIR_WIDTH):
        place = left + tl.arange(0, PAIR_WIDTH)
        is_there = is_inside[:, None] & (place[None, :] < D)
        x = tl.load(hidden_ptr + row[:, None] * D + place[None, :], mask=is_there, other=0.0)
        w = tl.load(weight_ptr + token[:, None] * D + place[None, :], mask=is_there, other=0.0)
        logits += tl.sum(x.to(tl.float32) * w.to(tl.float32), axis=1)
    if HAS_BIAS:
        logits += tl.load(bias_ptr + token, mask=is_inside, other=0.0).to(tl.float32)
    logits = _shaped(logits, scale, soft_cap, HAS_CAP)
    tl.store(logits_ptr + pair, tl.where(is_inside, logits, float("nan")), mask=is_pair)


def token_logprobs_triton(hidden: Tensor, head: Head, rows: Tensor, tokens: Tensor) -> Tensor:
    """See `token_logprobs`; products are of the weight's dtype, sums fp32."""
    refuse_interpreted_bf16(head.weight.dtype)
    hidden, weight = hidden.to(head.weight.dtype).contiguous(), head.weight.contiguous()
    (num_rows, width), vocabulary, num_pairs = hidden.shape, len(weight), len(rows)
    if num_pairs == 0:
        return hidden.new_empty(0, dtype=torch.float32)
    bias = weight if head.bias is None else head.bias
    slabs = triton.cdiv(vocabulary, head.chunk)
    lse = hidden.new_empty(num_rows, slabs, dtype=torch.float32)
    target = hidden.new_empty(num_pairs, dtype=torch.float32)
    cap = 0.0 if head.soft_cap is None else head.soft_cap
    flags = {"D": width, "HAS_BIAS": head.bias is not None, "HAS_CAP": head.soft_cap is not None}
    row_lse_kernel[(triton.cdiv(num_rows, ROWS), slabs)](
        hidden, weight, bias, lse, num_rows, vocabulary, head.chunk, head.scale, cap,
        **flags, ROWS=ROWS, COLUMNS=COLUMNS, WIDTH=WIDTH, num_warps=WARPS,
    )  # fmt: skip
    target_logits_kernel[(triton.cdiv(num_pairs, PAIRS),)](
        hidden, weight, bias, rows, tokens, target, num_pairs, num_rows, vocabulary,
        head.scale, cap, **flags, PAIRS=PAIRS, PAIR_WIDTH=PAIR_WIDTH,
    )  # fmt: skip
    return target - lse.logsumexp(dim=1)[rows.clamp(0, num_rows - 1)]


def instances(dtype: str) -> list[Instance]:
    """What is compiled ahead of time: the embedded model's width, with bias and soft cap."""
    assert dtype in DTYPES
    flags = {"D": 576, "HAS_BIAS": True, "HAS_CAP": True}
    data = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr"), f"*{dtype}")
    shape = {"num_rows": "i32", "vocabulary": "i32", "scale": "fp32", "soft_cap": "fp32"}
    lse = Instance(
        kernel=row_lse_kernel,
        types=data | shape | {"lse_ptr": "*fp32", "slab": "i32"},
        constants=flags | {"ROWS": ROWS, "COLUMNS": COLUMNS, "WIDTH": WIDTH},
        num_warps=WARPS,
    )
    pairs = {"rows_ptr": "*i64", "tokens_ptr": "*i64", "logits_ptr": "*fp32", "num_pairs": "i32"}
    target = Instance(
        kernel=target_logits_kernel,
        types=data | shape | pairs,
        constants=flags | {"PAIRS": PAIRS, "PAIR_WIDTH": PAIR_WIDTH},
        num_warps=4,
    )
    return [lse, target]
