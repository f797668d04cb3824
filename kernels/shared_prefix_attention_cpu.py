"""The CPU path of `shared_prefix_attention`, and its gradients: torch's flash kernel, per part.

Forward, the part over the prefix and the part over own keys are merged by their log-sum-exps.
Backward, the gradient of a score is p (dp - dout . out), where p = exp(score - lse) is its weight
in the merged softmax. So torch's backward kernel, given the merged `out` and `lse`, returns for
each part alone its exact gradients by keys and values, and its share of those by the queries.
Nothing is T x T, and no key head is repeated. Legend: see shared_prefix_attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.segments import HIDDEN, Padding, Segments


class _Attention(torch.autograd.Function):
    """The CPU path with its gradients; keeps its inputs, the output and a number a query."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, lse = shared_prefix_attention_cpu(*inputs)
        ctx.save_for_backward(*inputs[:5], out, lse)
        ctx.rest = inputs[5:]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward_cpu(grad, *ctx.saved_tensors, *ctx.rest), None, None, None


def differentiable_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    segments: Segments,
    scale: float,
    prefix_from: int,
) -> Tensor:
    """(Hq, T, d) with gradients by the five tensors; see `shared_prefix_attention`."""
    out: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query, key, value, prefix_key, prefix_value, segments, scale, prefix_from
    )
    return out


def shared_prefix_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    segments: Segments,
    scale: float,
    prefix_from: int,
) -> tuple[Tensor, Tensor]:
    """The flash kernel of torch twice, merged: (Hq, T, d) and its log-sum-exp (T, Hq) fp32.

    All T queries are one long query against the prefix as it lies there, with no mask. The own
    part is padded by segment: at T = 512 that costs a fifth of one masked T x T call (0.64 against
    3.9 ms on 2 cores), because what no segment shares is never computed.
    """
    own, own_lse = _own_part(query, key, value, segments, scale)
    num_blind = len(own)  # queries that see own keys alone
    if prefix_key.shape[1] > 0 and prefix_from < len(own):
        num_blind = prefix_from
        out, lse = _flash(
            query[None, :, prefix_from:], prefix_key[None], prefix_value[None], scale=scale
        )
        part, part_lse = own[prefix_from:], own_lse[prefix_from:]  # views, written in place
        prefix_weight = torch.sigmoid(lse[0].mT - part_lse)[..., None]  # (T, Hq, 1)
        sums = prefix_weight.dtype
        part.copy_(torch.lerp(part.to(sums), out[0].transpose(0, 1).to(sums), prefix_weight))
        torch.logaddexp(lse[0].mT, part_lse, out=part_lse)
    if num_blind and not segments.is_chain:  # in a chain each query sees itself
        own[:num_blind].masked_fill_(~segments.sees_own[:num_blind, None, None], 0.0)
    return own.transpose(0, 1), own_lse


