"""Rows for the parts of a training step: the loss, and a LoRA step with and without our layer."""

from __future__ import annotations

import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers.loss.loss_utils import ForCausalLMLoss

from kernels.linear import Linear, linear
from kernels.linear_cross_entropy import linear_cross_entropy
from tests.benchmarks.comparing import Setup
from tests.benchmarks.harness import SETTLE_SECONDS, Result, ratio_of
from tests.benchmarks.parity import Parity
from tests.benchmarks.training_data import banking77
from tests.benchmarks.training_ours import ours
from training.lora import LoraLayer

LONG_TOKENS = 2048
STEP_TOKENS = 512  # of the LoRA step
FEW_TOKENS, FEW_TARGETS = 1024, 51  # 5%
MAX_ERROR = 1e-4  # of gradients, by their largest value; tests hold 1e-6 of fp64 truth
MAX_LONG_MEMORY, MAX_FEW_MEMORY = 0.25, 0.05
LOSSES = ("loss_all_tokens_frozen_head", "loss_all_tokens", "loss_few_targets")
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(kw_only=True, slots=True)
class Head:
    """Rows before a model's head, and their targets; -100 where a token is none."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    def ours(self) -> tuple[Tensor, ...]:
        """Loss, and gradients of what trains, of the target rows only."""
        rows = (self.labels != -100).nonzero()[:, 0]
        loss = linear_cross_entropy(self.hidden[rows], self.weight, self.labels[rows])
        return self._graded(loss / len(rows))

    def shipped(self, product: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """transformers' own loss over all logits. product: of the head."""
        logits = product(self.hidden, self.weight)
        # It shifts labels by itself; ours are shifted already.
        loss = ForCausalLMLoss(
            logits[None], None, vocab_size=len(self.weight), shift_labels=self.labels[None]
        )
        return self._graded(loss)

    def _graded(self, loss: Tensor) -> tuple[Tensor, ...]:
        wanted = [t for t in (self.hidden, self.weight) if t.requires_grad]
        return (loss.detach(), *torch.autograd.grad(loss, wanted))


def loss_rows(setup: Setup) -> list[Result]:
    """The loss of long texts with a frozen and a trained head, and of few targets."""
    weight = _head_weight(setup.model_dir)
    torch.manual_seed(0)
    _, rounds = setup.cap(1, 9)
    results = []
    cases = (
        (LOSSES[0], LONG_TOKENS, LONG_TOKENS, False, 1.0, MAX_LONG_MEMORY),
        (LOSSES[1], LONG_TOKENS, LONG_TOKENS, True, 1.0, MAX_LONG_MEMORY),
        (LOSSES[2], FEW_TOKENS, FEW_TARGETS, False, 1.2, MAX_FEW_MEMORY),
    )
    for name, tokens, targets, trains, floor, most in cases:
        labels = torch.randint(0, len(weight), (tokens,))
        labels[torch.randperm(tokens)[targets:]] = -100
        head = Head(
            hidden=torch.randn(tokens, weight.shape[1], requires_grad=True),
            weight=weight.clone().requires_grad_(trains),
            labels=labels,
        )
        what = f"{targets} of {tokens} tokens are targets, head {'trains' if trains else 'frozen'}"
        results.append(_loss_row(head, name, what, floor=floor, most=most, rounds=rounds))
    return results


def _loss_row(
    head: Head, name: str, what: str, *, floor: float, most: float, rounds: int
) -> Result:
    def shipped() -> tuple[Tensor, ...]:
        return head.shipped(torch.nn.functional.linear)

    def same_linear() -> tuple[Tensor, ...]:
        return head.shipped(linear)

    parity = _parity(head.ours(), shipped())
    sides = {"ours": head.ours, "peer": shipped, "same_linear": same_linear}
    seconds = _in_turns(sides, rounds=rounds)
    gradients = sum(t.nbytes for t in (head.hidden, head.weight) if t.requires_grad)
    memory = {side: peak_bytes(run) - gradients for side, run in sides.items()}
    result = Result(
        name=name,
        work=f"loss and its gradients, {what}, vocabulary {len(head.weight):,}",
        ours=statistics.median(seconds["ours"]),
        peer=statistics.median(seconds["peer"]),
        peer_version="transformers ForCausalLMLoss",
        ratio=ratio_of(seconds["ours"], seconds["peer"]),
        floor=floor,
        aim=None,
        bound=None,
        unit="seconds",
        parity=parity,
        more={
            "ratio_same_linear": ratio_of(seconds["ours"], seconds["same_linear"]).median,
            "memory_bytes": memory,
            "memory_share": memory["ours"] / memory["peer"],
            "seconds": seconds,
        },
    )
    result.judge()
    if memory["ours"] > most * memory["peer"]:
        result.failures.append(f"memory: {memory['ours'] / memory['peer']:.3f} of the peer's")
    return result


