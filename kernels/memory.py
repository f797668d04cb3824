"""What an operation that found no memory looks like, on a GPU or on a CPU."""

from __future__ import annotations

import torch

# torch raises a plain RuntimeError on a CPU; its words differ by version and platform.
CPU_WORDS = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had not enough memory for an allocation."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in CPU_WORDS)
