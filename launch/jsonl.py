"""Append-only files of a JSON value a line, whose writer may be killed at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from conf.hashing import plain

BLOCK_BYTES = 1 << 16


class Lines:
    """An append-only JSONL file; each line is flushed to the kernel before `append` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream: IO[str] = path.open("a", encoding="utf-8")

    def append(self, value: Any) -> None:
        """Write one line."""
        self._stream.write(json.dumps(plain(value), ensure_ascii=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Flush to the disk and close."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """All whole lines of a JSONL file; a last line cut off by a killed writer is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield json.loads(line)


def cut_broken_line(path: Path) -> None:
    """Take off a last line that a killed writer left half written."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        end = start = stream.seek(0, os.SEEK_END)
        while start:  # from the end, for the file may be larger than memory
            size = min(start, BLOCK_BYTES)
            start = stream.seek(start - size)
            last = stream.read(size).rfind(b"\n")
            if last >= 0:
                start += last + 1
                break
        if start < end:
            stream.truncate(start)
