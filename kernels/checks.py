"""Each kernel against its reference, on the user's device: small odd shapes, a few seconds.

`launch.doctor` prints the result; an engine that finds a kernel wrong runs the reference instead
and records why. Tests and benchmarks make their inputs here too.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import BUILT, choose
from kernels.grouped_lora import Adapter, grouped_lora
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.lora_linear import lora_linear
from kernels.segments import Segments
from kernels.shared_prefix_attention import (
    shared_prefix_attention,
    shared_prefix_attention_reference,
)
from kernels.token_logprobs import Head, token_logprobs, token_logprobs_reference

# Largest absolute error allowed, for normal random inputs as made below. Attention rounds its
# output (values up to 4: 2 eps) and its weights on their way into a product (as much again).
# Log-probabilities are fp32 whatever the inputs are; 1e-4 is what the engine promises.
# Of the three kernels of training the largest error of loss, output and every gradient counts, each
# relative to its largest value; 16-bit products round their factors and their result.
TOLERANCES: dict[str, Callable[[torch.dtype], float]] = {
    "shared_prefix_attention": lambda dtype: 1e-5 + 4 * torch.finfo(dtype).eps,
    "token_logprobs": lambda dtype: 1e-4,
    "linear_cross_entropy": lambda dtype: 1e-5 + 4 * torch.finfo(dtype).eps,
    "lora_linear": lambda dtype: 1e-5 + 4 * torch.finfo(dtype).eps,
    "grouped_lora": lambda dtype: 1e-5 + 4 * torch.finfo(dtype).eps,
}


@dataclass(kw_only=True, slots=True, frozen=True)
class Check:
    """One kernel on one device.

    Args:
        kernel: its name.
        impl: what was compared with the reference.
        is_ok: whether the worst error is within the tolerance.
        worst_error: the largest absolute one; inf where the kernel raised.
        tolerance: the largest that is allowed.
        seconds: that the comparison took, compiling included.
        reason: why it is not ok; empty where it is.
    """

    kernel: str
    impl: str
    is_ok: bool
    worst_error: float
    tolerance: float
    seconds: float
    reason: str


@dataclass(kw_only=True, slots=True, frozen=True)
class AttentionCase:
    """Inputs of shared_prefix_attention, by its argument names."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    segments: Segments
    scale: float

    def run(self, impl: str) -> Tensor:
        """(Hq, T, d) by an implementation."""
        return shared_prefix_attention(
            self.query,
            self.key,
            self.value,
            prefix_key=self.prefix_key,
            prefix_value=self.prefix_value,
            segments=self.segments,
            scale=self.scale,
            impl=impl,
        )

    def reference(self) -> Tensor:
        """(Hq, T, d) fp32 by the reference, on the inputs as they were rounded."""
        return shared_prefix_attention_reference(
            self.query.float(),
            self.key.float(),
            self.value.float(),
            self.prefix_key.float(),
            self.prefix_value.float(),
            self.segments,
            self.scale,
        )


