"""Where keys and values live: a stack of one path, and slots of rows that decode.

Shapes: Hkv key heads, d head width, B slots of C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_GROWTH = 8  # columns


class KvStack:
    """Keys and values of one path from the first token down: per layer (Hkv, capacity, d)."""

    def __init__(self) -> None:
        """An empty stack."""
        self.length = 0
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def read(self, layer: int, depth: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the uppermost `depth` rows, as views; like: of shape (Hkv, T, d)."""
        if depth == 0:
            return like[:, :0], like[:, :0]
        return self._keys[layer][:, :depth], self._values[layer][:, :depth]

    def push(self, kept: int, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Drop all rows after the first `kept`, then add rows (Hkv, rows, d) per layer."""
        added = layers[0][0].shape[1] if layers else 0
        if added:
            self._make_room(kept + added, layers)
            for index, (keys, values) in enumerate(layers):
                self._keys[index][:, kept : kept + added] = keys
                self._values[index][:, kept : kept + added] = values
        self.length = kept + added

    def _make_room(self, rows: int, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        if self._keys and self._keys[0].shape[1] >= rows:
            return
        for store, which in ((self._keys, 0), (self._values, 1)):
            for index, pair in enumerate(layers):
                heads, _, width = pair[which].shape
                room = pair[which].new_empty(heads, 2 * rows, width)
                if index < len(store):
                    room[:, : store[index].shape[1]] = store[index]
                    store[index] = room
                else:
                    store.append(room)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are in use."""
        return sum(t[:, : self.length].nbytes for t in (*self._keys, *self._values))


class Slots:
    """Keys and values of the own tokens of at most B live rows: per layer (Hkv, B, C, d).

    A column is visible to its slot's next token while the column is below that token's and
    `visible` says so; see kernels.segments. Slots 0..n-1 are live.
    """

    def __init__(self, count: int, *, device: torch.device) -> None:
        """B = count slots without columns."""
        self.count, self.capacity = count, 0
        self.lengths = [0] * count
        self.ends = torch.zeros(count, 0, dtype=torch.int32, device=device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def write(self, layer: int, slots: Tensor, columns: Tensor, key: Tensor, value: Tensor) -> None:
        """Put keys and values (Hkv, K, d) at K places."""
        for store, new in ((self.keys, key), (self.values, value)):
            if layer == len(store):
                heads, _, width = new.shape
                # Zeros, not empty: an unseen column must not hold nan, since 0 x nan is nan.
                store.append(new.new_zeros(heads, self.count, self.capacity, width))
            store[layer][:, slots, columns] = new

    def make_room(self, columns: int, *, count: int) -> None:
        """Have at least so many columns; growing drops all slots but the first `count`."""
        if columns <= self.capacity:
            return
        # By a quarter, not twofold: few rows live long, and most columns would stay empty.
        capacity = max(columns, self.capacity + max(MIN_GROWTH, self.capacity // 4))
        added = capacity - self.capacity
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                heads, _, _, width = old.shape
                grown = old.new_zeros(heads, count, capacity, width)
                grown[:, :, : self.capacity] = old[:, :count]
                store[layer] = grown
        # What saw "all columns" goes on seeing all; what was hidden stays hidden.
        ends = torch.where(self.ends[:count] > 0, capacity, 0)
        rest = ends.amax(1, keepdim=True) if self.capacity else ends.new_zeros(count, 1)
        self.ends = torch.cat([ends, rest.expand(-1, added)], dim=1)
        self.lengths = self.lengths[:count]
        self.count, self.capacity = count, capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, used or not."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @torch.inference_mode()  # as the passes that write them: elsewhere these tensors are read only
    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        if source != target:
            length = self.lengths[source]
            for tensor in (*self.keys, *self.values):
                tensor[:, target, :length] = tensor[:, source, :length]
            self.ends[target] = self.ends[source]
            self.lengths[target] = length


@dataclass(kw_only=True, slots=True, frozen=True)
class Fill:
    """Rows that are copied to slots: of the pass, and of the stack above it.

    own, above: (3, K) of (row of the pass or of the stack, slot, column).
    """

    own: Tensor
    above: Tensor

    @classmethod
    def of(
        cls,
        own: Sequence[tuple[int, int, int]],
        above: Sequence[tuple[int, int, int]],
        *,
        device: torch.device,
    ) -> Fill:
        """From lists of (row, slot, column)."""
        made = [torch.tensor(rows, dtype=torch.long, device=device) for rows in (own, above)]
        return cls(own=made[0].reshape(-1, 3).t(), above=made[1].reshape(-1, 3).t())
