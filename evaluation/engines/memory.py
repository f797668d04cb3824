"""How many rows a pass may have: by what the device has free and what a pass was seen to need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

CPU_ROWS = (
    1024  # of a 135M model on 2 cores: 1,049 rows/s at 512, 1,133 at 1,024, in a scoring call
)
FIRST_GPU_ROWS = 1024
MOST_GPU_ROWS = 16384
USABLE_SHARE = 0.7  # of free memory; the rest is for the head, the stack, and other processes
CPU_BYTES_PER_ROW = 2**20  # more than any dense model under 10B parameters needs for a row


class RowsPerPass:
    """rows: of the next pass. A fixed number is obeyed until memory runs out."""

    def __init__(self, fixed: int | None, *, device: torch.device) -> None:
        """fixed: the user's own number; None: by itself."""
        self._device = device
        self._is_measuring = fixed is None and device.type == "cuda"
        if fixed is not None:
            self.rows = fixed
        elif device.type == "cuda":
            self.rows = FIRST_GPU_ROWS
        else:
            room = int(psutil.virtual_memory().available * USABLE_SHARE)
            self.rows = max(1, min(CPU_ROWS, room // CPU_BYTES_PER_ROW))

    @contextmanager
    def measured(self, num_rows: int) -> Iterator[None]:
        """Around a pass: on a GPU the first full pass tells how many rows the free memory holds."""
        if not self._is_measuring or num_rows < self.rows // 2:
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        per_row = (torch.cuda.max_memory_allocated(self._device) - before) / num_rows
        free, _ = torch.cuda.mem_get_info(self._device)
        held = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        fitting = int((free + held) * USABLE_SHARE / max(per_row, 1.0))
        self.rows = max(1, min(MOST_GPU_ROWS, fitting))
        self._is_measuring = False

    def back_off(self, num_rows: int) -> None:
        """A pass of num_rows had not enough memory: half as many from now on."""
        self.rows = max(1, num_rows // 2)
        self._is_measuring = False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
