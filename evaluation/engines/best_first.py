"""Winner-only scoring (pure): the best label by best-first search over the label trie.

A trie node's bound is the log-probability of its tokens so far plus the largest constant of the
labels below it. Log-probabilities are at most 0, so no label below can score more than the bound:
the first complete label that is taken off the queue is the winner, exactly. A node is forwarded
only when its bound is the highest of all. There is no label distribution afterwards.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    """children: by token. labels: indices that end here. bound: largest constant at or below."""

    bound: float
    children: dict[int, _Node] = field(default_factory=dict)
    labels: list[int] = field(default_factory=list)


@dataclass(kw_only=True, slots=True, frozen=True)
class Step:
    """What to forward next: `token` as the child of the row `parent` (-1: the prompt's last)."""

    parent: int
    token: int
    tokens_to_read: tuple[int, ...]


@dataclass(kw_only=True, slots=True, frozen=True)
class Winner:
    """label: its index. logprob: without its constant."""

    label: int
    logprob: float


class BestFirst:
    """The search for one item. Rows are numbered in the order in which they are forwarded."""

    def __init__(
        self, labels: Sequence[Sequence[int]], offsets: Sequence[float] | None = None
    ) -> None:
        """labels: at least one token each; offsets: one constant per label, None for zeros."""
        constants = offsets or [0.0] * len(labels)
        self._constants = list(constants)
        self._root = _Node(bound=max(constants))
        for index, (label, constant) in enumerate(zip(labels, constants, strict=True)):
            node = self._root
            for token in label:
                node = node.children.setdefault(token, _Node(bound=constant))
                node.bound = max(node.bound, constant)
            node.labels.append(index)
        self._queue: list[tuple[float, int, int, float, int, int, _Node | None]] = []
        self._open: tuple[float, _Node] = (0.0, self._root)
        self._count = 0
        self._rows = -1

    @property
    def first_tokens(self) -> tuple[int, ...]:
        """What to read at the prompt's last token."""
        return tuple(self._root.children)

    def advance(self, logprobs: Mapping[int, float]) -> Step | Winner:
        """Take what was read at the row last asked for; say what to forward, or who has won.

        logprobs: token -> its log-probability there, for `first_tokens` or `tokens_to_read`.
        """
        above, node = self._open
        for token, child in node.children.items():
            total = above + logprobs[token]
            for label in child.labels:  # complete: its bound is its score
                self._push(total + self._constants[label], label, total, token, None)
            if child.children:
                inner = max(grandchild.bound for grandchild in child.children.values())
                self._push(total + inner, len(self._constants), total, token, child)
        _, label, _, total, parent, token, best = heapq.heappop(self._queue)
        if best is None:
            return Winner(label=label, logprob=total)
        self._open = (total, best)
        self._rows += 1
        return Step(parent=parent, token=token, tokens_to_read=tuple(best.children))

    def _push(self, bound: float, label: int, total: float, token: int, node: _Node | None) -> None:
        # Of equal bounds the complete label of the lowest index comes first, as argmax has it;
        # inner nodes of that bound come before it, for a lower label may be below them.
        kind = label if node is None else -1
        self._count += 1
        heapq.heappush(self._queue, (-bound, kind, self._count, total, self._rows, token, node))
