"""The head's loss and gradients against a float64 softmax; peak bytes against torch's own loss."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.loss.loss_utils import ForCausalLMLoss

import kernels.linear_cross_entropy as module
from kernels.linear_cross_entropy import linear_cross_entropy

IMPLS = ["reference", "cpu"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(rows: int, width: int, vocabulary: int, *, has_bias: bool = False):
    """Logits of unit variance; hidden, weight, bias and targets."""
    bias = normal(vocabulary, seed=3) if has_bias else None
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(4))
    return (
        normal(rows, width, seed=1),
        normal(vocabulary, width, seed=2) * width**-0.5,
        bias,
        targets,
    )


def truth(hidden, weight, targets, bias, *, label_smoothing=0.0, soft_cap=None, scale=1.0):
    """The definition, row by row: no cross_entropy, no linear."""
    total = 0.0
    for row, target in zip(hidden, targets.tolist(), strict=True):
        logits = (weight * row).sum(1)
        logits = scale * (logits if bias is None else logits + bias)
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        logprobs = logits - torch.logsumexp(logits, dim=0)
        total = total - (1 - label_smoothing) * logprobs[target] - label_smoothing * logprobs.mean()
    return total


def loss_and_gradients(function, leaves, dtype, *, factor=1.0):
    """The loss and the gradient of each leaf of `factor` times the loss."""
    fresh = [None if t is None else t.detach().to(dtype).requires_grad_() for t in leaves]
    loss = function(*fresh)
    if isinstance(loss, float):  # of no rows
        return [
            torch.tensor(loss, dtype=dtype),
            *(torch.zeros_like(t) for t in fresh if t is not None),
        ]
    (factor * loss).backward()
    return [loss.detach(), *(t.grad for t in fresh if t is not None)]


def relative(found, wanted):
    """The norm of the difference over the norm of the truth."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-9))


shapings = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "soft_cap": st.sampled_from([None, 3.0, 30.0]),
        "scale": st.sampled_from([1.0, 0.5, 4.0]),
    }
)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 20),
    vocabulary=st.integers(2, 40),
    chunk=st.sampled_from([1, 3, 7, 39, 40, 8192]),
    has_bias=st.booleans(),
    is_onednn=st.booleans(),
    shaping=shapings,
)
def test_any_shape(rows, width, vocabulary, chunk, has_bias, is_onednn, shaping):
    *leaves, targets = problem(rows, width, vocabulary, has_bias=has_bias)
    wanted = loss_and_gradients(
        lambda h, w, b=None: truth(h, w, targets, b, **shaping), leaves, torch.float64, factor=0.3
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.lora_linear.takes_onednn", lambda: is_onednn)
        patch.setattr(module, "CHUNK", chunk)
        patch.setattr(module, "TILE_BYTES", 4 * 3 * min(chunk, vocabulary))  # 3 rows at a time
        patch.setattr(module, "KEPT_BYTES", 4 * 2 * vocabulary)  # 2 rows
        for impl in IMPLS:
            found = loss_and_gradients(
                lambda h, w, b, impl=impl: linear_cross_entropy(
                    h, w, targets, b, impl=impl, **shaping
                ),
                leaves,
                torch.float32,
                factor=0.3,
            )
            assert found[0].dtype == torch.float32
            for a, b in zip(found, wanted, strict=True):
                assert a.shape == b.shape
                torch.testing.assert_close(a.double(), b, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "shaping",
    [{}, {"label_smoothing": 0.1}, {"soft_cap": 5.0}, {"soft_cap": 5.0, "label_smoothing": 0.1}],
)
@pytest.mark.parametrize("shape", [(37, 576, 9001), (301, 40, 20_011)])
def test_gradients_are_within_a_millionth_of_the_truth(shape, shaping, has_bias):
    *leaves, targets = problem(*shape, has_bias=has_bias)
    wanted = loss_and_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, targets, b, impl="reference", **shaping),
        leaves,
        torch.float64,
    )
    found = loss_and_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, targets, b, impl="cpu", **shaping),
        leaves,
        torch.float32,
    )
    assert max(relative(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-6


@pytest.mark.parametrize("shaping", [{}, {"label_smoothing": 0.2, "soft_cap": 2.0, "scale": 0.7}])
def test_finite_differences_in_float64(shaping, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    *leaves, targets = problem(3, 4, 9, has_bias=True)
    leaves = [t.double() for t in leaves]

    def loss(h, w, b):
        return linear_cross_entropy(h, w, targets, b, **shaping)

    _, *gradients = loss_and_gradients(loss, leaves, torch.float64)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for place in range(leaf.numel()):
            step = torch.zeros_like(leaf).flatten()
            step[place] = 1e-6
            step = step.reshape(leaf.shape)
            up, down = (
                loss(*(t + sign * step if t is leaf else t for t in leaves)) for sign in (1, -1)
            )
            assert float(up - down) / 2e-6 == pytest.approx(
                float(gradient.flatten()[place]), abs=1e-7
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_sum_in_fp32(dtype):
    """As near to the truth for the rounded inputs as rounding the result allows."""
    *leaves, targets = problem(70, 64, 3001, has_bias=True)
    rounded = [t.to(dtype) for t in leaves]
    wanted = loss_and_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, targets, b, impl="reference"),
        rounded,
        torch.float64,
    )
    found = loss_and_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, targets, b, impl="cpu"), rounded, dtype
    )
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    assert relative(found[0], wanted[0]) <= 1e-6
    for a, b in zip(found[1:], wanted[1:], strict=True):
        assert relative(a, b) <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [(1,), (2,), (1, 2), (0,), (0, 2)])
