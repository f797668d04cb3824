"""How the rows of items are laid out where nothing is learned: every token once (pure).

The items of a rung are asked alike, and the labels of an item after one prompt. A pass is

    [common prefix, once] [item 1: its prompt, then its labels as branches] [item 2] ...

in which a token sees the prefix and those above it in its own item, at the place it has in its row.
So each computes what it computes in a row of its own. A row's last token predicts nothing and is
left out. Tokens of an item stand in preorder: kernels/segments.py says how T numbers tell a tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from conf.records import RenderedExample
from training.data import Batch
from training.packing import shared_length


@dataclass(kw_only=True, slots=True, frozen=True)
class ItemTree:
    """The rows of an item behind a prefix, T tokens in preorder and N targets, row by row.

    ids, depths, ends: (T,); depth: a token's place in its row; end: the first that is no longer
    below it. sources: (N,), the token that predicts each target; never one of the prefix, since
    shared_length leaves those to their rows. targets: (N,) ids. row_targets: of each row.
    """

    ids: tuple[int, ...]
    depths: tuple[int, ...]
    ends: tuple[int, ...]
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    row_targets: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[RenderedExample], *, prefix: int) -> ItemTree:
        """The tree of rows whose first `prefix` tokens stand in front of all items."""
        ids: list[int] = []
        depths: list[int] = []
        ends: list[int] = []
        path: list[int] = []  # the tokens of the row before
        paths: dict[int, list[int]] = {}
        # In this order what was left is never entered again, so new tokens stand in preorder.
        for number in sorted(range(len(rows)), key=lambda n: rows[n].input_ids[prefix:-1]):
            own = rows[number].input_ids[prefix:-1]
            pairs = zip(path, own, strict=False)
            same = next((k for k, (at, i) in enumerate(pairs) if ids[at] != i), None)
            same = min(len(path), len(own)) if same is None else same
            for at in path[same:]:
                ends[at] = len(ids)
            path = [*path[:same], *range(len(ids), len(ids) + len(own) - same)]
            paths[number] = path
            ids += own[same:]
            depths += range(prefix + same, prefix + len(own))
            ends += [0] * (len(own) - same)
        for at in path:
            ends[at] = len(ids)
        hits = [[t for t in range(1, len(r.input_ids)) if r.target_mask[t]] for r in rows]
        return cls(
            ids=tuple(ids),
            depths=tuple(depths),
            ends=tuple(ends),
            sources=tuple(paths[n][t - 1 - prefix] for n, at in enumerate(hits) for t in at),
            targets=tuple(row.input_ids[t] for row, at in zip(rows, hits, strict=True) for t in at),
            row_targets=tuple(map(len, hits)),
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class ItemTrees:
    """Items behind what all of them begin with."""

    prefix: tuple[int, ...]
    trees: tuple[ItemTree, ...]

    @classmethod
    def of(cls, items: Sequence[Sequence[RenderedExample]]) -> ItemTrees:
        """The trees of items, each some rows."""
        rows = [row for item in items for row in item]
        prefix = shared_length(rows)
        return cls(
            prefix=rows[0].input_ids[:prefix],
            trees=tuple(ItemTree.of(item, prefix=prefix) for item in items),
        )

    def passes(self, *, max_tokens: int) -> Iterator[tuple[ItemTree, ...]]:
        """Items in order, so many in a pass as max_tokens allows, and at least one."""
        ready: list[ItemTree] = []
        tokens = len(self.prefix)
        for tree in self.trees:
            if ready and tokens + len(tree.ids) > max_tokens:
                yield tuple(ready)
                ready, tokens = [], len(self.prefix)
            ready.append(tree)
            tokens += len(tree.ids)
        if ready:
            yield tuple(ready)

    def num_tokens(self, *, max_tokens: int) -> int:
        """Tokens that all passes put through the embedding."""
        num_passes = sum(1 for _ in self.passes(max_tokens=max_tokens))
        return num_passes * len(self.prefix) + sum(len(tree.ids) for tree in self.trees)

    def batch(self, trees: Sequence[ItemTree]) -> Batch:
        """The tensors of a pass of some items, (1, T)."""
        prefix = len(self.prefix)
        starts = list(accumulate((len(tree.ids) for tree in trees), initial=prefix))
        segments, ends = [0] * prefix, [starts[-1]] * prefix
        ids, depths = list(self.prefix), list(range(prefix))
        sources: list[int] = []
        for number, (start, tree) in enumerate(zip(starts, trees, strict=False), start=1):
            ids += tree.ids
            depths += tree.depths
            segments += [number] * len(tree.ids)
            ends += [start + end for end in tree.ends]
            sources += [start + at for at in tree.sources]
        return Batch(
            input_ids=torch.tensor([ids]),
            positions=torch.tensor(sources),
            targets=torch.tensor([i for tree in trees for i in tree.targets]),
            position_ids=torch.tensor([depths]),
            segments=torch.tensor(segments),
            ends=torch.tensor(ends),
        )
