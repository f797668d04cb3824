"""The Triton path of `shared_prefix_attention`: one kernel, nothing materialised.

The queries of the whole batch, and the GROUP query heads that read one key head, are folded into
one long query: row r is query r // GROUP under head r % GROUP of the group. A program takes M such
rows of one key head, walks the prefix once for all of them, then the own keys of each segment that
its rows belong to. The online softmax keeps a maximum, a sum and weighted values for each row, all
fp32; scores are in base 2, because exp2 is what the hardware has.

Inputs are fp16, bf16 or fp32. fp32 products are "ieee": TF32 would be off by 1e-3.
No GPU was at hand when this was written: it is checked in Triton's interpreter and compiled for
sm_80, sm_90 and sm_100; nothing is claimed about its speed.

Legend: Hq query heads, Hkv key heads, T queries, N own keys, P prefix keys, S segments,
M rows of a program, K keys of a block, D width of a head.
"""
# Triton compiles the source of its functions: their arguments have no Python types.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.segments import Segments
from kernels.triton_tools import Instance, refuse_interpreted_bf16

LOG2_E = 1.4426950408889634
WIDTHS = (16, 32, 64, 128)  # of a head
WARPS = 8


@triton.jit
def shared_prefix_attention_kernel(
    query,  # (pointer to (Hq, T, D), stride of a head, stride of a row); the others alike
    key,  # (Hkv, N, D)
    value,  # (Hkv, N, D)
    prefix_key,  # (Hkv, P, D)
    prefix_value,  # (Hkv, P, D)
    out,  # (Hq, T, D)
    segment_of_ptr,  # (T,) int64, as all below
    columns_ptr,  # (T,)
    ends_ptr,  # (N,)
    key_starts_ptr,  # (S,)
    key_lengths_ptr,  # (S,)
    num_queries,  # T
    prefix_length,  # P
    scale_log2,  # scale * log2(e)
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (blocks of T * GROUP rows, Hkv)."""
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = row // GROUP  # (M,) the query
    head = kv_head * GROUP + row % GROUP
    is_row = place < num_queries
    column = tl.load(columns_ptr + place, mask=is_row, other=-1)
    segment = tl.load(segment_of_ptr + place, mask=is_row, other=-1)
    at = head[:, None] * query[1] + place[:, None] * query[2] + tl.arange(0, D)[None, :]
    rows = tl.load(query[0] + at, mask=is_row[:, None], other=0.0)  # (M, D)

    # A finite first maximum: a row that sees nothing keeps the sum 0 and never meets inf - inf.
    maximum = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, D], tl.float32)
    maximum, total, mixed = _attend(
        rows, prefix_key, prefix_value, kv_head, 0, prefix_length, is_row, column, ends_ptr,
        scale_log2, maximum, total, mixed, False, BLOCK_K,
    )  # fmt: skip
    first = tl.program_id(0) * BLOCK_M // GROUP
    last = tl.minimum((tl.program_id(0) * BLOCK_M + BLOCK_M - 1) // GROUP, num_queries - 1)
    for s in range(tl.load(segment_of_ptr + first), tl.load(segment_of_ptr + last) + 1):
        maximum, total, mixed = _attend(
            rows, key, value, kv_head, tl.load(key_starts_ptr + s), tl.load(key_lengths_ptr + s),
            segment == s, column, ends_ptr,
            scale_log2, maximum, total, mixed, True, BLOCK_K,
        )  # fmt: skip

    mixed /= tl.where(total == 0.0, 1.0, total)[:, None]  # a row that sees nothing: 0 / 1
    at = head[:, None] * out[1] + place[:, None] * out[2] + tl.arange(0, D)[None, :]
    tl.store(out[0] + at, mixed.to(out[0].dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _attend(
    rows, keys, values, kv_head, start, length, is_mine, column, ends_ptr,
    scale_log2, maximum, total, mixed, HAS_ENDS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The rows (M, D) to the keys start..start + length of one head: the running softmax after.

    HAS_ENDS: a row sees a key where column of the key <= column of the row < end of the key.
    """
    width = tl.arange(0, rows.shape[1])[None, :]
    for block in range(0, length, BLOCK_K):
        own = block + tl.arange(0, BLOCK_K)  # (K,) columns
        is_key = own < length
        place = (start + own)[:, None]
        key_at = keys[0] + kv_head * keys[1] + place * keys[2] + width
        value_at = values[0] + kv_head * values[1] + place * values[2] + width
        key = tl.load(key_at, mask=is_key[:, None], other=0.0)  # (K, D)
        value = tl.load(value_at, mask=is_key[:, None], other=0.0)
        is_visible = is_mine[:, None] & is_key[None, :]  # (M, K)
        if HAS_ENDS:
            end = tl.load(ends_ptr + start + own, mask=is_key, other=0)
            is_visible &= (own[None, :] <= column[:, None]) & (column[:, None] < end[None, :])
        scores = tl.dot(rows, tl.trans(key), input_precision="ieee") * scale_log2
        scores = tl.where(is_visible, scores, float("-inf"))
        risen = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.exp2(scores - risen[:, None])
        shrink = tl.exp2(maximum - risen)
        total = total * shrink + tl.sum(weights, axis=1)
        added = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        mixed = mixed * shrink[:, None] + added
        maximum = risen
    return maximum, total, mixed


def shared_prefix_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    segments: Segments,
    scale: float,
) -> Tensor:
    """See `shared_prefix_attention`; d is 16, 32, 64 or 128, and all have the query's dtype.

    Raises:
        ValueError: for another width.
    """
    num_heads, num_queries, width = query.shape
    refuse_interpreted_bf16(query.dtype)
    if width not in WIDTHS:
        raise ValueError(f"shared_prefix_attention: d = {width}; the Triton path takes {WIDTHS}")
    # (T, Hq, d) in memory, so that the caller's reshape to (T, Hq * d) is free.
    out = query.new_empty(num_queries, num_heads, width).transpose(0, 1)
    if out.numel() == 0:
        return out
    group = num_heads // len(key)
    tile = _tile(is_fp32=query.dtype == torch.float32)
    grid = (triton.cdiv(num_queries * group, tile["BLOCK_M"]), len(key))
    shared_prefix_attention_kernel[grid](
        *(_strided(x) for x in (query, key, value, prefix_key, prefix_value, out)),
        segments.segment_of,
        segments.columns,
        segments.ends,
        segments.key_starts,
        segments.key_lengths,
        num_queries,
        prefix_key.shape[1],
        scale * LOG2_E,
        GROUP=group,
        D=width,
        **tile,
        num_warps=WARPS,
    )
    return out


