"""What decoding costs if everything but its matrix products were free, and what memory allows.

A bound by operations at the best rate (bounds.py) is out of reach for a decoding step: few rows
meet all weights. So the products of a workload are run here, by themselves: as many steps, with as
many rows each, on weights of the model's shapes that are as far apart in memory as the model's.

    products   seconds of all products, by kernels.linear, each step's on the rows live in it
    memory     bytes of all weights x steps / the rate at which this process reads memory
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from kernels.linear import Packed

REPEATS = 3
READ_BYTES = 2**30


@dataclass(kw_only=True, slots=True, frozen=True)
class Weights:
    """Packed weights of all layers and of the head, random, of a Llama-like model's shapes."""

    layers: tuple[tuple[Packed, ...], ...]
    head: Packed
    widths: tuple[int, ...]  # of the input of each product of a layer
    bytes: int

    @classmethod
    def of(cls, model_dir: Path) -> Self:
        """From config.json; costs the memory of the model once more."""
        c = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        width, inner = c["hidden_size"], c["intermediate_size"]
        head_width = c.get("head_dim") or width // c["num_attention_heads"]
        queries, keys = (c[f"num_{k}_heads"] * head_width for k in ("attention", "key_value"))
        shapes = [(queries, width), (keys, width), (keys, width), (width, queries)]
        shapes += [(inner, width), (inner, width), (width, inner)]
        layers = tuple(
            tuple(Packed(torch.randn(shape)) for shape in shapes)
            for _ in range(c["num_hidden_layers"])
        )
        count = len(layers) * sum(a * b for a, b in shapes) + c["vocab_size"] * width
        return cls(
            layers=layers,
            head=Packed(torch.randn(c["vocab_size"], width)),
            widths=tuple(inputs for _, inputs in shapes),
            bytes=4 * count,
        )

    def run(self, rows: int, *, read_rows: int) -> None:
        """All products of a pass of `rows`, of which `read_rows` go through the head."""
        inputs = {width: torch.ones(rows, width) for width in set(self.widths)}
        for layer in self.layers:
            for product, width in zip(layer, self.widths, strict=True):
                product(inputs[width])
        self.head(torch.ones(read_rows, self.widths[0]))


def steps_of(new_tokens: Sequence[int]) -> list[int]:
    """Rows live in each decoding step; a request's first token comes from its prompt's pass."""
    return [sum(count > step for count in new_tokens) for step in range(1, max(new_tokens))]


@torch.inference_mode()
def decode_bound(
    model_dir: Path, *, new_tokens: Sequence[int], prompt_rows: int
) -> dict[str, float | int]:
    """Both bounds of a workload in seconds, with what they were made of.

    Args:
        model_dir: where config.json is.
        new_tokens: of each request.
        prompt_rows: rows of the prompts that are computed, in one pass.
    """
    weights, steps = Weights.of(model_dir), steps_of(new_tokens)
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        weights.run(prompt_rows, read_rows=len(new_tokens))
        for rows in steps:
            weights.run(rows, read_rows=rows)
        seconds.append(time.perf_counter() - started)
    rate = read_bytes_per_second()
    return {
        "steps": len(steps),
        "weight_bytes": weights.bytes,
        "products_seconds": min(seconds),
        "read_gigabytes_per_second": rate / 1e9,
        "memory_seconds": (1 + len(steps)) * weights.bytes / rate,
    }


def read_bytes_per_second() -> float:
    """How fast this process reads memory that no cache holds: the best of a few sums."""
    numbers: Tensor = torch.ones(READ_BYTES // 4)
    best = 0.0
    for _ in range(REPEATS):
        started = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - started))
    return best
