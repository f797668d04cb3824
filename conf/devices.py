"""Accelerators by name, so that a plan can be made for hardware that is not here.

Peaks are dense products of bfloat16 with fp32 sums, as the makers publish them: what is quoted with
2:4 sparsity is halved. Memory is the maker's figure in 10^9 bytes; drivers leave a little less.
Noted 2026-11; makers' sheets change, so a number that decides should be looked up again.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class DeviceFacts:
    """One accelerator.

    flops_per_second: peak in bfloat16. memory_bytes_per_second: of its own memory.
    link_bytes_per_second: to another one of its node, both directions together. model: what a
    driver calls it, in part. pricing: the preset of conf/pricing, if there is one.
    """

    memory_bytes: int
    flops_per_second: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    model: str
    source: str
    date: str
    pricing: str | None = None


DEVICES: dict[str, DeviceFacts] = {
    "a100_40gb": DeviceFacts(
        memory_bytes=40 * 10**9,
        flops_per_second=312e12,
        memory_bytes_per_second=1.555e12,
        link_bytes_per_second=600e9,
        model="A100-SXM4-40GB",
        source="NVIDIA A100 datasheet (SXM)",
        date="2021-06",
    ),
    "a100_80gb": DeviceFacts(
        memory_bytes=80 * 10**9,
        flops_per_second=312e12,
        memory_bytes_per_second=2.039e12,
        link_bytes_per_second=600e9,
        model="A100-SXM4-80GB",
        source="NVIDIA A100 datasheet (SXM)",
        date="2021-06",
        pricing="a100_hour",
    ),
    "h100": DeviceFacts(
        memory_bytes=80 * 10**9,
        flops_per_second=989e12,
        memory_bytes_per_second=3.35e12,
        link_bytes_per_second=900e9,
        model="H100 80GB HBM3",
        source="NVIDIA H100 datasheet (SXM5); glennklockwood.com/garden/processors/h100",
        date="2023",
        pricing="h100_hour",
    ),
    "h200": DeviceFacts(
        memory_bytes=141 * 10**9,
        flops_per_second=989e12,
        memory_bytes_per_second=4.8e12,
        link_bytes_per_second=900e9,
        model="H200",
        source="NVIDIA H200 datasheet (SXM)",
        date="2024",
        pricing="h200_hour",
    ),
    "b200": DeviceFacts(
        memory_bytes=180 * 10**9,
        flops_per_second=2250e12,
        memory_bytes_per_second=7.7e12,
        link_bytes_per_second=1800e9,
        model="B200",
        source="NVIDIA DGX B200 datasheet, an eighth of the system",
        date="2024",
    ),
    "l4": DeviceFacts(
        memory_bytes=24 * 10**9,
        flops_per_second=121e12,
        memory_bytes_per_second=300e9,
        link_bytes_per_second=64e9,
        model="NVIDIA L4",
        source="NVIDIA L4 datasheet: 242 TFLOPS with sparsity; PCIe 4.0 x16",
        date="2023",
    ),
    "a10g": DeviceFacts(
        memory_bytes=24 * 10**9,
        flops_per_second=70e12,
        memory_bytes_per_second=600e9,
        link_bytes_per_second=64e9,
        model="A10G",
        source="NVIDIA A10G sheet of AWS g5: 140 TFLOPS with sparsity; PCIe 4.0 x16",
        date="2021",
    ),
    "rtx4090": DeviceFacts(
        memory_bytes=24 * 10**9,
        flops_per_second=165e12,
        memory_bytes_per_second=1.008e12,
        link_bytes_per_second=64e9,
        model="RTX 4090",
        source="NVIDIA Ada whitepaper; waredb.com/processor/nvidia-geforce-rtx-4090",
        date="2022",
    ),
}