def attention_case(
    segments: Segments,
    *,
    key_heads: int,
    group: int,
    prefix: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AttentionCase:
    """Normal random inputs with the strides that a model's projections have: (rows, H, d)."""
    device = segments.columns.device
    source = torch.Generator().manual_seed(seed)

    def rows(heads: int, count: int) -> Tensor:
        made = torch.randn(count, heads, width, generator=source)
        return made.to(device=device, dtype=dtype).transpose(0, 1)

    return AttentionCase(
        query=rows(key_heads * group, len(segments.columns)),
        key=rows(key_heads, len(segments.ends)),
        value=rows(key_heads, len(segments.ends)),
        prefix_key=rows(key_heads, prefix),
        prefix_value=rows(key_heads, prefix),
        segments=segments,
        scale=width**-0.5,
    )


def random_tree(length: int, source: random.Random) -> list[int]:
    """A random tree of so many nodes, in preorder: the first column after each node's subtree."""
    ends, path = [length] * length, [0]
    for column in range(1, length):
        while len(path) > 1 and source.random() < 0.4:
            ends[path.pop()] = column
        path.append(column)
    return ends


def check_kernels(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
    *,
    only: Sequence[str] = BUILT,
) -> list[Check]:
    """Compare the kernels that `impl` means on this device with their references.

    Args:
        device: cpu, cuda or cuda:0.
        dtype: of weights and rows; sums are fp32 everywhere.
        impl: as `kernels.impl`.
        only: names of kernels.

    Raises:
        KernelsNotBuilt: for an implementation that cannot run on the device.
    """
    name = choose(impl, device).impl
    kernels = {
        "shared_prefix_attention": _attention_errors,
        "token_logprobs": _logprob_errors,
        "linear_cross_entropy": _loss_errors,
        "lora_linear": _lora_errors,
        "grouped_lora": _grouped_errors,
    }
    return [_check(kernel, kernels[kernel], name, device, dtype) for kernel in only]


def _check(
    kernel: str,
    errors: Callable[[str, str, torch.dtype], Iterator[float]],
    impl: str,
    device: str,
    dtype: torch.dtype,
) -> Check:
    started = time.perf_counter()
    tolerance = TOLERANCES[kernel](dtype)
    try:
        with torch.no_grad():
            worst = max(math.inf if math.isnan(e) else e for e in errors(impl, device, dtype))
        reason = "" if worst <= tolerance else f"off by {worst:.1e}, {tolerance:.1e} allowed"
    except Exception as error:  # whatever a compiler or driver raises is the finding
        worst = math.inf
        reason = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]}"
    return Check(
        kernel=kernel,
        impl=impl,
        is_ok=worst <= tolerance,
        worst_error=worst,
        tolerance=tolerance,
        seconds=time.perf_counter() - started,
        reason=reason,
    )


def _attention_errors(impl: str, device: str, dtype: torch.dtype) -> Iterator[float]:
    source = random.Random(0)
    columns = torch.tensor([4, -1, 0, 10], device=device)
    shapes = {
        "trees": Segments.trees([random_tree(n, source) for n in (37, 1, 70)], device=device),
        "chains": Segments.chains([5, 33], device=device),
        "slots": Segments.slots(columns, torch.full((4, 11), 11, device=device), capacity=11),
    }
    for prefix in (0, 1, 75):
        for segments in shapes.values():
            case = attention_case(
                segments, key_heads=2, group=3, prefix=prefix, width=64, dtype=dtype
            )
            yield (case.run(impl).float() - case.reference()).abs().max().item()
    if impl == "cpu":  # the one with gradients
        case = attention_case(shapes["chains"], key_heads=2, group=3, prefix=75, width=64)
        tensors = (case.query, case.key, case.value, case.prefix_key, case.prefix_value)
        inputs = [tensor.to(dtype) for tensor in tensors]
        yield _gradient_error(functools.partial(_attend, case=case), inputs, impl)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, impl: str, *, case: AttentionCase
) -> Tensor:
    return shared_prefix_attention(
        q,
        k,
        v,
        prefix_key=pk,
        prefix_value=pv,
        prefix_from=5,
        segments=case.segments,
        scale=case.scale,
        impl=impl,
    )


def _logprob_errors(impl: str, device: str, dtype: torch.dtype) -> Iterator[float]:
    source = torch.Generator().manual_seed(0)
    for num_rows, width, vocabulary in ((1, 64, 257), (70, 40, 1003)):
        weight = torch.randn(vocabulary, width, generator=source).to(device, dtype)
        bias = torch.randn(vocabulary, generator=source).to(device, dtype)
        hidden = torch.randn(num_rows, width, generator=source).to(device, dtype)
        rows = torch.randint(num_rows, (90,), generator=source).to(device)
        tokens = torch.randint(vocabulary, (90,), generator=source).to(device)
        for head in (Head(weight, impl=impl, chunk=300), Head(weight, bias, impl=impl, soft_cap=9)):
            got = token_logprobs(hidden, head, rows=rows, tokens=tokens)
            wanted = token_logprobs_reference(hidden, head, rows, tokens)
            yield (got - wanted).abs().max().item()