def _tile(*, is_fp32: bool) -> dict[str, int]:
    """The largest tiles that keep d = 128 in registers on sm_80 to sm_100."""
    return {"BLOCK_M": 32 if is_fp32 else 64, "BLOCK_K": 32}


def _strided(x: Tensor) -> tuple[Tensor, int, int]:
    """A tensor (H, rows, d) as the kernel takes it."""
    return x, x.stride(0), x.stride(1)


def instances(dtype: str) -> list[Instance]:
    """What is compiled ahead of time: every width, with the embedded model's group of 3 heads."""
    rows = dict.fromkeys(
        ("query", "key", "value", "prefix_key", "prefix_value", "out"), (f"*{dtype}", "i32", "i32")
    )
    names = ("segment_of_ptr", "columns_ptr", "ends_ptr", "key_starts_ptr", "key_lengths_ptr")
    types = rows | dict.fromkeys(names, "*i64")
    types |= {"num_queries": "i32", "prefix_length": "i32", "scale_log2": "fp32"}
    tile = _tile(is_fp32=dtype == "fp32")
    return [
        Instance(
            kernel=shared_prefix_attention_kernel,
            types=types,
            constants={"GROUP": 3, "D": width} | tile,
            num_warps=WARPS,
        )
        for width in WIDTHS
    ]
