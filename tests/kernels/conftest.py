"""What the kernels' tests share: the largest block of memory that a call asks for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile


@pytest.fixture
def largest_allocation() -> Callable[[Callable[[], object]], int]:
    """Bytes of the largest block, seen by torch's allocator: inside its C++ operators as well.

    On one thread: some operators ask for a block with room for every thread.
    """

    def measure(run: Callable[[], object]) -> int:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.no_grad():
            run()  # what is kept between calls is made now
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
                run()
        torch.set_num_threads(threads)
        return max(event.self_cpu_memory_usage for event in seen.events())

    return measure
