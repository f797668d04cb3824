"""What a process does while it works for a job: logs/<job>/<rank>.log, .stack and where it ran.

    <rank>.log          what it prints and warns, secrets masked, at most two files of MAX_LOG_BYTES
    <rank>.stack        where all its threads stood when it had said nothing for too long
    worker-<rank>.json  its node and process id
    error-<rank>.json   its own words where it failed

<rank> is the global rank of a training's worker, 0 for an evaluator, engine-<k> for its engines.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from launch.logs.errors_file import note_failure, note_worker
from launch.logs.masking import masked, secrets_of

MAX_LOG_BYTES = 8 * 2**20
MAX_LINE_CHARACTERS = 2**16
# An evaluator that has not brought a record for so long; one item on a slow machine takes 30 s.
STALLED_SECONDS = 300.0


class MaskedLog(io.TextIOBase):
    """A text stream into a log file: whole lines, secrets masked, the oldest part given up.

    A line is held back until it ends, so that a secret written in two parts is found as well.
    """

    encoding = "utf-8"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._secrets = secrets_of()
        self._guard = threading.RLock()
        self._pending = ""
        self._file: IO[str] = path.open("a", encoding="utf-8", errors="replace", buffering=1)
        self._num_bytes = path.stat().st_size

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The file's, for libraries that hand their output to a process."""
        return self._file.fileno()

    def write(self, text: str) -> int:
        """Take a text; its whole lines are in the file at once."""
        with self._guard:
            self._pending += text
            end = max(self._pending.rfind("\n"), self._pending.rfind("\r")) + 1
            if len(self._pending) - end > MAX_LINE_CHARACTERS:
                end = len(self._pending)
            if end:
                self._put(self._pending[:end])
                self._pending = self._pending[end:]
        return len(text)

    def _put(self, text: str) -> None:
        clean = masked(text, self._secrets)
        size = len(clean.encode("utf-8", "replace"))
        if self._num_bytes and self._num_bytes + size > MAX_LOG_BYTES:
            self._file.close()
            os.replace(self._path, self._path.with_name(f"{self._path.name}.old"))
            self._file = self._path.open("w", encoding="utf-8", errors="replace", buffering=1)
            self._num_bytes = 0
        self._file.write(clean)
        self._num_bytes += size

    def close(self) -> None:
        """Write what is left of a line, and close."""
        with self._guard:
            if not self.closed:
                if self._pending:
                    self._put(self._pending)
                self._file.close()
        super().close()


class _Alarm:
    """Dumps the stacks of all threads where nobody calls `again` in time; one per process.

    faulthandler's own thread does it without the interpreter's lock, so a worker that hangs in a
    collective or in a kernel is shown as well. One that was stopped (SIGSTOP) shows nothing.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self._seconds = path, seconds
        self._file = path.open("w", encoding="utf-8")
        self.again()

    def again(self) -> None:
        faulthandler.dump_traceback_later(self._seconds, file=self._file)

    def end(self, *, keeps: bool) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not keeps or not self.path.stat().st_size:
            self.path.unlink()


_alarm: _Alarm | None = None


def beat() -> None:
    """The worker gets on: its stacks need not be shown yet."""
    if _alarm is not None:
        _alarm.again()


@contextlib.contextmanager
def _stacks(path: Path, seconds: float | None) -> Iterator[None]:
    global _alarm
    if path.exists():  # of an attempt that hung, which this one may mend
        os.replace(path, path.with_name(f"{path.name}.old"))
    if seconds is None or _alarm is not None:
        yield
        return
    _alarm = _Alarm(path, seconds)
    keeps = True
    try:
        yield
        keeps = False
    finally:
        alarm, _alarm = _alarm, None
        alarm.end(keeps=keeps)


@contextlib.contextmanager
def logged(path: Path, *, stalled_seconds: float | None = None) -> Iterator[None]:
    """Send what libraries print to the job's log file; a failure leaves its traceback and words.

    Args:
        path: logs/<job>/<rank>.log.
        stalled_seconds: after how long without `beat` the stacks are dumped; None: never.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    note_worker(path)
    stream: Any = MaskedLog(path)
    with (
        contextlib.closing(stream),
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        _stacks(path.with_suffix(".stack"), stalled_seconds),
    ):
        try:
            yield
        except GeneratorExit:  # who asked wants no more
            raise
        except BaseException as error:
            said = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"{said} failed with {type(error).__name__}", file=stream)
            traceback.print_exc(file=stream)
            sys.stdout.flush()
            if isinstance(error, Exception):
                note_failure(path, error)
            raise
