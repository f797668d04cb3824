"""Which rows each worker sees in each pass of each optimizer step (pure).

The order comes from (seed, epoch) alone and batches are formed over all workers first, so the
number of workers and the size of a pass change the work's layout and not its result. Batches are
random, not grouped by length: where length goes with the label (spam is long), grouped batches
hold one class each. Rows are sorted by length inside a batch instead, which is free.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class Step:
    """One optimizer step.

    rows: indices of the global batch. shares[global_rank][pass]: the rows that a worker forwards
    together. All workers have the same number of passes, since a pass is a collective operation;
    a pass without rows is taken with a stand-in row that carries no loss.
    """

    step: int
    rows: tuple[int, ...]
    shares: tuple[tuple[tuple[int, ...], ...], ...]


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of the rows, the same on every machine for the same (seed, epoch)."""
    order = list(range(num_rows))
    random.Random(f"rows {seed} {epoch}").shuffle(order)
    return tuple(order)


def global_batches(
    num_rows: int, *, batch_size: int, seed: int, total_steps: int
) -> Iterator[tuple[int, ...]]:
    """Row indices of each optimizer step. Each row comes once per epoch, in the epoch's order."""
    step, epoch = 0, 0
    while step < total_steps:
        order = epoch_order(num_rows, seed=seed, epoch=epoch)
        for start in range(0, num_rows, batch_size):
            if step == total_steps:
                return
            yield order[start : start + batch_size]
            step += 1
        epoch += 1


def split_batch(
    rows: Sequence[int],
    *,
    lengths: Sequence[int],
    world_size: int,
    fits: Callable[[tuple[int, ...]], bool],
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """A batch dealt out to workers and passes: result[global_rank][pass] = row indices.

    Rows are sorted by length and dealt round, so workers get near-equal tokens; each worker's share
    is cut into passes of neighbours, so little is padded. As few passes as `fits` allows, which
    must accept a single row and an empty pass. Every row appears exactly once.
    """
    longest_first = sorted(rows, key=lambda row: (-lengths[row], row))
    shares = [longest_first[worker::world_size] for worker in range(world_size)]
    for num_passes in range(1, len(shares[0]) + 1):
        cut = tuple(tuple(_cut(share, num_parts=num_passes)) for share in shares)
        if all(fits(part) for share in cut for part in share):
            return cut
    raise AssertionError("a single row must fit")


def _cut(share: Sequence[int], *, num_parts: int) -> Iterator[tuple[int, ...]]:
    """Consecutive parts whose sizes differ by at most one."""
    size, extra = divmod(len(share), num_parts)
    start = 0
    for part in range(num_parts):
        end = start + size + (part < extra)
        yield tuple(share[start:end])
        start = end


def plan_steps(
    lengths: Sequence[int],
    *,
    batch_size: int,
    fits: Callable[[tuple[int, ...]], bool],
    world_size: int,
    seed: int,
    total_steps: int,
    first_step: int = 1,
) -> Iterator[Step]:
    """The optimizer steps first_step..total_steps of a training, in order, numbered from 1.

    fits: whether rows may be one pass.
    """
    batches = global_batches(
        len(lengths), batch_size=batch_size, seed=seed, total_steps=total_steps
    )
    for number, rows in enumerate(batches, start=1):
        if number < first_step:
            continue
        shares = split_batch(rows, lengths=lengths, world_size=world_size, fits=fits)
        yield Step(step=number, rows=rows, shares=shares)
