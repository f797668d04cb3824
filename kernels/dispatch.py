"""Which implementation of our kernels runs: chosen once, with the reason, and recorded.

Only plain torch exists so far: asking for one of the fused kernels is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass

NOT_BUILT = (
    "linear_cross_entropy",
    "lora_linear",
    "token_logprobs",
    "shared_prefix_attention",
    "grouped_lora",
)


class KernelsNotBuilt(ValueError):
    """The asked-for implementation does not exist yet; the message names what does."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Choice:
    """The implementation that runs, and why."""

    impl: str
    reason: str


def choose(impl: str) -> Choice:
    """The implementation for `kernels.impl`.

    Args:
        impl: auto, cpu, triton or reference.

    Raises:
        KernelsNotBuilt: for cpu and triton, whose kernels are not built.
        ValueError: for any other name.
    """
    match impl:
        case "reference":
            return Choice(impl="reference", reason="asked for")
        case "auto":
            return Choice(impl="reference", reason="no fused kernel is built yet: plain torch")
        case "cpu" | "triton":
            raise KernelsNotBuilt(
                f"kernels.impl={impl}: not built yet ({', '.join(NOT_BUILT)}); "
                "write kernels.impl=auto or kernels.impl=reference"
            )
    raise ValueError(f"kernels.impl={impl}: expected auto, cpu, triton or reference")
