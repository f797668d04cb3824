"""The prefix forest (pure): every needed token row once, in passes that a small KV stack can serve.

All token sequences of a call form a radix tree over token ids: run prefix, wording or draw, item,
label trie. A row is one token in its context; two sequences with an equal beginning share its rows.
Rows stand in depth-first preorder, so that

    a subtree is a contiguous range [row, ends[row]),
    row i is an ancestor of row j (or j itself) exactly if i <= j < ends[i],
    the keys and values that later rows still need are those of one path: a stack.

A pass computes a contiguous range of rows below the path on the stack, then pushes the path of the
next row and drops the rest. So each tree node has one copy of its keys and values, and a forest of
any size needs room for its longest path and one pass only. That the plan is known in advance is
what an online prefix cache lacks (BatchLLM, arXiv 2412.03594: LRU reuses 36% where 58% is there).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ROOT = -1  # the parent of first tokens
SHARED = -1  # the owner of rows that several requests need


@dataclass(kw_only=True, slots=True, frozen=True)
class Forest:
    """R rows in preorder, and what is read at them.

    tokens, parents, depths, ends: (R,). depths: rows above, which is the position. ends: the row
    after the subtree. owners: (R,), the only request that needs the row, or SHARED.
    num_known: leading rows that are on the stack already. read_rows, read_tokens: (E,), the
    distinct (row, next token) pairs whose log-probabilities are wanted, rows ascending.
    piece_reads, piece_labels: (K,), which read counts towards which label, labels ascending and
    numbered through all requests: those of request r are label_starts[r] up to label_starts[r + 1].
    first_pieces: (K,) whether it is the label's first token. prompt_rows: per request the row of
    its last prompt token.
    """

    tokens: Ints
    parents: Ints
    depths: Ints
    ends: Ints
    owners: Ints
    num_known: int
    read_rows: Ints
    read_tokens: Ints
    piece_reads: Ints
    piece_labels: Ints
    first_pieces: NDArray[np.bool_]
    label_starts: Ints
    prompt_rows: Ints

    @property
    def num_computed(self) -> int:
        """Rows that have to go through the model."""
        return len(self.tokens) - self.num_known

    def last_read_rows(self) -> Ints:
        """Per request the last row that it reads; its scores are known after that row's pass."""
        rows = self.read_rows[self.piece_reads]
        requests = np.searchsorted(self.label_starts, self.piece_labels, side="right") - 1
        last = np.zeros(len(self.prompt_rows), dtype=np.int64)
        np.maximum.at(last, requests, rows)
        return last

    def ancestors(self, row: int) -> list[int]:
        """The rows above a row, from the first token down."""
        path: list[int] = []
        parent = int(self.parents[row])
        while parent != ROOT:
            path.append(parent)
            parent = int(self.parents[parent])
        return path[::-1]


