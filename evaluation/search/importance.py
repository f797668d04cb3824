"""How much of the order of a search's settings one field explains, and how much chance does (pure).

Settings are split by the field's values; a number with more than MAX_GROUPS values is split into
thirds, so that a best value in the middle shows. The share is epsilon squared of the ranks: the
part of their variance that lies between groups, less what that many groups explain by chance
(Kelley 1935). A permutation test tells what chance does with these very groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conf.hashing import canonical_json
from evaluation.search.values import is_number

MIN_SETTINGS = 5  # with fewer, hardly any share is beyond chance
MAX_GROUPS = 4
NUM_SHUFFLES = 2000


@dataclass(kw_only=True, slots=True, frozen=True)
class Importance:
    """See FieldResult."""

    share: float | None = None
    chance_high: float | None = None
    p_value: float | None = None


def importance(values: Sequence[object], ranks: Sequence[float], *, seed: int = 0) -> Importance:
    """The importance of one field.

    Args:
        values: the field's, by setting.
        ranks: by setting, 1 is the best; equals share their mean rank.
        seed: of the shufflings.
    """
    groups = np.asarray(groups_of(values))
    order = np.asarray(ranks, dtype=np.float64)
    n, k = len(order), len(set(groups.tolist()))
    spread = float(((order - order.mean()) ** 2).sum()) if n else 0.0
    if n < MIN_SETTINGS or not 2 <= k < n or spread == 0:
        return Importance()
    member = (groups[:, None] == np.unique(groups)[None, :]).astype(np.float64)  # (n, k)

    def shares(rows: np.ndarray) -> np.ndarray:  # (m, n) -> (m,)
        sums = (rows - order.mean()) @ member
        between = (sums**2 / member.sum(axis=0)).sum(axis=1)
        return np.asarray(1 - (spread - between) / (n - k) / (spread / (n - 1)))

    shuffled = np.random.default_rng(seed).permuted(np.tile(order, (NUM_SHUFFLES, 1)), axis=1)
    found, chance = float(shares(order[None, :])[0]), shares(shuffled)
    as_much = int((chance >= found - 1e-9).sum())
    return Importance(
        share=max(0.0, found),
        chance_high=max(0.0, float(np.quantile(chance, 0.95))),
        p_value=(1 + as_much) / (1 + NUM_SHUFFLES),
    )


def groups_of(values: Sequence[object]) -> list[int]:
    """The group of each value: one per value, or thirds of the order of many numbers."""
    keys = [canonical_json(value) for value in values]
    if all(is_number(value) for value in values) and len(set(keys)) > MAX_GROUPS:
        numbers = np.asarray(values, dtype=np.float64)
        below = np.searchsorted(np.sort(numbers), numbers)  # equal values stay together
        return [int(b) for b in 3 * below // len(numbers)]
    names = list(dict.fromkeys(keys))
    return [names.index(key) for key in keys]
