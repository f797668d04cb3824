"""Sharding of requests against counts by sets: a partition, balanced, small subtrees whole."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.engines.shards import SLACK, shards

# Few token ids and short prompts: nearly all of them share something, and many are equal.
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=40)
SHARDS = st.integers(1, 6)


def rows(prompts: Sequence[Sequence[int]]) -> int:
    """Distinct prefixes of all prompts: what an engine has to compute, counted with a set."""
    return len({tuple(p[: i + 1]) for p in prompts for i in range(len(p))})


def own_cost(prompts: Sequence[Sequence[int]], weights: Sequence[int], group: list[int]) -> int:
    return rows([prompts[i] for i in group]) + sum(weights[i] for i in group)


def seeded_weights(prompts: Sequence[Sequence[int]], seed: int) -> list[int]:
    return [(seed + 7 * i + sum(p)) % 5 for i, p in enumerate(prompts)]


@given(PROMPTS, SHARDS, st.integers(0, 9))
def test_every_request_stands_in_exactly_one_shard(
    prompts: list[list[int]], num: int, seed: int
) -> None:
    groups = shards(prompts, num, seeded_weights(prompts, seed))
    assert sorted(i for group in groups for i in group) == list(range(len(prompts)))
    assert len(groups) <= num
    assert all(groups)
    ordered = [tuple(prompts[i]) for group in groups for i in group]
    assert ordered == sorted(ordered)


@given(PROMPTS.filter(bool), SHARDS, st.integers(0, 9))
def test_no_shard_costs_much_more_than_its_share(
    prompts: list[list[int]], num: int, seed: int
) -> None:
    weights = seeded_weights(prompts, seed)
    num = min(num, len(prompts))
    share = own_cost(prompts, weights, list(range(len(prompts)))) / num
    largest = max(len(p) + w for p, w in zip(prompts, weights, strict=True))
    longest = max(map(len, prompts))
    for group in shards(prompts, num, weights):
        cost = own_cost(prompts, weights, group)
        # A cut is at most a slack or one request off at both ends; its prefix is computed again.
        assert cost <= share + 2 * max(SLACK * share, largest) + longest + 1e-9


@given(PROMPTS.filter(bool), SHARDS, st.integers(0, 9), st.sampled_from([0.1, 0.3, 0.49]))
def test_a_subtree_that_costs_less_than_the_slack_is_never_cut(
    prompts: list[list[int]], num: int, seed: int, slack: float
) -> None:
    weights = seeded_weights(prompts, seed)
    groups = shards(prompts, num, weights, slack=slack)
    everything = list(range(len(prompts)))
    share = own_cost(prompts, weights, everything) / min(num, len(prompts))
    where = {i: number for number, group in enumerate(groups) for i in group}
    for prefix in {tuple(p[: n + 1]) for p in prompts for n in range(len(p))}:
        inside = [i for i in everything if tuple(prompts[i][: len(prefix)]) == prefix]
        before = [i for i in everything if tuple(prompts[i]) < prefix]
        cost = own_cost(prompts, weights, before + inside) - own_cost(prompts, weights, before)
        if cost <= slack * share - 1e-9:
            assert len({where[i] for i in inside}) == 1


def test_a_cut_moves_a_little_to_spare_a_long_prefix() -> None:
    prompts = [[wording] * 5 + [9, i] for i in range(9) for wording in (1, 2)]
    prompts += [[2] * 5 + [9, 9], [2] * 5 + [9, 10]]
    first, second = shards(prompts, 2, [20] * len(prompts))  # the ideal cut lies in wording 2
    assert {prompts[i][0] for i in first} == {1}
    assert {prompts[i][0] for i in second} == {2}
    tightly = shards(prompts, 2, [20] * len(prompts), slack=0)
    assert [len(group) for group in tightly] == [10, 10]


def test_one_prompt_asked_often_is_split_evenly() -> None:
    groups = shards([[5] * 40] * 30, 3, [10] * 30)
    assert [len(group) for group in groups] == pytest.approx([10, 10, 10], abs=4)


def test_nothing_gives_no_shards_and_one_request_one() -> None:
    assert shards([], 4) == []
    assert shards([[1, 2]], 4) == [[0]]


def test_a_request_larger_than_a_share_stands_alone() -> None:
    groups = shards([[1] * 100, [2], [3], [4]], 4)
    assert [0] in groups
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3]
