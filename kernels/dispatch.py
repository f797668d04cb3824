"""Which implementation of our kernels runs: chosen once, with the reason, and recorded.

    reference   plain torch that everyone can read; on any device
    cpu         torch's own CPU kernels, put together so that nothing is copied or repeated
    triton      our GPU kernels

Needs neither torch nor Triton to be imported, so that a run is refused before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass

BUILT = (
    "shared_prefix_attention",
    "token_logprobs",
    "linear_cross_entropy",
    "lora_linear",
    "grouped_lora",
)
NAMES = ("auto", "cpu", "triton", "reference")


class KernelsNotBuilt(ValueError):
    """The asked-for implementation cannot run here; the message names what does."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Choice:
    """The implementation that runs, and why."""

    impl: str
    reason: str


def choose(impl: str, device: str = "cpu") -> Choice:
    """The implementation for `kernels.impl` on a device.

    Args:
        impl: auto, cpu, triton or reference.
        device: cpu, cuda, or another type torch knows; an index behind it is not looked at.

    Raises:
        KernelsNotBuilt: for an implementation that cannot run on the device.
        ValueError: for any other name.
    """
    kind = str(device).split(":")[0]
    missing = _missing(kind)
    if impl == "reference":
        return Choice(impl=impl, reason="asked for")
    if impl == "auto":
        for name in ("cpu", "triton"):
            if not missing[name]:
                return Choice(impl=name, reason=f"the device is {kind}")
        return Choice(impl="reference", reason=f"plain torch on {kind}: {missing['triton']}")
    if impl not in NAMES:
        raise ValueError(f"kernels.impl={impl}: expected {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if missing[impl]:
        raise KernelsNotBuilt(
            f"kernels.impl={impl}: {missing[impl]}; "
            "write kernels.impl=auto or kernels.impl=reference"
        )
    return Choice(impl=impl, reason="asked for")


def _missing(kind: str) -> dict[str, str]:
    """What keeps each implementation from running on this kind of device; empty for nothing."""
    return {
        "cpu": "" if kind == "cpu" else f"it runs on a CPU, and the device is {kind}",
        "triton": _no_triton() if kind == "cuda" else f"it needs CUDA, and the device is {kind}",
    }


def _no_triton() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return ""
