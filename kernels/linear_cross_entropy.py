"""The loss of a language model's head, and its gradients, without the (rows, vocabulary) logits.

    loss = sum over rows of  -(1 - e) log P(target | row) - e / V sum over v of log P(v | row)
    log P = log_softmax(soft_cap * tanh(scale * (hidden W^T + b) / soft_cap))

Forward forms the gradients too: chunk by chunk over the vocabulary, with a running maximum m and
sum of exp(logit - m). The gradient of a row is the mean of W's rows under the softmax, which is
summed up in the same pass, less its target's row:

    d loss / d hidden[n] = scale * (sum over v of P(v | n) W[v] - W[target])     (e = 0, no cap)

So a frozen head takes two products and TILE_BYTES of logits, however many rows there are. A head
that trains takes three: the exponentials of a block of rows are kept, KEPT_BYTES of them, until
their sums are known. Sums are fp32 at least. Rows without a target should not be passed.
After Wijmans et al. 2024 (arXiv 2411.09009), and Liger-Kernel's gradient in forward (2410.10989).

Legend: N rows, D width, V vocabulary, e label smoothing.
For the Triton path see linear_cross_entropy_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import choose
from kernels.linear import linear_reference
from kernels.lora_linear import best_product

CHUNK = 8192  # columns of the vocabulary at a time
TILE_BYTES = 16 * 2**20  # of logits at a time: block of rows x chunk
KEPT_BYTES = 64 * 2**20  # of exponentials of a block of rows, where W or b train
LOWEST = torch.finfo(torch.float32).min  # a first maximum that survives a chunk of -inf logits


@dataclass(kw_only=True, slots=True, frozen=True)
class Shaping:
    """What happens between the head's product and the loss: see the top of this file."""

    label_smoothing: float = 0.0
    soft_cap: float | None = None
    scale: float = 1.0


@dataclass(kw_only=True, slots=True)
class LossAndGradients:
    """Each row's loss, (N,), fp32 at least; gradients of what needs one, None of the rest."""

    losses: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, needs: tuple[bool, ...]
    ) -> LossAndGradients:
        """To be summed up. needs: whether hidden, weight and bias need a gradient."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        zeros = [
            None if like is None or not is_needed else like.new_zeros(like.shape, dtype=dtype)
            for like, is_needed in zip((hidden, weight, bias), needs, strict=True)
        ]
        losses = hidden.new_zeros(len(hidden), dtype=dtype)
        return cls(losses=losses, hidden=zeros[0], weight=zeros[1], bias=zeros[2])


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
    soft_cap: float | None = None,
    scale: float = 1.0,
    reduction: str = "sum",
    impl: str = "auto",
) -> Tensor:
    """The summed cross-entropy of rows after a head; differentiable once.

    Args:
        hidden: (N, D), after the model's last norm; only rows with a target. N may be 0.
        weight: (V, D), often the embedding itself; frozen, it costs no gradient.
        targets: (N,) int64, 0 to V - 1.
        bias: (V,).
        label_smoothing: e, 0 to 1, as in torch's cross_entropy.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap).
        scale: multiplies every logit, before the cap.
        reduction: sum, or none: the losses of the rows, which may be weighted; only under a head
            that is frozen, since the head's gradient is formed before the weights are known.
        impl: auto, cpu, triton or reference.

    Returns:
        The sum over rows, (), or the rows' losses, (N,); fp32 or, for fp64 rows, fp64. nan where a
        logit is nan.

    Raises:
        ValueError: shapes that do not fit together; smoothing outside 0 to 1; another reduction,
            or none under a head that trains.
        IndexError: a target out of range. On a GPU the loss is nan instead.
        KernelsNotBuilt: an implementation that cannot run on the device.
    """
    _check(hidden, weight, targets, label_smoothing)
    if reduction not in ("sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction={reduction}; expected sum or none")
    if reduction == "none" and any(t is not None and t.requires_grad for t in (weight, bias)):
        raise ValueError("linear_cross_entropy: reduction=none needs a frozen head")
    shaping = Shaping(label_smoothing=label_smoothing, soft_cap=soft_cap, scale=scale)
    match choose(impl, hidden.device.type).impl:
        case "cpu":
            compute: Compute = _linear_cross_entropy_cpu
        case "triton":
            from kernels.linear_cross_entropy_triton import linear_cross_entropy_triton

            compute = linear_cross_entropy_triton
        case _:
            return linear_cross_entropy_reference(hidden, weight, targets, bias, shaping, reduction)
    return apply(compute, hidden, weight, targets, bias, shaping, reduction)


def shaped(logits: Tensor, shaping: Shaping) -> Tensor:
    """Logits after the factor and the soft cap, of any shape."""
    logits = shaping.scale * logits
    if shaping.soft_cap is None:
        return logits
    return shaping.soft_cap * torch.tanh(logits / shaping.soft_cap)


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    shaping: Shaping,
    reduction: str = "sum",
) -> Tensor:
    """What is meant: all logits, in fp32 at least, and torch's cross-entropy."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    wide = None if bias is None else bias.to(dtype)
    logits = shaped(linear_reference(hidden.to(dtype), weight.to(dtype), wide), shaping)
    return torch.nn.functional.cross_entropy(
        logits, targets, reduction=reduction, label_smoothing=shaping.label_smoothing
    )


