"""The Triton path of `lora_linear`: the low-rank update is added while the product is in registers.

    lora_linear_kernel     x W^T + b + s u B^T with u = x A^T: one more step of the sum over K,
                           r wide, so that the output is written once and never read

Backward calls it with the transposed weights: dx = dy W + s (dy B) A. The thin products (u, dy B
and the gradients of A and B) are torch's own. Sums are fp32, and fp32 products are "ieee".
No GPU was at hand: see shared_prefix_attention_triton.py for what was checked without one.

Legend: N rows, K inputs, M outputs, r the adapter's rank, s its scaling.
"""
# Triton compiles the source of its functions: their arguments have no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.lora_linear import LoraLinear
from kernels.triton_tools import DTYPES, Instance, refuse_interpreted_bf16

ROWS, COLUMNS, WIDTH, LOW = 64, 64, 32, 16  # of a program's tile; LOW: of r at a time
WARPS, WARPS_FP32 = 4, 8  # with 4 warps fp32 spills on sm_80


@triton.jit
def lora_linear_kernel(
    x_ptr,  # (N, K) contiguous
    weight_ptr,  # (M, K)
    bias_ptr,  # (M,), or anything where there is none
    u_ptr,  # (N, r) contiguous
    b_ptr,  # (M, r)
    out_ptr,  # (N, M) contiguous
    num_rows,
    num_columns,
    width,
    weight_row,  # strides
    weight_column,
    b_row,
    b_column,
    scaling,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
):
    """Grid: (blocks of rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row[:, None] < num_rows, column[:, None] < num_columns
    low = tl.zeros([ROWS, COLUMNS], tl.float32)
    for left in range(0, R, LOW):
        place = left + tl.arange(0, LOW)[None, :]
        u = tl.load(u_ptr + row[:, None] * R + place, mask=is_row & (place < R), other=0.0)
        at = column[:, None] * b_row + place * b_column
        b = tl.load(b_ptr + at, mask=is_column & (place < R), other=0.0)
        low = tl.dot(u, tl.trans(b), acc=low, input_precision="ieee")
    total = low * scaling
    for left in range(0, width, WIDTH):
        place = left + tl.arange(0, WIDTH)[None, :]
        is_place = place < width
        x = tl.load(x_ptr + row[:, None] * width + place, mask=is_row & is_place, other=0.0)
        at = column[:, None] * weight_row + place.to(tl.int64) * weight_column
        w = tl.load(weight_ptr + at, mask=is_column & is_place, other=0.0)
        total = tl.dot(x, tl.trans(w), acc=total, input_precision="ieee")
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=column < num_columns, other=0.0).to(tl.float32)
    at = row[:, None] * num_columns + column
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), is_row & (column < num_columns))


def _added(
    x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """The product x W^T + b + s u B^T, of x (N, K), weight (M, K), u (N, r) and b (M, r)."""
    x, u = x.contiguous(), u.contiguous()
    (num_rows, width), num_columns = x.shape, len(weight)
    out = x.new_empty(num_rows, num_columns)
    if out.numel() == 0:
        return out
    lora_linear_kernel[(triton.cdiv(num_rows, ROWS), triton.cdiv(num_columns, COLUMNS))](
        x, weight, x if bias is None else bias, u, b, out, num_rows, num_columns, width,
        *weight.stride(), *b.stride(), scaling, R=u.shape[1], HAS_BIAS=bias is not None,
        ROWS=ROWS, COLUMNS=COLUMNS, WIDTH=WIDTH, LOW=LOW,
        num_warps=WARPS_FP32 if x.dtype == torch.float32 else WARPS,
    )  # fmt: skip
    return out


def lora_linear_triton(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """See `lora_linear`."""
    refuse_interpreted_bf16(weight.dtype)
    result: Tensor = LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, lora_a, lora_b, scaling, bias, _added
    )
    return result


def instances(dtype: str) -> list[Instance]:
    """What is compiled ahead of time: forward's and backward's strides differ at run time only."""
    assert dtype in DTYPES
    names = ("x_ptr", "weight_ptr", "bias_ptr", "u_ptr", "b_ptr", "out_ptr")
    numbers = ("num_rows", "num_columns", "width", "weight_row", "weight_column")
    return [
        Instance(
            kernel=lora_linear_kernel,
            types=dict.fromkeys(names, f"*{dtype}")
            | dict.fromkeys((*numbers, "b_row", "b_column"), "i32")
            | {"scaling": "fp32"},
            constants={"R": 16, "HAS_BIAS": True, "ROWS": ROWS, "COLUMNS": COLUMNS}
            | {"WIDTH": WIDTH, "LOW": LOW},
            num_warps=WARPS_FP32 if dtype == "fp32" else WARPS,
        )
    ]
