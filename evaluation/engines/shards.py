"""How requests are split over engines (pure): neighbours in the prefix tree stay together.

Sorted by token ids, requests stand in the depth-first order of their radix tree: those that share a
prefix are next to each other, and what a request costs is what it does not share with the one
before it. A cut between two neighbours makes their shared prefix be computed once more.
"""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.engines.rows import common_prefix

# A cut may leave its ideal place by this part of a shard to spare a longer prefix. Tokens are an
# estimate of time that is no better than this.
SLACK = 0.1


def shards(
    prompts: Sequence[Sequence[int]],
    num_shards: int,
    weights: Sequence[float] | None = None,
    *,
    slack: float = SLACK,
) -> list[list[int]]:
    """Split requests into at most `num_shards` groups of about equal cost.

    A subtree whose requests cost at most `slack` of a shard is never cut.

    Args:
        prompts: (N,) token ids of each request.
        num_shards: at least 1.
        weights: (N,) what a request costs beyond its prompt, in rows; None: nothing.
        slack: in [0, 0.5).

    Returns:
        Indices of the requests, none of the groups empty, each in the order of the tree.
    """
    assert num_shards >= 1 and 0 <= slack < 0.5
    num_shards = min(num_shards, max(1, len(prompts)))
    order = sorted(range(len(prompts)), key=lambda index: tuple(prompts[index]))
    shared = shared_lengths([prompts[index] for index in order])
    ends = [0.0]  # cost of all requests before each place
    for index, common in zip(order, shared, strict=True):
        weight = weights[index] if weights is not None else 0
        ends.append(ends[-1] + len(prompts[index]) - common + weight)
    share = ends[-1] / num_shards
    cuts = {0, len(order)}
    for number in range(1, num_shards):
        cuts.add(_cut(ends, shared, at=number * share, width=slack * share))
    places = sorted(cuts)
    return [order[a:b] for a, b in zip(places, places[1:], strict=False)]


def shared_lengths(prompts: Sequence[Sequence[int]]) -> list[int]:
    """(N,) tokens that each prompt shares with the one before it; 0 for the first."""
    pairs = zip(prompts, prompts[1:], strict=False)
    return [0, *(common_prefix(pair) for pair in pairs)][: len(prompts)]


def _cut(ends: Sequence[float], shared: Sequence[int], *, at: float, width: float) -> int:
    """The place within `width` of the ideal that shares least; outside it, the nearest place."""

    def badness(place: int) -> tuple[float, float]:
        distance = abs(ends[place] - at)
        return (shared[place], distance) if distance <= width else (float("inf"), distance)

    return min(range(1, len(shared)), key=badness)
