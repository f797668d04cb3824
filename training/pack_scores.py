"""How good the trials of a pack are on the same validation items, asked at a rung.

An item's rows are its labels after the same prompt. What rows and items have in common is computed
once for each trial (training/item_trees.py). A trial is right where the reference has the largest
sum of log-probabilities. Where all items have the same labels, the sums are also compared after
batch calibration (Zhou et al. 2023, arXiv 2309.17249), and the better of both counts, as an
evaluation chooses on validation: after few steps a trial prefers one label for all inputs, whatever
it has learned. On few items many trials are right equally often, so the log-probability of the
reference among the labels breaks ties. Items of one row each (the task generates) are scored by
their mean loss instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.errors import DataError, JobFailed
from conf.records import from_dict
from conf.trial_records import LabelRow
from training.data import check_row, num_targets


def read_items(path: Path) -> tuple[tuple[LabelRow, ...], ...]:
    """The rows of each item, in the order of the file.

    Raises:
        DataError: no rows, a row that cannot be scored, an item of several rows without its
            reference, or items of one row among items of several.
    """
    items: dict[str, list[LabelRow]] = {}
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            row = from_dict(LabelRow, json.loads(line))
            check_row(row, where=f"{path}:{number}")
            items.setdefault(row.item_id, []).append(row)
    if not items:
        raise DataError(str(path), found="no rows", expected="at least one validation row")
    scores_labels = any(len(rows) > 1 for rows in items.values())
    for item_id, rows in items.items():
        if scores_labels and (len(rows) == 1 or not any(row.is_reference for row in rows)):
            raise DataError(
                str(path),
                found=f"item {item_id}: {len(rows)} rows, reference "
                f"{[row.label for row in rows if row.is_reference]}",
                expected="a row for each label, one of them the reference",
            )
    return tuple(tuple(rows) for rows in items.values())


@dataclass(kw_only=True, slots=True, frozen=True)
class Scored:
    """The metric's name, each item's value, and what breaks ties: None where the metric does."""

    metric: str
    per_item: tuple[float, ...]
    tie_break: float | None


def score_items(items: Sequence[Sequence[LabelRow]], found: Sequence[Sequence[float]]) -> Scored:
    """How good a model is on the items.

    Args:
        items: the rows of each.
        found: of each item log p(targets) of each of its rows, summed.

    Raises:
        JobFailed: a log-probability that is not finite.
    """
    for rows, logprobs in zip(items, found, strict=True):
        if not all(map(math.isfinite, logprobs)):
            raise JobFailed(f"item {rows[0].item_id} has the log-probabilities {logprobs}")
    pairs = list(zip(items, found, strict=True))
    if any(len(rows) > 1 for rows in items):
        return _by_labels(items, found)
    losses = tuple(logprobs[0] / num_targets(rows[0]) for rows, logprobs in pairs)
    return Scored(metric="minus_loss", per_item=losses, tie_break=None)


def _by_labels(items: Sequence[Sequence[LabelRow]], found: Sequence[Sequence[float]]) -> Scored:
    """Accuracy by sums, or by calibrated ones where that is better."""
    ways = [found]
    if _have_same_labels(items):
        offsets = _batch_offsets(found)
        ways.append([[a - b for a, b in zip(sums, offsets, strict=True)] for sums in found])
    right = [
        [float(_is_right(rows, sums)) for rows, sums in zip(items, way, strict=True)]
        for way in ways
    ]
    pairs = zip(items, ways[-1], strict=True)
    return Scored(
        metric="accuracy",
        per_item=tuple(max(right, key=math.fsum)),
        tie_break=math.fsum(_reference_logprob(*pair) for pair in pairs) / len(items),
    )


def _have_same_labels(items: Sequence[Sequence[LabelRow]]) -> bool:
    """Whether the items are asked about the same labels, token for token."""
    labels = {
        tuple(
            tuple(i for i, hit in zip(row.input_ids, row.target_mask, strict=True) if hit)
            for row in rows
        )
        for rows in items
    }
    return len(labels) == 1


def _batch_offsets(found: Sequence[Sequence[float]]) -> list[float]:
    """Of each label the logarithm of its mean probability over the items."""
    shares = []
    for sums in found:
        total = _log_sum_exp(sums)
        shares.append([math.exp(value - total) for value in sums])
    means = [math.fsum(of) / len(shares) for of in zip(*shares, strict=True)]
    return [math.log(max(mean, 1e-30)) for mean in means]


def _log_sum_exp(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(value - top) for value in values))


def _reference_logprob(rows: Sequence[LabelRow], sums: Sequence[float]) -> float:
    """Log p(reference | it is one of the labels); the likeliest of several references."""
    right = [value for row, value in zip(rows, sums, strict=True) if row.is_reference]
    return max(right) - _log_sum_exp(sums)


def _is_right(rows: Sequence[LabelRow], logprobs: Sequence[float]) -> bool:
    """Whether the likeliest label is the reference; of equal ones the first counts."""
    return rows[max(range(len(rows)), key=logprobs.__getitem__)].is_reference