def test_what_is_frozen_gets_no_gradient(impl, frozen):
    *leaves, targets = problem(5, 7, 30, has_bias=True)
    wanted = loss_and_gradients(lambda h, w, b: truth(h, w, targets, b), leaves, torch.float64)[1:]
    fresh = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(leaves)]
    hidden, weight, bias = fresh
    linear_cross_entropy(hidden, weight, targets, bias, impl=impl).backward()
    for i, leaf in enumerate(fresh):
        if i in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad.double(), wanted[i], atol=1e-6, rtol=1e-5)


def test_a_tied_head_adds_up_both_uses():
    """The weight is the embedding too: its gradient is the sum of one per use."""
    ids, targets = torch.tensor([3, 1, 3, 0]), torch.tensor([1, 3, 0, 2])
    found = []
    for impl in IMPLS:
        table = nn.Parameter(normal(11, 6))
        hidden = torch.tanh(nn.functional.embedding(ids, table))
        linear_cross_entropy(hidden, table, targets, impl=impl).backward()
        found.append(table.grad)
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)
    assert (found[1].abs().sum(1) > 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_give_zero_and_zero_gradients(impl):
    *leaves, targets = problem(0, 6, 11, has_bias=True)
    found = loss_and_gradients(
        lambda h, w, b: linear_cross_entropy(h, w, targets, b, impl=impl, label_smoothing=0.1),
        leaves,
        torch.float32,
    )
    assert [t.shape for t in found] == [(), (0, 6), (11, 6), (11,)]
    assert all((t == 0).all() for t in found)


def test_without_grad_nothing_is_formed(monkeypatch):
    hidden, weight, _, targets = problem(5, 7, 30)
    weight.requires_grad_()
    products = []
    right = module.best_product(hidden)
    monkeypatch.setattr(
        module, "best_product", lambda _: lambda *args: products.append(1) or right(*args)
    )
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad and len(products) == 1  # the logits
    for trains, count in ((False, 2), (True, 3)):  # frozen: hidden's gradient; else W's too
        products.clear()
        weight.requires_grad_(trains)
        linear_cross_entropy(hidden.clone().requires_grad_(), weight, targets).backward()
        assert len(products) == count


def test_infinities_and_nan():
    hidden, weight, _, targets = problem(4, 6, 12)
    hidden[2, 1] = torch.nan
    assert linear_cross_entropy(hidden, weight, targets).isnan()
    bias = torch.zeros(12)
    bias[:4] = -torch.inf  # a whole chunk is shut out
    leaves, targets = [normal(3, 6), weight, bias], torch.tensor([5, 9, 11])
    wanted = loss_and_gradients(
        lambda h, w, _: truth(h, w[4:], targets - 4, None), leaves[:2] + [None], torch.float64
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", 4)
        found = loss_and_gradients(
            lambda h, w, _: linear_cross_entropy(h, w, targets, bias),
            leaves[:2] + [None],
            torch.float32,
        )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, weight, _, targets = problem(5, 8, 90)
    found = linear_cross_entropy(300 * hidden, 300 * weight, targets)
    wanted = truth(300 * hidden.double(), 300 * weight.double(), targets, None)
    assert wanted > 1e5
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_backward_twice_is_refused():
    hidden, weight, _, targets = problem(3, 4, 9)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def peak_bytes(run) -> int:
    """Most bytes held at a time beyond what was there before, by torch's allocator; one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    torch.set_num_threads(threads)
    held = highest = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def test_the_measure_of_memory():
    def run():
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        c = torch.empty(500)
        del b, c

    assert 12_000 <= peak_bytes(run) <= 12_400


def test_memory_of_the_loss():
    """All tokens: at most a quarter of transformers'; 5% of them targets: at most 5%."""
    rows, width, vocabulary = 1024, 16, 49_152
    hidden, weight, _, labels = problem(rows, width, vocabulary)
    few = torch.where(torch.arange(rows) % 20 == 0, labels, -100)

    def theirs(x, w, labels):
        logits = nn.functional.linear(x, w)[None]
        ForCausalLMLoss(logits, labels[None], len(w), shift_labels=labels[None]).backward()

    def ours(x, w, labels):
        wanted = (labels != -100).nonzero()[:, 0]
        (linear_cross_entropy(x[wanted], w, labels[wanted]) / len(wanted)).backward()

    def measured(run, labels, *, is_trained):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(is_trained)
        return peak_bytes(lambda: run(x, w, labels)) - (w.nbytes if is_trained else 0)

    plain = measured(theirs, few, is_trained=False)  # W's gradient, which both need, is left out
    assert plain >= 3 * 4 * rows * vocabulary
    for is_trained in (False, True):
        every, some = (measured(ours, kind, is_trained=is_trained) for kind in (labels, few))
        assert every <= plain / 4
        assert some <= 0.05 * plain
        limit = module.KEPT_BYTES if is_trained else module.TILE_BYTES
        # x, its gradient and sums; where W trains, a chunk's product too
        assert every <= limit + 8 * 4 * rows * width + 4 * module.CHUNK * width


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("vocabulary", [50, 49_152, 256_000])
@pytest.mark.parametrize("num_rows", [0, 1, 342, 10_000])
def test_blocks_of_rows_are_even_and_cover_all(num_rows, vocabulary, keeps):
    blocks = module.row_blocks(num_rows, vocabulary=vocabulary, keeps=keeps)
    assert [r for b in blocks for r in range(num_rows)[b]] == list(range(num_rows))
    sizes = [b.stop - b.start for b in blocks]
    assert not sizes or max(sizes) - min(sizes) <= 1
    for size in sizes:
        assert 4 * size * min(module.CHUNK, vocabulary) <= module.TILE_BYTES
        assert not keeps or 4 * size * vocabulary <= module.KEPT_BYTES


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": torch.tensor([0, 9, 1])}, IndexError, r"target 0\.\.9, expected 0\.\.8"),
        ({"targets": torch.tensor([0, -100, 1])}, IndexError, r"target -100\.\.1"),
        ({"targets": torch.tensor([0, 1])}, ValueError, r"targets \(2,\) of 3 rows"),
        ({"hidden": torch.zeros(3, 5)}, ValueError, r"hidden \(3, 5\), weight \(9, 4\)"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing 1.5"),
        ({"impl": "triton"}, ValueError, "kernels.impl=triton"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    hidden, weight, _, targets = problem(3, 4, 9)
    with pytest.raises(error, match=message):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "targets": targets} | change))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 70])
