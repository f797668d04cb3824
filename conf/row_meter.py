"""Rows put through an embedding, announced in a file before they are computed.

A killed process cannot tell what it had computed since its last record. Its file can: the next
attempt bills what was announced and is in no record. The number is 8 bytes in the page cache, which
outlives the process. Counting and writing it take 6.5 microseconds a pass on a busy core.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any


class RowMeter:
    """Counts the rows of this process. rows: all that were announced since it started."""

    def __init__(self) -> None:
        self.rows = 0
        self._before = 0
        self._file: int | None = None

    def count_into(self, directory: Path | None) -> None:
        """Announce rows from now on in a new file of this directory; None: in no file."""
        if self._file is not None:
            os.close(self._file)
        self._before, self._file = self.rows, None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / f"{time.time_ns()}-{os.getpid()}"
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def announce(self, rows: int) -> None:
        """Say that so many rows are about to be computed."""
        self.rows += rows
        if self._file is not None:
            os.pwrite(self._file, struct.pack("<q", self.rows - self._before), 0)


METER = RowMeter()  # of this process: a model outlives the jobs that ask it


def announced_rows(directory: Path) -> int:
    """What all processes announced in a directory and below; 0 where it is not there."""
    contents = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    return sum(struct.unpack("<q", c)[0] for c in contents if len(c) == struct.calcsize("<q"))


def watch(embedding: Any) -> None:
    """Have an embedding announce its rows; a copy of it, as adapters make, does as well."""
    embedding.register_forward_pre_hook(_announce)


def _announce(_module: object, inputs: tuple[Any, ...]) -> None:
    METER.announce(sum(ids.numel() for ids in inputs))  # none where they came by keyword