def _own_part(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention inside each segment: (T, Hq, d) and its log-sum-exp (T, Hq) fp32."""
    parts = [
        _run_part(query[:, r.rows], key[:, r.keys], value[:, r.keys], r.segments, scale)
        for r in segments.runs
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _run_part(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor]:
    """The same for one run, in one call of torch's kernel."""
    if segments.longest_key == 0 or query.shape[1] == 0:  # torch's kernel divides by the number
        lse = query.new_full(query.shape[1::-1], HIDDEN, dtype=_sum_dtype(query))
        return torch.zeros_like(query).transpose(0, 1), lse
    padding = segments.query_padding
    own, lse = _flash(
        _padded(query, padding),
        _padded(key, segments.key_padding),
        _padded(value, segments.key_padding),
        scale=scale,
        mask=_mask(segments, query),
        is_causal=segments.is_chain,
    )  # (S, Hq, L, d), (S, Hq, L); in memory (S, L, Hq, d) and (S, L, Hq)
    return _unpadded(own, padding), _unpadded(lse[..., None], padding)[..., 0]


def _backward_cpu(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    scale: float,
    prefix_from: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the five inputs, from the merged out (Hq, T, d) and lse (T, Hq)."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    lse = torch.where(lse > HIDDEN / 2, lse, -HIDDEN)  # who sees nothing gives every key weight 0
    parts = [
        _run_backward(
            grad[:, r.rows],
            query[:, r.rows],
            key[:, r.keys],
            value[:, r.keys],
            out[:, r.rows],
            lse[r.rows],
            r.segments,
            scale,
        )
        for r in segments.runs
    ]
    joined = parts[0] if len(parts) == 1 else [torch.cat(x) for x in zip(*parts, strict=True)]
    by_query, by_key, by_value = (x.transpose(0, 1) for x in joined)
    if prefix_key.shape[1] == 0 or prefix_from >= len(lse):
        zeros = torch.zeros_like(prefix_key), torch.zeros_like(prefix_value)
        return by_query, by_key, by_value, *zeros
    seeing = slice(prefix_from, None)
    by_seeing, by_prefix_key, by_prefix_value = _flash_backward(
        grad[None, :, seeing],
        query[None, :, seeing],
        prefix_key[None],
        prefix_value[None],
        out[None, :, seeing],
        lse[None, seeing].mT,
        scale=scale,
    )
    by_query[:, seeing] += by_seeing[0]
    return by_query, by_key, by_value, by_prefix_key[0], by_prefix_value[0]


def _run_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Segments,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (rows, H, d) of one run by its queries, keys and values."""
    if segments.longest_key == 0 or query.shape[1] == 0:
        zeros = (torch.zeros_like(x).transpose(0, 1) for x in (query, key, value))
        return next(zeros), next(zeros), next(zeros)
    rows, keys = segments.query_padding, segments.key_padding
    by_query, by_key, by_value = _flash_backward(
        _padded(grad, rows),
        _padded(query, rows),
        _padded(key, keys),
        _padded(value, keys),
        _padded(out, rows),
        _padded(lse.mT[..., None], rows, fill=-HIDDEN)[..., 0],  # no weight, so no gradient
        scale=scale,
        mask=_mask(segments, query),
        is_causal=segments.is_chain,
    )
    return _unpadded(by_query, rows), _spread(by_key, keys, key), _spread(by_value, keys, value)


def _padded(rows: Tensor, padding: Padding, *, fill: float | None = None) -> Tensor:
    """(H, rows, d) -> (S, H, L, d): a view where segments lie at equal distances, else a copy.

    fill: what stands where there is no query; without it, some other row. Queries that lie at equal
    distances have no gaps.
    """
    num_segments, longest = padding.index.shape
    if padding.stride is None:
        padded = rows.transpose(0, 1)[padding.index]
        if fill is not None:
            padded = torch.where(padding.is_row[..., None, None], padded, fill)
        return padded.transpose(1, 2)
    regular = rows[:, : num_segments * padding.stride]
    split = regular.view(len(rows), num_segments, padding.stride, -1)  # splits a dim: never copies
    return split[:, :, :longest].transpose(0, 1)


def _unpadded(padded: Tensor, padding: Padding) -> Tensor:
    """(S, H, L, d) -> (rows, H, d), in order of segments; a view where nothing was padded."""
    rows = padded.transpose(1, 2).flatten(0, 1)
    return rows if len(rows) == len(padding.back) else rows[padding.back]


def _spread(padded: Tensor, padding: Padding, rows: Tensor) -> Tensor:
    """(S, H, L, d) -> (N, H, d), each at its place; 0 for keys of no segment."""
    found = _unpadded(padded, padding)
    if padding.is_in_order and len(found) == rows.shape[1]:
        return found
    return torch.zeros_like(rows).transpose(0, 1).index_add(0, padding.places, found)


def _mask(segments: Segments, query: Tensor) -> Tensor | None:
    return None if segments.is_chain else segments.mask.to(_sum_dtype(query))


def _sum_dtype(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """(B, Hq, Lq, d) and log-sum-exp (B, Hq, Lq) fp32 by torch's CPU kernel; repeats no head."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale
    )
    return out, lse


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query (B, Hq, Lq, d), key and value (B, Hkv, Lk, d); lse: (B, Hq, Lq)."""
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    by_query, by_key, by_value = run(
        grad, query, key, value, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return by_query, by_key, by_value