class _Tree:
    """A token trie while it grows; nodes in order of insertion."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.owners: list[int] = []
        self.children: dict[tuple[int, int], int] = {}
        self._last: tuple[int, ...] = ()
        self._path: list[int] = []

    def child(self, node: int, token: int, request: int) -> int:
        """The node of a token below another; made if there is none."""
        found = self.children.get((node, token))
        if found is None:
            found = self.children[node, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            self.owners.append(request)
        elif self.owners[found] != request:
            self.owners[found] = SHARED
        return found

    def add_prompt(self, prompt: tuple[int, ...], request: int) -> int:
        """Insert a prompt; what it shares with the one before is not walked token by token."""
        common = common_length(self._last, prompt)
        node = self._path[common - 1] if common else ROOT
        above = node
        while above != ROOT and self.owners[above] not in (SHARED, request):
            self.owners[above] = SHARED  # above a shared row all rows are shared
            above = self.parents[above]
        del self._path[common:]
        for token in prompt[common:]:
            node = self.child(node, token, request)
            self._path.append(node)
        self._last = prompt
        return node

    def preorder(self, first: Sequence[int]) -> list[int]:
        """Nodes in depth-first order, the path along `first` before its siblings."""
        below: list[list[int]] = [[] for _ in range(len(self.tokens) + 1)]
        for node, parent in enumerate(self.parents):
            below[parent + 1].append(node)
        at = ROOT
        for token in first:
            node = self.children.get((at, token), ROOT)
            if node == ROOT:
                break
            siblings = below[at + 1]
            siblings.insert(0, siblings.pop(siblings.index(node)))
            at = node
        order: list[int] = []
        todo = below[0][::-1]
        while todo:
            node = todo.pop()
            order.append(node)
            todo += below[node + 1][::-1]
        return order


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two sequences of one type, by bisection over slices."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def build_forest(
    prompts: Sequence[tuple[int, ...]],
    labels: Sequence[Sequence[Sequence[int]]] = (),
    *,
    known: tuple[int, ...] = (),
) -> Forest:
    """The forest of some requests.

    Args:
        prompts: at least one token id each.
        labels: per request the token ids of its labels, at least one each; a label may be a prefix
            of another. Empty: only the prompts' rows, and nothing is read.
        known: token ids whose rows an earlier call has left on the stack.
    """
    tree = _Tree()
    ends_at = [ROOT] * len(prompts)
    reads: dict[tuple[int, int], int] = {}
    pieces: list[tuple[int, int, bool]] = []
    offsets = [0, *itertools.accumulate(len(of) for of in labels)]
    for request in sorted(range(len(prompts)), key=prompts.__getitem__):
        prompt = prompts[request]
        assert prompt, "a prompt has at least one token"
        ends_at[request] = tree.add_prompt(prompt, request)
        for index, label in enumerate(labels[request] if labels else ()):
            assert label, "a label has at least one token"
            node = ends_at[request]
            for position, token in enumerate(label):
                read = reads.setdefault((node, token), len(reads))
                pieces.append((read, offsets[request] + index, position == 0))
                if position < len(label) - 1:
                    node = tree.child(node, token, request)
    return _in_preorder(tree, ends_at, reads, pieces, offsets=offsets, known=known)


def _in_preorder(
    tree: _Tree,
    ends_at: Sequence[int],
    reads: dict[tuple[int, int], int],
    pieces: Sequence[tuple[int, int, bool]],
    *,
    offsets: Sequence[int],
    known: tuple[int, ...],
) -> Forest:
    order = np.array(tree.preorder(known), dtype=np.int64)
    rows = np.empty(len(order) + 1, dtype=np.int64)
    rows[order] = np.arange(len(order))
    rows[-1] = ROOT  # index -1: the parent of first tokens
    parents = rows[np.array(tree.parents, dtype=np.int64)[order]]
    depths, ends = _depths_and_ends(parents)
    where = np.array(list(reads), dtype=np.int64).reshape(-1, 2)
    read_rows = rows[where[:, 0]]
    by_row = np.lexsort((where[:, 1], read_rows))
    place = np.empty(len(by_row), dtype=np.int64)
    place[by_row] = np.arange(len(by_row))
    found = np.array(sorted(pieces, key=itemgetter(1)), dtype=np.int64).reshape(-1, 3)
    tokens = np.array(tree.tokens, dtype=np.int64)[order]
    forest_ends = rows[np.array(ends_at, dtype=np.int64)]
    first_read = min([*read_rows.tolist(), *forest_ends.tolist()])
    return Forest(
        tokens=tokens,
        parents=parents,
        depths=depths,
        ends=ends,
        owners=np.array(tree.owners, dtype=np.int64)[order],
        num_known=min(common_length(tuple(tokens[: len(known)].tolist()), known), first_read),
        read_rows=read_rows[by_row],
        read_tokens=where[by_row, 1],
        piece_reads=place[found[:, 0]],
        piece_labels=found[:, 1],
        first_pieces=found[:, 2].astype(bool),
        label_starts=np.array(offsets, dtype=np.int64),
        prompt_rows=forest_ends,
    )


def _depths_and_ends(parents: Ints) -> tuple[Ints, Ints]:
    depths = [0] * len(parents)
    ends = list(range(1, len(parents) + 1))
    above = parents.tolist()
    for row, parent in enumerate(above):
        depths[row] = 0 if parent == ROOT else depths[parent] + 1
    for row in range(len(above) - 1, -1, -1):
        if above[row] != ROOT:
            ends[above[row]] = max(ends[above[row]], ends[row])
    return np.array(depths, dtype=np.int64), np.array(ends, dtype=np.int64)


@dataclass(kw_only=True, slots=True, frozen=True)
class Pass:
    """Rows [low, high) computed together below `depth` rows of the stack.

    starts: the first rows of the independent subtrees ("segments") that the pass consists of.
    kept: rows of the stack that the next pass needs. pushed: rows of this pass that it needs.
    """

    low: int
    high: int
    depth: int
    starts: tuple[int, ...]
    kept: int
    pushed: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows that go through the model."""
        return self.high - self.low


def next_pass(forest: Forest, low: int, *, max_rows: int, last_path: Sequence[int] = ()) -> Pass:
    """The pass that begins at row `low`, whose ancestors are on the stack.

    It ends where the next row has few ancestors, looked for in the second half of max_rows: a
    subtree that is cut leaves a small pass behind it. last_path: the rows to keep on the stack when
    no row is left.
    """
    parent = int(forest.parents[low])
    limit = len(forest.tokens) if parent == ROOT else int(forest.ends[parent])
    high = min(low + max_rows, limit)
    if high < limit:
        window = np.arange(high, low + max_rows // 2, -1)  # the largest first
        window = window[forest.parents[window] != window - 1]  # never inside a chain
        if len(window):
            high = int(window[np.argmin(forest.depths[window])])
    needed = forest.ancestors(high) if high < len(forest.tokens) else list(last_path)
    starts = low + np.flatnonzero(forest.parents[low:high] == parent)
    return Pass(
        low=low,
        high=high,
        depth=int(forest.depths[low]),
        starts=tuple(starts.tolist()),
        kept=sum(row < low for row in needed),
        pushed=tuple(row for row in needed if row >= low),
    )


def passes(forest: Forest, *, max_rows: int, last_path: Sequence[int] = ()) -> Iterator[Pass]:
    """All passes of a forest in order; each computed row is in exactly one."""
    low = forest.num_known
    while low < len(forest.tokens):
        work = next_pass(forest, low, max_rows=max_rows, last_path=last_path)
        yield work
        low = work.high
