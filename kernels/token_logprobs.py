"""Log-probabilities of chosen tokens at chosen rows, without the (rows, vocabulary) matrix.

    log P(token | row) = logit[row, token] - log sum_v exp(logit[row, v])

The sum is taken chunk by chunk over the vocabulary, with a running maximum m and sum
s = sum exp(logit - m), rescaled when the maximum rises; a wanted logit is picked up in the chunk
where it falls. Logits are fp32, whatever the weights are. Rows that nothing is asked of should not
be passed: they are projected all the same.

Legend: R rows, D width, V vocabulary, K wanted (row, token) pairs, B rows of a decoding step.
For the Triton path see token_logprobs_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.dispatch import choose
from kernels.linear import Packed, choose_linear, linear_reference

TILE_BYTES = 16 * 2**20  # of fp32 logits at a time: R x chunk is cut to this
LOWEST = torch.finfo(torch.float32).min  # a first maximum that survives a chunk of -inf logits


class Head:
    """A language model's head, prepared once: logits = soft_cap(scale * (hidden W^T + bias)).

    On a CPU whose oneDNN wins (`choose_linear`), fp32 weights are laid out anew, which costs their
    size once more; a later change of them is then not seen.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        impl: str = "auto",
        chunk: int = 8192,
        scale: float = 1.0,
        soft_cap: float | None = None,
    ) -> None:
        """Keep or pack the weights.

        Args:
            weight: (V, D), often the embedding itself.
            bias: (V,).
            impl: auto, cpu, triton or reference.
            chunk: columns of the vocabulary at a time.
            scale: multiplies every logit.
            soft_cap: logits become soft_cap * tanh(logits / soft_cap).
        """
        self.impl = choose(impl, weight.device.type).impl
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.chunk = chunk
        self.scale = scale
        self.soft_cap = soft_cap
        self._products = [] if self.impl == "reference" else self._prepared()

    @property
    def vocabulary(self) -> int:
        """V."""
        return len(self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B, V) fp32, for the few rows of a decoding step."""
        if not self._products:
            return self._shaped(_float_product(self.weight, self.bias)(hidden))
        out = hidden.new_empty(len(hidden), self.vocabulary, dtype=torch.float32)
        for start, logits in self.chunks(hidden):
            out[:, start : start + logits.shape[1]] = logits
        return out

    def chunks(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """First token and fp32 logits (rows, up to chunk) of each part of the vocabulary."""
        rows = hidden.float()
        for index, product in enumerate(self._products):
            yield index * self.chunk, self._shaped(product(rows))

    def _prepared(self) -> list[Callable[[Tensor], Tensor]]:
        is_fp32 = self.impl == "cpu" and self.weight.dtype == torch.float32
        is_packed = is_fp32 and choose_linear()[0]
        make = Packed if is_packed else _float_product
        parts = [slice(i, i + self.chunk) for i in range(0, self.vocabulary, self.chunk)]
        return [make(self.weight[p], None if self.bias is None else self.bias[p]) for p in parts]

    def _shaped(self, logits: Tensor) -> Tensor:
        """Scale and soft cap, in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.soft_cap is not None:
            logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return logits


def token_logprobs(hidden: Tensor, head: Head, *, rows: Tensor, tokens: Tensor) -> Tensor:
    """The log P(tokens[k] | hidden[rows[k]]) for every k.

    A row whose logits are not finite (nan, or inf) gives nan: check with isfinite.

    Args:
        hidden: (R, D), after the model's last norm.
        head: the projection.
        rows: (K,) int64, any order, repeats allowed.
        tokens: (K,) int64.

    Returns:
        (K,) fp32.

    Raises:
        ValueError: rows and tokens of different lengths.
        IndexError: a row or a token out of range.
    """
    if rows.shape != tokens.shape or rows.dim() != 1:
        raise ValueError(f"token_logprobs: rows {tuple(rows.shape)}, tokens {tuple(tokens.shape)}")
    _check_range("row", rows, len(hidden))
    _check_range("token", tokens, head.vocabulary)
    match head.impl:
        case "cpu":
            return _token_logprobs_cpu(hidden, head, rows, tokens)
        case "triton":
            from kernels.token_logprobs_triton import token_logprobs_triton

            return token_logprobs_triton(hidden, head, rows, tokens)
    return token_logprobs_reference(hidden, head, rows, tokens)


def token_logprobs_reference(hidden: Tensor, head: Head, rows: Tensor, tokens: Tensor) -> Tensor:
    """What is meant: log_softmax over all of the vocabulary in fp32, then a look-up."""
    logits = head.scale * linear_reference(hidden.float(), head.weight.float())
    if head.bias is not None:
        logits = logits + head.scale * head.bias.float()
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    return logits.log_softmax(dim=-1)[rows, tokens]


def _token_logprobs_cpu(hidden: Tensor, head: Head, rows: Tensor, tokens: Tensor) -> Tensor:
    """Block by block of rows, so that a tile of logits stays within TILE_BYTES."""
    block = max(1, TILE_BYTES // (4 * min(head.chunk, head.vocabulary)))
    out = torch.empty(len(rows), dtype=torch.float32)
    for start in range(0, len(hidden), block):
        wanted = ((rows >= start) & (rows < start + block)).nonzero()[:, 0]
        if len(wanted):
            part = hidden[start : start + block]
            out[wanted] = _block_logprobs(part, head, rows[wanted] - start, tokens[wanted])
    return out


def _block_logprobs(hidden: Tensor, head: Head, rows: Tensor, tokens: Tensor) -> Tensor:
    """The same for one block of rows: online log-sum-exp over the chunks of the vocabulary."""
    maximum = torch.full((len(hidden), 1), LOWEST)
    total = torch.zeros(len(hidden), 1)
    target = torch.empty(len(rows))
    for start, logits in head.chunks(hidden):
        here = ((tokens >= start) & (tokens < start + logits.shape[1])).nonzero()[:, 0]
        target[here] = logits[rows[here], tokens[here] - start]
        risen = torch.maximum(maximum, logits.amax(dim=1, keepdim=True))  # keeps nan
        total = total * (maximum - risen).exp_() + logits.sub_(risen).exp_().sum(1, keepdim=True)
        maximum = risen
    return target - (maximum + total.log())[rows, 0]


def _float_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The product in fp32, whatever the dtype: bf16 logits above 16 are off by up to 0.06."""

    def product(x: Tensor) -> Tensor:
        return linear_reference(x.float(), weight.float(), None if bias is None else bias.float())

    return product


def _check_range(name: str, indices: Tensor, limit: int) -> None:
    """CPU only: on a GPU the look would wait for the device, and its kernels mask instead."""
    if indices.device.type == "cpu" and len(indices):
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= limit:
            raise IndexError(f"token_logprobs: {name} {low}..{high}, expected 0..{limit - 1}")
