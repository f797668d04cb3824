"""The workers of a pack: each holds all adapters and the whole base, and a part of each batch.

Adapters are small, so one sum of all their gradients a step is all that crosses. Everything else
that a pack decides follows from numbers that are the same on all workers: what only one of them
knows (a clock, a file, a full disk) is taken from the first. A worker alone needs no process group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn

from conf.errors import JobFailed, MachineFailed
from training.agree import number_from_rank_0, peers_named, text_from_rank_0
from training.job import Runtime

_RAISED = {error.__name__: error for error in (JobFailed, MachineFailed)}


class Workers:
    """This worker among those of its pack. Every method is called by all of them alike."""

    def __init__(self, runtime: Runtime, *, device: str) -> None:
        """device: cpu or cuda."""
        self.global_rank, self.count = runtime.global_rank, runtime.world_size
        self._device = f"cuda:{runtime.local_rank}" if device == "cuda" else device

    @property
    def is_first(self) -> bool:
        """Whether this one writes and reports."""
        return self.global_rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to ask."""
        return self.count == 1

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give each parameter the sum of all workers' gradients; one without any counts as 0."""
        if self.is_alone:
            return
        grads = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            grads.append(parameter.grad)
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        parts = torch.split(flat, [grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])

    def summed(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the workers, in float64."""
        if self.is_alone or not values:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(told)
        return [float(value) for value in told.tolist()]

    def summed_rows(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        """The same for rows of values, as long on each worker."""
        values = iter(self.summed([value for row in rows for value in row]))
        return [list(islice(values, len(row))) for row in rows]

    def of_each(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        """Each value of every worker, by global rank."""
        if self.is_alone:
            return [(value,) for value in values]
        own = torch.tensor(values, dtype=torch.int64, device=self._device)
        found = torch.empty(self.count * len(values), dtype=torch.int64, device=self._device)
        dist.all_gather_into_tensor(found, own)
        by_worker = found.view(self.count, len(values)).tolist()
        return [tuple(int(v) for v in of) for of in zip(*by_worker, strict=True)]

    def number_of_first(self, value: int) -> int:
        """The first worker's number, on all."""
        return value if self.is_alone else number_from_rank_0(value, device=self._device)

    def seconds_since(self, started_ns: int) -> float:
        """By the first worker's clock since its `time.perf_counter_ns()`."""
        return self.number_of_first(time.perf_counter_ns() - started_ns) / 1e9

    def first_does(self, work: Callable[[], object]) -> None:
        """Have the first worker do something, and wait for it.

        Raises:
            JobFailed, MachineFailed: what it raised, on all workers.
        """
        if self.is_alone:
            work()
            return
        failure = ""
        if self.is_first:
            try:
                work()
            except (JobFailed, MachineFailed) as error:
                failure = f"{type(error).__name__} {error}"
        name, _, text = text_from_rank_0(failure, device=self._device).partition(" ")
        if name:
            raise _RAISED[name](text)

    @contextmanager
    def named(self, when: str) -> Iterator[None]:
        """Say of a collective that failed what it means; see `peers_named`."""
        with peers_named(when, global_rank=self.global_rank, world_size=self.count):
            yield
