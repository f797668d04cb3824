"""Answers of endpoints, kept so that none is paid for twice: append-only JSON lines.

One file per endpoint and model, in the cache that all runs share. A line is written whole, by one
call, before its answer is used; a line that a killed process has cut off is passed over, and its
answer asked for again. Errors are not kept: they may be mended.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(kw_only=True, slots=True, frozen=True)
class Reply:
    """What an endpoint gave. Tokens are its own counts, None where it does not tell.

    attempts: requests it took. first_token_seconds: only where the answer was streamed.
    """

    text: str
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_seconds: float | None = None
    total_seconds: float | None = None
    attempts: int = 1


class AnswerStore:
    """Replies by key; used by all threads of a process, and by several processes at a time."""

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Args:
            path: the file; it and its directory are made where they are missing.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._replies: dict[str, Reply] = {}
        self._guard = threading.Lock()
        self._offset = 0
        self._refresh()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if _is_cut_off(path):
            os.write(self._file, b"\n")

    def get(self, key: str) -> Reply | None:
        """The reply to a key, also one that another process has written meanwhile."""
        with self._guard:
            if key not in self._replies:
                self._refresh()
            return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; it is in the file when this returns."""
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False) + "\n"
        with self._guard:
            os.write(self._file, line.encode("utf-8"))  # appended whole, whoever else writes
            self._replies.setdefault(key, reply)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)

    def _refresh(self) -> None:
        """Read the lines that are new and whole."""
        if not self._path.exists():
            return
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                fields = json.loads(line)
                self._replies.setdefault(fields.pop("key"), Reply(**fields))
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # cut off by a kill


def _is_cut_off(path: Path) -> bool:
    """Whether a file's last line has no end."""
    with path.open("rb") as stream:
        if not stream.seek(0, os.SEEK_END):
            return False
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"
