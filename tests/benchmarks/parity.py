"""Whether two sides gave the same answers: asked before any ratio is formed.

scores       the same winner on at least 99.9% of items (or all but one), each exception a tie
             within 1e-3 nats; log-probabilities within 1e-4, relative where above 1 in size
winners      the same, for a side that gives the winner only
completions  the same tokens; where they part, the two tokens are a tie within 1e-3 nats
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

MAX_TIE = 1e-3
MAX_ERROR = 1e-4
MIN_SAME = 0.999


@dataclass(kw_only=True, slots=True, frozen=True)
class Scores:
    """One log-probability per label."""

    logprobs: tuple[float, ...]


@dataclass(kw_only=True, slots=True, frozen=True)
class Winner:
    """The best label and its log-probability."""

    index: int
    logprob: float


@dataclass(kw_only=True, slots=True, frozen=True)
class Completion:
    """Generated token ids."""

    ids: tuple[int, ...]


Answer = Scores | Winner | Completion
# Gap in nats between two tokens after the same text: item, tokens so far, one token, the other.
Gap = Callable[[int, tuple[int, ...], int, int], float]


@dataclass(kw_only=True, slots=True, frozen=True)
class Parity:
    """checked: answers compared. worst: the largest difference, in nats (relative above 1)."""

    checked: int
    ok: bool
    worst: float
    ties: int = 0
    why: str = ""

    def __add__(self, other: Parity) -> Parity:
        """Both have to hold."""
        return Parity(
            checked=self.checked + other.checked,
            ok=self.ok and other.ok,
            worst=max(self.worst, other.worst),
            ties=self.ties + other.ties,
            why=self.why or other.why,
        )


def compare(ours: Sequence[Answer], peer: Sequence[Answer], *, gap: Gap | None = None) -> Parity:
    """Compare answers item by item; the peer gives Scores or Completions.

    gap: the plain path's distance between two tokens, asked where completions part.
    """
    total = Parity(checked=0, ok=len(ours) == len(peer), worst=0.0)
    if not total.ok:
        return Parity(checked=0, ok=False, worst=0.0, why=f"{len(ours)} answers, not {len(peer)}")
    for index, (a, b) in enumerate(zip(ours, peer, strict=True)):
        match a, b:
            case Completion(), Completion():
                total += _compare_completions(index, a.ids, b.ids, gap=gap)
            case Scores(), Scores():
                total += _compare_scores(index, a.logprobs, b.logprobs)
            case Winner(), Scores():
                total += _compare_winner(index, a, b.logprobs)
            case _:
                raise TypeError(f"{type(a).__name__} with {type(b).__name__}")
    if total.ok and gap is None and total.ties > max(1, (1 - MIN_SAME) * total.checked):
        why = f"another winner in {total.ties} ties of {total.checked} items"
        return replace(total, ok=False, why=why)
    return total


def difference(a: float, b: float) -> float:
    """Distance of two log-probabilities, relative where above 1 in size; infinite for nan."""
    found = abs(a - b) / max(1.0, abs(a), abs(b))
    return math.inf if math.isnan(found) else found


def _compare_scores(index: int, a: Sequence[float], b: Sequence[float]) -> Parity:
    if len(a) != len(b):
        return Parity(checked=1, ok=False, worst=0.0, why=f"item {index}: {len(a)} labels")
    best = max(range(len(a)), key=a.__getitem__)
    worst = max(difference(x, y) for x, y in zip(a, b, strict=True))
    return _judge(index, best, b, worst=worst)


def _compare_winner(index: int, a: Winner, b: Sequence[float]) -> Parity:
    return _judge(index, a.index, b, worst=difference(a.logprob, b[a.index]))


def _judge(index: int, winner: int, logprobs: Sequence[float], *, worst: float) -> Parity:
    behind = max(logprobs) - logprobs[winner]
    why = ""
    if worst > MAX_ERROR:
        why = f"item {index}: log-probabilities differ by {worst:.1e}"
    elif not behind <= MAX_TIE:
        why = f"item {index}: another winner, {behind:.1e} nats behind"
    return Parity(checked=1, ok=not why, worst=worst, ties=int(behind > 0), why=why)


def _compare_completions(
    index: int, a: tuple[int, ...], b: tuple[int, ...], *, gap: Gap | None
) -> Parity:
    if a == b:
        return Parity(checked=1, ok=True, worst=0.0)
    if len(a) != len(b):
        why = f"item {index}: {len(a)} tokens, not {len(b)}"
        return Parity(checked=1, ok=False, worst=0.0, why=why)
    parted = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    assert gap is not None, "completions are compared with the plain path at hand"
    found = gap(index, a[:parted], a[parted], b[parted])
    why = "" if found <= MAX_TIE else f"item {index}: parted at a gap of {found:.1e} nats"
    return Parity(checked=1, ok=not why, worst=found, ties=1, why=why)
