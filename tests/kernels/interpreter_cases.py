"""The Triton kernels in Triton's interpreter, run by test_triton_tools.py in a process of its own.

Whether a kernel is interpreted is fixed when @triton.jit sees it, so TRITON_INTERPRET=1 must be in
the environment before anything is imported. To run it by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreter_cases.py
"""

import random

import pytest
import torch
import triton

from kernels.checks import TOLERANCES, attention_case, random_tree
from kernels.segments import Segments
from kernels.shared_prefix_attention_triton import shared_prefix_attention_triton
from kernels.token_logprobs import Head, token_logprobs_reference
from kernels.token_logprobs_triton import token_logprobs_triton

DTYPES = [torch.float32, torch.float16]


def attend(case):
    return shared_prefix_attention_triton(
        case.query,
        case.key,
        case.value,
        case.prefix_key,
        case.prefix_value,
        case.segments,
        case.scale,
    )


def assert_right(case):
    found = attend(case)
    assert found.dtype == case.query.dtype
    worst = (found.float() - case.reference()).abs().max().item()
    assert worst <= TOLERANCES["shared_prefix_attention"](case.query.dtype)


def test_this_process_interprets():
    assert triton.knobs.runtime.interpret


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_attention_in_any_forest(dtype, seed):
    source = random.Random(seed)
    lengths = [source.choice([1, 2, 7, 33, 40]) for _ in range(source.randint(1, 4))]
    assert_right(
        attention_case(
            Segments.trees([random_tree(length, source) for length in lengths]),
            key_heads=source.randint(1, 2),
            group=source.randint(1, 4),
            prefix=source.choice([0, 1, 32, 70]),
            width=source.choice([16, 32, 64]),
            dtype=dtype,
            seed=seed,
        )
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 45])
def test_attention_in_slots(dtype, prefix):
    columns = torch.tensor([5, -1, 0, 33, 12, 7, 8, 39])
    ends = torch.full((8, 40), 40)
    ends[3, 4:9], ends[4] = 0, 3  # hidden rows; a slot that sees none of its own
    segments = Segments.slots(columns, ends, capacity=40)
    assert_right(
        attention_case(segments, key_heads=2, group=3, prefix=prefix, width=16, dtype=dtype)
    )


def test_attention_that_sees_nothing_is_zero():
    segments = Segments.slots(torch.tensor([-1, 2]), torch.full((2, 4), 4), capacity=4)
    out = attend(attention_case(segments, key_heads=1, group=2, prefix=0, width=16))
    assert (out[:, 0] == 0).all()
    assert out[:, 1].abs().min() > 0


def test_attention_with_chunked_queries_and_strides():
    segments = Segments.build(
        [3, 0, 2], columns=[4, 5, 6, 0, 1], ends=[9] * 11, key_starts=[0, 7, 9],
        key_lengths=[7, 2, 2],
    )  # fmt: skip
    case = attention_case(segments, key_heads=2, group=2, prefix=9, width=16)
    case.prefix_key.copy_(case.prefix_key.contiguous())
    assert_right(case)


def test_attention_of_no_queries():
    case = attention_case(Segments.chains([]), key_heads=1, group=2, prefix=3, width=16)
    assert attend(case).shape == (2, 0, 16)


def test_attention_of_another_width_is_refused():
    case = attention_case(Segments.chains([2]), key_heads=1, group=1, prefix=0, width=24)
    with pytest.raises(ValueError, match="d = 24"):
        attend(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "width", "vocabulary", "chunk"),
    [(1, 16, 65, 64), (70, 40, 203, 100), (3, 130, 50, 8192)],
)
@pytest.mark.parametrize("has_extras", [False, True])
def test_log_probabilities(dtype, num_rows, width, vocabulary, chunk, has_extras):
    source = torch.Generator().manual_seed(0)
    weight, hidden = (
        torch.randn(n, width, generator=source).to(dtype) for n in (vocabulary, num_rows)
    )
    bias = torch.randn(vocabulary, generator=source).to(dtype) if has_extras else None
    extras = {"scale": 0.5, "soft_cap": 5.0} if has_extras else {}
    head = Head(weight, bias, impl="reference", chunk=chunk, **extras)
    rows = torch.randint(num_rows, (37,), generator=source)
    tokens = torch.randint(vocabulary, (37,), generator=source)
    found = token_logprobs_triton(hidden, head, rows, tokens)
    expected = token_logprobs_reference(hidden, head, rows, tokens)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max().item() <= 2e-5


def test_log_probabilities_of_nan_rows_and_shut_out_tokens():
    hidden, weight, bias = torch.randn(3, 16), torch.randn(90, 16), torch.zeros(90)
    hidden[1, 0] = torch.nan
    bias[:64] = -torch.inf  # a whole first block
    head = Head(weight, bias, impl="reference", chunk=64)
    rows, tokens = torch.tensor([0, 1, 2, 0]), torch.tensor([70, 70, 80, 3])
    found = token_logprobs_triton(hidden, head, rows, tokens)
    expected = token_logprobs_reference(hidden, head, rows, tokens)
    torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-5, rtol=0)
    assert found.isnan().tolist() == [False, True, False, False]


def test_log_probabilities_out_of_range_are_nan():
    head = Head(torch.randn(20, 16), impl="reference")
    rows, tokens = torch.tensor([0, 2, 1, -1]), torch.tensor([0, 0, 20, 0])
    found = token_logprobs_triton(torch.randn(2, 16), head, rows, tokens)
    assert found.isnan().tolist() == [False, True, True, True]


def test_no_log_probabilities():
    nothing = torch.empty(0, dtype=torch.int64)
    head = Head(torch.randn(20, 16), impl="reference")
    assert token_logprobs_triton(torch.randn(2, 16), head, nothing, nothing).shape == (0,)


def test_bf16_is_refused_because_the_interpreter_multiplies_its_bits():
    case = attention_case(
        Segments.chains([2]), key_heads=1, group=1, prefix=0, width=16, dtype=torch.bfloat16
    )
    with pytest.raises(ValueError, match="bf16 is wrong in Triton's interpreter"):
        attend(case)
    head = Head(torch.randn(20, 16).bfloat16(), impl="reference")
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="bf16 is wrong in Triton's interpreter"):
        token_logprobs_triton(torch.randn(2, 16), head, one, one)
