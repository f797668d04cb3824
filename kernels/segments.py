"""Which own rows a query row sees: packed trees, chains and decoding slots in O(T) numbers.

T query rows and N own key rows belong to S segments, packed without padding. Segment s has the
queries query_starts[s]:query_starts[s+1] and the keys key_starts[s]:key_starts[s]+key_lengths[s].
A key's place in its segment is its column; query t sees key n of its segment if and only if

    column of n  <=  columns[t]  <  ends[n]

Lay a tree out in depth-first preorder and let ends[n] be the first column after the subtree of n:
then a node's subtree is columns[n] .. ends[n] - 1, and the line above says "n is t or an ancestor
of t". T numbers stand for the T x T mask.

    chain 0 1 2             ends = 3 3 3            (plain causal attention)
    tree  0 (1 (2) 3)       ends = 4 3 3 4          (3 sees 0 and 3, not 1 and 2)
    a key that nobody sees  end  = 0

Legend: T queries, N own keys, S segments, B slots, C columns a slot can hold, L longest segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Added to a hidden score. Finite, so that a row that sees nothing has the log-sum-exp -1e30 and
# no weight in a merge; with -inf torch's CPU kernel reports 0 for such a row, the weight of e^0.
HIDDEN = -1e30
# A run of unequal segments may be padded by so large a part of its rows, or by so few scores of a
# head: less work than another call of torch's kernel, which takes some 10 microseconds.
PADDED_PART, PADDED_SCORES = 1 / 8, 4096


@dataclass(frozen=True, eq=False)
class Segments:
    """Which own keys each query sees; built once for a pass, used by all of its layers.

    All tensors are int64 and on one device. What only the CPU path needs (padded places, masks) is
    made at first use and kept.
    """

    query_starts: Tensor  # (S + 1,)
    key_starts: Tensor  # (S,)
    key_lengths: Tensor  # (S,)
    columns: Tensor  # (T,)
    ends: Tensor  # (N,)

    @classmethod
    def build(
        cls,
        query_lengths: Sequence[int],
        *,
        columns: Sequence[int] | Tensor,
        ends: Sequence[int] | Tensor,
        key_starts: Sequence[int],
        key_lengths: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Segments:
        """The general form; see the top of the file.

        Args:
            query_lengths: queries of each segment (S,), summing to T; 0 is allowed.
            columns: the column of each query (T,); -1 sees no own key.
            ends: the first column that no longer sees a key, for each key (N,).
            key_starts: where a segment's keys begin (S,).
            key_lengths: how many keys a segment has (S,).
            device: where the tensors go.

        Raises:
            ValueError: lengths that do not add up, or keys beyond the last one.
        """
        starts = [0, *itertools.accumulate(query_lengths)]
        reach = [start + length for start, length in zip(key_starts, key_lengths, strict=True)]
        if len(key_starts) != len(query_lengths) or starts[-1] != len(columns):
            raise ValueError(
                f"segments: {len(query_lengths)} query lengths of sum {starts[-1]}, "
                f"{len(key_starts)} key starts, {len(columns)} columns: expected one key start "
                "for each length, and the sum of the lengths as many columns"
            )
        if min([*query_lengths, *key_lengths, *key_starts], default=0) < 0:
            raise ValueError("segments: a negative length or start")
        if max(reach, default=0) > len(ends):
            raise ValueError(f"segments: keys up to {max(reach)}, but only {len(ends)} ends")
        return cls(*(_int64(x, device) for x in (starts, key_starts, key_lengths, columns, ends)))

    @classmethod
    def trees(
        cls, ends: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
    ) -> Segments:
        """Packed trees: every node of a tree in preorder is a query and a key.

        Args:
            ends: for each tree, the first column after each node's subtree.
            device: where the tensors go.
        """
        lengths = [len(tree) for tree in ends]
        return cls.build(
            lengths,
            columns=[column for length in lengths for column in range(length)],
            ends=[end for tree in ends for end in tree],
            key_starts=[0, *itertools.accumulate(lengths)][:-1],
            key_lengths=lengths,
            device=device,
        )

    @classmethod
    def chains(cls, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> Segments:
        """Packed texts of these lengths: each row sees itself and all rows before it."""
        return cls.trees([[length] * length for length in lengths], device=device)

    @classmethod
    def slots(cls, columns: Tensor, ends: Tensor, *, capacity: int) -> Segments:
        """One decoding step: one query for each slot, whose keys lie at slot * capacity.

        Args:
            columns: (B,) the column of each slot's new row, whose key is already in its place;
                -1 for an empty slot. Columns after it hold no key yet and are not seen.
            ends: (B, C) of every column of every slot; `capacity` for all is plain decoding.
            capacity: C.

        Raises:
            ValueError: for ends of another shape.
        """
        num_slots = len(columns)
        if ends.shape != (num_slots, capacity):
            raise ValueError(f"slots: ends {tuple(ends.shape)}, expected {(num_slots, capacity)}")
        places = torch.arange(num_slots + 1, device=columns.device)
        return cls(
            query_starts=places,
            key_starts=places[:-1] * capacity,
            key_lengths=(columns.long() + 1).clamp(max=capacity),
            columns=columns.long(),
            ends=ends.reshape(-1).long(),
        )

    @property
    def num_segments(self) -> int:
        """S."""
        return len(self.key_starts)

    @cached_property
    def segment_of(self) -> Tensor:
        """The segment of each query (T,)."""
        segments = torch.arange(self.num_segments, device=self.columns.device)
        lengths = self.query_starts.diff()
        return segments.repeat_interleave(lengths, output_size=len(self.columns))

    @cached_property
    def longest_query(self) -> int:
        """Most queries of a segment."""
        return int(self.query_starts.diff().max()) if self.num_segments else 0

    @cached_property
    def longest_key(self) -> int:
        """Most keys of a segment."""
        return int(self.key_lengths.max()) if self.num_segments else 0

    @cached_property
    def query_padding(self) -> Padding:
        """The queries as S rows of the longest segment."""
        starts, lengths = self.query_starts[:-1], self.query_starts.diff()
        return Padding.of(starts, lengths, longest=self.longest_query, rows=len(self.columns))

    @cached_property
    def key_padding(self) -> Padding:
        """The keys as S rows of the longest segment."""
        starts, lengths = self.key_starts, self.key_lengths
        return Padding.of(starts, lengths, longest=self.longest_key, rows=len(self.ends))

    @cached_property
    def is_chain(self) -> bool:
        """Whether this is plain causal attention: each query sees its column and those before."""
        if not torch.equal(self.query_starts.diff(), self.key_lengths):
            return False
        own = torch.arange(len(self.columns), device=self.columns.device)
        offset = own - self.query_starts[self.segment_of]
        ends = self.ends[self.key_starts[self.segment_of] + offset]
        longest_sight = self.key_lengths[self.segment_of]
        return bool(((self.columns == offset) & (ends >= longest_sight)).all())

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Neighbours of about one length, for one call of a kernel each; all rows in order.

        Packed chains and trees are cut so that little is padded: equal lengths, or lengths in
        order, make few runs. (Items of 40 to 320 rows in one padded call were a third of the time
        of scoring sms_spam.) Slots, whose keys lie apart, are one run.
        """
        lengths, starts = self.key_lengths, self.query_starts
        is_packed = torch.equal(starts[:-1], self.key_starts) and torch.equal(
            starts.diff(), lengths
        )
        parts = _cut_lengths(lengths.tolist()) if is_packed else []
        if len(parts) <= 1:
            rows, keys = slice(0, len(self.columns)), slice(0, len(self.ends))
            return (Run(rows=rows, keys=keys, segments=self),)
        ends = [0, *itertools.accumulate(sum(part) for part in parts)]
        places = itertools.starmap(slice, itertools.pairwise(ends))
        return tuple(
            Run(rows=place, keys=place, segments=self._packed(part, place))
            for place, part in zip(places, parts, strict=True)
        )

    def _packed(self, lengths: Sequence[int], place: slice) -> Segments:
        """The neighbouring segments of these lengths, whose rows and keys are at `place`."""
        starts = _int64([0, *itertools.accumulate(lengths)], self.columns.device)
        return Segments(
            query_starts=starts,
            key_starts=starts[:-1],
            key_lengths=starts.diff(),
            columns=self.columns[place],
            ends=self.ends[place],
        )

    @cached_property
    def visible(self) -> Tensor:
        """(S, longest query, longest key) bool: the rule itself, on padded segments."""
        column = _gather(self.columns, self.query_padding.index)[:, :, None]
        ends = _gather(self.ends, self.key_padding.index)[:, None, :]
        place = torch.arange(self.longest_key, device=column.device)
        is_key = place < self.key_lengths[:, None, None]
        return (place <= column) & (column < ends) & is_key

    @cached_property
    def mask(self) -> Tensor:
        """(S, 1, longest query, longest key) fp32: added to the scores."""
        hidden = torch.full((), HIDDEN, device=self.columns.device)
        return torch.where(self.visible, 0.0, hidden).unsqueeze(1)

    @cached_property
    def sees_own(self) -> Tensor:
        """(T,) bool: whether a query sees any own key."""
        return self.visible.any(-1).flatten()[self.query_padding.back]


