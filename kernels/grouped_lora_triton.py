"""The Triton path of `grouped_lora`: each tile of rows belongs to one group and adds its update.

    grouped_lora_kernel    x W^T + b + s_g u_g B_g^T: as lora_linear_kernel, but rows, group and
                           scaling of a program stand in a table, so that one launch serves all

Tiles are cut by group, so a group of few rows fills its last tile in part only. Ranks are padded
with zeros to the largest: next to the weight's product that is little. Backward calls it with the
transposed weights. Thin products are torch's own. Sums are fp32, and fp32 products are "ieee".
No GPU was at hand: see shared_prefix_attention_triton.py for what was checked without one.

Legend: N rows, K inputs, M outputs, G groups with an adapter, r the largest rank.
"""
# Triton compiles the source of its functions: their arguments have no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.grouped_lora import Adapter, LowRank, apply
from kernels.triton_tools import DTYPES, Instance, refuse_interpreted_bf16

ROWS, COLUMNS, WIDTH, LOW = 64, 64, 32, 16  # of a program's tile; LOW: of r at a time
WARPS, WARPS_FP32 = 4, 8  # with 4 warps fp32 spills on sm_80
NO_GROUP = -1


@triton.jit
def grouped_lora_kernel(
    x_ptr,  # (N, K) contiguous
    weight_ptr,  # (M, K)
    bias_ptr,  # (M,), or anything where there is none
    u_ptr,  # (N, r) contiguous
    b_ptr,  # (G, M, r) contiguous
    tiles_ptr,  # (tiles, 3) int32 contiguous: first row, row after the last, group or -1
    scalings_ptr,  # (G,) fp32
    out_ptr,  # (N, M) contiguous
    num_columns,
    width,
    weight_row,  # strides
    weight_column,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOW: tl.constexpr,
):
    """Grid: (tiles, blocks of columns)."""
    tile = tiles_ptr + tl.program_id(0) * 3
    first, end, group = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    row = first.to(tl.int64) + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row[:, None] < end, column[:, None] < num_columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if group >= 0:
        own = b_ptr + group.to(tl.int64) * num_columns * R
        for left in range(0, R, LOW):
            place = left + tl.arange(0, LOW)[None, :]
            u = tl.load(u_ptr + row[:, None] * R + place, mask=is_row & (place < R), other=0.0)
            at = column[:, None] * R + place
            b = tl.load(own + at, mask=is_column & (place < R), other=0.0)
            total = tl.dot(u, tl.trans(b), acc=total, input_precision="ieee")
        total *= tl.load(scalings_ptr + group)
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


def _added(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[LowRank]) -> Tensor:
    """The product x W^T + b with the updates, of x (N, K) and weight (M, K)."""
    x = x.contiguous()
    (num_rows, width), num_columns = x.shape, len(weight)
    out = x.new_empty(num_rows, num_columns)
    if out.numel() == 0:
        return out
    lora_rank = max((update.u.shape[1] for update in updates), default=1)
    u = x.new_zeros(num_rows, lora_rank)
    b = x.new_zeros(max(1, len(updates)), num_columns, lora_rank)
    for group, (start, end, thin, lora_b, _) in enumerate(updates):
        u[start:end, : thin.shape[1]] = thin
        b[group, :, : thin.shape[1]] = lora_b
    tiles = _tiles(num_rows, updates)
    scalings = torch.tensor([update.scaling for update in updates] or [0.0], device=x.device)
    grouped_lora_kernel[(len(tiles), triton.cdiv(num_columns, COLUMNS))](
        x, weight, x if bias is None else bias, u, b, tiles.to(x.device), scalings, out,
        num_columns, width, *weight.stride(), R=lora_rank, HAS_BIAS=bias is not None,
        ROWS=ROWS, COLUMNS=COLUMNS, WIDTH=WIDTH, LOW=LOW,
        num_warps=WARPS_FP32 if x.dtype == torch.float32 else WARPS,
    )  # fmt: skip
    return out


def _tiles(num_rows: int, updates: Sequence[LowRank]) -> Tensor:
    """First row, row after the last and group of each tile, (tiles, 3) int32; all rows, once."""
    spans, done = [], 0
    for group, update in enumerate(updates):
        spans += [(done, update.start, NO_GROUP), (update.start, update.end, group)]
        done = update.end
    spans.append((done, num_rows, NO_GROUP))
    tiles = [
        (first, min(first + ROWS, end), group)
        for start, end, group in spans
        for first in range(start, end, ROWS)
    ]
    return torch.tensor(tiles, dtype=torch.int32)


def grouped_lora_triton(
    x: Tensor,
    weight: Tensor,
    starts: Sequence[int],
    adapters: Sequence[Adapter | None],
    bias: Tensor | None = None,
) -> Tensor:
    """See `grouped_lora`."""
    refuse_interpreted_bf16(weight.dtype)
    return apply(_added, x, weight, starts, adapters, bias)


def instances(dtype: str) -> list[Instance]:
    """What is compiled ahead of time: forward's and backward's strides differ at run time only."""
    assert dtype in DTYPES
    names = ("x_ptr", "weight_ptr", "bias_ptr", "u_ptr", "b_ptr", "out_ptr")
    numbers = ("num_columns", "width", "weight_row", "weight_column")
    return [
        Instance(
            kernel=grouped_lora_kernel,
            types=dict.fromkeys(names, f"*{dtype}")
            | dict.fromkeys(numbers, "i32")
            | {"tiles_ptr": "*i32", "scalings_ptr": "*fp32"},
            constants={"R": 16, "HAS_BIAS": True, "ROWS": ROWS, "COLUMNS": COLUMNS}
            | {"WIDTH": WIDTH, "LOW": LOW},
            num_warps=WARPS_FP32 if dtype == "fp32" else WARPS,
        )
    ]
