"""What the model as trained says of some rows, so that whoever loads it can check it is the same.

A checkpoint may be whole and yet be loaded wrongly: on another base, with another scale of its
adapter, merged in the wrong order. Its hash says nothing about that; these numbers do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from conf.checkpoint_records import ProbeItem
from conf.errors import JobFailed
from conf.records import RenderedExample
from training.data import make_batch
from training.engine import Engine
from training.packing import Layout

PROBE_ROWS = 20


def probe(
    rows: Sequence[RenderedExample], *, engine: Engine, layout: Layout, pad_id: int
) -> tuple[ProbeItem, ...]:
    """Log-probabilities of the targets of the first rows, each row forwarded alone.

    All workers call it with the same rows: under ZeRO-3 each layer is gathered for all of them.
    Nothing is drawn at random, so a training goes on afterwards as if it had not been probed.

    Raises:
        JobFailed: a log-probability that is not finite.
    """
    engine.trainee.loss.eval()
    try:
        return tuple(_probed(row, engine, layout, pad_id) for row in rows[:PROBE_ROWS])
    finally:
        engine.trainee.loss.train()


def _probed(row: RenderedExample, engine: Engine, layout: Layout, pad_id: int) -> ProbeItem:
    batch = make_batch([continued(row)], layout=layout, pad_id=pad_id).to(engine.device)
    return probe_item(row, logprob=-float(engine.evaluate_pass(batch)))


def continued(row: RenderedExample) -> RenderedExample:
    """A row in which all that follows its first target is one continuation of what precedes it."""
    start = row.target_mask.index(1, 1)
    mask = (0,) * start + (1,) * (len(row.input_ids) - start)
    return RenderedExample(item_id=row.item_id, input_ids=row.input_ids, target_mask=mask)


def probe_item(row: RenderedExample, *, logprob: float) -> ProbeItem:
    """What the trained model says of the continuation of a row.

    Raises:
        JobFailed: a log-probability that is not finite.
    """
    start = row.target_mask.index(1, 1)
    if not math.isfinite(logprob):
        raise JobFailed(
            f"the trained model gives item {row.item_id} the log-probability {logprob}; "
            "the checkpoint was not saved. Try a smaller trainer.learning_rate."
        )
    return ProbeItem(
        item_id=row.item_id,
        prompt_ids=row.input_ids[:start],
        target_ids=row.input_ids[start:],
        logprob=logprob,
    )
