"""The rule of which keys a query sees, against walking up the tree."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.segments import HIDDEN, PADDED_PART, PADDED_SCORES, Segments
from kernels.shared_prefix_attention import dense_visible
from tests.kernels.brute_force import ends_of, seen_in_forest, trees


def seen_by_mask(segments: Segments) -> list[list[int]]:
    """For each query the keys it sees, read from the padded mask."""
    mask = segments.mask[:, 0]
    flat = mask.flatten(0, 1)[segments.query_padding.back]
    keys = segments.key_padding.index[segments.segment_of]
    return [keys[t][flat[t] == 0].tolist() for t in range(len(flat))]


def seen_by_dense(segments: Segments) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in dense_visible(segments)]


@settings(max_examples=80, deadline=None)
@given(forest=st.lists(trees(), min_size=1, max_size=5))
def test_a_query_sees_its_ancestors(forest):
    segments = Segments.trees([ends_of(tree) for tree in forest])
    expected = [sorted(keys) for keys in seen_in_forest(forest)]
    assert seen_by_mask(segments) == expected
    assert seen_by_dense(segments) == expected
    assert segments.sees_own.all()
    is_chain = all(tree == list(range(-1, len(tree) - 1)) for tree in forest)
    assert segments.is_chain == is_chain


@settings(max_examples=80, deadline=None)
@given(data=st.data(), count=st.integers(1, 5), capacity=st.integers(1, 6))
def test_a_slot_sees_its_filled_columns_that_have_not_ended(data, count, capacity):
    columns = data.draw(st.lists(st.integers(-1, capacity - 1), min_size=count, max_size=count))
    size = count * capacity
    ends = data.draw(st.lists(st.integers(0, capacity), min_size=size, max_size=size))
    table = torch.tensor(ends, dtype=torch.int32).reshape(count, capacity)
    segments = Segments.slots(torch.tensor(columns), table, capacity=capacity)
    expected = [
        [b * capacity + c for c in range(now + 1) if ends[b * capacity + c] > now]
        for b, now in enumerate(columns)
    ]
    assert seen_by_dense(segments) == expected
    assert seen_by_mask(segments) == expected
    assert segments.sees_own.tolist() == [bool(keys) for keys in expected]


def test_chains_see_all_rows_before_them():
    segments = Segments.chains([2, 1, 3])
    assert seen_by_dense(segments) == [[0], [0, 1], [2], [3], [3, 4], [3, 4, 5]]
    assert segments.is_chain


def test_queries_may_be_the_last_rows_of_longer_segments():
    segments = Segments.build(
        [1, 0, 2], columns=[2, 0, 1], ends=[9, 9, 0, 9, 9, 9], key_starts=[0, 0, 4],
        key_lengths=[4, 0, 2],
    )  # fmt: skip
    assert seen_by_dense(segments) == [[0, 1], [4], [4, 5]]
    assert seen_by_mask(segments) == seen_by_dense(segments)
    assert not segments.is_chain
    assert (segments.longest_query, segments.longest_key, segments.num_segments) == (2, 4, 3)


def test_a_column_beyond_the_keys_sees_what_there_is():
    segments = Segments.build(
        [1, 1], columns=[5, 2], ends=[9] * 5, key_starts=[0, 2], key_lengths=[2, 3]
    )
    assert seen_by_dense(segments) == [[0, 1], [2, 3, 4]]
    assert segments.visible.sum(dim=(1, 2)).tolist() == [2, 3]


def test_a_chain_with_a_hidden_key_is_no_chain():
    assert Segments.trees([[3, 3, 3]]).is_chain
    assert not Segments.trees([[3, 2, 3]]).is_chain
    assert not Segments.build(
        [2], columns=[0, 0], ends=[2, 2], key_starts=[0], key_lengths=[2]
    ).is_chain


def test_equal_lengths_are_a_view_and_others_are_not():
    assert Segments.chains([4, 4, 4]).query_padding.stride == 4
    assert Segments.chains([4]).key_padding.stride == 4
    assert Segments.chains([4, 3]).key_padding.stride is None
    assert Segments.chains([3, 4]).key_padding.stride is None
    ends = torch.full((3, 8), 8)
    slots = Segments.slots(torch.tensor([1, 2, -1]), ends, capacity=8)
    assert (slots.key_padding.stride, slots.longest_key) == (8, 3)


def test_what_a_pass_needs_is_made_once():
    segments = Segments.trees([[3, 2, 3]])
    assert segments.mask is segments.mask
    assert segments.mask.unique().tolist() == [torch.tensor(HIDDEN).item(), 0.0]


def test_nothing_at_all():
    segments = Segments.trees([])
    assert (segments.num_segments, segments.longest_query, segments.longest_key) == (0, 0, 0)
    assert segments.segment_of.tolist() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_lengths": [2, 2]}, "sum 4"),
        ({"columns": [0]}, "1 columns"),
        ({"key_starts": [0, 1, 2], "key_lengths": [1, 1, 1]}, "3 key starts"),
        ({"key_lengths": [1, 3]}, "only 3 ends"),
        ({"key_starts": [-1, 1]}, "negative"),
        ({"query_lengths": [3, -1], "columns": [0, 0]}, "negative"),
    ],
)
def test_lengths_that_do_not_add_up_are_refused(change, message):
    good = {
        "query_lengths": [1, 2], "columns": [0, 0, 1], "ends": [1, 2, 2],
        "key_starts": [0, 1], "key_lengths": [1, 2],
    }  # fmt: skip
    Segments.build(**good)
    with pytest.raises(ValueError, match=message):
        Segments.build(**(good | change))


def test_slots_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        Segments.slots(torch.zeros(2), torch.zeros(2, 3), capacity=4)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), max_size=20), is_chain=st.booleans(), seed=st.integers()
)
def test_runs_are_all_rows_in_order_and_pad_little(lengths, is_chain, seed):
    draw = random.Random(seed)
    trees = [[n if is_chain else draw.randint(row + 1, n) for row in range(n)] for n in lengths]
    segments = Segments.trees(trees)
    runs, start, num_segments = segments.runs, 0, 0
    for run in runs:
        assert run.rows == run.keys and run.rows.start == start
        start = run.rows.stop
        own = run.segments.key_lengths.tolist()
        assert sum(own) == run.rows.stop - run.rows.start
        padded = len(own) * max(own, default=0) - sum(own)
        assert padded <= PADDED_PART * sum(own) or padded * max(own) <= PADDED_SCORES
        which = slice(num_segments, num_segments + len(own))
        longest = run.segments.longest_key
        assert torch.equal(run.segments.visible, segments.visible[which, :longest, :longest])
        num_segments = which.stop
    assert start == sum(lengths)
    assert [n for run in runs for n in run.segments.key_lengths.tolist()] == lengths
    assert len(Segments.chains(sorted(lengths)).runs) <= 12


def test_equal_lengths_are_one_run_and_slots_always_are():
    assert len(Segments.chains([300] * 50).runs) == 1
    assert len(Segments.chains([300] * 3 + [30] * 3 + [300]).runs) == 3
    tree = [n if n % 2 else 90 for n in range(1, 91)]
    assert len(Segments.trees([[2, 1], tree]).runs) == 2
    slots = Segments.slots(torch.tensor([0, 89]), torch.full((2, 90), 90), capacity=90)
    assert len(slots.runs) == 1
