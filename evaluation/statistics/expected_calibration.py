"""Expected calibration error: how far stated probabilities are from shares of right answers (pure).

Plain binned estimates are biased upwards, since each bin's share is noisy even where probabilities
are right. Here bins hold equally many items, and the noise's own part is taken off: with a share
acc of k items the observed |conf - acc| is about |N(conf - acc, acc(1 - acc) / k)|, whose mean has
a closed form, the folded normal's (the normal debiasing of Kumar, Liang and Ma 2019, arXiv
1909.10155). What is left below zero is zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from conf.records import AnswerRule, SampleRecord
from evaluation.statistics import Floats

MOST_BINS = 10
ITEMS_PER_BIN = 10  # at least, so that a bin's share is worth the name


def calibration_error(values: Floats, *, is_resampled: bool = False) -> Floats:
    """The debiased error of (confidence, is right) rows: (B, N, 2) -> (B,), in [0, 1].

    is_resampled: the rows are drawn with replacement from others, so their noise is twice as large.
    """
    n = values.shape[1]
    num_bins = max(1, min(MOST_BINS, n // ITEMS_PER_BIN))
    order = np.argsort(values[..., 0], axis=1, kind="stable")
    ordered = np.take_along_axis(values, order[..., None], axis=1)
    starts = np.arange(num_bins) * n // num_bins
    sizes = np.diff(np.append(starts, n))
    means = np.add.reduceat(ordered, starts, axis=1) / sizes[:, None]  # (B, bins, 2)
    share = means[..., 1]
    gap = np.abs(means[..., 0] - share)
    variance = share * (1 - share) / np.maximum(1, sizes - 1) * (2 if is_resampled else 1)
    unbiased = 2 * gap - folded_normal_mean(gap, np.sqrt(variance))
    return np.asarray(np.maximum(0.0, (unbiased * sizes / n).sum(axis=1)), dtype=np.float64)


def folded_normal_mean(mean: Floats, sd: Floats) -> Floats:
    """E|X| of X ~ N(mean, sd^2), element by element; |mean| where sd is 0."""
    from scipy.special import erf  # not scipy.stats, which takes a second to import

    ratio = mean / np.where(sd > 0, sd, 1.0)
    spread = math.sqrt(2 / math.pi) * sd * np.exp(-ratio * ratio / 2)
    return np.where(sd > 0, spread + mean * erf(ratio / math.sqrt(2)), np.abs(mean))


def stated_probability(record: SampleRecord, rule: AnswerRule | None) -> float | None:
    """The probability that an answer's own label scores give it, under the arm's rule.

    None where there is no label distribution, or its lengths, which records do not hold, decide.
    """
    scores = _scores(record, rule)
    answer = record.calibrated_answer or record.answer
    if scores is None or answer is None or answer not in scores:
        return None
    offsets = (rule.label_offsets if rule is not None else None) or {}
    shifted = {label: value - offsets.get(label, 0.0) for label, value in scores.items()}
    highest = max(shifted.values())
    weights = {label: math.exp(value - highest) for label, value in shifted.items()}
    return weights[answer] / math.fsum(weights.values())


def _scores(record: SampleRecord, rule: AnswerRule | None) -> Mapping[str, float] | None:
    if record.label_logprobs is None:
        return None
    match rule.normalisation if rule is not None else "sum":
        case "sum":
            return record.label_logprobs
        case "pmi":
            free = record.baseline_logprobs or {}
            return {k: v - free.get(k, 0.0) for k, v in record.label_logprobs.items()}
        case "first_token":
            return record.first_token_logprobs
    return None
