"""How the rows of a pass are laid out, and what of them is computed (pure).

The rows of a run begin alike: the system prompt and the instruction. A packed pass is one sequence

    [common prefix, once] [rest of row 1] [rest of row 2] ...

in which each rest sees the prefix and itself, at the positions it has in its own row. Every token
computes what it computes in a row of its own, so loss and gradients are those of the rows one by
one; the prefix receives the sum of their gradients. Nothing is padded. The same idea serves
reinforcement learning on GPUs (Prefix Grouper, arXiv 2506.05433).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from conf.records import RenderedExample

STAND_IN_TOKENS = 1  # length of the row that takes the place of an empty pass


@dataclass(kw_only=True, slots=True, frozen=True)
class Layout:
    """How rows become passes.

    is_packed: one sequence per pass, else a rectangle padded to its longest row. shares_prefix: a
    packed pass computes what its rows have in common once. max_rows: rows of a pass. max_tokens:
    tokens of a packed pass; a longer row is a pass of its own. reason: why this layout.
    """

    is_packed: bool
    shares_prefix: bool
    max_rows: int
    max_tokens: int
    reason: str

    def fits(self, rows: Sequence[RenderedExample]) -> bool:
        """Whether rows may be one pass. One row always may."""
        if len(rows) <= 1:
            return True
        if len(rows) > self.max_rows:
            return False
        return not self.is_packed or self.num_tokens(rows) <= self.max_tokens

    def num_tokens(self, rows: Sequence[RenderedExample]) -> int:
        """Tokens of a pass that go through the embedding, without padding."""
        whole = sum(len(row.input_ids) for row in rows)
        if not (self.is_packed and self.shares_prefix):
            return whole
        return whole - max(0, len(rows) - 1) * shared_length(rows)

    def num_padding(self, rows: Sequence[RenderedExample]) -> int:
        """Tokens of a pass that go through the embedding and belong to no row."""
        if not rows:
            return STAND_IN_TOKENS
        if self.is_packed:
            return 0
        longest = max(len(row.input_ids) for row in rows)
        return len(rows) * longest - self.num_tokens(rows)


@dataclass(kw_only=True, slots=True, frozen=True)
class PackedRows:
    """One packed pass of T tokens and N targets.

    input_ids, depths, segments: (T,); depth: a token's place in its own row; segment: 0 for the
    prefix, else the row's number from 1. sources: (N,) indices into T of the tokens that predict a
    target. targets: (N,) token ids.
    """

    input_ids: tuple[int, ...]
    depths: tuple[int, ...]
    segments: tuple[int, ...]
    sources: tuple[int, ...]
    targets: tuple[int, ...]


def shared_length(rows: Sequence[RenderedExample]) -> int:
    """Leading tokens that a pass computes once: common to all rows, and predicting no target.

    A token that predicts a target stays in its row, so that the target counts once for each row.
    """
    if len(rows) < 2:
        return 0
    # The token before a row's first target is the first that must stay.
    limit = min(row.target_mask.index(1, 1) - 1 for row in rows)
    # What the smallest and the largest sequence have in common, all between them have.
    low, high = min(row.input_ids for row in rows), max(row.input_ids for row in rows)
    pairs = zip(low[:limit], high[:limit], strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), limit)


def pack(rows: Sequence[RenderedExample], *, shares_prefix: bool) -> PackedRows:
    """The rows of a pass as one sequence."""
    prefix = shared_length(rows) if shares_prefix else 0
    ids = list(rows[0].input_ids[:prefix])
    depths = list(range(prefix))
    segments = [0] * prefix
    sources: list[int] = []
    targets: list[int] = []
    for number, row in enumerate(rows, start=1):
        length = len(row.input_ids)
        offset = len(ids) - prefix  # token t of the row lies at t + offset
        ids += row.input_ids[prefix:]
        depths += range(prefix, length)
        segments += [number] * (length - prefix)
        hits = [t for t in range(1, length) if row.target_mask[t]]
        sources += [t - 1 + offset for t in hits]
        targets += [row.input_ids[t] for t in hits]
    return PackedRows(
        input_ids=tuple(ids),
        depths=tuple(depths),
        segments=tuple(segments),
        sources=tuple(sources),
        targets=tuple(targets),
    )
