"""Frozen splits and class-balanced limits (pure).

A row's split follows from a hash of its own content and the seed, and from nothing else: adding or
removing rows never moves another one, and identical content is never in two splits. The hash knows
nothing of the labels, so each label is cut 60/20/20 in expectation; exact shares per label cannot
be had without moving rows when others arrive. With a group column the hash is the group's.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from conf.records import Item

TEST_SHARE = 0.2
VALIDATION_SHARE = 0.2


def uniform(key: str, *, purpose: str, seed: int) -> float:
    """A number in [0, 1) that depends on the arguments alone."""
    digest = hashlib.sha256(f"{purpose}\0{seed}\0{key}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def split_of(key: str, *, seed: int) -> str:
    """One of test (a fifth), validation (a fifth), train, by the hash of a content or group."""
    value = uniform(key, purpose="split", seed=seed)
    if value < TEST_SHARE:
        return "test"
    return "validation" if value < TEST_SHARE + VALIDATION_SHARE else "train"


def is_validation(key: str, *, seed: int) -> bool:
    """Whether a row of the user's train file is held out where there is no validation file."""
    return uniform(key, purpose="validation", seed=seed) < VALIDATION_SHARE


def limited(
    items: Sequence[Item], *, limit: int | None, by_label: bool, is_balanced: bool, seed: int
) -> tuple[Item, ...]:
    """At most `limit` items, in their old order; a smaller limit keeps a subset of a larger one's.

    Which items stay is decided by their hash. by_label: every label gets the same number, and what
    a label cannot fill goes to the others. is_balanced: strictly the same number of every label
    that occurs, also where that leaves fewer than `limit`, and also without a limit.
    """
    order = sorted(items, key=lambda i: (uniform(i.sha256, purpose="limit", seed=seed), i.id))
    if not by_label:
        return _in_old_order(items, order[:limit])
    queues: defaultdict[str, list[Item]] = defaultdict(list)
    for item in order:
        queues[item.answer_key].append(item)
    sizes = {label: len(queue) for label, queue in queues.items()}
    if is_balanced and sizes:
        each = min(sizes.values()) if limit is None else min(*sizes.values(), limit // len(sizes))
        shares = dict.fromkeys(sizes, each)
    else:
        shares = balanced_shares(sizes, total=len(items) if limit is None else limit)
    return _in_old_order(items, [i for label, n in shares.items() for i in queues[label][:n]])


def balanced_shares(sizes: dict[str, int], *, total: int) -> dict[str, int]:
    """How many of each label to take so that the shares are as equal as the sizes let them.

    One more for the labels that come first in `sizes` where `total` does not divide.
    """
    shares = dict.fromkeys(sizes, 0)
    left = min(total, sum(sizes.values()))
    open_labels = [label for label, size in sizes.items() if size]
    while left:
        each = max(1, left // len(open_labels))
        for label in open_labels:
            more = min(each, sizes[label] - shares[label], left)
            shares[label] += more
            left -= more
        open_labels = [label for label in open_labels if shares[label] < sizes[label]]
    return shares


def _in_old_order(items: Sequence[Item], chosen: Sequence[Item]) -> tuple[Item, ...]:
    ids = {item.id for item in chosen}
    return tuple(item for item in items if item.id in ids)


def spread(items: Sequence[Item], count: int) -> tuple[Item, ...]:
    """At most `count` items, evenly over all, so that an order by length does not matter."""
    taken = min(count, len(items))
    return tuple(items[index * len(items) // taken] for index in range(taken))


def sampled(items: Sequence[Item], count: int) -> tuple[Item, ...]:
    """At most `count` items by the hash of their content, so that no order of rows matters.

    Taking every second row of a file whose labels alternate would take one label only.
    """
    order = sorted(items, key=lambda i: (uniform(i.sha256, purpose="sample", seed=0), i.id))
    return _in_old_order(items, order[:count])
