"""The variance of a metric by where it comes from: items, draws of shots, training seeds (pure).

A score is mean + item + draw + seed + rest, each of them random; every draw and seed answers the
same items. The parts come from the mean squares of the balanced layout (Searle, Casella and
McCulloch 1992, Variance Components, chapter 4), a negative one counts as 0, and they add up to the
variance of the mean over all of them. The rest is smaller with more items, and counts with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from conf.records import Measured
from conf.results import Variance
from evaluation.statistics import Floats
from evaluation.statistics.clusters import clustered_mean

Replicate = tuple[int, int]  # draw, training seed
Scores = Mapping[Replicate, Mapping[str, float]]  # replicate -> item id -> score


def split_variance(scores: Scores, *, sources: Mapping[str, str] | None = None) -> Variance:
    """Of the mean over all replicates and items, by source; None where there is one of a kind.

    Items that some replicate has not answered are left out. Where draws and seeds are not crossed
    (e.g. one seed for each draw), their parts cannot be told apart and are None.

    Args:
        scores: of each draw and seed.
        sources: item -> its source, where items share sources.
    """
    common = sorted(set.intersection(*(set(own) for own in scores.values()))) if scores else []
    means = [fmean(own[i] for own in scores.values()) for i in common]
    items = _of_items(means, common, sources)
    draws, seeds = sorted({d for d, _ in scores}), sorted({s for _, s in scores})
    if not common or len(scores) != len(draws) * len(seeds):
        return Variance(items=items)
    rows = [[[scores[d, s][i] for i in common] for s in seeds] for d in draws]
    table = np.array(rows, dtype=np.float64)  # (draws, seeds, items)
    rest = _rest(table)
    return Variance(
        items=items,
        draws=_component(table.mean(axis=(1, 2)), each=table[0].size, rest=rest),
        seeds=_component(table.mean(axis=(0, 2)), each=table[:, 0].size, rest=rest),
    )


def _of_items(
    means: Sequence[float] | Floats, items: Sequence[str], sources: Mapping[str, str] | None
) -> float | None:
    if len(means) < 2:
        return None
    names = [items[k] if sources is None else sources[items[k]] for k in range(len(means))]
    return clustered_mean(means, names).variance


def _rest(table: Floats) -> float:
    """The mean square that neither item, draw nor seed explains; 0 where nothing is left of it."""
    effects = [
        np.mean(table, axis=axes, keepdims=True) - table.mean() for axes in ((1, 2), (0, 2), (0, 1))
    ]
    left = table - table.mean() - sum(effects)
    freedom = table.size - 1 - sum(size - 1 for size in table.shape)
    return float((left**2).sum()) / freedom if freedom > 0 else 0.0


def _component(means: Floats, *, each: int, rest: float) -> float | None:
    """What a factor adds to the variance of the mean; means: of its levels, over `each` scores."""
    levels = means.size
    if levels < 2:
        return None
    return max(0.0, float(np.var(means, ddof=1)) - rest / each) / levels


def pooled_interval(
    mean: float, parts: Variance, *, n: int, num_draws: int, num_seeds: int, confidence: float
) -> Measured:
    """A share over several draws or seeds: its interval has all three parts in it.

    Student's t at the degrees of freedom of Satterthwaite 1946.
    """
    from scipy.special import stdtrit

    known = [
        (part, levels - 1)
        for part, levels in ((parts.items, n), (parts.draws, num_draws), (parts.seeds, num_seeds))
        if part
    ]
    total = sum(part for part, _ in known)
    if total == 0:
        return Measured(value=mean, n=n)
    freedom = total**2 / sum(part**2 / own for part, own in known)
    half = float(stdtrit(freedom, 0.5 + confidence / 2)) * math.sqrt(total)
    return Measured(value=mean, low=max(0.0, mean - half), high=min(1.0, mean + half), n=n)
