"""The choice of an implementation: only plain torch exists, and the rest is refused by name."""

import pytest

from kernels.dispatch import Choice, KernelsNotBuilt, choose


def test_reference_runs():
    assert choose("reference") == Choice(impl="reference", reason="asked for")


def test_auto_says_why():
    choice = choose("auto")
    assert choice.impl == "reference"
    assert "no fused kernel" in choice.reason


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_kernels_that_do_not_exist_are_refused_by_name(impl):
    with pytest.raises(KernelsNotBuilt, match=f"kernels.impl={impl}.*linear_cross_entropy.*auto"):
        choose(impl)


@pytest.mark.parametrize("impl", ["", "Auto", "cuda"])
def test_unknown_names_are_refused(impl):
    with pytest.raises(ValueError, match="expected auto"):
        choose(impl)