def lora_step(setup: Setup) -> list[Result]:
    """One LoRA pass of 512 computed tokens with our layer and with peft's, and a full one."""
    data = banking77(setup.model_dir, setup.data, rows=STEP_TOKENS // 8, chunks=1)
    _, rounds = setup.cap(1, 9)
    scratch = Path(tempfile.mkdtemp())
    places = {"model_dir": setup.model_dir, "threads": setup.threads, "output_dir": scratch}
    with ours(kind="lora", **places) as mine, ours(kind="full", **places) as full:  # type: ignore[arg-type]
        model, layout = mine.engine.trainee.model, mine.engine.trainee.layout
        reaches = range(1, len(data.chunks[0]) + 1)
        parts = (data.chunks[0][:end] for end in reaches)
        rows = next(part for part in parts if layout.num_tokens(part) >= STEP_TOKENS)
        layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        linears = [m for m in model.modules() if type(m) is Linear]

        def with_peft(swapped: Sequence[torch.nn.Module] = ()) -> tuple[float, float]:
            before = [(module, type(module)) for module in (*layers, *swapped)]
            for module, own in before:  # as the class is that ours was made of
                module.__class__ = own.__mro__[1]
            try:
                return mine.loss_and_norm(rows)
            finally:
                for module, own in before:
                    module.__class__ = own

        def run(step: Callable[[], tuple[float, float]]) -> Step:
            return lambda: tuple(torch.tensor(value) for value in step())

        sides = {
            "ours": run(lambda: mine.loss_and_norm(rows)),
            "peer": run(lambda: with_peft(linears)),
            "same_linear": run(with_peft),
            "full": run(lambda: full.loss_and_norm(rows)),
        }
        parity = _parity(sides["ours"](), sides["peer"]())
        seconds = _in_turns(sides, rounds=rounds)
    result = Result(
        name="lora_layer",
        work=f"forward and backward of LoRA r=16, {layout.num_tokens(rows)} rows computed",
        ours=statistics.median(seconds["ours"]),
        peer=statistics.median(seconds["peer"]),
        peer_version=f"peft {metadata.version('peft')} lora.Linear",
        ratio=ratio_of(seconds["ours"], seconds["peer"]),
        floor=1.1,
        aim=None,
        bound=None,
        unit="seconds",
        parity=parity,
        more={
            "ratio_same_linear": ratio_of(seconds["ours"], seconds["same_linear"]).median,
            "full_seconds": statistics.median(seconds["full"]),
            "seconds": seconds,
        },
    )
    result.judge()
    if ratio_of(seconds["ours"], seconds["full"]).high < 1.0:
        result.failures.append("slower than a full step")
    return [result]


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes held at a time beyond what was there before, by torch's allocator."""
    run()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = run()
    held = most = 0
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    del kept
    return most


def _in_turns(sides: dict[str, Step], *, rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for run in sides.values():
        run()
    for k in range(rounds):
        order = list(sides.items())
        for side, run in order if k % 2 == 0 else order[::-1]:
            gc.collect()
            time.sleep(SETTLE_SECONDS)
            started = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - started)
    return seconds


def _parity(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> Parity:
    """Largest difference of loss and gradients, each relative to its largest value."""
    gaps = [
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)
    ]
    worst = max(gaps)
    is_ok = worst <= MAX_ERROR
    return Parity(checked=len(gaps), ok=is_ok, worst=worst, why="" if is_ok else f"off by {worst}")


def _head_weight(model_dir: Path) -> Tensor:
    """The head's weights (V, D) of a model directory."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    return copy.deepcopy(model.get_output_embeddings().weight.detach())