@dataclass(frozen=True, eq=False)
class Run:
    """Some neighbouring segments: their rows and keys among all, and what they are by themselves.

    segments: those of the run, numbered from its first row and key.
    """

    rows: slice
    keys: slice
    segments: Segments


@dataclass(frozen=True, eq=False)
class Padding:
    """Packed rows as S rows of one length L, and back."""

    index: Tensor  # (S, L) the packed row at each padded place; row 0 where there is none
    back: Tensor  # (T,) the padded place of each packed row, in order of segments
    is_row: Tensor  # (S, L) bool: whether there is a row
    stride: int | None  # rows from one segment to the next, where a view of the rows will do

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor, *, longest: int, rows: int) -> Padding:
        """From where each segment begins (S,), how many rows it has (S,), and rows in all."""
        column = torch.arange(longest, device=starts.device)
        is_row = column < lengths[:, None]
        return cls(
            index=torch.where(is_row, starts[:, None] + column, 0),
            back=is_row.flatten().nonzero()[:, 0],
            is_row=is_row,
            stride=_stride(starts.tolist(), longest=longest, rows=rows),
        )

    @cached_property
    def places(self) -> Tensor:
        """(T,) the packed row of each element of `back`."""
        return self.index.flatten()[self.back]

    @cached_property
    def is_in_order(self) -> bool:
        """Whether the packed rows are 0, 1, 2..., each once."""
        return torch.equal(self.places, torch.arange(len(self.places), device=self.places.device))


def _stride(starts: list[int], *, longest: int, rows: int) -> int | None:
    """The distance d of segments at 0, d, 2d.. that may be read as (S, longest), or None."""
    stride = starts[1] if len(starts) > 1 else rows
    is_regular = starts == [stride * s for s in range(len(starts))]
    is_inside = longest <= stride and stride * len(starts) <= rows
    return stride if is_regular and is_inside else None


def _cut_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Consecutive lengths, cut wherever padding them to one length would cost too much."""
    parts: list[list[int]] = []
    total = longest = 0  # of the part that grows
    for length in lengths:
        longest_now = max(longest, length)
        padded = (len(parts[-1]) + 1) * longest_now - total - length if parts else 0
        is_cheap = padded <= PADDED_PART * (total + length) or padded * longest_now <= PADDED_SCORES
        if parts and is_cheap:
            parts[-1].append(length)
            total, longest = total + length, longest_now
        else:
            parts.append([length])
            total = longest = length
    return parts


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """values[index], where there may be none at all (index then is empty or never read)."""
    return values[index] if len(values) else torch.zeros_like(index)


def _int64(values: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int64, device=device)
