"""How good one training is on the validation items of a rung, with all its workers (no packs)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from conf.records import RenderedExample
from conf.trial_records import LabelRow, RungScore
from training.data import num_targets, padded_batch
from training.engine import Engine
from training.item_trees import ItemTrees
from training.job import TrainJob
from training.pack_model import logprob_sums
from training.pack_scores import read_items, score_items

Items = Sequence[Sequence[LabelRow]]


def score_rung(engine: Engine, job: TrainJob, *, rows: Path, rung: int, step: int) -> RungScore:
    """Score the model as it stands, as a pack scores its trials.

    All workers call it, and each forwards all items: under ZeRO-3 each layer is gathered for all of
    them. Nothing is drawn at random, so a training goes on as if it had not been scored.

    Raises:
        DataError: rows that cannot be scored.
        JobFailed: a log-probability that is not finite, on all workers.
    """
    assert job.trial is not None, "rungs are of trials"
    started = time.perf_counter()
    items = read_items(rows)
    layout = engine.trainee.layout
    engine.trainee.loss.eval()
    try:
        if layout.is_packed:
            found, tokens = _by_trees(engine, items, max_tokens=layout.max_tokens)
        else:
            found, tokens = _by_rows(engine, items, max_rows=layout.max_rows, pad_id=job.pad_id)
    finally:
        engine.trainee.loss.train()
    scored = score_items(items, found)
    return RungScore(
        trial=job.trial,
        rung=rung,
        step=step,
        metric=scored.metric,
        per_item=scored.per_item,
        tie_break=scored.tie_break,
        tokens=tokens * job.world_size,
        device_seconds=(time.perf_counter() - started) * job.devices,
    )


def _by_trees(engine: Engine, items: Items, *, max_tokens: int) -> tuple[list[list[float]], int]:
    """Log p(targets) of each row by item, and the tokens that were forwarded."""
    trees = ItemTrees.of(items)
    found: list[list[float]] = []
    for passed in trees.passes(max_tokens=max_tokens):
        batch = trees.batch(passed).to(engine.device)
        losses = engine.evaluate_pass(batch, reduction="none").double()
        each = torch.split(losses, [len(tree.targets) for tree in passed])
        found += [
            logprob_sums(own, tree.row_targets) for own, tree in zip(each, passed, strict=True)
        ]
    return found, trees.num_tokens(max_tokens=max_tokens)


def _by_rows(
    engine: Engine, items: Items, *, max_rows: int, pad_id: int
) -> tuple[list[list[float]], int]:
    """The same where rows cannot lie side by side: padded passes of some rows."""
    rows: list[RenderedExample] = [row for item in items for row in item]
    flat: list[float] = []
    tokens = 0
    for start in range(0, len(rows), max_rows):
        part = rows[start : start + max_rows]
        batch = padded_batch(part, pad_id=pad_id).to(engine.device)
        tokens += batch.input_ids.numel()
        losses = engine.evaluate_pass(batch, reduction="none").double()
        flat += logprob_sums(losses, [num_targets(row) for row in part])
    values = iter(flat)
    return [[next(values) for _ in item] for item in items], tokens
