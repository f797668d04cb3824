"""Copies finished jobs and runs to a store as they end, and brings them back (cluster.copy_to).

A store that fails costs no run anything: what it lacks is told at the end, and the same command
copies it then.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from conf.errors import ClusterError
from launch.elsewhere.copy_store import Entry, Store, check_url

IDLE_SECONDS = 120.0  # a store that takes no byte for so long is given up


@dataclass(slots=True)
class Copier:
    """Copies finished jobs while a run goes on, in a thread of its own, and the run as it ends.

    Args:
        url: cluster.copy_to; None: nothing is copied.
        run: the run's directory; jobs lie in the cache beside it.
        idle_seconds: after so long without a byte, the store is given up.
    """

    url: str | None
    run: Path
    idle_seconds: float = IDLE_SECONDS
    failures: dict[str, str] = field(default_factory=dict)  # by directory, its last
    _copied: dict[str, dict[str, Entry]] = field(default_factory=dict)
    _waiting: queue.Queue[str | None] = field(default_factory=queue.Queue)
    _thread: threading.Thread | None = None
    _moved: float = 0.0

    def job(self, key: str) -> None:
        """Copy a finished job as soon as those before it are there; returns at once."""
        self._ask(f"jobs/{key}")

    def _ask(self, directory: str | None) -> None:
        if self.url is None:
            return
        self._waiting.put(directory)
        if self._thread is None:
            self._moved = time.monotonic()
            self._thread = threading.Thread(target=self._work, name="copies", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        assert self.url is not None
        while (directory := self._waiting.get()) is not None:
            self._note_move()
            try:
                self._copy(directory)
                self.failures.pop(directory, None)
            except Exception as error:  # noqa: BLE001 - a copy that fails is told, and ends nothing
                self.failures[directory] = f"{type(error).__name__}: {error}"

    def _copy(self, directory: str) -> None:
        assert self.url is not None
        if directory in self._copied:
            return
        kind, _, key = directory.partition("/")
        source = self.run.parent / ".cache" / "jobs" / key if kind == "jobs" else self.run
        store = Store(self.url, self.run.name, moved=self._note_move)
        own = (e for entries in self._copied.values() for e in entries.values())
        found = store.put(source, directory, {e.sha256: e.at for e in own})
        if kind == "jobs":
            self._copied[directory] = found

    def _note_move(self) -> None:
        self._moved = time.monotonic()

    def end(self, keys: list[str]) -> str | None:
        """Copy what is missing of these finished jobs, and the run; waits while bytes move.

        Returns:
            What to tell; None where nothing is copied.
        """
        if self.url is None:
            return None
        asked = [*(f"jobs/{key}" for key in dict.fromkeys(keys)), "run"]
        for directory in [*asked, None]:
            self._ask(directory)
        assert self._thread is not None
        while self._thread.is_alive() and time.monotonic() - self._moved < self.idle_seconds:
            self._thread.join(timeout=0.2)
        if self._thread.is_alive():
            why = f"it takes nothing since {self.idle_seconds:.0f} s"
        elif self.failures:
            name, text = next(iter(self.failures.items()))
            why = f"{len(self.failures)} of {len(asked)} directories, e.g. {name}: {text}"
        else:
            return f"Copied to {self.url.rstrip('/')}/{self.run.name}: {len(asked) - 1} jobs, run"
        return f"Not all is copied to {self.url}: {why}. The same command copies the rest."


def fetch_copy(url: str, run: Path) -> str:
    """Bring a run and its finished jobs here from a store.

    Args:
        url: what cluster.copy_to was.
        run: where the run's directory is to lie; jobs go to the cache beside it.

    Returns:
        What has come, as a line.

    Raises:
        ClusterError: nothing of this run there, or a file that its manifest does not vouch for.
    """
    check_url(url, where="from")
    store = Store(url, run.name)
    jobs = {key: store.manifest(f"jobs/{key}") for key in store.jobs()}
    whole = {key: entries for key, entries in jobs.items() if entries is not None}
    own = store.manifest("run")
    if not whole and own is None:
        raise ClusterError(
            store.root,
            found="no copy of a job or a run",
            expected="what cluster.copy_to was, and the run's name",
            remedy="write python -m launch.fetch outputs/RUN from=URL",
        )
    for key, entries in whole.items():
        target = run.parent / ".cache" / "jobs" / key
        if not (target / "done.json").is_file():
            for name, entry in entries.items():
                store.get(entry, target / name)
    for name, entry in (own or {}).items():
        store.get(entry, run / name)
    if own is None:
        return f"{run}: {len(whole)} finished jobs. The run's own command makes the rest."
    return f"{run}: {len(whole)} jobs, and the run with its report"
