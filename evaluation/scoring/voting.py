"""Votes over the repeats of an item, and when no further repeat is needed (pure).

Self-consistency (Wang et al. 2022, arXiv 2203.11171) samples several answers to an item and takes
the most frequent one. Most items are settled long before the last repeat, so repeats are asked in
waves and an item leaves when its vote is

    decided   the leading answer wins whatever the remaining repeats say; the vote is unchanged
    likely    P(the leader stays ahead of the runner-up) > 0.95 under the Beta posterior of
              Adaptive-Consistency (Aggarwal et al. 2023, arXiv 2305.11860); may change the vote

Of equally frequent answers the one that was given first wins. No answer is no vote.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from conf.choices import RepeatStopping
from conf.errors import ConfigError
from evaluation.scoring import plain_text

UNLIKELY = 0.05  # that the runner-up is ahead
GRADED = ("token_f1", "rouge_l", "chrf")


def check_voting(scoring: str, *, key: str) -> None:
    """Refuse a vote over free texts that are graded: hardly two of them are equal.

    Raises:
        ConfigError: for such a scoring rule.
    """
    if scoring in GRADED:
        raise ConfigError(
            f"{key}.self_consistency",
            found=f"true with task.scoring={scoring}, which grades free texts",
            expected="answers that can be equal: labels, numbers, exact texts or JSON",
            remedy=f"write {key}.self_consistency=false",
        )


def ballot(answer: str | None, *, is_label: bool) -> str | None:
    """What an answer counts as in a vote: a label as it is, numbers by value, texts but for case.

    JSON objects count as equal when their values are, whatever their spaces and order.
    """
    if answer is None or is_label:
        return answer
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return plain_text(answer)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(float(value)) if abs(value) < 2**53 else answer
    return json.dumps(value, sort_keys=True)


def majority(ballots: Sequence[str | None]) -> int | None:
    """Index of the first vote for the most frequent ballot; None where nobody voted."""
    counts = _counts(ballots)
    return ballots.index(max(counts, key=lambda b: counts[b])) if counts else None


def _counts(ballots: Sequence[str | None]) -> dict[str, int]:
    """Votes per ballot, in the order in which ballots were first given."""
    counts: dict[str, int] = {}
    for b in ballots:
        if b is not None:
            counts[b] = counts.get(b, 0) + 1
    return counts


def is_settled(
    ballots: Sequence[str | None], *, repeats: int, stopping: RepeatStopping | None
) -> bool:
    """Whether an item with these answers, in the order of its repeats, needs no further one."""
    remaining = repeats - len(ballots)
    if remaining <= 0:
        return True
    match stopping:
        case RepeatStopping.decided:
            return is_decided(ballots, remaining=remaining)
        case RepeatStopping.likely:
            return is_decided(ballots, remaining=remaining) or is_likely(ballots)
    return False


def is_decided(ballots: Sequence[str | None], *, remaining: int) -> bool:
    """Whether the most frequent ballot wins whatever `remaining` further ballots are."""
    counts = _counts(ballots)
    if not counts:
        return False
    order = list(counts)
    leader = max(counts, key=lambda b: counts[b])
    rivals = [counts[b] + (order.index(b) < order.index(leader)) for b in order if b != leader]
    # A rival that was given earlier wins a tie, so it is as good as one vote ahead.
    return counts[leader] >= max(rivals, default=0) + remaining


def is_likely(ballots: Sequence[str | None]) -> bool:
    """Whether the leader stays ahead of the runner-up with a probability over 0.95.

    With a and b votes, the leader's share of the two is Beta(a + 1, b + 1) under a uniform prior,
    and P(share < 1/2) = P(at most b successes in a + b + 1 fair tosses), a sum of binomials.
    """
    votes = sorted(_counts(ballots).values(), reverse=True)
    if not votes:
        return False
    a, b = votes[0], votes[1] if len(votes) > 1 else 0
    tosses = a + b + 1
    return sum(math.comb(tosses, k) for k in range(b + 1)) / (1 << tosses) < UNLIKELY


def further(ballots: Sequence[str | None], *, repeats: int, stopping: RepeatStopping | None) -> int:
    """How many further repeats to ask at once: as many as the earliest stop needs, 0 if settled.

    No repeat of them could have been saved, and few waves mean that a prompt is computed few times.
    """
    counts = _counts(ballots)
    leader = max(counts, key=lambda b: counts[b], default="")
    remaining = max(0, repeats - len(ballots))
    for more in range(remaining + 1):
        # Further votes for the leader settle it soonest.
        if is_settled([*ballots, *[leader] * more], repeats=repeats, stopping=stopping):
            return more
    return remaining
