"""What a training step achieved: its operations, their share of what the devices can do, memory.

Operations are counted from the shapes of the step's passes (training/flops.py), never measured.
The peak they are compared with is that of a matrix product, measured before training.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import ModelError
from conf.records import RenderedExample
from kernels.linear import linear
from training.data import num_targets
from training.estimate import model_size
from training.flops import PassShape, StepCost, train_cost
from training.job import TrainJob
from training.packing import Layout, shared_length
from training.sharding import Step

PEAK_ROWS = {"cpu": 1024, "cuda": 8192}  # a square product large enough to run at its best
PEAK_SECONDS = 0.1  # spent on each product that is tried
MIN_REPEATS = 3


class Telemetry:
    """What is known of each step of a training; all workers make one, and ask it together."""

    def __init__(self, job: TrainJob, *, rows: Sequence[RenderedExample], device: str) -> None:
        self._rows = rows
        self._device = device
        self._world_size = job.world_size
        self._cost = _cost_of(job)
        self.peak_flops_per_second = self._summed(product_peak(device, dtype=job.dtype))

    def flops(self, step: Step, *, layout: Layout) -> int | None:
        """Operations that a step needs, over all workers; None for a model of unknown sizes."""
        if self._cost is None:
            return None
        passes = [part for share in step.shares for part in share if part]
        return sum(self._cost.flops(self._shape(part, layout=layout)) for part in passes)

    def share_of_peak(self, flops: int | None, *, seconds: float) -> float | None:
        """The share of the measured peak of all workers that so many operations are."""
        return None if flops is None else flops / seconds / self.peak_flops_per_second

    def peak_memory_bytes(self) -> tuple[int, ...]:
        """Each worker's peak so far, by global rank."""
        own = torch.tensor([peak_memory_bytes(self._device)], device=self._device)
        if self._world_size == 1:
            return (int(own),)
        found = torch.empty(self._world_size, dtype=own.dtype, device=self._device)
        dist.all_gather_into_tensor(found, own)
        return tuple(int(value) for value in found.tolist())

    def _shape(self, part: Sequence[int], *, layout: Layout) -> PassShape:
        rows = [self._rows[index] for index in part]
        shares = layout.is_packed and layout.shares_prefix
        return PassShape.of(
            [len(row.input_ids) for row in rows],
            shared=shared_length(rows) if shares else 0,
            targets=sum(num_targets(row) for row in rows),
        )

    def _summed(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total)


def _cost_of(job: TrainJob) -> StepCost | None:
    try:
        return train_cost(job.method, size=model_size(Path(job.model_dir)))
    except (ModelError, KeyError):  # a configuration without the counts that are needed
        return None


def product_peak(device: str, *, dtype: str) -> float:
    """Operations per second of a large square matrix product on one worker: the best that is seen.

    On a CPU the better of torch's product and oneDNN's. Takes about 0.2 s.
    """
    kind = device.partition(":")[0]
    size = PEAK_ROWS[kind]
    a = torch.rand(size, size, device=device).to(getattr(torch, dtype))
    products: list[Callable[[Tensor, Tensor], Tensor]] = [torch.nn.functional.linear]
    if kind == "cpu" and dtype == "float32":
        products.append(linear)
    best = min(_best_seconds(product, a, kind=kind) for product in products)
    return 2 * size**3 / best


@torch.no_grad()
def _best_seconds(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, *, kind: str) -> float:
    best, repeats = float("inf"), 0
    end = time.perf_counter() + PEAK_SECONDS
    while repeats < MIN_REPEATS or time.perf_counter() < end:
        started = time.perf_counter()
        product(a, a)
        if kind == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
        repeats += 1
    return best


def peak_memory_bytes(device: str) -> int:
    """This worker's peak: resident memory of the process, or allocated on its GPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
