"""The ceiling on what endpoints may cost: the most a request can cost is set aside before it goes.

The file is shared by all processes of a run. A request whose process died, or whose connection
broke, may have been answered and charged: what was set aside for it counts as spent for good.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path

from conf.run_groups import HostedPrice

# A token has at least one byte; a turn of a chat adds a few tokens of its own.
TURN_TOKENS, START_TOKENS = 16, 32


@dataclass(kw_only=True, slots=True, frozen=True)
class EndpointPlace:
    """What belongs to a run, not to the arm: where answers are kept, and what they may cost.

    answers: a directory. price: of the model's tokens. spend: the run's file of amounts, and
    limit_usd what they may add up to; both None without a cap.
    """

    answers: Path
    price: HostedPrice | None = None
    spend: Path | None = None
    limit_usd: float | None = None


def cost_usd(
    price: HostedPrice,
    *,
    prompt_tokens: int | None,
    cached_tokens: int | None,
    completion_tokens: int | None,
) -> float | None:
    """What a request cost; None where the endpoint does not tell its tokens.

    Without a count of cached tokens all are at the full price: the endpoint gave no discount that
    anybody could check.
    """
    if prompt_tokens is None or completion_tokens is None:
        return None
    cached = cached_tokens or 0
    cached_price = price.cached_input_usd_per_million
    if cached_price is None:
        cached_price = price.input_usd_per_million
    usd = (prompt_tokens - cached) * price.input_usd_per_million + cached * cached_price
    return (usd + completion_tokens * price.output_usd_per_million) / 1e6


def most_usd(price: HostedPrice, *, prompt_bytes: int, turns: int, max_new_tokens: int) -> float:
    """The most a request can cost, whatever the endpoint's tokenizer."""
    prompt_tokens = prompt_bytes + TURN_TOKENS * turns + START_TOKENS
    usd = prompt_tokens * price.input_usd_per_million
    return (usd + max_new_tokens * price.output_usd_per_million) / 1e6


@dataclass(slots=True, frozen=True)
class Reservation:
    """An amount that is set aside."""

    id: str
    usd: float


class Ceiling:
    """Sets amounts aside below a limit; used by threads and by processes at the same time."""

    def __init__(self, path: Path, *, limit_usd: float) -> None:
        """Nothing is read before the first amount.

        Args:
            path: the run's file of amounts.
            limit_usd: what they may add up to.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.limit_usd = limit_usd
        self._path = path
        self._amounts: dict[str, float] = {}
        self._offset = 0
        self._guard = threading.Lock()

    @property
    def usd(self) -> float:
        """Spent and set aside, as of the last look."""
        return sum(self._amounts.values())

    def reserve(self, usd: float) -> Reservation | None:
        """Set an amount aside; None where it would pass the limit."""
        found = Reservation(uuid.uuid4().hex, usd)
        return found if self._write(found, has_to_fit=True) else None

    def settle(self, reserved: Reservation, usd: float) -> None:
        """Replace what was set aside by what was spent."""
        self._write(Reservation(reserved.id, usd), has_to_fit=False)

    def _write(self, amount: Reservation, *, has_to_fit: bool) -> bool:
        """Add a line, with all others' lines known and none coming in between."""
        with self._guard, self._path.open("ab+") as stream:
            fcntl.flock(
                stream, fcntl.LOCK_EX
            )  # given back when the file is closed, or we are killed
            self._read_on(stream.fileno())
            if has_to_fit and self.usd + amount.usd > self.limit_usd:
                return False
            self._amounts[amount.id] = amount.usd
            line = json.dumps({"id": amount.id, "usd": amount.usd}).encode() + b"\n"
            os.write(stream.fileno(), line)
            self._offset += len(line)
            return True

    def _read_on(self, file: int) -> None:
        """Take in what others have written; a line cut off by a kill is closed and passed over."""
        size = os.fstat(file).st_size
        new = os.pread(file, size - self._offset, self._offset)
        self._offset = size
        if new and not new.endswith(b"\n"):
            self._offset += os.write(file, b"\n")
        for line in new.splitlines():
            try:
                fields = json.loads(line)
                self._amounts[fields["id"]] = float(fields["usd"])
            except (ValueError, TypeError, KeyError):
                continue
