"""Attention of many rows to one prefix that they share, and to rows of their own.

Instruction and shots are the same for every item of a batch, so their keys and values exist once,
and every query of the batch reads that one copy. Each query also sees some own rows (`Segments`:
its item so far, or its branch of a tree of labels). With scores s = scale * q k, the two softmaxes
are merged exactly by their log-sum-exps:

    out = w * out_prefix + (1 - w) * out_own,    w = sigmoid(lse_prefix - lse_own)

Legend: Hq query heads, Hkv key heads (Hq a multiple: grouped-query attention), T queries,
N own keys, P prefix keys, d width of a head, S segments, L rows of the longest segment.
The CPU and the Triton path are in files of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import choose
from kernels.segments import Segments
from kernels.shared_prefix_attention_cpu import (
    differentiable_attention_cpu,
    shared_prefix_attention_cpu,
)


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    prefix_key: Tensor,
    prefix_value: Tensor,
    segments: Segments,
    scale: float,
    prefix_from: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Each query over the whole prefix and the own keys it sees; a query that sees none gives 0.

    Any strides, the last dimension contiguous. Rows that nobody sees still take part with weight
    0, so they must be finite: fill a fresh cache with zeros. fp32, or 16 bit with fp32 sums.
    torch's CPU kernel, here as in its own attention, gives 0 for a row whose scores are all nan.
    Differentiable once by all five tensors, except with impl=triton.

    Args:
        query: (Hq, T, d).
        key: (Hkv, N, d).
        value: (Hkv, N, d).
        prefix_key: (Hkv, P, d), P may be 0.
        prefix_value: (Hkv, P, d).
        segments: which own keys each query sees.
        scale: multiplies q k, usually d ** -0.5.
        prefix_from: the first query that sees the prefix; those before see own keys alone. So the
            prefix's own rows can stand in front, as a segment, when they are computed too.
        impl: auto, cpu, triton or reference.

    Returns:
        (Hq, T, d) in the query's dtype.

    Raises:
        ValueError: shapes that do not belong together, or gradients or a prefix_from asked of the
            Triton path, which has neither.
    """
    _check_shapes(query, key, value, prefix_key, prefix_value, segments)
    tensors = (query, key, value, prefix_key, prefix_value)
    name = choose(impl, query.device.type).impl
    if name == "triton":
        _check_triton(*tensors, prefix_from=prefix_from)
        return _shared_prefix_attention_triton(*tensors, segments, scale)
    if name == "reference":
        return shared_prefix_attention_reference(*tensors, segments, scale, prefix_from)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return differentiable_attention_cpu(*tensors, segments, scale, prefix_from)
    return shared_prefix_attention_cpu(*tensors, segments, scale, prefix_from)[0]


def shared_prefix_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    segments: Segments,
    scale: float,
    prefix_from: int = 0,
) -> Tensor:
    """What is meant: one dense softmax in fp32 (fp64 for fp64) over the prefix and all own keys."""
    group = query.shape[0] // key.shape[0]
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys = torch.cat([prefix_key, key], dim=1).to(dtype).repeat_interleave(group, dim=0)
    values = torch.cat([prefix_value, value], dim=1).to(dtype).repeat_interleave(group, dim=0)
    own = dense_visible(segments)  # (T, N)
    above = own.new_ones(len(own), prefix_key.shape[1])
    above[:prefix_from] = False
    is_visible = torch.cat([above, own], dim=1)
    scores = scale * (query.to(dtype) @ keys.mT)  # (Hq, T, P + N)
    # A row that sees nothing has no weights: its scores are left alone, or its gradient were nan.
    sees_none = ~is_visible.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(~(is_visible | sees_none), -torch.inf).softmax(dim=-1)
    return (weights.masked_fill(sees_none, 0.0) @ values).to(query.dtype)


def dense_visible(segments: Segments) -> Tensor:
    """(T, N) bool: whether query t sees own key n, straight from the rule."""
    place = torch.arange(len(segments.ends), device=segments.ends.device)
    start = segments.key_starts[segments.segment_of][:, None]
    length = segments.key_lengths[segments.segment_of][:, None]
    column = place - start  # (T, N) of key n, if it is one of the query's segment
    is_own = (column >= 0) & (column < length)
    now = segments.columns[:, None]
    return is_own & (column <= now) & (now < segments.ends)


def _shared_prefix_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    segments: Segments,
    scale: float,
) -> Tensor:
    from kernels.shared_prefix_attention_triton import shared_prefix_attention_triton

    return shared_prefix_attention_triton(
        query, key, value, prefix_key, prefix_value, segments, scale
    )


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    segments: Segments,
) -> None:
    tensors = (query, key, value, prefix_key, prefix_value)
    shapes = [tuple(x.shape) for x in tensors]
    (hq, t, d), (hkv, n, _) = shapes[0], shapes[1]
    p = shapes[3][1]
    expected = [(hq, t, d), (hkv, n, d), (hkv, n, d), (hkv, p, d), (hkv, p, d)]
    if shapes != expected or hq % hkv or (t, n) != (len(segments.columns), len(segments.ends)):
        raise ValueError(
            f"shared_prefix_attention: query, key, value, prefix_key, prefix_value {shapes} for "
            f"{len(segments.columns)} queries and {len(segments.ends)} keys; expected (Hq, T, d), "
            "twice (Hkv, N, d) and twice (Hkv, P, d), with Hq a multiple of Hkv"
        )
    if d > 1 and any(x.stride(2) != 1 for x in tensors):
        raise ValueError("shared_prefix_attention: the last dimension must be contiguous")


def _check_triton(*tensors: Tensor, prefix_from: int) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "shared_prefix_attention: impl=triton has no gradients; write impl=reference, or "
            "call it under torch.no_grad() or torch.inference_mode()"
        )
    if prefix_from:
        raise ValueError(
            "shared_prefix_attention: impl=triton knows no prefix_from; write impl=reference"
        )
