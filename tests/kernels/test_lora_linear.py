"""The LoRA layer against float64 and peft: values, gradients, operations counted, tensors kept."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kernels.lora_linear as module
from kernels.lora_linear import lora_linear

IMPLS = ["reference", "cpu"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(rows, inputs, outputs, rank, *, has_bias=False, dtype=torch.float32):
    """The tensors x, W, A, B and bias, so that both parts have about unit variance."""
    bias = normal(outputs, seed=5) if has_bias else None
    tensors = [
        normal(*rows, inputs, seed=1),
        normal(outputs, inputs, seed=2) * inputs**-0.5,
        normal(rank, inputs, seed=3) * inputs**-0.5,
        normal(outputs, rank, seed=4) * rank**-0.5,
        bias,
    ]
    return [None if t is None else t.to(dtype) for t in tensors]


def values_and_gradients(function, tensors, *, frozen=()):
    """The output and the leaves' gradients (None of the frozen) under a weighted sum of it."""
    leaves = [
        None if t is None else t.detach().clone().requires_grad_(i not in frozen)
        for i, t in enumerate(tensors)
    ]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    (out * weights).sum().backward()
    return [out.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def truth(x, w, a, b, bias):
    """The definition in float64 by one dense matrix, scaling 1.5."""
    y = torch.einsum("...k,mk->...m", x, w + 1.5 * torch.einsum("mr,rk->mk", b, a))
    return y if bias is None else y + bias


def by(impl):
    return lambda x, w, a, b, bias: lora_linear(x, w, a, b, 1.5, bias, impl=impl)


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    inputs=st.integers(1, 20),
    outputs=st.integers(1, 20),
    rank=st.integers(1, 9),
    has_bias=st.booleans(),
    is_onednn=st.booleans(),
)
def test_any_shape(rows, inputs, outputs, rank, has_bias, is_onednn):
    tensors = problem(rows, inputs, outputs, rank, has_bias=has_bias)
    wanted = values_and_gradients(truth, [None if t is None else t.double() for t in tensors])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "takes_onednn", lambda: is_onednn)
        for impl in IMPLS:
            found = values_and_gradients(by(impl), tensors)
            for a, b in zip(found, wanted, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(512, 576, 1536, 16), (1700, 576, 192, 16), (90, 1536, 576, 8)])
def test_gradients_are_within_a_millionth_of_the_truth(shape):
    rows, *rest = shape
    tensors = problem([rows], *rest)
    wanted = values_and_gradients(
        truth, [None if t is None else t.double() for t in tensors], frozen=(1,)
    )
    found = values_and_gradients(by("cpu"), tensors, frozen=(1,))
    errors = [relative(a, b) for a, b in zip(found, wanted, strict=True) if a is not None]
    assert len(errors) == 4 and max(errors) <= 1e-6


@pytest.mark.parametrize("rows", [3, 40])
def test_finite_differences_in_float64(rows):
    tensors = [
        t.requires_grad_() for t in problem([rows], 4, 5, 2, has_bias=True, dtype=torch.float64)
    ]
    assert torch.autograd.gradcheck(lambda x, w, a, b, c: lora_linear(x, w, a, b, 0.7, c), tensors)


@pytest.mark.parametrize("rows", [2, 50])
@pytest.mark.parametrize("frozen", [(1,), (0, 1), (1, 2), (1, 3), (0, 1, 2), (2, 3, 4), (0, 1, 4)])
def test_what_is_frozen_gets_no_gradient(rows, frozen):
    tensors = problem([rows], 6, 9, 3, has_bias=True)
    wanted = values_and_gradients(by("reference"), tensors)
    found = values_and_gradients(by("cpu"), tensors, frozen=frozen)
    for i, gradient in enumerate(found[1:]):
        assert (gradient is None) == (i in frozen)
        if gradient is not None:
            torch.testing.assert_close(gradient, wanted[1 + i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 90])
def test_sixteen_bits_are_never_merged(dtype, rows, monkeypatch):
    monkeypatch.setattr(module, "merged", None)  # would raise
    tensors = problem([rows], 40, 30, 4, has_bias=True, dtype=dtype)
    wanted = values_and_gradients(truth, [t.double() for t in tensors], frozen=(1,))
    plain = values_and_gradients(by("reference"), tensors, frozen=(1,))
    found = values_and_gradients(by("cpu"), tensors, frozen=(1,))
    for a, b, c in zip(found, plain, wanted, strict=True):
        if a is not None:
            assert a.dtype == dtype
            assert relative(a, c) <= 1.1 * relative(b, c) + torch.finfo(dtype).eps / 4


