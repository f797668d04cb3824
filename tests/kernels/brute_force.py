"""The truth, in float64 and plain loops; trees are lists of parents, and nobody uses `ends`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

Tree = list[int]  # the parent of each node in preorder; -1 for the root


@st.composite
def trees(draw: st.DrawFn, max_length: int = 9) -> Tree:
    """Any tree: the parent of the next node is the last node or one of its ancestors."""
    parents = [-1]
    for _ in range(draw(st.integers(0, max_length - 1))):
        candidates = path_of(parents, len(parents) - 1)
        parents.append(draw(st.sampled_from(candidates)))
    return parents


def path_of(parents: Tree, node: int) -> list[int]:
    """The node and its ancestors."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path


def ends_of(parents: Tree) -> list[int]:
    """The first column after each node's subtree."""
    paths = [path_of(parents, node) for node in range(len(parents))]
    return [
        max(n for n, path in enumerate(paths) if node in path) + 1 for node in range(len(paths))
    ]


def seen_in_forest(forest: Sequence[Tree]) -> list[list[int]]:
    """For each packed query, the packed keys it sees."""
    seen, start = [], 0
    for tree in forest:
        seen += [[start + n for n in path_of(tree, node)] for node in range(len(tree))]
        start += len(tree)
    return seen


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    seen: Sequence[Sequence[int]],
    scale: float,
) -> Tensor:
    """(Hq, T, d) float64: one query, one head, one key at a time."""
    group = len(query) // len(key)
    out = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(len(query)):
        for t, own in enumerate(seen):
            h = head // group
            keys = [*prefix_key[h].double(), *(key[h, n].double() for n in own)]
            values = [*prefix_value[h].double(), *(value[h, n].double() for n in own)]
            scores = [math.exp(scale * float(query[head, t].double() @ k)) for k in keys]
            for score, row in zip(scores, values, strict=True):
                out[head, t] += score / sum(scores) * row
    return out


def logprob(hidden: Tensor, weight: Tensor, bias: Tensor | None, token: int, **cap: float) -> float:
    """Log P(token | one hidden row (D,)) in float64; cap: scale and soft_cap."""
    logits = weight.double() @ hidden.double()
    logits = (logits if bias is None else logits + bias.double()) * cap["scale"]
    if cap["soft_cap"]:
        logits = cap["soft_cap"] * torch.tanh(logits / cap["soft_cap"])
    return float(logits[token]) - math.log(math.fsum(logits.exp().tolist()))