Compute = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Shaping, tuple[bool, ...]], LossAndGradients
]


def apply(
    compute: Compute,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    shaping: Shaping,
    reduction: str = "sum",
) -> Tensor:
    """A computation of losses and gradients as one differentiable step."""
    if not torch.is_grad_enabled():
        losses = compute(hidden, weight, targets, bias, shaping, (False,) * 3).losses
        return losses.sum() if reduction == "sum" else losses
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, shaping, compute, reduction
    )
    return result


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shaping: Shaping,
        compute: Compute,
        reduction: str,
    ) -> Tensor:
        found = compute(hidden, weight, targets, bias, shaping, ctx.needs_input_grad[:3])
        pairs = ((found.hidden, hidden), (found.weight, weight), (found.bias, bias))
        ctx.gradients = [
            None if gradient is None or like is None else gradient.to(like.dtype)
            for gradient, like in pairs
        ]
        return found.losses.sum() if reduction == "sum" else found.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("linear_cross_entropy: backward a second time; run forward again")
        hidden, *head = gradients
        if hidden is not None:
            hidden.mul_(grad[:, None] if grad.dim() else grad)  # of each row, or of the sum
        # In place: the weight's gradient is the largest tensor here.
        return (hidden, *(None if g is None else g.mul_(grad) for g in head), *(None,) * 4)


def _linear_cross_entropy_cpu(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    shaping: Shaping,
    needs: tuple[bool, ...],
) -> LossAndGradients:
    """Block by block of rows, so that tiles stay within TILE_BYTES and KEPT_BYTES."""
    out = LossAndGradients.zeros(hidden, weight, bias, needs=needs)
    for rows in row_blocks(len(hidden), vocabulary=len(weight), keeps=needs[1] or needs[2]):
        block = _Block(hidden[rows], targets[rows], vocabulary=len(weight), shaping=shaping)
        for start in range(0, len(weight), CHUNK):
            chunk = slice(start, min(start + CHUNK, len(weight)))
            block.add_chunk(chunk, weight, bias, out=out)
        block.finish(rows, weight, out=out)
    return out


