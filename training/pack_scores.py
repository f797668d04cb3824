"""How good the trials of a pack are on the same validation items, asked at a rung.

An item's rows are its labels after the same prompt, which is computed once for each trial. A trial
is right where the reference has the largest sum of log-probabilities. On few items many trials are
right equally often, so the log-probability of the reference among the labels breaks ties. Items of
one row each (the task generates) are scored by their mean loss instead.
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
from training.pack_model import PackModel, Part


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


def score_items(
    adapter: str,
    items: Sequence[Sequence[LabelRow]],
    *,
    model: PackModel,
    max_tokens: int,
) -> Scored:
    """How good an adapter is on the items.

    Raises:
        JobFailed: a log-probability that is not finite.
    """
    parts = [Part(adapter, rows) for rows in items]  # the labels of an item share its prompt
    found: list[list[float]] = []
    for passed in model.passes(parts, max_tokens=max_tokens):
        found += model.logprobs(passed)
    for rows, logprobs in zip(items, found, strict=True):
        if not all(map(math.isfinite, logprobs)):
            raise JobFailed(f"item {rows[0].item_id} has the log-probabilities {logprobs}")
    pairs = list(zip(items, found, strict=True))
    if any(len(rows) > 1 for rows in items):
        return Scored(
            metric="accuracy",
            per_item=tuple(float(_is_right(rows, logprobs)) for rows, logprobs in pairs),
            tie_break=math.fsum(_reference_logprob(*pair) for pair in pairs) / len(pairs),
        )
    losses = tuple(logprobs[0] / num_targets(rows[0]) for rows, logprobs in pairs)
    return Scored(metric="minus_loss", per_item=losses, tie_break=None)


def _reference_logprob(rows: Sequence[LabelRow], logprobs: Sequence[float]) -> float:
    """Log p(reference | it is one of the labels); the likeliest of several references."""
    top = max(logprobs)
    total = top + math.log(math.fsum(math.exp(value - top) for value in logprobs))
    right = [value for row, value in zip(rows, logprobs, strict=True) if row.is_reference]
    return max(right) - total


def _is_right(rows: Sequence[LabelRow], logprobs: Sequence[float]) -> bool:
    """Whether the likeliest label is the reference; of equal ones the first counts."""
    return rows[max(range(len(rows)), key=logprobs.__getitem__)].is_reference
