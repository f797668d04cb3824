"""Trained rows and tokens by source: as the training room takes them, and as by hand."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from conf.groups import TrainerConfig
from conf.records import RenderedExample
from evaluation.prepare import source_rows
from launch.trained_rows import with_trained
from training.schedule import num_steps
from training.sharding import plan_steps


def rows_of(count: int, seed: int) -> list[RenderedExample]:
    source = random.Random(seed)
    lengths = [source.randint(2, 30) for _ in range(count)]
    return [
        RenderedExample(
            item_id=str(i),
            input_ids=tuple(range(n)),
            target_mask=(0,) * (n - 1 - i % 2) + (1,) * (1 + i % 2),
        )
        for i, n in enumerate(lengths)
    ]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    st.integers(1, 8),
    st.sampled_from([0.3, 1.0, 2.0, 2.5]),
    st.sampled_from([None, 1, 4]),
)
def test_counts_equal_the_steps_of_the_training(
    sizes: list[int], batch_size: int, epochs: float, max_steps: int | None
) -> None:
    rows = rows_of(sum(sizes), seed=sum(sizes))
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    sources = [
        source_rows(f"s{i}", kept=rows[a:b], dropped=(), num_items=b - a)
        for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    trainer = TrainerConfig(batch_size=batch_size, epochs=epochs, max_steps=max_steps, seed=3)
    found = with_trained(sources, rows, trainer=trainer)
    steps = plan_steps(
        [len(r.input_ids) for r in rows],
        batch_size=batch_size,
        fits=lambda part: len(part) <= 2,
        world_size=2,
        seed=3,
        total_steps=num_steps(len(rows), trainer=trainer),
    )
    taken = [row for step in steps for share in step.shares for part in share for row in part]
    for i, source in enumerate(found):
        own = [rows[r] for r in taken if bounds[i] <= r < bounds[i + 1]]
        assert source.trained_rows == len(own)
        assert source.trained_tokens == sum(len(r.input_ids) for r in own)
        assert source.trained_target_tokens == sum(sum(r.target_mask) for r in own)


def test_whole_epochs_train_every_row_as_often() -> None:
    rows = rows_of(10, seed=1)
    (found,) = with_trained(
        [source_rows("target", kept=rows, dropped=(), num_items=10)],
        rows,
        trainer=TrainerConfig(batch_size=4, epochs=3),
    )
    assert (found.trained_rows, found.trained_tokens) == (30, 3 * found.tokens)
