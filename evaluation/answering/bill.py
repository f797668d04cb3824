"""What an evaluation job spends: ledger lines that add up to the engine's own count of rows."""

from __future__ import annotations

import time
from collections.abc import Iterator

from conf.records import LedgerLine
from evaluation.engines.base import Engine, Hosted, Paid


class Bill:
    """Bills one job, a line per purpose at a time.

    Lines are written before the records they pay for. A process that is killed in between has paid
    for records that will be computed again, and the bill says so; the other order would lose what
    was spent. A resumed job therefore bills only what it computes itself, and the lines of all
    attempts together are what was really spent.
    """

    def __init__(
        self,
        *,
        job: str,
        arm: str,
        engine: Engine,
        devices: int,
        usd_per_device_second: float | None,
    ) -> None:
        """Start the clock; rows that an earlier job left unbilled in the engine are not ours."""
        self._job, self._arm = job, arm
        self._engine = engine
        self._devices = devices
        self._usd_per_device_second = usd_per_device_second
        self._last = time.perf_counter()
        engine.take_shared()
        self._take_paid()

    def lines(
        self, purpose: str, *, tokens: int = 0, completion_tokens: int = 0
    ) -> Iterator[LedgerLine]:
        """Bill tokens and all time since the last line to a purpose; shared and padding rows apart.

        The seconds of shared and padding rows cannot be told from those of the rows beside them:
        they stand on the purpose's line. A hosted engine is paid by token, and takes no devices;
        what it answers from earlier requests stands on a line of its own, marked reused.
        """
        now = time.perf_counter()
        device_seconds = (now - self._last) * self._devices
        self._last = now
        price = self._usd_per_device_second
        paid = self._take_paid()
        usd = None if price is None else price * device_seconds
        yield LedgerLine(
            job=self._job,
            arm=self._arm,
            purpose=purpose,
            tokens=tokens,
            completion_tokens=completion_tokens,
            device_seconds=device_seconds,
            usd=usd if paid is None else paid.usd,
        )
        if paid is not None and paid.reused_usd != 0.0:
            yield LedgerLine(
                job=self._job,
                arm=self._arm,
                purpose=purpose,
                usd=paid.reused_usd,
                is_reused=True,
            )
        overhead = self._engine.take_shared()
        extra = (("shared", overhead.shared_tokens), ("padding", overhead.padding_tokens))
        for name, count in extra:
            if count:
                yield LedgerLine(job=self._job, arm=self._arm, purpose=name, tokens=count)

    def _take_paid(self) -> Paid | None:
        return self._engine.take_paid() if isinstance(self._engine, Hosted) else None
