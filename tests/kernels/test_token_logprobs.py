"""Chunked log-probabilities: reference and CPU path against a float64 softmax in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.token_logprobs as module
from kernels.linear import Packed
from kernels.token_logprobs import Head, token_logprobs
from tests.kernels import brute_force

IMPLS = ["reference", "cpu"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(num_rows: int, vocabulary: int, count: int) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    return {
        "rows": torch.randint(num_rows, (count,), generator=source),
        "tokens": torch.randint(vocabulary, (count,), generator=source),
    }


@settings(max_examples=80, deadline=None)
@given(
    num_rows=st.integers(1, 9),
    width=st.integers(1, 20),
    vocabulary=st.integers(1, 40),
    chunk=st.sampled_from([1, 3, 7, 39, 40, 8192]),
    count=st.integers(0, 12),
    has_bias=st.booleans(),
    cap=st.sampled_from([(1.0, None), (0.5, None), (1.0, 3.0), (2.0, 30.0)]),
    is_packed=st.booleans(),
)
def test_any_shape(num_rows, width, vocabulary, chunk, count, has_bias, cap, is_packed):
    weight, hidden = normal(vocabulary, width), normal(num_rows, width, seed=2)
    bias = normal(vocabulary, seed=3) if has_bias else None
    asked = pairs(num_rows, vocabulary, count)
    numbers = {"scale": cap[0], "soft_cap": cap[1]}
    expected = [
        brute_force.logprob(hidden[r], weight, bias, t, **numbers)
        for r, t in zip(asked["rows"].tolist(), asked["tokens"].tolist(), strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "choose_linear", lambda: (is_packed, "set by the test"))
        patch.setattr(module, "TILE_BYTES", 4 * 3 * min(chunk, vocabulary))  # 3 rows at a time
        for impl in IMPLS:
            head = Head(weight, bias, impl=impl, chunk=chunk, **numbers)
            found = token_logprobs(hidden, head, **asked)
            assert found.dtype == torch.float32
            assert found.tolist() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_fp32_whatever_the_weights_are(impl, dtype):
    weight, hidden, bias = normal(70, 9).to(dtype), normal(4, 9, seed=2).to(dtype), normal(70)
    head = Head(weight, bias, impl=impl, chunk=32, scale=3.0, soft_cap=20.0)
    logits = 3.0 * (hidden.double() @ weight.double().t() + bias.double())
    expected = 20.0 * torch.tanh(logits / 20.0)
    assert head.logits(hidden).dtype == torch.float32
    torch.testing.assert_close(head.logits(hidden).double(), expected, atol=1e-5, rtol=0)
    assert head.logits(hidden[:0]).shape == (0, 70)
    assert head.vocabulary == 70
    asked = pairs(4, 70, 30)
    wanted = expected.log_softmax(dim=1)[asked["rows"], asked["tokens"]]
    found = token_logprobs(hidden, head, **asked)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)


def test_the_probabilities_of_a_row_sum_to_one():
    head = Head(normal(300, 8), chunk=64)
    every = {"rows": torch.zeros(300, dtype=torch.int64), "tokens": torch.arange(300)}
    assert token_logprobs(normal(1, 8), head, **every).exp().sum().item() == pytest.approx(
        1, abs=1e-5
    )


def test_a_row_of_nan_or_infinity_is_nan_and_the_others_are_not():
    hidden = normal(3, 8)
    hidden[1, 2], hidden[2, 0] = torch.nan, torch.inf
    rows = torch.tensor([0, 1, 2, 0])
    for impl in IMPLS:
        head = Head(normal(50, 8), impl=impl, chunk=16)
        found = token_logprobs(hidden, head, rows=rows, tokens=torch.tensor([3, 3, 40, 49]))
        assert found.isfinite().tolist() == [True, False, False, True]


def test_tokens_shut_out_by_the_bias():
    """A whole first chunk of -inf logits neither counts nor harms."""
    bias = torch.zeros(10)
    bias[:4] = -torch.inf
    asked = {"rows": torch.tensor([0, 0]), "tokens": torch.tensor([1, 7])}
    weight, hidden = normal(10, 5), normal(1, 5)
    found = token_logprobs(hidden, Head(weight, bias, chunk=4), **asked)
    expected = brute_force.logprob(hidden[0], weight[4:], None, 3, scale=1.0, soft_cap=None)
    assert found[0].item() == -torch.inf
    assert found[1].item() == pytest.approx(expected, abs=1e-5)


def test_large_logits_do_not_overflow():
    weight, hidden = 300 * normal(90, 8), 300 * normal(2, 8, seed=2)
    asked = pairs(2, 90, 40)
    found = token_logprobs(hidden, Head(weight, chunk=7), **asked)
    truth = (hidden.double() @ weight.double().t()).log_softmax(1)
    expected = truth[asked["rows"], asked["tokens"]]
    assert expected.min() < -1e5
    torch.testing.assert_close(found.double(), expected, atol=0.1, rtol=1e-5)


def test_no_matrix_of_rows_and_vocabulary(largest_allocation):
    num_rows, vocabulary = 700, 40_000
    weight, hidden, asked = (
        normal(vocabulary, 4),
        normal(num_rows, 4),
        pairs(num_rows, vocabulary, 99),
    )
    plain, ours = Head(weight, impl="reference"), Head(weight, impl="cpu")
    full = 4 * num_rows * vocabulary
    assert largest_allocation(lambda: token_logprobs(hidden, ours, **asked)) <= module.TILE_BYTES
    assert full > 6 * module.TILE_BYTES
    assert largest_allocation(lambda: token_logprobs(hidden, plain, **asked)) >= full


def test_rows_nobody_asks_for_in_a_block_are_skipped(monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", 4 * 10 * 2)  # 2 rows at a time
    head = Head(normal(10, 4), impl="cpu")
    blocks = []
    chunks = head.chunks
    monkeypatch.setattr(head, "chunks", lambda x: blocks.append(len(x)) or chunks(x))
    asked = {"rows": torch.tensor([5, 0, 4]), "tokens": torch.tensor([1, 2, 3])}
    token_logprobs(normal(7, 4), head, **asked)
    assert blocks == [2, 2]


def test_the_head_is_packed_where_onednn_wins(monkeypatch):
    monkeypatch.setattr(module, "choose_linear", lambda: (True, ""))
    assert all(isinstance(p, Packed) for p in Head(normal(9, 4), chunk=4)._products)
    assert not isinstance(Head(normal(9, 4).bfloat16())._products[0], Packed)
    monkeypatch.setattr(module, "choose_linear", lambda: (False, ""))
    assert not isinstance(Head(normal(9, 4))._products[0], Packed)


@pytest.mark.parametrize(
    ("rows", "tokens", "error", "message"),
    [
        ([0, 3], [0, 0], IndexError, r"row 0\.\.3, expected 0\.\.2"),
        ([0], [-1], IndexError, r"token -1\.\.-1, expected 0\.\.8"),
        ([0], [9], IndexError, "token"),
        ([0, 1], [0], ValueError, r"rows \(2,\), tokens \(1,\)"),
        ([[0]], [[0]], ValueError, "rows"),
    ],
)
def test_what_is_out_of_range_is_refused(rows, tokens, error, message):
    asked = {"rows": torch.tensor(rows), "tokens": torch.tensor(tokens)}
    for impl in IMPLS:
        with pytest.raises(error, match=message):
            token_logprobs(normal(3, 4), Head(normal(9, 4), impl=impl), **asked)


def test_an_implementation_of_another_device_is_refused():
    with pytest.raises(ValueError, match="kernels.impl=triton"):
        Head(normal(9, 4), impl="triton")
