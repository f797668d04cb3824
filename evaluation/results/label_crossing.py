"""Where two curves over labels cross, and how sure that is (numpy only).

Scores are (D, N): draws of the label set by items, training seeds averaged. Both arms see the same
draws and items, so a resample takes the same ones of both (two-way bootstrap over crossed factors:
Owen 2007, arXiv 0711.1247). Of the spread of draw means, what answers to single items explain is
resampled with the items already, and left out. A few draws tell little of the rest: it is widened
by sqrt(D / (D - 1)), which makes the variance right, and by Student's t over the normal quantile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NUM_RESAMPLES = 2000


@dataclass(kw_only=True, slots=True, frozen=True)
class Crossing:
    """The number of labels from which on b is at least as good as a.

    status: crosses | none_seen | always | unknown. low: None below the smallest size, which is all
    that is known then; high: None above the largest. An interval that lies outside the sizes whole
    begins at the largest or ends at the smallest. share_seen: of the resamples, those with status
    crosses or always.
    """

    status: str
    labels: float | None = None
    low: float | None = None
    high: float | None = None
    share_seen: float | None = None


def student_quantile(confidence: float, df: float) -> float:
    """The t such that a Student variable lies in (-t, t) with probability `confidence`."""
    from scipy.special import stdtrit

    return float(stdtrit(df, 0.5 + confidence / 2))


def draw_variance(scores: Floats) -> float:
    """The variance of draws' own effects in (D, N) scores, without that of answers to items."""
    draws, items = scores.shape
    if draws < 2:
        return 0.0
    noise = float(scores.var(axis=0, ddof=1).mean()) / items
    return float(max(0.0, scores.mean(axis=1).var(ddof=1) - noise))


def draw_factor(scores: Floats, *, confidence: float) -> float:
    """What the deviations of draw means in (D, N) scores are multiplied with in a resample."""
    draws = scores.shape[0]
    own = draw_variance(scores)
    if own == 0:
        return 0.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = own / float(scores.mean(axis=1).var(ddof=1))
    wide = student_quantile(confidence, draws - 1) / z
    return float(math.sqrt(share * draws / (draws - 1)) * wide)


def crossing(
    sizes: Sequence[int],
    a: Sequence[Floats],
    b: Sequence[Floats],
    *,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Crossing:
    """Where b's curve comes to a's for good, interpolated in the logarithm of labels.

    Args:
        sizes: (S,) growing numbers of labels.
        a: per size (D, N) scores; an arm without draws has D = 1. N is the same everywhere.
        b: the same of the other arm.
        confidence: of the interval.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    if len(sizes) < 2 or not a[0].size:
        return Crossing(status="unknown")
    x = np.log(np.asarray(sizes, dtype=np.float64))
    observed = np.array([q.mean() - p.mean() for p, q in zip(a, b, strict=True)])
    place = float(places(x, observed[None])[0])
    rng = np.random.default_rng(seed)
    items = a[0].shape[1]
    weights = rng.multinomial(items, np.full(items, 1 / items), size=num_resamples) / items
    draws = max(part.shape[0] for part in (*a, *b))
    picks = rng.multinomial(draws, np.full(draws, 1 / draws), size=num_resamples) / draws
    differences = np.stack(
        [
            _resampled(q, weights, picks, confidence) - _resampled(p, weights, picks, confidence)
            for p, q in zip(a, b, strict=True)
        ],
        axis=1,
    )
    found = np.sort(places(x, differences))
    tail = (1 - confidence) / 2
    low = float(found[math.floor(tail * (num_resamples - 1))])
    high = float(found[math.ceil((1 - tail) * (num_resamples - 1))])
    status = {-math.inf: "always", math.inf: "none_seen"}.get(place, "crosses")
    return Crossing(
        status=status,
        labels=math.exp(place) if math.isfinite(place) else None,
        low=None if low == -math.inf else _within(low, sizes),
        high=None if high == math.inf else _within(high, sizes),
        share_seen=float(np.mean(found < math.inf)),
    )


def places(x: Floats, differences: Floats) -> Floats:
    """(B,) where each row of (B, S) differences stays at or above 0 from; x: (S,).

    -inf: it is never below. inf: it is below at the last.
    """
    below = differences < 0
    count = differences.shape[1]
    last = np.where(below.any(axis=1), count - 1 - np.argmax(below[:, ::-1], axis=1), -1)
    found = np.full(len(differences), -math.inf)
    found[last == count - 1] = math.inf
    inside = np.flatnonzero((last >= 0) & (last < count - 1))
    k = last[inside]
    before, after = differences[inside, k], differences[inside, k + 1]
    found[inside] = x[k] + (x[k + 1] - x[k]) * before / (before - after)
    return found


def _resampled(scores: Floats, weights: Floats, picks: Floats, confidence: float) -> Floats:
    """(B,) means under item weights (B, N) and draw weights (B, D')."""
    by_draw = weights @ scores.T  # (B, D)
    mean = by_draw.mean(axis=1)
    draws = scores.shape[0]
    if draws < 2 or picks.shape[1] != draws:
        return np.asarray(mean)
    deviation = (by_draw * picks).sum(axis=1) - mean
    return np.asarray(mean + draw_factor(scores, confidence=confidence) * deviation)


def _within(place: float, sizes: Sequence[int]) -> float:
    """Labels at a place; the nearest size where it lies outside of all."""
    if math.isfinite(place):
        return math.exp(place)
    return float(sizes[-1] if place > 0 else sizes[0])
