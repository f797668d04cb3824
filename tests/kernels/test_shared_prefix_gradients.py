"""Gradients of shared-prefix attention on the CPU path, against one dense softmax in float64."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import shared_prefix_attention_cpu as cpu_path
from kernels.checks import attention_case
from kernels.segments import Segments
from kernels.shared_prefix_attention import shared_prefix_attention
from tests.kernels.brute_force import ends_of, seen_in_forest, trees

NAMES = ("query", "key", "value", "prefix_key", "prefix_value")
shapes = st.fixed_dictionaries(
    {
        "key_heads": st.integers(1, 3),
        "group": st.integers(1, 4),
        "prefix": st.sampled_from([0, 1, 2, 7]),
        "width": st.sampled_from([1, 3, 8, 16]),
        "seed": st.integers(0, 99),
    }
)


def seen_in_chains(lengths):
    starts = [sum(lengths[:s]) for s in range(len(lengths))]
    return [
        [*range(start, start + t + 1)]
        for start, n in zip(starts, lengths, strict=True)
        for t in range(n)
    ]


def leaves(case, dtype):
    return {name: getattr(case, name).to(dtype).clone().requires_grad_() for name in NAMES}


def weights_of(out):
    """What the output is multiplied with before it is summed: the gradient by the output."""
    made = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return made.to(out.dtype)


def truth(case, seen, prefix_from=0, dtype=torch.float64):
    """(output, gradients by name, sizes of their summands): a mask, one softmax, autograd.

    The gradient of a score is weight * (dO.v - dO.o): where a query sees one key it is 0, the
    difference of two numbers that need not be small. The third result is the norm of those
    gradients were all summands of one sign: what rounding is proportional to.
    """
    own = torch.zeros(len(seen), case.key.shape[1], dtype=torch.bool)
    for t, keys in enumerate(seen):
        own[t, keys] = True
    prefix = case.prefix_key.shape[1]
    above = torch.ones(len(seen), prefix, dtype=torch.bool)
    above[:prefix_from] = False
    hidden = ~torch.cat([above, own], dim=1)
    tensors = leaves(case, dtype)
    heads = torch.arange(len(case.query)) // (len(case.query) // len(case.key))
    keys = torch.cat([tensors["prefix_key"], tensors["key"]], dim=1)[heads]
    values = torch.cat([tensors["prefix_value"], tensors["value"]], dim=1)[heads]
    scores = case.scale * tensors["query"] @ keys.transpose(1, 2)
    weights = (
        scores.masked_fill(hidden, torch.finfo(dtype).min).softmax(-1).masked_fill(hidden, 0.0)
    )
    out = weights @ values
    (out * weights_of(out)).sum().backward()
    with torch.no_grad():
        grad = weights_of(out).abs()
        own_term = (grad * out.abs()).sum(-1, keepdim=True)
        terms = case.scale * weights * (grad @ values.abs().transpose(1, 2) + own_term)
        by_key = terms.transpose(1, 2) @ tensors["query"].abs()
        by_value = weights.transpose(1, 2) @ grad
        sums = {
            "query": terms @ keys.abs(),
            "key": by_key[:, prefix:],
            "value": by_value[:, prefix:],
            "prefix_key": by_key[:, :prefix],
            "prefix_value": by_value[:, :prefix],
        }
        sizes = {name: float(total.norm()) for name, total in sums.items()}
    return out.detach(), {name: x.grad for name, x in tensors.items()}, sizes


def found(case, *, impl="cpu", dtype=torch.float32, prefix_from=0):
    tensors = leaves(case, dtype)
    out = shared_prefix_attention(
        **tensors, segments=case.segments, scale=case.scale, prefix_from=prefix_from, impl=impl
    )
    (out * weights_of(out)).sum().backward()
    return out.detach(), {name: x.grad for name, x in tensors.items()}


def errors(got, wanted):
    """By tensor: the distance from the truth over its norm, or over 1 where that is smaller."""
    pairs = {"out": (got[0], wanted[0]), **{n: (got[1][n], wanted[1][n]) for n in NAMES}}
    assert all(a.shape == b.shape for a, b in pairs.values())
    return {
        n: float((a.double() - b).norm() / b.norm().clamp(min=1.0)) for n, (a, b) in pairs.items()
    }


def assert_equal(got, wanted, relative, *, plain=None):
    """Each tensor within `relative` of the truth, or within the rounding of its summands.

    plain: one softmax in the same precision. Where even that is off by more (a peaked softmax, seen
    once in thousands of examples: 1.2e-6), twice its error is allowed. Where a gradient is 0 by
    cancellation (four queries with one key each: 1.3e-6 absolute), four roundings of its summands.
    """
    allowed = {} if plain is None else errors(plain, wanted)
    rounding = torch.finfo(got[0].dtype).eps / 2
    norms = {name: max(1.0, float(grad.norm())) for name, grad in wanted[1].items()}
    for name, error in errors(got, wanted).items():
        summands = 4 * rounding * wanted[2].get(name, 0.0)
        most = max(relative, 2 * allowed.get(name, 0.0), summands / norms.get(name, 1.0))
        assert error <= most, (name, error)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 12), max_size=6), front=st.integers(0, 3), shape=shapes)
def test_any_chains(lengths, front, shape):
    case = attention_case(Segments.chains(lengths), **shape)
    prefix_from = sum(lengths[:front])
    wanted = truth(case, seen_in_chains(lengths), prefix_from)
    for impl in ("cpu", "reference"):
        exact = found(case, impl=impl, dtype=torch.float64, prefix_from=prefix_from)
        assert_equal(exact, wanted, 1e-12)
        got = found(case, impl=impl, prefix_from=prefix_from)
        plain = truth(case, seen_in_chains(lengths), prefix_from, torch.float32)
        assert_equal(got, wanted, 1e-6, plain=plain)


@settings(max_examples=40, deadline=None)
@example(
    forest=[[-1]] * 4, shape={"key_heads": 1, "group": 1, "prefix": 0, "width": 16, "seed": 30}
)
@given(forest=st.lists(trees(), min_size=1, max_size=4), shape=shapes)
def test_any_forest(forest, shape):
    case = attention_case(Segments.trees([ends_of(tree) for tree in forest]), **shape)
    wanted = truth(case, seen_in_forest(forest))
    assert_equal(found(case, dtype=torch.float64), wanted, 1e-12)
    plain = truth(case, seen_in_forest(forest), dtype=torch.float32)
    assert_equal(found(case), wanted, 1e-6, plain=plain)


@settings(max_examples=30, deadline=None)
@given(columns=st.lists(st.integers(-1, 3), min_size=1, max_size=4), shape=shapes)
def test_any_slots(columns, shape):
    """Keys that no query sees get 0, and so does all that a query without keys touches."""
    ends = torch.full((len(columns), 4), 4)
    case = attention_case(Segments.slots(torch.tensor(columns), ends, capacity=4), **shape)
    seen = [[4 * b + c for c in range(now + 1)] for b, now in enumerate(columns)]
    for impl in ("cpu", "reference"):
        got = found(case, impl=impl, dtype=torch.float64)
        assert_equal(got, truth(case, seen), 1e-12)


@pytest.mark.parametrize(
    ("lengths", "prefix"),
    [([20, 60, 55, 50, 44], 33), ([165] * 3, 0), ([300, 290, 100, 30], 150), ([513], 64)],
)
@pytest.mark.parametrize("sharpness", [1, 3])
def test_training_shapes_in_fp32(lengths, prefix, sharpness):
    """SmolLM2's heads; at three times the scores softmax is sharp, and fp32 itself loses more."""
    case = attention_case(Segments.chains(lengths), key_heads=3, group=3, prefix=prefix, width=64)
    case = dataclasses.replace(case, query=case.query * sharpness)
    wanted = truth(case, seen_in_chains(lengths), lengths[0])
    assert_equal(found(case, prefix_from=lengths[0]), wanted, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_lose_their_rounding(dtype):
    lengths = [9, 5, 5, 1]
    case = attention_case(
        Segments.chains(lengths), key_heads=2, group=2, prefix=6, width=32, dtype=dtype
    )
    got = found(case, dtype=dtype, prefix_from=9)
    assert all(x.dtype == dtype for x in got[1].values())
    assert_equal(got, truth(case, seen_in_chains(lengths), 9), 4 * torch.finfo(dtype).eps)


def test_the_prefix_computed_in_the_same_pass():
    """Its rows stand in front as a segment; keys and values get gradients from both uses."""
    lengths, prefix = [5, 4, 1, 3], 5
    made = attention_case(Segments.chains(lengths), key_heads=2, group=3, prefix=0, width=8)
    x = {name: getattr(made, name).double().requires_grad_() for name in NAMES[:3]}
    out = shared_prefix_attention(
        **x,
        prefix_key=x["key"][:, :prefix],
        prefix_value=x["value"][:, :prefix],
        segments=made.segments,
        scale=made.scale,
        prefix_from=prefix,
    )
    (out * weights_of(out)).sum().backward()
    expected = torch.zeros_like(out)
    grads = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    start = prefix
    for number, length in enumerate(lengths[1:]):
        rows = [*range(prefix), *range(start, start + length)]  # a row of its own, whole
        own = {name: tensor.detach()[:, rows].requires_grad_() for name, tensor in x.items()}
        keys, values = (own[n].repeat_interleave(3, 0) for n in ("key", "value"))
        scores = made.scale * own["query"] @ keys.mT
        later = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
        alone = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
        weight = weights_of(out)[:, rows].clone()
        if number:  # the prefix's own output counts once
            weight[:, :prefix] = 0
        (alone * weight).sum().backward()
        expected[:, rows] = alone.detach()
        for name in grads:
            grads[name][:, rows] += own[name].grad
        start += length
    assert (out - expected).abs().max() <= 1e-12
    for name, tensor in x.items():
        assert (tensor.grad - grads[name]).abs().max() <= 1e-12


@pytest.mark.parametrize("lengths", [[4, 4, 4, 4], [4, 9, 2, 1], [4, 40, 3, 60]])
def test_no_segment_changes_another_by_a_bit(lengths):
    """Forward and backward: new keys, values and queries in segment 2 leave the others alone."""
    case = attention_case(Segments.chains(lengths), key_heads=2, group=2, prefix=7, width=16)
    rows = torch.arange(sum(lengths[:2]), sum(lengths[:3]))
    other = {name: getattr(case, name).clone() for name in ("query", "key", "value")}
    for tensor in other.values():
        tensor[:, rows] = 3 * tensor[:, rows] + 1
    before = found(case, prefix_from=lengths[0])
    after = found(dataclasses.replace(case, **other), prefix_from=lengths[0])
    kept = torch.ones(sum(lengths), dtype=torch.bool)
    kept[rows] = False
    assert torch.equal(before[0][:, kept], after[0][:, kept])
    assert not torch.equal(before[0][:, ~kept], after[0][:, ~kept])
    for name in ("query", "key", "value"):
        assert torch.equal(before[1][name][:, kept], after[1][name][:, kept])


def test_only_what_is_needed_is_computed(monkeypatch):
    """Scores formed, forward and backward: prefix x queries, and squares of padded segments."""
    scores = {"_flash": 0, "_flash_backward": 0}

    def counting(name, run, query_at):
        def counted(*args, **kwargs):
            query, key = args[query_at], args[query_at + 1]
            scores[name] += len(query) * query.shape[2] * key.shape[2]
            return run(*args, **kwargs)

        return counted

    for name, query_at in (("_flash", 0), ("_flash_backward", 1)):
        monkeypatch.setattr(cpu_path, name, counting(name, getattr(cpu_path, name), query_at))
    lengths = [130, *[60] * 16, *[200] * 4]
    case = attention_case(Segments.chains(lengths), key_heads=1, group=1, prefix=100, width=4)
    found(case, prefix_from=130)
    needed = sum(n * n for n in lengths) + 100 * sum(lengths[1:])
    assert scores == {"_flash": needed, "_flash_backward": needed}
    assert needed < sum(lengths) ** 2 / 6


def test_nothing_is_t_by_t(largest_allocation):
    lengths = [64] * 32
    case = attention_case(Segments.chains(lengths), key_heads=1, group=2, prefix=64, width=16)

    def step():
        with torch.enable_grad():
            found(case)

    assert largest_allocation(step) <= 2 * case.query.nbytes  # scores of T x T: 64 times as much


def test_gradients_with_odd_strides():
    """A sum sends back one number for all, with strides of 0."""
    case = attention_case(Segments.chains([3, 2]), key_heads=1, group=2, prefix=2, width=4)
    tensors = leaves(case, torch.float64)
    shared_prefix_attention(**tensors, segments=case.segments, scale=1.0).sum().backward()
    again = leaves(case, torch.float64)
    out = shared_prefix_attention(**again, segments=case.segments, scale=1.0, impl="reference")
    out.sum().backward()
    for name in NAMES:
        assert (tensors[name].grad - again[name].grad).abs().max() <= 1e-12


def test_gradients_are_had_once():
    case = attention_case(Segments.chains([3]), key_heads=1, group=1, prefix=2, width=4)
    query = case.query.requires_grad_()
    out = case.run("cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
