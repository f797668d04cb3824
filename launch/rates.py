"""How fast and how large devices are: measured here where it was, else stated (light).

Every training leaves the rate of its steps in the cache that all runs share, by machine, model and
method. The next plan of the same stands on it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conf.choices import Device
from conf.devices import DEVICES, DeviceFacts
from conf.hashing import sha256_of
from conf.records import TrainRecord
from conf.schema import RunConfig
from launch.cluster import accelerator_models
from launch.placement import Machine
from training.job import TrainJob
from training.rate import StepRate, fit

# 970 tokens/s forward through 106M parameters on 2 cores is 103 GFLOP/s a core (fp32, AVX-512).
FLOPS_PER_CORE = 100e9
CORE_RANGE = (0.5, 1.5)  # older cores without AVX-512, newer ones
# Llama 3 was trained at 38 to 43% of the peak of H100s ("The Llama 3 Herd of Models", 2024,
# arXiv 2407.21783, table 4). Short rows and small batches do worse.
UTILISATION = 0.40
UTILISATION_RANGE = (0.20, 0.50)


@dataclass(kw_only=True, slots=True, frozen=True)
class Rate:
    """Operations per second of one device, the range they may be in, and where that comes from."""

    flops_per_second: float
    low: float
    high: float
    source: str


def device_facts(config: RunConfig) -> DeviceFacts | None:
    """The facts of the accelerators that are asked for or here; None where they are not known."""
    if config.cluster.device.is_named:
        return DEVICES[config.cluster.device.name]
    models = accelerator_models()
    if config.cluster.device is Device.cpu or not models:
        return None
    known = (f for f in DEVICES.values() if all(f.model in model for model in models))
    return next(known, None)


def rate_of(machine: Machine, facts: DeviceFacts | None) -> Rate | None:
    """How fast one device of a machine computes; None for an accelerator that is not known."""
    if machine.device == "cpu":
        low, high = CORE_RANGE
        return Rate(
            flops_per_second=FLOPS_PER_CORE,
            low=low * FLOPS_PER_CORE,
            high=high * FLOPS_PER_CORE,
            source=f"assumed {FLOPS_PER_CORE / 1e9:.0f} GFLOP/s a core, as on the README's machine",
        )
    if facts is None:
        return None
    peak = facts.flops_per_second
    return Rate(
        flops_per_second=UTILISATION * peak,
        low=UTILISATION_RANGE[0] * peak,
        high=UTILISATION_RANGE[1] * peak,
        source=f"assumed {UTILISATION:.0%} of a peak of {peak / 1e12:.0f} TFLOP/s "
        f"({UTILISATION_RANGE[0]:.0%} to {UTILISATION_RANGE[1]:.0%}; {facts.source}, {facts.date})",
    )


def memory_of_device(
    machine: Machine, facts: DeviceFacts | None, *, workers_per_node: int
) -> int | None:
    """What one training worker may fill: its accelerator, or its share of a node's memory."""
    if machine.device == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total // max(1, workers_per_node)
    return None if facts is None else facts.memory_bytes


def price_of(config: RunConfig, machine: Machine) -> float | None:
    """USD per device-second; the default price is that of a core, and no other device's."""
    if machine.device != "cpu" and config.pricing.name == "cpu_core_hour":
        return None
    return config.pricing.usd_per_device_second


def rate_file(root: Path, *, machine: Machine, job: TrainJob) -> Path:
    """Where the rate of such a training is kept: same machine, model, method and workers."""
    method = {"kind": job.method.kind, "lora_rank": getattr(job.method, "lora_rank", None)}
    trainer = [job.trainer.activation_checkpointing, job.zero]
    key = [machine.name, job.model_dir, method, trainer, job.dtype, job.world_size, job.threads]
    return root / ".cache" / "rates" / f"{sha256_of(key)}.json"


def noted(events: Iterable[Any], path: Path) -> Iterator[Any]:
    """Pass on a training's events; when it has ended, keep the rate of its steps at `path`."""
    steps = []
    for event in events:
        if isinstance(event, TrainRecord) and event.flops is not None:
            steps.append((event.flops, event.step_seconds))
        yield event
    found = fit(steps)
    if found is None:
        return
    content = {**dataclasses.asdict(found), "date": datetime.now(UTC).date().isoformat()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as stream:
        json.dump(content, stream)
    os.replace(stream.name, path)


def known_rate(path: Path) -> tuple[StepRate, str] | None:
    """The rate that an earlier training left, and the date; None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return StepRate(
            fixed_seconds=float(content["fixed_seconds"]),
            flops_per_second=float(content["flops_per_second"]),
            steps=int(content["steps"]),
        ), str(content["date"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
