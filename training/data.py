"""Prepared rows from the cache, and the tensors of one forward pass.

B: rows of a pass. L: longest row. T: tokens of a packed pass. N: target tokens of a pass.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conf.errors import DataError
from conf.records import RenderedExample, from_dict
from training.packing import STAND_IN_TOKENS, Layout, pack


@dataclass(kw_only=True, slots=True, frozen=True)
class Batch:
    """One forward pass, padded or packed.

    input_ids: (B, L), padded at the right, or (1, T). positions: (N,) indices into B * L or T of
    the tokens that predict a target, i.e. one before it. targets: (N,) target ids.
    attention_mask: (B, L), 1 where there is a token; padding is known by length, never by token id.
    position_ids, segments: (1, T) and (T,) of a packed pass of several rows. All three are None for
    one row alone, which is plainly causal. parts: tokens of each part of a joined pass, whose
    segments are numbered part by part; a part sees nothing of the others. ends: (T,) of a pass of
    trees (training/item_trees.py), the first place that no longer sees a token; None: each row is
    one chain.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    segments: Tensor | None = None
    parts: tuple[int, ...] | None = None
    ends: Tensor | None = None

    def to(self, device: str) -> Batch:
        """The same batch on another device."""
        return Batch(
            input_ids=self.input_ids.to(device),
            positions=self.positions.to(device),
            targets=self.targets.to(device),
            attention_mask=_moved(self.attention_mask, device),
            position_ids=_moved(self.position_ids, device),
            segments=_moved(self.segments, device),
            parts=self.parts,
            ends=_moved(self.ends, device),
        )


def _moved(tensor: Tensor | None, device: str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def num_targets(row: RenderedExample) -> int:
    """Target tokens of a row. The first token has no predecessor, so it is never a target."""
    return sum(row.target_mask[1:])


def read_rows(path: Path) -> tuple[RenderedExample, ...]:
    """All rows of a JSONL file of RenderedExample, checked.

    Raises:
        DataError: no rows; a mask that does not fit its ids; a row without a target token.
    """
    with path.open(encoding="utf-8") as stream:
        rows = tuple(
            from_dict(RenderedExample, json.loads(line)) for line in stream if line.strip()
        )
    if not rows:
        raise DataError(str(path), found="no rows", expected="at least one training row")
    for number, row in enumerate(rows, start=1):
        check_row(row, where=f"{path}:{number}")
    return rows


def check_row(row: RenderedExample, *, where: str) -> None:
    """Refuse a row whose mask does not fit its ids, or that has no target.

    Raises:
        DataError: naming `where`, a file and line.
    """
    if len(row.input_ids) != len(row.target_mask) or set(row.target_mask) - {0, 1}:
        raise DataError(
            where,
            found=f"item {row.item_id}: {len(row.input_ids)} ids, mask {row.target_mask[:8]}...",
            expected="a mask of 0 and 1, as long as the ids",
        )
    if num_targets(row) == 0:
        raise DataError(
            where,
            found=f"item {row.item_id} has no target token after its first token",
            expected="at least one token to learn in every row",
            remedy="check that the row's completion is not empty and not cut off",
        )


def make_batch(rows: Sequence[RenderedExample], *, layout: Layout, pad_id: int) -> Batch:
    """The tensors of one pass; without rows, a stand-in row that has no target."""
    if not rows:
        stand_in = RenderedExample(
            item_id="",
            input_ids=(pad_id,) * STAND_IN_TOKENS,
            target_mask=(0,) * STAND_IN_TOKENS,
        )
        rows = [stand_in]
    if layout.is_packed:
        return packed_batch(rows, shares_prefix=layout.shares_prefix)
    return padded_batch(rows, pad_id=pad_id)


def packed_batch(rows: Sequence[RenderedExample], *, shares_prefix: bool) -> Batch:
    """Rows as one sequence, (1, T)."""
    packed = pack(rows, shares_prefix=shares_prefix)
    is_alone = len(rows) == 1
    return Batch(
        input_ids=_ids(packed.input_ids)[None],
        positions=_ids(packed.sources),
        targets=_ids(packed.targets),
        position_ids=None if is_alone else _ids(packed.depths)[None],
        segments=None if is_alone else _ids(packed.segments),
    )


def joined_batch(parts: Sequence[Sequence[RenderedExample]], *, shares_prefix: bool) -> Batch:
    """Several packed passes as one, (1, T); each is a part that has a prefix of its own."""
    packed = [pack(rows, shares_prefix=shares_prefix) for rows in parts]
    sizes = tuple(len(part.input_ids) for part in packed)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return Batch(
        input_ids=_ids([i for part in packed for i in part.input_ids])[None],
        positions=_ids([s + at for at, p in zip(starts, packed, strict=True) for s in p.sources]),
        targets=_ids([i for part in packed for i in part.targets]),
        position_ids=_ids([i for part in packed for i in part.depths])[None],
        segments=_ids([i for part in packed for i in part.segments]),
        parts=sizes,
    )


def padded_batch(rows: Sequence[RenderedExample], *, pad_id: int) -> Batch:
    """Rows as a rectangle, (B, L)."""
    longest = max(len(row.input_ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    attention = torch.zeros((len(rows), longest), dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids[index, :length] = _ids(row.input_ids)
        attention[index, :length] = 1
        hits = [t for t in range(1, length) if row.target_mask[t]]
        positions += [index * longest + t - 1 for t in hits]
        targets += [row.input_ids[t] for t in hits]
    return Batch(
        input_ids=ids,
        positions=_ids(positions),
        targets=_ids(targets),
        attention_mask=attention,
    )


def _ids(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def visibility(segments: Tensor, *, dtype: torch.dtype, ends: Tensor | None = None) -> Tensor:
    """What each token of a packed pass sees, as an additive mask, (1, 1, T, T).

    A token sees itself and the earlier ones of the prefix (segment 0) and of its own segment, but
    for those that end before it: 0 there, elsewhere the lowest value of the dtype. segments, ends:
    (T,), as in Batch.
    """
    key = segments[None, :]
    sees = ((key == 0) | (key == segments[:, None])).tril()
    if ends is not None:
        sees &= torch.arange(len(ends), device=ends.device)[:, None] < ends[None, :]
    mask = torch.zeros(sees.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)[None, None]
