"""Small collective decisions: what one worker knows, all do. Every worker calls them alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from training.job import PeerLost


def number_from_rank_0(value: int, *, device: str) -> int:
    """Global rank 0's number, on all workers; the others' values are not looked at."""
    told = torch.tensor(value, dtype=torch.int64, device=device)
    dist.broadcast(told, src=0)
    return int(told)


def text_from_rank_0(text: str, *, device: str) -> str:
    """Global rank 0's text, on all workers. Bytes cross, never pickles."""
    data = text.encode("utf-8")
    length = number_from_rank_0(len(data), device=device)
    told = torch.zeros(length, dtype=torch.uint8, device=device)
    if dist.get_rank() == 0 and length:
        told = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
    dist.broadcast(told, src=0)
    return bytes(told.cpu().tolist()).decode("utf-8")


def is_true_everywhere(value: bool, *, device: str) -> bool:
    """Whether the value is true on all workers."""
    told = torch.tensor(int(value), dtype=torch.int64, device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MIN)
    return bool(told)


@contextmanager
def peers_named(when: str, *, global_rank: int, world_size: int) -> Iterator[None]:
    """Say of a collective that failed what it means: another worker is not there any more.

    Raises:
        PeerLost: it did.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text):
            raise
        raise PeerLost(
            f"worker {global_rank} of {world_size} got no answer from another in {when}: "
            f"{text.partition('. This is typically')[0][:300]}"
        ) from error
