"""Winner-only search against the argmax over all labels, on random tries with many ties."""

from __future__ import annotations

import random

import pytest

from evaluation.engines.best_first import BestFirst, Step, Winner

Text = tuple[int, ...]


def logprob(seed: int, context: Text, token: int, *, is_tied: bool) -> float:
    """A log-probability that depends on the context alone; tied: of few possible values."""
    source = random.Random(f"{seed} {context} {token}")
    return float(-source.randint(0, 2)) if is_tied else -source.expovariate(1.0)


def search(
    seed: int, labels: list[Text], offsets: list[float] | None, *, is_tied: bool
) -> tuple[Winner, list[Text]]:
    """Run a search; also returns the contexts of the rows that it forwarded."""
    frontier = BestFirst(labels, offsets)
    contexts: list[Text] = []
    here: Text = ()
    wanted = frontier.first_tokens
    while True:
        step = frontier.advance({t: logprob(seed, here, t, is_tied=is_tied) for t in wanted})
        if isinstance(step, Winner):
            return step, contexts
        assert isinstance(step, Step)
        above = contexts[step.parent] if step.parent >= 0 else ()
        here = (*above, step.token)
        contexts.append(here)
        wanted = step.tokens_to_read


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("with_offsets", [False, True])
def test_the_winner_is_the_argmax(is_tied: bool, with_offsets: bool) -> None:
    for seed in range(300):
        source = random.Random(seed)
        labels = [
            tuple(source.randrange(3) for _ in range(source.randint(1, 4)))
            for _ in range(source.randint(1, 12))
        ]
        offsets = [float(source.randint(-2, 2)) for _ in labels] if with_offsets else None
        sums = [
            sum(logprob(seed, label[:k], label[k], is_tied=is_tied) for k in range(len(label)))
            for label in labels
        ]
        values = [a + b for a, b in zip(sums, offsets or [0.0] * len(labels), strict=True)]
        winner, rows = search(seed, labels, offsets, is_tied=is_tied)
        assert winner.label == values.index(max(values)), "the first of equal ones"
        assert winner.logprob == pytest.approx(sums[winner.label])
        inner = {label[:k] for label in labels for k in range(1, len(label))}
        assert len(rows) == len(set(rows))
        assert set(rows) <= inner


def test_only_rows_that_could_lead_to_the_winner_are_forwarded() -> None:
    """A node is forwarded only if its bound is not below the winner's score."""
    for seed in range(200):
        source = random.Random(seed)
        labels = [tuple(source.randrange(5) for _ in range(3)) for _ in range(30)]
        winner, rows = search(seed, labels, None, is_tied=False)
        for row in rows:
            bound = sum(logprob(seed, row[:k], row[k], is_tied=False) for k in range(len(row)))
            assert bound >= winner.logprob


def test_one_label_of_one_token_forwards_nothing() -> None:
    winner, rows = search(0, [(7,)], None, is_tied=False)
    assert winner.label == 0 and rows == []
