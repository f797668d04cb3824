"""Which implementation of each kernel an engine uses: what was asked for, if it is right here."""

from __future__ import annotations

import functools

from evaluation.engines.loading import DTYPES
from kernels.dispatch import Choice, choose

KERNELS = ("shared_prefix_attention", "token_logprobs")  # the others are for training


@functools.cache
def usable_kernels(impl: str, *, device: str, dtype: str) -> dict[str, Choice]:
    """Per kernel the implementation for kernels.impl; the reference, and why, where it is wrong.

    Each kernel is compared with its reference on this device once per process, before it answers
    anything: a driver or compiler may be broken in ways that no version number tells.

    Raises:
        KernelsNotBuilt: for an implementation that cannot run on the device.
    """
    wanted = choose(impl, device)
    if wanted.impl == "reference":
        return dict.fromkeys(KERNELS, wanted)
    from kernels.checks import check_kernels

    found = check_kernels(device, DTYPES[dtype], wanted.impl, only=KERNELS)
    checks = {check.kernel: check for check in found}
    return {
        name: wanted
        if checks[name].is_ok
        else Choice(impl="reference", reason=f"{wanted.impl} {checks[name].reason}")
        for name in KERNELS
    }
