"""The check of each kernel on the user's device passes what is right and finds what is wrong."""

import math

import pytest
import torch

import kernels.shared_prefix_attention_cpu as attention
import kernels.token_logprobs as logprobs
from kernels.checks import check_kernels
from kernels.dispatch import BUILT, KernelsNotBuilt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_every_built_kernel_is_right_here(dtype, impl):
    checks = check_kernels("cpu", dtype, impl)
    assert tuple(check.kernel for check in checks) == BUILT
    for check in checks:
        assert check.is_ok, check
        assert check.impl == ("cpu" if impl == "auto" else "reference")
        assert 0 <= check.worst_error <= check.tolerance
        assert 0 < check.seconds < 10
        assert check.reason == ""


def test_a_wrong_kernel_is_found(monkeypatch):
    right = attention._own_part

    def wrong(*arguments):
        rows, lse = right(*arguments)
        return rows, lse + 1e-3

    monkeypatch.setattr(attention, "_own_part", wrong)
    found = {check.kernel: check for check in check_kernels()}
    assert not found["shared_prefix_attention"].is_ok
    assert "off by" in found["shared_prefix_attention"].reason
    assert found["token_logprobs"].is_ok


def test_nan_is_not_within_any_tolerance(monkeypatch):
    monkeypatch.setattr(attention, "_own_part", lambda *a: (a[0].transpose(0, 1) * math.nan,) * 2)
    check = check_kernels()[0]
    assert not check.is_ok
    assert check.worst_error == math.inf


def test_what_a_kernel_raises_is_the_reason(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(logprobs, "_token_logprobs_cpu", broken)
    check = check_kernels()[1]
    assert (check.is_ok, check.worst_error) == (False, math.inf)
    assert check.reason == "RuntimeError: no kernel image"


def test_an_implementation_that_cannot_run_is_refused():
    with pytest.raises(KernelsNotBuilt):
        check_kernels("cpu", impl="triton")
