"""Requests until they are answered: pace, waits, what is worth another attempt, what it may cost.

Waits double from half a second up to 30 s with full jitter (Brooker, "Exponential Backoff And
Jitter", AWS Architecture Blog, 2015), and are never shorter than an endpoint's Retry-After, which
holds for all requests.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from conf.errors import BudgetReached
from conf.run_groups import HostedPrice
from evaluation.engines.endpoint_ceiling import Ceiling, Reservation, cost_usd
from evaluation.engines.endpoint_client import AttemptFailed, EndpointClient
from evaluation.engines.endpoint_store import Reply

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
# An endpoint that asks for more is out of service: nobody waits half a day for one answer.
LONGEST_RETRY_AFTER_SECONDS = 600.0
CEILING_LOOK_SECONDS = 0.05


@dataclass(kw_only=True, slots=True, frozen=True)
class Outgoing:
    """A request as it is sent. most_usd: the most it can cost, None without a price."""

    id: str
    path: str
    body: Mapping[str, Any]
    is_streamed: bool = False
    most_usd: float | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class FailedAttempt:
    """One attempt without an answer, for the journal.

    usd: what it cost; None where nobody knows: then at most most_usd. wait_seconds: until the next
    attempt, None where there is none.
    """

    request: str
    attempt: int
    status: int | None
    reason: str
    seconds: float
    wait_seconds: float | None
    usd: float | None
    most_usd: float | None


class Stopped(Exception):
    """The call is over; requests that wait are given up."""


class Pace:
    """When the next attempt may go: so many a minute, and none while the endpoint asks to wait."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self._gap_seconds = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._guard = threading.Lock()

    def turn_seconds(self) -> float:
        """Take the next turn; how long to wait for it."""
        with self._guard:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap_seconds
            return turn - now

    def hold(self, seconds: float) -> None:
        """Let no turn come before so many seconds have passed."""
        with self._guard:
            self._next = max(self._next, time.monotonic() + seconds)


@dataclass(kw_only=True, slots=True)
class Retrier:
    """Gets answers; used by many threads.

    failed: told of every failed attempt. price, ceiling: None where there is none. stop: set, all
    waiting ends.
    """

    client: EndpointClient
    pace: Pace
    max_attempts: int
    failed: Callable[[FailedAttempt], None]
    price: HostedPrice | None = None
    ceiling: Ceiling | None = None
    first_wait_seconds: float = FIRST_WAIT_SECONDS
    stop: threading.Event = field(default_factory=threading.Event)
    _random: random.Random = field(default_factory=random.Random)
    _open: int = 0  # amounts set aside by this process for requests under way
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: Outgoing) -> Reply:
        """The endpoint's answer, after as many attempts as it takes.

        Raises:
            AttemptFailed: the last attempt failed, or one that no other would mend.
            BudgetReached: the request might pass the ceiling. Stopped: the call is over.
        """
        attempt = 0
        while True:
            attempt += 1
            self._wait(self.pace.turn_seconds())
            reserved = self._reserve(request)
            started = time.monotonic()
            try:
                reply = self.client.send(
                    request.path, request.body, is_streamed=request.is_streamed
                )
            except AttemptFailed as error:
                self._settle(reserved, 0.0 if error.is_free else None)
                wait = self._wait_after(error, attempt)
                self._tell(request, error, attempt, seconds=time.monotonic() - started, wait=wait)
                if wait is None:
                    raise
                self._wait(wait)
            except BaseException:
                self._settle(reserved, None)
                raise
            else:
                self._settle(reserved, self._cost(reply))
                return replace(reply, attempts=attempt)

    def _wait(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Stopped

    def _wait_after(self, error: AttemptFailed, attempt: int) -> float | None:
        """Seconds until the next attempt; None where there is none."""
        asked = error.retry_after_seconds or 0.0
        is_over = not error.is_retryable or attempt >= self.max_attempts
        if is_over or asked > LONGEST_RETRY_AFTER_SECONDS:
            return None
        if asked:
            self.pace.hold(asked)
        longest = min(LONGEST_WAIT_SECONDS, self.first_wait_seconds * 2.0 ** (attempt - 1))
        return max(asked, self._random.uniform(0.0, longest))

    def _reserve(self, request: Outgoing) -> Reservation | None:
        """Set the most that an attempt can cost aside, once others have given enough back."""
        if self.ceiling is None or request.most_usd is None:
            return None
        while True:
            with self._guard:
                reserved = self.ceiling.reserve(request.most_usd)
                if reserved is not None:
                    self._open += 1
                    return reserved
                if not self._open:
                    raise BudgetReached(
                        f"budget.max_usd: {self.ceiling.usd:.4f} of {self.ceiling.limit_usd:.4f} "
                        f"USD for endpoints is spent, and the next request may cost "
                        f"{request.most_usd:.4f}"
                    )
            self._wait(CEILING_LOOK_SECONDS)

    def _settle(self, reserved: Reservation | None, usd: float | None) -> None:
        """Put down what an attempt cost; where nobody knows, what was set aside stays spent."""
        if reserved is None or self.ceiling is None:
            return
        with self._guard:
            if usd is not None:
                self.ceiling.settle(reserved, usd)
            self._open -= 1

    def _cost(self, reply: Reply) -> float | None:
        if self.price is None:
            return None
        return cost_usd(
            self.price,
            prompt_tokens=reply.prompt_tokens,
            cached_tokens=reply.cached_tokens,
            completion_tokens=reply.completion_tokens,
        )

    def _tell(
        self,
        request: Outgoing,
        error: AttemptFailed,
        attempt: int,
        *,
        seconds: float,
        wait: float | None,
    ) -> None:
        self.failed(
            FailedAttempt(
                request=request.id,
                attempt=attempt,
                status=error.status,
                reason=error.reason,
                seconds=seconds,
                wait_seconds=wait,
                usd=0.0 if error.is_free else None,
                most_usd=request.most_usd,
            )
        )
