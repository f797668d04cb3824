"""The Triton kernels in Triton's interpreter, run by test_triton_tools.py in a process of its own.

Whether a kernel is interpreted is fixed when @triton.jit sees it, so TRITON_INTERPRET=1 must be in
the environment before anything is imported. To run it by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreter_cases.py
"""

import random

import pytest
import torch
import triton

import kernels.linear_cross_entropy_triton as cross_entropy
from kernels.checks import TOLERANCES, attention_case, random_tree
from kernels.grouped_lora import Adapter, grouped_lora_reference
from kernels.grouped_lora_triton import grouped_lora_triton
from kernels.linear_cross_entropy import Shaping, apply, linear_cross_entropy_reference
from kernels.linear_cross_entropy_triton import linear_cross_entropy_triton
from kernels.lora_linear import lora_linear_reference
from kernels.lora_linear_triton import lora_linear_triton
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


def with_gradients(function, tensors, frozen=()):
    """The result of a function and the gradients of what is not frozen."""
    leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    out = function(*leaves)
    ramp = torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape).to(out.dtype)
    (out * ramp).sum().backward()
    return [out.detach(), *(leaf.grad for i, leaf in enumerate(leaves) if i not in frozen)]


def assert_near(found, wanted, eps):
    """Each within eps of the fp32 truth, relative to its norm."""
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert (a.float() - b.float()).norm() <= eps * b.float().norm().clamp(min=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "width", "vocabulary", "block"),
    [(1, 16, 65, 64), (7, 40, 203, 64), (5, 9, 33, 64)],
)
@pytest.mark.parametrize(
    "shaping", [Shaping(), Shaping(label_smoothing=0.2, soft_cap=3.0, scale=0.5)]
)
@pytest.mark.parametrize("frozen", [(), (1,)])
def test_cross_entropy(dtype, num_rows, width, vocabulary, block, shaping, frozen, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK", block)
    monkeypatch.setattr(cross_entropy, "TILE_BYTES", 4 * vocabulary * 3)  # 3 rows at a time
    source = torch.Generator().manual_seed(0)
    shapes = ((num_rows, width), (vocabulary, width), (vocabulary,))
    tensors = [torch.randn(*shape, generator=source).to(dtype) for shape in shapes]
    targets = torch.randint(vocabulary, (num_rows,), generator=source)

    def ours(h, w, b):
        return apply(linear_cross_entropy_triton, h, w, targets, b, shaping)

    def plain(h, w, b):
        return linear_cross_entropy_reference(h, w, targets, b, shaping)

    found = with_gradients(ours, tensors, frozen)
    wanted = with_gradients(plain, [t.float() for t in tensors], frozen)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    assert_near(found, wanted, 2e-6 if dtype == torch.float32 else 2e-3)
    with torch.no_grad():
        assert ours(*tensors) == found[0]


def test_cross_entropy_of_no_rows_nan_and_targets_out_of_range():
    hidden, weight = torch.randn(3, 16), torch.randn(20, 16)

    def loss(rows, targets):
        return apply(linear_cross_entropy_triton, rows, weight, targets, None, Shaping())

    assert loss(hidden[:0], torch.empty(0, dtype=torch.int64)) == 0
    assert loss(hidden, torch.tensor([0, 1, 19])).isfinite()
    for wrong in (-1, 20):
        assert loss(hidden, torch.tensor([0, wrong, 1])).isnan()
    hidden[1, 3] = torch.nan
    assert loss(hidden, torch.tensor([0, 1, 19])).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "inputs", "outputs", "lora_rank"),
    [(1, 16, 65, 1), (70, 40, 33, 5), (9, 130, 70, 20)],
)
@pytest.mark.parametrize("frozen", [(1,), ()])
def test_lora_linear(dtype, num_rows, inputs, outputs, lora_rank, frozen):
    source = torch.Generator().manual_seed(0)
    shapes = ((2, num_rows, inputs), (outputs, inputs), (lora_rank, inputs), (outputs, lora_rank))
    tensors = [torch.randn(*s, generator=source) * s[-1] ** -0.5 for s in (*shapes, (outputs,))]
    tensors = [t.to(dtype) for t in tensors]

    def ours(x, w, a, b, bias):
        return lora_linear_triton(x, w, a, b, 1.5, bias)

    def plain(x, w, a, b, bias):
        return lora_linear_reference(x, w, a, b, 1.5, bias)

    found = with_gradients(ours, tensors, frozen)
    wanted = with_gradients(plain, [t.float() for t in tensors], frozen)
    assert all(t.dtype == dtype for t in found)
    # dy B is a row's one number where r = 1, and rounded before all else
    assert_near(found, wanted, 2e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "starts",
    [
        (0, 1, 1, 2),  # one row, none, one row without an adapter
        (0, 70, 71, 80),  # a group of more than one tile
        (0, 3, 60, 60),
    ],
)
@pytest.mark.parametrize(
    ("inputs", "outputs", "ranks"), [(16, 65, (1, 5, None)), (70, 33, (20, 3, 16))]
)
def test_grouped_lora(dtype, starts, inputs, outputs, ranks):
    source = torch.Generator().manual_seed(0)
    shapes = [(starts[-1], inputs)]
    for r in ranks:
        shapes += [] if r is None else [(r, inputs), (outputs, r)]
    tensors = [torch.randn(*s, generator=source) * s[-1] ** -0.5 for s in shapes]
    weight, bias = torch.randn(outputs, inputs, generator=source) * 0.2, torch.ones(outputs)

    def by(function, dtype):
        def layer(x, *factors):
            rest = iter(factors)
            adapters = [
                None if r is None else Adapter(next(rest), next(rest), 0.5 + number)
                for number, r in enumerate(ranks)
            ]
            return function(x, weight.to(dtype), starts, adapters, bias.to(dtype))

        return layer

    tensors = [t.to(dtype) for t in tensors]
    found = with_gradients(by(grouped_lora_triton, dtype), tensors, ())
    wanted = with_gradients(
        by(grouped_lora_reference, torch.float32), [t.float() for t in tensors], ()
    )
    assert all(t.dtype == dtype for t in found)
    assert_near(found, wanted, 2e-6 if dtype == torch.float32 else 8e-3)


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
    for run in (
        lambda x: apply(linear_cross_entropy_triton, x, x, one, None, Shaping()),
        lambda x: lora_linear_triton(x, x, x, x, 1.0),
        lambda x: grouped_lora_triton(x, x, (0, 1), [Adapter(x, x, 1.0)]),
    ):
        with pytest.raises(ValueError, match="bf16 is wrong in Triton's interpreter"):
            run(torch.randn(1, 1).bfloat16())
