"""Who pays for which rows of a forest (pure)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.engines.forest import ROOT, SHARED, Forest, Pass


class ForestBill:
    """Counts rows as they are computed: each belongs to one request, or is shared.

    shared: rows of several requests that were computed so far.
    """

    def __init__(self, forest: Forest, prompts: Sequence[Sequence[int]]) -> None:
        """Nothing is computed yet."""
        self._forest = forest
        self._lengths = [len(prompt) for prompt in prompts]
        own = forest.owners[forest.num_known :]
        self._owned = np.bincount(own[own != SHARED], minlength=len(prompts))
        self._is_computed = np.zeros(len(forest.tokens), dtype=bool)
        self.shared = 0

    def add(self, work: Pass) -> int:
        """A pass was computed; returns how many of its rows are shared."""
        self._is_computed[work.low : work.high] = True
        shared = int(np.count_nonzero(self._forest.owners[work.low : work.high] == SHARED))
        self.shared += shared
        return shared

    def owned(self, request: int) -> int:
        """Rows that a request needs alone."""
        return int(self._owned[request])

    def lost(self, request: int) -> int:
        """Rows computed for a request alone that ended without scores."""
        return int(np.count_nonzero(self._is_computed & (self._forest.owners == request)))

    def cached(self, request: int) -> int:
        """Prompt tokens whose rows were not computed for this request alone."""
        row, own = int(self._forest.prompt_rows[request]), 0
        while row != ROOT and row >= self._forest.num_known:
            if self._forest.owners[row] != request:
                break  # above a row that others need too, all are shared
            own += 1
            row = int(self._forest.parents[row])
        return self._lengths[request] - own