def row_blocks(num_rows: int, *, vocabulary: int, keeps: bool) -> list[slice]:
    """Even blocks of rows: of a tile over a chunk, or where exponentials are kept over all of V."""
    limit = TILE_BYTES // (4 * min(CHUNK, vocabulary))
    if keeps:
        limit = min(limit, KEPT_BYTES // (4 * vocabulary))
    count = -(-num_rows // max(1, limit))
    return [slice(num_rows * i // count, num_rows * (i + 1) // count) for i in range(count)]


class _Block:
    """Running sums of a block of R rows over the vocabulary; z: a shaped logit."""

    def __init__(
        self, hidden: Tensor, targets: Tensor, *, vocabulary: int, shaping: Shaping
    ) -> None:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.x = x = hidden.to(dtype) * shaping.scale  # (R, D); the scale is paid here, once
        self.targets = targets  # (R,)
        self.shaping = shaping
        self.share = shaping.label_smoothing / vocabulary  # of the loss, of every token
        self.product = best_product(x)
        self.highest = x.new_full((len(x), 1), LOWEST)  # m, the maximum of z so far
        self.total = x.new_zeros(len(x), 1)  # sum of exp(z - m)
        self.pulled = torch.zeros_like(x)  # sum of exp(z - m) slope W
        self.target = x.new_zeros(len(x))  # z of the target
        self.target_slope = x.new_ones(len(x), 1)
        self.plain = x.new_zeros(len(x))  # sum of z
        self.spread = x.new_zeros(1, x.shape[1])  # sum of slope W, (1, D) or (R, D)
        self.kept: list[tuple[slice, Tensor, Tensor]] = []  # exp(z - m) slope of a chunk, its m

    def add_chunk(
        self, chunk: slice, weight: Tensor, bias: Tensor | None, *, out: LossAndGradients
    ) -> None:
        """Count a chunk of the vocabulary in."""
        w = weight[chunk].to(self.x.dtype)
        b = None if bias is None else bias[chunk].to(self.x.dtype) * self.shaping.scale
        logits = self.product(self.x, w, b)  # (R, chunk)
        slope = _cap(logits, self.shaping.soft_cap)
        here = ((self.targets >= chunk.start) & (self.targets < chunk.stop)).nonzero()[:, 0]
        at = self.targets[here] - chunk.start
        self.target[here] = logits[here, at]
        if slope is not None:
            self.target_slope[here, 0] = slope[here, at]
        if self.share:
            self._smooth(chunk, w, logits, slope, out=out)
        risen = torch.maximum(self.highest, logits.amax(dim=1, keepdim=True))  # keeps nan
        shrink = (self.highest - risen).exp_()
        logits.sub_(risen).exp_()
        self.total = self.total * shrink + logits.sum(1, keepdim=True)
        self.highest = risen
        if slope is not None:
            logits.mul_(slope)
        if out.hidden is not None:
            self.pulled.mul_(shrink).add_(self.product(logits, w.t()))
        if out.weight is not None or out.bias is not None:
            self.kept.append((chunk, logits, risen))

    def _smooth(
        self,
        chunk: slice,
        w: Tensor,
        logits: Tensor,
        slope: Tensor | None,
        *,
        out: LossAndGradients,
    ) -> None:
        """The part of label smoothing that no softmax enters."""
        self.plain += logits.sum(1)
        if out.hidden is not None:
            even = w.sum(0, keepdim=True) if slope is None else self.product(slope, w.t())
            self.spread = self.spread + even
        if out.weight is not None:
            even = self.x.sum(0) if slope is None else self.product(slope.t(), self.x.t())
            out.weight[chunk] -= even * self.share
        if out.bias is not None:
            count = torch.full_like(out.bias[chunk], len(self.x)) if slope is None else slope.sum(0)
            out.bias[chunk] -= count * (self.share * self.shaping.scale)

    def finish(self, rows: slice, weight: Tensor, *, out: LossAndGradients) -> None:
        """All of the vocabulary is in: add loss and gradients to `out`."""
        scale, sure = self.shaping.scale, 1 - self.shaping.label_smoothing
        lse = self.highest + self.total.log()  # (R, 1)
        out.losses[rows] = lse[:, 0] - sure * self.target - self.share * self.plain
        hit = sure * self.target_slope  # what the target's row of W weighs, (R, 1)
        if out.hidden is not None:
            pulled = self.pulled.div_(self.total).sub_(weight[self.targets].to(hit.dtype) * hit)
            out.hidden[rows] = pulled.sub_(self.spread * self.share).mul_(scale)
        for chunk, exponentials, highest in self.kept:
            factor = (highest - lse).exp_()  # (R, 1): P slope = exponentials * factor
            if out.weight is not None:
                out.weight[chunk] += self.product(exponentials.t(), (self.x * factor).t())
            if out.bias is not None:
                out.bias[chunk] += exponentials.t().mv(factor[:, 0]) * scale
        if out.weight is not None:
            out.weight.index_add_(0, self.targets, self.x * hit, alpha=-1)
        if out.bias is not None:
            out.bias.index_add_(0, self.targets, hit[:, 0] * scale, alpha=-1)


def _cap(logits: Tensor, soft_cap: float | None) -> Tensor | None:
    """Cap logits in place; the slope 1 - (z / cap)^2 of what was done, or None."""
    if soft_cap is None:
        return None
    logits.div_(soft_cap).tanh_()
    slope = 1 - logits * logits
    logits.mul_(soft_cap)
    return slope


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"linear_cross_entropy: {shapes}; expected (N, D) and (V, D)")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: targets {tuple(targets.shape)} of {len(hidden)} rows"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing {label_smoothing}, not 0 to 1")
    if targets.device.type == "cpu" and len(targets):
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= len(weight):
            raise IndexError(
                f"linear_cross_entropy: target {low}..{high}, expected 0..{len(weight) - 1}"
            )
