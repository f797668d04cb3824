"""oneDNN's linear product against torch's in float64: values, gradients, models."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kernels.linear as module
from kernels.linear import Linear, Packed, choose_linear, linear, linear_reference, swap_linear


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected.double(), atol=2e-5, rtol=1e-5)


def gradients(product, tensors):
    """The product of fresh leaves, and their gradients under a weighted sum of the output."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = product(*leaves)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)).sum().backward()
    return [out, *(leaf.grad for leaf in leaves if leaf is not None)]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(st.integers(1, 5), min_size=0, max_size=2),
    rows=st.integers(1, 17),
    wide=st.integers(1, 33),
    out=st.integers(1, 19),
    has_bias=st.booleans(),
)
def test_values_and_gradients_equal_float64(batch, rows, wide, out, has_bias):
    tensors = [normal(*batch, rows, wide), normal(out, wide, seed=1)]
    tensors.append(normal(out, seed=2) if has_bias else None)
    doubles = [None if t is None else t.double() for t in tensors]
    expected = gradients(linear_reference, doubles)
    for found, wanted in zip(gradients(linear, tensors), expected, strict=True):
        assert_close(found, wanted)
    assert_close(Packed(*tensors[1:])(tensors[0]), expected[0])


def test_float64_is_checked_by_finite_differences_of_the_reference():
    """The backward of the reference itself, so that the test above has a truth."""
    leaves = [t.double().requires_grad_() for t in (normal(3, 4), normal(2, 4), normal(2))]
    assert torch.autograd.gradcheck(linear_reference, leaves)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_a_frozen_argument_gets_no_gradient(frozen):
    tensors = [normal(3, 4), normal(2, 4, seed=1), normal(2, seed=2)]
    leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    linear(*leaves).sum().backward()
    full = [t.clone().requires_grad_() for t in tensors]
    linear_reference(*full).sum().backward()
    for i, leaf in enumerate(leaves):
        if i in frozen:
            assert leaf.grad is None
        else:
            assert_close(leaf.grad, full[i].grad)


def test_inputs_that_are_not_contiguous():
    x, weight = normal(6, 5).t(), normal(7, 6)
    assert not x.is_contiguous()
    assert_close(linear(x, weight), x.double() @ weight.double().t())
    assert_close(
        linear(x[:, ::2], weight[:, ::2]), x[:, ::2].double() @ weight[:, ::2].double().t()
    )
    turned = [normal(6, 5), normal(6, 7)]
    found = gradients(lambda a, b: linear(a.t(), b.t()), turned)
    wanted = gradients(lambda a, b: linear_reference(a.t(), b.t()), turned)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b)
    assert_close(Packed(weight)(x), x.double() @ weight.double().t())


def test_an_expanded_gradient():
    """`sum` hands back a gradient whose strides are 0."""
    x = normal(4, 3).requires_grad_()
    linear(x, normal(2, 3)).sum().backward()
    assert_close(x.grad, normal(2, 3).sum(0).expand(4, 3))


def test_no_rows():
    assert linear(torch.empty(0, 3), normal(2, 3)).shape == (0, 2)
    assert linear(torch.empty(2, 0, 3), normal(2, 3)).shape == (2, 0, 2)


def test_packed_does_not_see_a_later_change():
    weight, bias, x = normal(4, 3), normal(4), normal(2, 3)
    packed = Packed(weight, bias)
    before = packed(x)
    weight.zero_()
    bias.zero_()
    assert torch.equal(packed(x), before)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("is_packed", [True, False])
def test_swapped_models_keep_their_parameters_and_answers(is_packed):
    inner = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3, bias=False))
    model = nn.ModuleDict({"a": inner, "b": Doubled(3, 3), "c": nn.Linear(3, 3).bfloat16()})
    before, x = copy.deepcopy(model.state_dict()), normal(4, 5)
    expected = inner.double()(x.double())
    inner.float()
    assert swap_linear(model, is_packed=is_packed) == 2
    assert type(model["b"]) is Doubled and type(model["c"]) is nn.Linear
    assert isinstance(inner[0], Linear)
    assert_close(inner(x), expected)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert swap_linear(model, is_packed=is_packed) == 0


def test_a_swapped_model_trains_as_before():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    swapped = copy.deepcopy(plain)
    swap_linear(swapped, is_packed=False)
    for model in (plain, swapped):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(10):
            optimizer.zero_grad()
            model(normal(8, 5, seed=step)).pow(2).mean().backward()
            optimizer.step()
    for a, b in zip(plain.parameters(), swapped.parameters(), strict=True):
        assert_close(b, a)


def test_the_choice_comes_with_what_was_measured():
    choose_linear.cache_clear()
    is_better, reason = choose_linear()
    assert isinstance(is_better, bool)
    assert "GFLOP/s" in reason or "wrong by" in reason or "no such product" in reason
    assert choose_linear() is choose_linear()


@pytest.mark.parametrize(
    ("product", "message"),
    [
        (lambda x, w: x @ w.t() + 1.0, "wrong by"),
        (lambda x, w: x @ w.t() * float("nan"), "wrong by"),
    ],
)
def test_a_wrong_product_is_not_chosen(monkeypatch, product, message):
    monkeypatch.setattr(module, "_product", product)
    choose_linear.cache_clear()
    is_better, reason = choose_linear()
    choose_linear.cache_clear()
    assert not is_better
    assert message in reason


def test_a_torch_without_the_product_is_not_chosen(monkeypatch):
    def missing(x, w):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute\nmore")

    monkeypatch.setattr(module, "_product", missing)
    choose_linear.cache_clear()
    is_better, reason = choose_linear()
    choose_linear.cache_clear()
    assert not is_better
    assert reason.startswith("this torch has no such product")
    assert "\n" not in reason


def test_a_slower_product_is_not_chosen(monkeypatch):
    for other, is_chosen in ((0.95, False), (0.5, True)):  # less than a tenth is not enough
        monkeypatch.setattr(module, "_fastest", lambda *runs, other=other: [1.0, other])
        choose_linear.cache_clear()
        assert choose_linear()[0] is is_chosen
    choose_linear.cache_clear()


def test_products_are_timed_in_turns_on_one_thread(monkeypatch):
    seen = []
    before = torch.get_num_threads()
    seconds = {"a": iter([9.0] * 5 + [2.0] * 7), "b": iter([8.0] + [1.0] * 11)}
    clock = [100.0]
    monkeypatch.setattr(module.time, "thread_time", lambda: clock[0])

    def run(name):
        seen.append((name, torch.get_num_threads()))
        clock[0] += next(seconds[name])

    assert module._fastest(lambda: run("a"), lambda: run("b")) == [2.0, 1.0]
    assert seen == [("a", 1), ("b", 1)] * module.REPEATS
    assert torch.get_num_threads() == before
