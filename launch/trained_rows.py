"""What a training takes of each source of its rows: counted from the order, before it starts."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from conf.groups import TrainerConfig
from conf.records import RenderedExample, SourceRows, TrainingData, from_dict
from evaluation.prepare import read_rows
from training.schedule import num_steps
from training.sharding import global_batches


def training_data(arm: str, directory: Path, *, trainer: TrainerConfig) -> TrainingData:
    """The counts of a finished rows job, with what the training will take of its rows.

    directory: of the rows job, with rows.jsonl and sources.json, in whose order the rows stand.
    """
    sources = [
        from_dict(SourceRows, found)
        for found in json.loads((directory / "sources.json").read_text(encoding="utf-8"))
    ]
    rows = read_rows(directory / "rows.jsonl")
    return TrainingData(arm=arm, sources=with_trained(sources, rows, trainer=trainer))


def with_trained(
    sources: Sequence[SourceRows], rows: Sequence[RenderedExample], *, trainer: TrainerConfig
) -> tuple[SourceRows, ...]:
    """The sources with trained_*: sums over the rows of all optimizer steps."""
    times = [0] * len(rows)
    batches = global_batches(
        len(rows),
        batch_size=trainer.batch_size,
        seed=trainer.seed,
        total_steps=num_steps(len(rows), trainer=trainer),
    )
    for row in itertools.chain.from_iterable(batches):
        times[row] += 1
    found, begun = [], 0
    for source in sources:
        own = range(begun, begun + source.num_rows)
        begun += source.num_rows
        found.append(
            dataclasses.replace(
                source,
                trained_rows=sum(times[i] for i in own),
                trained_tokens=sum(times[i] * len(rows[i].input_ids) for i in own),
                trained_target_tokens=sum(times[i] * sum(rows[i].target_mask) for i in own),
            )
        )
    assert begun == len(rows), "every row has a source"
    return tuple(found)