def test_losses_of_rows_under_weights(impl, num_rows):
    """reduction=none, weighted: the gradient of each row is its own loss's times its weight."""
    source = torch.Generator().manual_seed(num_rows)
    hidden = torch.randn(num_rows, 12, generator=source, dtype=torch.float64).requires_grad_()
    weight = torch.randn(9001, 12, generator=source, dtype=torch.float64)
    targets = torch.randint(9001, (num_rows,), generator=source)
    weights = torch.rand(num_rows, generator=source, dtype=torch.float64)
    losses = linear_cross_entropy(
        hidden, weight, targets, scale=2.0, soft_cap=5.0, reduction="none", impl=impl
    )
    (found,) = torch.autograd.grad((losses * weights).sum(), hidden)
    logits = 5 * torch.tanh(2 * (hidden @ weight.mT) / 5)
    wanted = logits.logsumexp(-1) - logits[torch.arange(num_rows), targets]
    torch.testing.assert_close(losses.detach(), wanted.detach(), atol=1e-10, rtol=1e-10)
    (true,) = torch.autograd.grad((wanted * weights).sum(), hidden)
    torch.testing.assert_close(found, true, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        plain = linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)
        whole = linear_cross_entropy(hidden, weight, targets, impl=impl)
    torch.testing.assert_close(plain.sum(), whole)


def test_losses_of_rows_need_a_frozen_head():
    hidden, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    weight = torch.zeros(5, 3, requires_grad=True)
    with pytest.raises(ValueError, match="frozen head"):
        linear_cross_entropy(hidden, weight, targets, reduction="none")
    with pytest.raises(ValueError, match="sum or none"):
        linear_cross_entropy(hidden, weight, targets, reduction="mean")
