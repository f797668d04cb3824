"""Many adapters on one layer against float64 and one layer for each: values, gradients, counts."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import kernels.grouped_lora as module
import kernels.lora_linear as products
from kernels.grouped_lora import Adapter, grouped_lora
from kernels.lora_linear import lora_linear

IMPLS = ["reference", "cpu"]
SCALINGS = (1.5, 0.25, 3.0, 1.0, 2.0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(rows, inputs, outputs, ranks, *, has_bias=False, dtype=torch.float32):
    """x, the frozen weight and bias, the starts, and A and B of each group that has an adapter."""
    starts = [sum(rows[:k]) for k in range(len(rows) + 1)]
    factors = []
    for number, rank in enumerate(ranks):
        if rank:
            factors.append(normal(rank, inputs, seed=10 + number) * inputs**-0.5)
            factors.append(normal(outputs, rank, seed=50 + number) * rank**-0.5)
    weight = normal(outputs, inputs, seed=2) * inputs**-0.5
    bias = normal(outputs, seed=3).to(dtype) if has_bias else None
    leaves = [normal(starts[-1], inputs, seed=1), *factors]
    return [t.to(dtype) for t in leaves], weight.to(dtype), bias, starts


def adapters_of(factors, ranks):
    rest = iter(factors)
    return [
        Adapter(next(rest), next(rest), SCALINGS[number]) if rank else None
        for number, rank in enumerate(ranks)
    ]


def truth(leaves, weight, bias, starts, ranks):
    """The definition in float64: each row by the dense matrix of its own group."""
    x, *factors = leaves
    out = x.new_zeros(len(x), len(weight))
    for (start, end), adapter in zip(pairwise(starts), adapters_of(factors, ranks), strict=True):
        dense = weight if adapter is None else weight + adapter[2] * adapter[1] @ adapter[0]
        rows = torch.zeros(len(x), dtype=torch.bool)
        rows[start:end] = True
        out = torch.where(rows[:, None], x @ dense.mT, out)
    return out if bias is None else out + bias


def values_and_gradients(function, leaves):
    """The output and each leaf's gradient under a weighted sum of it."""
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = function(leaves)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    gradients = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    pairs = zip(gradients, leaves, strict=True)
    return [out.detach(), *(torch.zeros_like(leaf) if g is None else g for g, leaf in pairs)]


def by(impl, weight, bias, starts, ranks):
    return lambda leaves: grouped_lora(
        leaves[0], weight, starts, adapters_of(leaves[1:], ranks), bias, impl=impl
    )


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9))


