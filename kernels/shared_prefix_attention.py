"""Attention of many rows to one prefix that they share, and to rows of their own.

Instruction and shots are the same for every item of a batch, so their keys and values exist once,
and every query of the batch reads that one copy. Each query also sees some own rows (`Segments`:
its item so far, or its branch of a tree of labels). With scores s = scale * q k, the two softmaxes
are merged exactly by their log-sum-exps:

    out = w * out_prefix + (1 - w) * out_own,    w = sigmoid(lse_prefix - lse_own)

Legend: Hq query heads, Hkv key heads (Hq a multiple: grouped-query attention), T queries,
N own keys, P prefix keys, d width of a head, S segments, L rows of the longest segment.
For the Triton path see shared_prefix_attention_triton.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dispatch import choose
from kernels.segments import Padding, Segments


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    prefix_key: Tensor,
    prefix_value: Tensor,
    segments: Segments,
    scale: float,
    impl: str = "auto",
) -> Tensor:
    """Each query over the whole prefix and the own keys it sees; a query that sees none gives 0.

    Any strides, the last dimension contiguous. Rows that nobody sees still take part with weight
    0, so they must be finite: fill a fresh cache with zeros. fp32, or 16 bit with fp32 sums.
    torch's CPU kernel, here as in its own attention, gives 0 for a row whose scores are all nan.

    Args:
        query: (Hq, T, d).
        key: (Hkv, N, d).
        value: (Hkv, N, d).
        prefix_key: (Hkv, P, d), P may be 0.
        prefix_value: (Hkv, P, d).
        segments: which own keys each query sees.
        scale: multiplies q k, usually d ** -0.5.
        impl: auto, cpu, triton or reference; only the reference has gradients.

    Returns:
        (Hq, T, d) in the query's dtype.

    Raises:
        ValueError: shapes that do not belong together, or gradients asked of a fused path.
    """
    _check_shapes(query, key, value, prefix_key, prefix_value, segments)
    run = {
        "reference": shared_prefix_attention_reference,
        "cpu": _shared_prefix_attention_cpu,
        "triton": _shared_prefix_attention_triton,
    }[choose(impl, query.device.type).impl]
    if run is not shared_prefix_attention_reference:
        _check_no_grad(query, key, value, prefix_key, prefix_value)
    return run(query, key, value, prefix_key, prefix_value, segments, scale)


def shared_prefix_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    segments: Segments,
    scale: float,
) -> Tensor:
    """What is meant: one dense fp32 softmax over the prefix and all own keys, with a mask."""
    group = query.shape[0] // key.shape[0]
    keys = torch.cat([prefix_key, key], dim=1).float().repeat_interleave(group, dim=0)
    values = torch.cat([prefix_value, value], dim=1).float().repeat_interleave(group, dim=0)
    own = dense_visible(segments)  # (T, N)
    is_visible = torch.cat([own.new_ones(len(own), prefix_key.shape[1]), own], dim=1)
    scores = scale * (query.float() @ keys.mT)  # (Hq, T, P + N)
    weights = scores.masked_fill(~is_visible, -torch.inf).softmax(dim=-1)
    weights = weights.masked_fill(~is_visible.any(dim=-1, keepdim=True), 0.0)  # 0 / 0 -> 0
    return (weights @ values).to(query.dtype)


def dense_visible(segments: Segments) -> Tensor:
    """(T, N) bool: whether query t sees own key n, straight from the rule."""
    place = torch.arange(len(segments.ends), device=segments.ends.device)
    start = segments.key_starts[segments.segment_of][:, None]
    length = segments.key_lengths[segments.segment_of][:, None]
    column = place - start  # (T, N) of key n, if it is one of the query's segment
    is_own = (column >= 0) & (column < length)
    now = segments.columns[:, None]
    return is_own & (column <= now) & (now < segments.ends)


def _shared_prefix_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    segments: Segments,
    scale: float,
) -> Tensor:
    """The flash kernel of torch twice, merged.

    All T queries are one long query against the prefix as it lies there, with no mask. The own
    part is padded by segment: at T = 512 that costs a fifth of one masked T x T call (0.64 against
    3.9 ms on 2 cores), because what no segment shares is never computed.
    """
    has_prefix = prefix_key.shape[1] > 0
    if query.shape[1] == 0 or (segments.longest_key == 0 and not has_prefix):
        return torch.zeros_like(query)
    if segments.longest_key == 0:  # torch's kernel divides by the number of keys
        return _flash(query[None], prefix_key[None], prefix_value[None], scale=scale)[0][0]
    own, own_lse = _own_part(query, key, value, segments, scale)
    if not has_prefix:
        return torch.where(segments.sees_own[:, None, None], own, 0.0).transpose(0, 1)
    out, lse = _flash(query[None], prefix_key[None], prefix_value[None], scale=scale)
    prefix_weight = torch.sigmoid(lse[0].mT - own_lse)[..., None]  # (T, Hq, 1) fp32
    merged = torch.lerp(own.float(), out[0].transpose(0, 1).float(), prefix_weight)
    return merged.to(query.dtype).transpose(0, 1)


def _own_part(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention inside each segment: (T, Hq, d) and its log-sum-exp (T, Hq) fp32."""
    padding = segments.query_padding
    own, lse = _flash(
        _padded(query, padding),
        _padded(key, segments.key_padding),
        _padded(value, segments.key_padding),
        scale=scale,
        mask=None if segments.is_chain else segments.mask,
        is_causal=segments.is_chain,
    )  # (S, Hq, L, d), (S, Hq, L); in memory (S, L, Hq, d) and (S, L, Hq)
    rows, lse_rows = own.transpose(1, 2).flatten(0, 1), lse.mT.flatten(0, 1)
    if len(rows) == len(padding.back):  # no padding: already in order
        return rows, lse_rows
    return rows[padding.back], lse_rows[padding.back]


def _padded(rows: Tensor, padding: Padding) -> Tensor:
    """(H, rows, d) -> (S, H, L, d): a view where segments lie at equal distances, else a copy."""
    num_segments, longest = padding.index.shape
    if padding.stride is None:
        return rows.transpose(0, 1)[padding.index].transpose(1, 2)
    regular = rows[:, : num_segments * padding.stride]
    split = regular.view(len(rows), num_segments, padding.stride, -1)  # splits a dim: never copies
    return split[:, :, :longest].transpose(0, 1)


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


def _check_no_grad(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "shared_prefix_attention: only impl=reference has gradients; "
            "call it under torch.no_grad() or torch.inference_mode()"
        )
