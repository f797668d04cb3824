"""The linear layer on a CPU: oneDNN's matrix product where it beats the one torch would take.

torch sends fp32 products on x86 to MKL, which takes its AVX2 path on AMD processors whatever they
can do. oneDNN, which torch brings along, takes AVX-512. Measured on 2 Zen 5 cores, 512 rows x 576
-> 1,536: MKL 193 GFLOP/s, oneDNN 436, with packed weights 448; at 8 rows 73 against 207 (packed).

    linear            x W^T + b, differentiable; weights as they are
    Packed            the same for weights that stay as they are, laid out once as oneDNN wants them
    swap_linear       every plain nn.Linear of a model takes `linear` from now on
    choose_linear     which of the two wins on this machine: measured, never guessed
    pin_linear        what kernels take in this process, whatever is measured: one choice a training

On a GPU torch's own product is right, and nothing here is used.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# The other product must win by half, or torch's own stays. They round differently, so trainings are
# equal only where all choose alike: on an AMD EPYC of Zen 3, where the two are equally fast, the
# ratio lay between 0.84 and 1.27 beside a training, 8 of 175 times at 1.15 or more. On Zen 5 it
# is 440 to 193 GFLOP/s.
MARGIN = 1.5
REPEATS = 12  # of 2 to 5 ms each
MAX_ERROR = 1e-4  # largest difference from fp32 truth, relative to the largest value


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of x (..., K) and weight (N, K) transposed, plus bias (N,): torch's own."""
    return nn.functional.linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of x (M, K) and weight (N, K) transposed; both may be transposed views."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # As a view, which oneDNN's result is, it could not be added to in place (some adapters do).
        return _product(x, weight, bias).data

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        return (
            _product(flat, weight.t()).reshape(*grad.shape[:-1], -1) if needs_x else None,
            _product(flat.t(), x.reshape(-1, x.shape[-1]).t()) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Product of x (..., K) and weight (N, K) transposed, plus bias (N,); differentiable once."""
    if x.numel() == 0:
        return linear_reference(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


class Packed:
    """A weight (N, K) with its bias, laid out for oneDNN; call it with x (..., K). No gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Copy the weight; a later change of it is not seen."""
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._bias = None if bias is None else bias.detach().clone()

    def __call__(self, x: Tensor) -> Tensor:
        """From x (..., K) to (..., N)."""
        return _product(x, self._weight, self._bias)


class Linear(nn.Linear):
    """nn.Linear whose product is oneDNN's. `packed`: laid out once; set for frozen weights only."""

    packed: Packed | None = None

    def forward(self, x: Tensor) -> Tensor:
        """From x (..., in) to (..., out)."""
        if self.packed is not None:
            return self.packed(x)
        return linear(x, self.weight, self.bias)


def swap_linear(model: nn.Module, *, is_packed: bool) -> int:
    """Give every plain nn.Linear of a model oneDNN's product, in place; returns how many.

    Parameters, hooks and names stay as they are: only the module's class changes. is_packed: the
    weights never change again (inference); costs their size once more.
    """
    count = 0
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.__class__ = Linear
            if is_packed:
                module.packed = Packed(module.weight, module.bias)  # type: ignore[assignment]
            count += 1
    return count


@functools.cache
def choose_linear() -> tuple[bool, str]:
    """Whether oneDNN's product is right and faster here for fp32, and what was measured."""
    x, weight = torch.randn(256, 576), torch.randn(1536, 576)
    truth = (x.double() @ weight.double().t()).float()
    try:
        worst = ((_product(x, weight) - truth).abs().max() / truth.abs().max()).item()
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return False, f"this torch has no such product: {str(error).splitlines()[0]}"
    if not worst <= MAX_ERROR:
        return False, f"wrong by {worst:.1e} here"
    own, other = _fastest(lambda: linear_reference(x, weight), lambda: _product(x, weight))
    gigaflops = 2 * x.numel() * weight.shape[0] / 1e9
    seen = f"one thread: oneDNN {gigaflops / other:.0f} GFLOP/s, torch's own {gigaflops / own:.0f}"
    return own > MARGIN * other, seen


_pinned: bool | None = None


def pin_linear(is_onednn: bool) -> None:
    """Kernels of this process take this product from now on, oneDNN's or torch's own.

    The two round differently, and on a busy machine another process may measure another winner:
    then workers of one training differed, and half of all resumed ones by an ulp in some weights.
    """
    global _pinned
    _pinned = is_onednn


def takes_onednn() -> bool:
    """Whether kernels take oneDNN's product for fp32 on a CPU: as pinned, else as measured."""
    return choose_linear()[0] if _pinned is None else _pinned


def _fastest(*runs: Callable[[], Tensor]) -> list[float]:
    """The least processor seconds of each, in turns and on one thread.

    With several threads one that has to wait for a core holds up all: on a busy machine the two
    products then looked alike, and the slower one was taken. By the clock on the wall the ratio of
    two equal products lay between 0.64 and 1.48 beside four processes that only count, on two
    cores; by this thread's own between 0.91 and 1.04 (60 measurements each).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        least = [math.inf] * len(runs)
        for _ in range(REPEATS):
            for index, run in enumerate(runs):
                started = time.thread_time()
                run()
                least[index] = min(least[index], time.thread_time() - started)
        return least
    finally:
        torch.set_num_threads(threads)