def peft_layer(inputs, outputs, rank):
    """The layer of peft with a frozen base, B not zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank)
    layer = PeftLinear(nn.Linear(inputs, outputs), "default", config, r=rank, lora_alpha=2 * rank)
    layer.base_layer.requires_grad_(False)
    nn.init.uniform_(layer.lora_B["default"].weight, 0.5, 1.5)  # no sums that cancel
    return layer


def as_ours(layer):
    def forward(x):
        base = layer.base_layer
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return lora_linear(x, base.weight, a, b, layer.scaling["default"], base.bias)

    return forward


def added_flop(_, a, b, *, out_shape=None, **kwargs):
    """Operations of addmm_ by shapes; torch counts only its out-of-place form."""
    return 2 * a[0] * a[1] * b[1]


IN_PLACE = {torch.ops.aten.addmm_: added_flop}
SHAPES = [  # rows from far below to far above where merging pays
    (rows, inputs, outputs, rank)
    for rows in (1, 64, 192, 193, 577, 2048)
    for inputs, outputs in ((576, 576), (576, 192), (192, 576))
    for rank in (1, 16)
]


@pytest.mark.parametrize(("rows", "inputs", "outputs", "rank"), SHAPES)
def test_never_more_operations_than_peft(rows, inputs, outputs, rank, monkeypatch):
    monkeypatch.setattr(module, "takes_onednn", lambda: False)  # torch counts its own
    layer = peft_layer(inputs, outputs, rank)
    counts, gradients = [], []
    for forward in (layer, as_ours(layer)):
        layer.zero_grad()
        x = normal(rows, inputs).requires_grad_()
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            forward(x).sum().backward()
        counts.append(counter.get_total_flops())
        gradients.append([x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    theirs, ours = counts
    base = 2 * rows * inputs * outputs
    thin = 2 * rows * rank * (inputs + outputs)
    assert theirs == 2 * base + 3 * thin
    saved = 2 * rank * outputs * max(0, rows - inputs) + 2 * rank * inputs * max(0, rows - outputs)
    assert ours == theirs - saved
    for a, b in zip(*gradients, strict=True):
        assert relative(b, a) <= 1e-5


def kept_numbers(run):
    """Numbers that are kept for backward, each storage once; and the output."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(storages.values()), out


@pytest.mark.parametrize("rows", [20, 100])
def test_only_x_and_a_thin_product_are_kept(rows):
    layer = peft_layer(48, 64, 4)
    x = normal(rows, 48).requires_grad_()
    parameters = 64 * 48 + 4 * 48 + 64 * 4
    ours, _ = kept_numbers(lambda: as_ours(layer)(x))
    assert ours == parameters + rows * 48 + (0 if rows > 48 else rows * 4)
    theirs, _ = kept_numbers(lambda: layer(x))
    assert ours <= theirs


def test_forward_makes_one_tensor_of_the_outputs_size():
    """peft makes four: the base's product, B's, the scaled one, and the sum."""
    layer = peft_layer(8, 5000, 2)
    x = normal(1, 8)  # 1 row: unmerged
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() == 5000:
                made.append(out.untyped_storage().data_ptr())
            return out

    for forward, count in ((as_ours(layer), 1), (layer, 4)):
        made.clear()
        with torch.no_grad(), Watch():
            kept = forward(x)  # held, so that no address is given out twice
        assert kept.shape == (1, 5000)
        assert len(made) >= count
        assert (len(set(made)) == 1) == (count == 1)


def test_views_and_expanded_gradients():
    x, w, a, b, _ = problem([30], 6, 9, 3)
    x = x.t().contiguous().t().requires_grad_()
    assert not x.is_contiguous()
    lora_linear(x, w, a, b, 1.5).sum().backward()  # a gradient whose strides are 0
    other = copy.deepcopy(x.detach()).requires_grad_()
    lora_linear(other, w, a, b, 1.5, impl="reference").sum().backward()
    torch.testing.assert_close(x.grad, other.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 7)}, "shapes"),
        ({2: torch.zeros(3, 5)}, "shapes"),
        ({3: torch.zeros(9, 4)}, "shapes"),
        ({2: torch.zeros(3, 6).bfloat16()}, "dtypes"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    tensors = problem([2], 6, 9, 3)[:4]
    for place, tensor in change.items():
        tensors[place] = tensor
    for impl in IMPLS:
        with pytest.raises(ValueError, match=message):
            lora_linear(*tensors, 1.0, impl=impl)
    with pytest.raises(ValueError, match="kernels.impl=triton"):
        lora_linear(*problem([2], 6, 9, 3)[:4], 1.0, impl="triton")