def _loss_errors(impl: str, device: str, dtype: torch.dtype) -> Iterator[float]:
    source = torch.Generator().manual_seed(0)
    for num_rows, width, vocabulary in ((1, 64, 257), (70, 40, 9001)):
        hidden, bias = (
            torch.randn(*s, generator=source) for s in ((num_rows, width), (vocabulary,))
        )
        weight = torch.randn(vocabulary, width, generator=source) * width**-0.5
        targets = torch.randint(vocabulary, (num_rows,), generator=source).to(device)
        inputs = [tensor.to(device, dtype) for tensor in (hidden, weight, bias)]
        for smoothing, cap in ((0.0, None), (0.1, 9.0)):
            loss = functools.partial(
                _loss, targets=targets, label_smoothing=smoothing, soft_cap=cap
            )
            yield _gradient_error(loss, inputs, impl)


def _loss(h: Tensor, w: Tensor, b: Tensor, impl: str, *, targets: Tensor, **shaping: Any) -> Tensor:
    return linear_cross_entropy(h, w, targets, b, impl=impl, scale=2.0, **shaping)


def _lora_errors(impl: str, device: str, dtype: torch.dtype) -> Iterator[float]:
    source = torch.Generator().manual_seed(0)
    for num_rows, width, outputs, lora_rank in ((3, 64, 33, 16), (90, 40, 70, 5)):
        shapes = ((num_rows, width), (outputs, width), (lora_rank, width), (outputs, lora_rank))
        inputs = [
            (torch.randn(*s, generator=source) * (s[1] ** -0.5 if i else 1)).to(device, dtype)
            for i, s in enumerate(shapes)
        ]
        yield _gradient_error(_layer, inputs, impl)


def _layer(x: Tensor, w: Tensor, a: Tensor, b: Tensor, impl: str) -> Tensor:
    return lora_linear(x, w, a, b, 2.0, impl=impl)


def _grouped_errors(impl: str, device: str, dtype: torch.dtype) -> Iterator[float]:
    source = torch.Generator().manual_seed(0)
    shapes = ((90, 40), (5, 40), (70, 5), (16, 40), (70, 16))
    inputs = [
        (torch.randn(*s, generator=source) * (s[1] ** -0.5 if i else 1)).to(device, dtype)
        for i, s in enumerate(shapes)
    ]
    weight = (torch.randn(70, 40, generator=source) * 40**-0.5).to(device, dtype)
    for starts in ((0, 3, 20, 90), (0, 64, 89, 90)):
        layers = functools.partial(_layers, weight=weight, starts=starts)
        yield _gradient_error(layers, inputs, impl)


def _layers(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    impl: str,
    *,
    weight: Tensor,
    starts: tuple[int, ...],
) -> Tensor:
    adapters = (Adapter(a, b, 2.0), None, Adapter(c, d, 0.5))
    return grouped_lora(x, weight, starts, adapters, impl=impl)


def _gradient_error(function: Callable[..., Tensor], inputs: list[Tensor], impl: str) -> float:
    """The largest error of a function's result and gradients, relative to the largest value."""
    found, wanted = (_with_gradients(function, inputs, name) for name in (impl, "reference"))
    pairs = zip(found, wanted, strict=True)
    return max(_worst((a.float() - b.float()).abs().max(), b.float().abs().max()) for a, b in pairs)


def _worst(difference: Tensor, largest: Tensor) -> float:
    """Inf where anything is nan: `max` would lose it."""
    ratio = (difference / largest.clamp(min=1e-3)).item()
    return math.inf if math.isnan(ratio) else ratio


def _with_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], impl: str
) -> list[Tensor]:
    """The result of a function, and its gradients under a weighted sum."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        out = function(*leaves, impl)
        ramp = torch.linspace(0.5, 1.5, out.numel(), device=out.device, dtype=out.dtype)
        gradients = torch.autograd.grad((out * ramp.reshape(out.shape)).sum(), leaves)
    return [out.detach(), *gradients]
