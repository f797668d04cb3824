"""Shared-prefix attention: reference and CPU path against loops in float64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.checks import TOLERANCES, AttentionCase, attention_case
from kernels.segments import Segments
from kernels.shared_prefix_attention import shared_prefix_attention
from tests.kernels import brute_force
from tests.kernels.brute_force import ends_of, seen_in_forest, trees

IMPLS = ["reference", "cpu"]
shapes = st.fixed_dictionaries(
    {
        "key_heads": st.integers(1, 3),
        "group": st.integers(1, 4),
        "prefix": st.sampled_from([0, 1, 2, 7]),
        "width": st.sampled_from([1, 3, 8, 16]),
        "seed": st.integers(0, 99),
    }
)


def truth(case: AttentionCase, seen: list[list[int]]) -> torch.Tensor:
    rows = (case.query, case.key, case.value, case.prefix_key, case.prefix_value)
    return brute_force.attention(*rows, seen, case.scale)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    if found.numel():
        assert (found.double() - expected.double()).abs().max().item() <= tolerance


@settings(max_examples=60, deadline=None)
@given(forest=st.lists(trees(), min_size=1, max_size=4), shape=shapes)
def test_any_forest(forest, shape):
    case = attention_case(Segments.trees([ends_of(tree) for tree in forest]), **shape)
    expected = truth(case, seen_in_forest(forest))
    for impl in IMPLS:
        assert_close(case.run(impl), expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), count=st.integers(1, 4), capacity=st.integers(1, 5), shape=shapes)
def test_any_slots(data, count, capacity, shape):
    columns = data.draw(st.lists(st.integers(-1, capacity - 1), min_size=count, max_size=count))
    ends = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.sampled_from([0, capacity]), min_size=capacity, max_size=capacity),
                min_size=count,
                max_size=count,
            )
        )
    )
    case = attention_case(Segments.slots(torch.tensor(columns), ends, capacity=capacity), **shape)
    seen = [
        [b * capacity + c for c in range(now + 1) if ends[b, c] > now]
        for b, now in enumerate(columns)
    ]
    expected = truth(case, seen)
    for impl in IMPLS:
        assert_close(case.run(impl), expected)


@pytest.mark.parametrize("lengths", [[165], [33, 7, 64, 1], [20, 20, 20]])
@pytest.mark.parametrize("is_chain", [True, False])
def test_the_cpu_path_on_long_blocks(lengths, is_chain):
    ends = [[n if is_chain or i % 3 else i + 1 for i in range(n)] for n in lengths]
    case = attention_case(Segments.trees(ends), key_heads=3, group=3, prefix=169, width=64)
    assert case.segments.is_chain == is_chain
    assert_close(case.run("cpu"), case.reference())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", [0, 50])
def test_sixteen_bits_lose_their_rounding_and_no_more(dtype, prefix):
    segments = Segments.trees([[9, 5, 5, 4, 5, 9, 9, 8, 9], [1], [3, 2, 3]])
    case = attention_case(segments, key_heads=2, group=3, prefix=prefix, width=32, dtype=dtype)
    found = case.run("cpu")
    assert found.dtype == dtype
    plain = (case.run("reference").double() - case.reference().double()).abs().max().item()
    assert_close(found, case.reference(), 2 * plain + TOLERANCES["shared_prefix_attention"](dtype))
    assert_close(found, case.reference(), 6 * plain)


def test_labels_of_which_one_begins_another():
    """Each label of a trie (a, ab, abc, ad, b) sees just its own tokens and the prompt."""
    parents = [-1, 0, 1, 2, 1, 0]  # the item's row, a, b, c, d, b
    labels = {1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 1, 4], 5: [0, 5]}
    case = attention_case(
        Segments.trees([ends_of(parents)]), key_heads=2, group=2, prefix=5, width=8
    )
    for last, path in labels.items():
        alone = dataclasses.replace(
            case,
            query=case.query[:, path],
            key=case.key[:, path],
            value=case.value[:, path],
            segments=Segments.chains([len(path)]),
        )
        for impl in IMPLS:
            assert_close(case.run(impl)[:, last], alone.run("reference")[:, -1])


def test_rows_that_see_nothing_are_zero_and_others_unharmed():
    ends = torch.tensor([[4, 4, 4, 4], [0, 0, 0, 4], [4, 4, 4, 4]])
    segments = Segments.slots(torch.tensor([-1, 2, 1]), ends, capacity=4)
    case = attention_case(segments, key_heads=1, group=2, prefix=0, width=4)
    for impl in IMPLS:
        out = case.run(impl)
        assert (out[:, :2] == 0).all()
        assert out[:, 2].abs().min() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_other_items_and_unseen_columns_do_not_matter_to_the_bit(impl):
    segments = Segments.trees([[3, 2, 3], [2, 2], [2, 2]])
    case = attention_case(segments, key_heads=1, group=3, prefix=6, width=8)
    other = case.key.clone()
    other[:, 1] += 5.0  # node 1 of the first tree: seen by itself alone
    other[:, 3:5] -= 3.0  # the second tree
    before, after = case.run(impl), dataclasses.replace(case, key=other).run(impl)
    is_same = (before == after).all(dim=2).all(dim=0)
    assert is_same.tolist() == [True, False, True, False, False, True, True]


def test_keys_of_a_larger_buffer_are_read_where_they_lie():
    segments = Segments.chains([3, 2])
    case = attention_case(segments, key_heads=2, group=2, prefix=7, width=8)
    room = torch.full((2, 50, 8), torch.nan)
    room[:, 10:17] = case.prefix_key
    strided = dataclasses.replace(
        case, prefix_key=room[:, 10:17], key=case.key.contiguous(), query=case.query.contiguous()
    )
    assert_close(strided.run("cpu"), case.run("reference"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("lengths", "prefix"), [([], 0), ([], 3), ([0, 0], 2)], ids=["nothing", "prefix", "empty"]
)
def test_no_queries(impl, lengths, prefix):
    case = attention_case(Segments.chains(lengths), key_heads=1, group=2, prefix=prefix, width=4)
    assert case.run(impl).shape == (2, 0, 4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prefix", [0, 3])
def test_no_own_keys(impl, prefix):
    segments = Segments.build([2], columns=[0, 1], ends=[], key_starts=[0], key_lengths=[0])
    case = attention_case(segments, key_heads=1, group=2, prefix=prefix, width=4)
    assert_close(case.run(impl), truth(case, [[], []]))


def test_large_scores_do_not_overflow():
    case = attention_case(Segments.chains([4]), key_heads=1, group=1, prefix=3, width=4)
    case = dataclasses.replace(case, scale=1e4)
    assert_close(case.run("cpu"), case.run("reference"))
    assert case.run("cpu").isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {"key": torch.zeros(2, 4, 4)},
        {"value": torch.zeros(1, 3, 3)},
        {"query": torch.zeros(3, 3, 4)},
        {"prefix_value": torch.zeros(2, 1, 4)},
        {"query": torch.zeros(4, 3, 8)[:, :, ::2]},
    ],
    ids=["keys", "value", "heads", "prefix", "strides"],
)
def test_shapes_that_do_not_belong_together_are_refused(change):
    case = attention_case(Segments.chains([3]), key_heads=2, group=2, prefix=2, width=4)
    with pytest.raises(ValueError, match="expected|contiguous"):
        dataclasses.replace(case, **change).run("cpu")


def test_the_prefix_is_not_copied(largest_allocation):
    """No block is as large as the prefix's keys: torch's kernel works on 128 KiB of scores."""
    case = attention_case(Segments.chains([4] * 64), key_heads=2, group=3, prefix=8192, width=8)
    assert largest_allocation(lambda: case.run("cpu")) < case.prefix_key.nbytes / 3
    assert largest_allocation(lambda: case.run("reference")) > case.prefix_key.nbytes


def test_slots_are_not_copied(largest_allocation):
    segments = Segments.slots(torch.full((16,), 500), torch.full((16, 1024), 1024), capacity=1024)
    case = attention_case(segments, key_heads=2, group=2, prefix=4, width=16)
    assert largest_allocation(lambda: case.run("cpu")) < case.key.nbytes / 16


def test_auto_is_the_cpu_path_on_a_cpu():
    case = attention_case(Segments.chains([5]), key_heads=1, group=2, prefix=3, width=4)
    assert torch.equal(case.run("auto"), case.run("cpu"))
    with pytest.raises(ValueError, match="kernels.impl=triton"):
        case.run("triton")
    assert shared_prefix_attention.__kwdefaults__["impl"] == "auto"
