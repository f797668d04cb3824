"""The least work a workload needs, and how fast that could be done here: what a ratio cannot pass.

    bound = the peer's measured seconds / (operations that nobody can avoid / best measured rate)

Operations that cannot be avoided: every distinct token prefix once through the layers (counted with
a set, not by our planner), attention to what stands before it, and the head where a label's token
is read. All at the rate of the fastest matrix product measured in the same process. It is a bound
on the ratio of times, so it also holds for what the peer spends on padding, on log-softmax over
positions nobody reads, and on copies; `flops_ratio` is the ratio of operations alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

Continued = tuple[tuple[int, ...], tuple[int, ...]]  # prompt ids, ids of one continuation


@dataclass(kw_only=True, slots=True, frozen=True)
class Work:
    """rows through the layers; keys: (row, visible key) pairs; heads: rows that are projected."""

    rows: int
    keys: int
    heads: int

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(
            rows=self.rows + other.rows,
            keys=self.keys + other.keys,
            heads=self.heads + other.heads,
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class Shape:
    """Floating-point operations of a Llama-like model: per row, per visible key, per logits row."""

    row_flops: int
    key_flops: int
    head_flops: int

    @classmethod
    def read(cls, model_dir: Path) -> Shape:
        """Count the matrix products that config.json describes; a multiply-add is 2."""
        c = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        width, layers = c["hidden_size"], c["num_hidden_layers"]
        head_width = c.get("head_dim") or width // c["num_attention_heads"]
        queries = c["num_attention_heads"] * head_width
        keys = c["num_key_value_heads"] * head_width
        parameters = 2 * width * (queries + keys) + 3 * width * c["intermediate_size"]
        return cls(
            row_flops=2 * layers * parameters,
            key_flops=4 * layers * queries,  # query x key, and weight x value
            head_flops=2 * width * c["vocab_size"],
        )

    def flops(self, work: Work) -> int:
        """Operations of a piece of work."""
        return (
            work.rows * self.row_flops + work.keys * self.key_flops + work.heads * self.head_flops
        )


def needed(pairs: Iterable[Continued]) -> Work:
    """Each distinct prefix once, and one head row per distinct prefix that is read.

    The continuation's last token is read and never forwarded. A prefix is known by its rolling
    64-bit hash: of 10^6 prefixes two share one with a probability of 3 in 10^8.
    """
    seen: dict[int, int] = {}
    read: set[int] = set()
    for prompt, continuation in pairs:
        state = 0
        for depth, token in enumerate((*prompt, *continuation[:-1])):
            state = hash((state, token))
            seen[state] = depth + 1
            if depth >= len(prompt) - 1:
                read.add(state)
    return Work(rows=len(seen), keys=sum(seen.values()), heads=len(read))


def full_runs(pairs: Iterable[Continued], *, is_all_projected: bool) -> Work:
    """Each distinct prompt + continuation[:-1] run in full, as an evaluator without reuse does.

    is_all_projected: logits at every position (lm-eval's hf), or only where they are read.
    """
    runs: dict[tuple[int, ...], int] = {}
    for prompt, continuation in pairs:
        run = prompt + continuation[:-1]
        runs[run] = max(runs.get(run, 0), len(continuation))
    return Work(
        rows=sum(len(run) for run in runs),
        keys=sum(len(run) * (len(run) + 1) // 2 for run in runs),
        heads=sum(len(run) if is_all_projected else heads for run, heads in runs.items()),
    )


def peak_flops_per_second(repeats: int = 5) -> float:
    """The fastest fp32 matrix product of this process: both libraries, the model's own shapes."""
    import torch

    from kernels.linear import Packed

    best = 0.0
    for rows, inner, outer in ((512, 576, 1536), (512, 1536, 576), (1024, 576, 4096)):
        x, weight = torch.randn(rows, inner), torch.randn(outer, inner)
        for product in (Packed(weight), lambda x, w=weight: torch.nn.functional.linear(x, w)):
            product(x)
            for _ in range(repeats):
                started = time.perf_counter()
                for _ in range(8):
                    product(x)
                seconds = time.perf_counter() - started
                best = max(best, 8 * 2 * rows * inner * outer / seconds)
    return best