groups = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 7)), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(
    groups=groups,
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    has_bias=st.booleans(),
    is_onednn=st.booleans(),
)
def test_any_groups(groups, inputs, outputs, has_bias, is_onednn):
    """Groups without rows, without an adapter, of one row, of mixed ranks."""
    rows, ranks = [n for n, _ in groups], [r for _, r in groups]
    leaves, weight, bias, starts = problem(rows, inputs, outputs, ranks, has_bias=has_bias)
    wide = [t.double() for t in leaves]
    wide_bias = None if bias is None else bias.double()
    wanted = values_and_gradients(
        lambda found: truth(found, weight.double(), wide_bias, starts, ranks), wide
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "takes_onednn", lambda: is_onednn)
        for impl in IMPLS:
            found = values_and_gradients(by(impl, weight, bias, starts, ranks), leaves)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "ranks"),
    [
        ((64,) * 8, 576, 1536, (16,) * 8),
        ((1, 700, 33), 576, 192, (4, 0, 64)),
        ((90, 1, 5), 1536, 576, (1, 8, 16)),
    ],
)
def test_within_a_millionth_of_the_truth(rows, inputs, outputs, ranks, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SCALINGS", (1.5, 0.25, 3.0, 1.0, 2.0, 0.5, 1.2, 0.8))
    leaves, weight, bias, starts = problem(rows, inputs, outputs, ranks, has_bias=True)
    wanted = values_and_gradients(
        lambda found: truth(found, weight.double(), bias.double(), starts, ranks),
        [t.double() for t in leaves],
    )
    plain, found = (
        values_and_gradients(by(impl, weight, bias, starts, ranks), leaves) for impl in IMPLS
    )
    for ours, reference, true in zip(found, plain, wanted, strict=True):
        # Where sums cancel, plain torch is off by more: 3.0e-6 for the gradient of a lone row's A.
        assert relative(ours, true) <= max(1e-6, 1.1 * relative(reference, true))


def test_finite_differences_in_float64():
    ranks = (2, 0, 1, 3)
    leaves, weight, bias, starts = problem(
        (3, 2, 0, 1), 4, 5, ranks, has_bias=True, dtype=torch.float64
    )
    leaves = [t.requires_grad_() for t in leaves]
    function = by("auto", weight, bias, starts, ranks)
    assert torch.autograd.gradcheck(lambda *given: function(given), leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_of_nan_stays_by_itself(impl):
    """Bit for bit: a trial that diverged must reach no other trial's output or gradient."""
    rows, ranks = (5, 9, 3), (4, 4, 0)
    leaves, weight, bias, starts = problem(rows, 40, 70, ranks, has_bias=True)
    function = by(impl, weight, bias, starts, ranks)
    plain = values_and_gradients(function, leaves)
    leaves[0][5:14] = math.nan
    leaves[3][:] = math.inf
    found = values_and_gradients(function, leaves)
    assert found[0][5:14].isnan().all() and found[4].isnan().all()
    for a, b in zip(found[:2], plain[:2], strict=True):
        assert torch.equal(a[:5], b[:5]) and torch.equal(a[14:], b[14:])
    assert torch.equal(found[2], plain[2]) and torch.equal(found[3], plain[3])


def test_an_adapter_on_two_groups_gets_the_sum_of_its_gradients():
    (x, a, b), weight, _, _ = problem((4, 3, 6), 10, 7, (3,))

    def twice(given):
        adapter = Adapter(given[1], given[2], 2.0)
        return grouped_lora(given[0], weight, (0, 4, 7, 13), (adapter, None, adapter))

    def whole(given):
        y = lora_linear(given[0], weight, given[1], given[2], 2.0, impl="reference")
        return torch.cat([y[:4], given[0][4:7] @ weight.mT, y[7:]])

    for found, wanted in zip(
        values_and_gradients(twice, [x, a, b]), values_and_gradients(whole, [x, a, b]), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_what_needs_no_gradient_gets_none():
    ranks = (2, 3)
    (x, a, b, c, d), weight, _, starts = problem((4, 5), 6, 9, ranks)
    trained = [a, d]
    for tensor in trained:
        tensor.requires_grad_()
    out = grouped_lora(x, weight, starts, adapters_of((a, b, c, d), ranks))
    out.sum().backward()
    assert all(t.grad is not None for t in trained)
    assert all(t.grad is None for t in (x, b, c, weight))


def added_flop(_, a, b, *, out_shape=None, **kwargs):
    """Operations of addmm_ by shapes; torch counts only its out-of-place form."""
    return 2 * a[0] * a[1] * b[1]


def test_operations_are_one_base_product_and_thin_ones(monkeypatch):
    monkeypatch.setattr(products, "takes_onednn", lambda: False)  # torch counts its own
    rows, ranks = (30, 700, 1, 12), (16, 8, 0, 4)
    leaves, weight, _, starts = problem(rows, 48, 64, ranks)
    mapping = {torch.ops.aten.addmm_: added_flop}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        values_and_gradients(by("cpu", weight, None, starts, ranks), leaves)
    base = 2 * sum(rows) * 48 * 64
    thin = sum(2 * n * r * (48 + 64) for n, r in zip(rows, ranks, strict=True))
    assert counter.get_total_flops() == 2 * base + 3 * thin


def test_the_weight_is_read_once_a_pass(monkeypatch):
    seen = []
    plain = products.linear_reference

    def product(x, weight, bias=None):
        seen.append(tuple(weight.shape))
        return plain(x, weight, bias)

    monkeypatch.setattr(module, "best_product", lambda like: product)
    ranks = (2, 3, 4)
    leaves, weight, _, starts = problem((4, 5, 6), 48, 64, ranks)
    values_and_gradients(by("cpu", weight, None, starts, ranks), leaves)
    assert seen.count((64, 48)) == 1  # forward
    assert seen.count((48, 64)) == 1  # backward, transposed


def test_only_x_and_the_thin_products_are_kept():
    ranks = (4, 0, 2)
    leaves, weight, _, starts = problem((20, 7, 5), 48, 64, ranks)
    leaves = [t.requires_grad_() for t in leaves]
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        by("cpu", weight, None, starts, ranks)(leaves)
    parameters = 64 * 48 + 6 * (48 + 64)
    assert sum(storages.values()) == parameters + 32 * 48 + 20 * 4 + 5 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": (0, 2)}, "ascend from 0 to 3"),
        ({"starts": (0, 2, 1, 3)}, "ascend"),
        ({"starts": (1, 3)}, "ascend"),
        ({"starts": (0, 1, 3)}, "1 adapters of 2 groups"),
        ({"x": torch.zeros(3, 7)}, "x "),
        ({"lora_a": torch.zeros(2, 5)}, "shapes"),
        ({"lora_b": torch.zeros(9, 4)}, "shapes"),
        ({"lora_a": torch.zeros(2, 6).bfloat16()}, "dtypes"),
        ({"weight": torch.zeros(9, 6, requires_grad=True)}, "frozen"),
        ({"bias": torch.zeros(9, requires_grad=True)}, "frozen"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {
        "x": torch.zeros(3, 6),
        "weight": torch.zeros(9, 6),
        "starts": (0, 3),
        "lora_a": torch.zeros(2, 6),
        "lora_b": torch.zeros(9, 2),
        "bias": None,
    } | change
    adapter = Adapter(given["lora_a"], given["lora_b"], 1.0)
    for impl in IMPLS:
        with pytest.raises(ValueError, match=message):
            grouped_lora(
                given["x"], given["weight"], given["starts"], [adapter], given["bias"], impl=impl
            )
    with pytest.raises(ValueError, match="kernels.impl=triton"):
        x = torch.zeros(3, 6)
        grouped_lora(x, torch.zeros(9, 6), (0, 3), [None], impl="triton")
