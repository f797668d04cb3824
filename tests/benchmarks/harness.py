"""How a benchmark is measured and judged: interleaved arms, median ratios, a result file.

All arms of a benchmark run in one process, one after the other, in the order A B, B A, A B, ...
Round k works on chunk k, the same for all arms. The ratio of a round is peer seconds / our seconds;
the result is the median over rounds with a bootstrap interval.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.parity import Answer, Gap, Parity, compare
from tests.benchmarks.workloads import Workload

ROOT = Path(__file__).resolve().parents[2]
RESAMPLES = 10_000
BOUND_MARGIN = 1.1
SETTLE_SECONDS = 0.3  # OpenMP's threads of the side before spin for up to 0.2 s
PACKAGES = "crossover torch transformers tokenizers numpy peft ray lm-eval trl".split()
# glibc gives large blocks back after each step and faults them in again: 1.2 to 1.7 times slower.
# All sides get the same, vLLM's process too.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass(kw_only=True, slots=True)
class Arm:
    """One side. run: answers of a workload. prepare: before each run, outside the clock.

    items: how many of a workload's items it gets, where its seconds are proportional to them and
    too many to spend on all; None: all.
    """

    name: str
    version: str
    run: Callable[[Workload], list[Answer]]
    prepare: Callable[[], None] = lambda: None
    settings: dict[str, Any] = field(default_factory=dict)
    items: int | None = None

    def count(self, workload: Workload) -> int:
        """Items that it gets of a workload."""
        return min(len(workload.items), self.items or len(workload.items))


@dataclass(slots=True)
class Trace:
    """What an arm did, per round."""

    seconds: list[float] = field(default_factory=list)
    answers: list[list[Answer]] = field(default_factory=list)


@dataclass(kw_only=True, slots=True, frozen=True)
class Ratio:
    """Median of ratios with the 95% bootstrap interval of the median."""

    median: float
    low: float
    high: float


@dataclass(kw_only=True, slots=True)
class Result:
    """A row of the table, as it is written. ours and peer are in `unit`; ratio = how much better.

    bound: what no ratio can pass; None where none was formed. more: further keys.
    """

    name: str
    work: str
    ours: float
    peer: float
    peer_version: str
    ratio: Ratio
    floor: float
    aim: float | None
    bound: float | None
    unit: str
    parity: Parity
    more: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def judge(self) -> None:
        """Collect what is wrong: parity, floor, bound."""
        if not self.parity.ok:
            self.failures.append(f"parity: {self.parity.why}")
        if self.ratio.high < self.floor:
            self.failures.append(f"floor {self.floor:g}x missed: at most {self.ratio.high:.3g}x")
        if self.bound is not None and self.ratio.median > BOUND_MARGIN * self.bound:
            self.failures.append(
                f"broken benchmark: {self.ratio.median:.3g}x is above the bound {self.bound:.3g}x "
                "(peer's seconds / least operations at the best measured rate)"
            )


def timed(arm: Arm, workload: Workload) -> tuple[float, list[Answer]]:
    """Seconds and answers of one run."""
    part = workload.first(arm.count(workload))
    arm.prepare()
    gc.collect()
    time.sleep(SETTLE_SECONDS)
    started = time.perf_counter()
    answers = arm.run(part)
    return time.perf_counter() - started, answers


def measure(arms: Sequence[Arm], chunks: Sequence[Workload], *, rounds: int) -> dict[str, Trace]:
    """Run all arms on chunk k % len(chunks) in round k; every second round in reverse order."""
    traces = {arm.name: Trace() for arm in arms}
    for k in range(rounds):
        for arm in arms if k % 2 == 0 else list(arms)[::-1]:
            seconds, answers = timed(arm, chunks[k % len(chunks)])
            traces[arm.name].seconds.append(seconds)
            traces[arm.name].answers.append(answers)
        line = ", ".join(f"{arm.name} {traces[arm.name].seconds[-1]:.3g} s" for arm in arms)
        print(f"  round {k + 1} of {rounds}: {line}", flush=True)
    return traces


def best_of(
    candidates: Sequence[Arm], sample: Workload, *, repeats: int = 1
) -> tuple[Arm, dict[str, float]]:
    """The fastest arm on a sample after one warm-up, and every candidate's best seconds."""
    seconds: dict[str, float] = {}
    timed(candidates[0], sample.first(1))
    for arm in candidates:
        seconds[str(arm.settings)] = min(timed(arm, sample)[0] for _ in range(repeats))
    best = min(candidates, key=lambda arm: seconds[str(arm.settings)])
    return best, {key: round(value, 4) for key, value in seconds.items()}


def ratio_of(ours: Sequence[float], peer: Sequence[float], *, seed: int = 0) -> Ratio:
    """Median of the paired ratios peer / ours; one pair has no width."""
    ratios = np.asarray(peer, dtype=np.float64) / np.asarray(ours, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    medians = np.median(ratios[draws], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return Ratio(median=float(np.median(ratios)), low=float(low), high=float(high))


def parity_of(ours: Trace, peer: Trace, *, gap: Callable[[int], Gap] | None = None) -> Parity:
    """Parity over all rounds, on the peer's items. gap: the plain path's for a round's chunk."""
    total = Parity(checked=0, ok=True, worst=0.0)
    for k, (a, b) in enumerate(zip(ours.answers, peer.answers, strict=True)):
        total += compare(a[: len(b)], b, gap=gap(k) if gap else None)
    return total


def write(result: Result, directory: Path) -> dict[str, Any]:
    """Write <name>.json and return what was written."""
    parity = result.parity
    content = {
        "name": result.name,
        "work": result.work,
        "ours": result.ours,
        "peer": result.peer,
        "peer_version": result.peer_version,
        "ratio": result.ratio.median,
        "ratio_low": result.ratio.low,
        "ratio_high": result.ratio.high,
        "floor": result.floor,
        "aim": result.aim,
        "bound": result.bound,
        "unit": result.unit,
        "parity": {
            "checked": parity.checked,
            "ok": parity.ok,
            "worst": parity.worst,
            "ties": parity.ties,
        },
        "is_reached": not result.failures,
        "failures": result.failures,
        **result.more,
        "hardware": hardware(),
        "versions": versions(),
        **commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"make bench NAME={result.name}",
    }
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(content), indent=2) + "\n"
    (directory / f"{result.name}.json").write_text(text, encoding="utf-8")
    return content


def rounded(value: Any) -> Any:
    """Floats to four digits: more are noise. Not finite: None, since JSON has no word for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and vector instructions of this machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    about = {key.strip(): value.strip() for key, _, value in (li.partition(":") for li in lines)}
    flags = about.get("flags", "").split()
    return {
        "cpu": about.get("model name", platform.processor()),
        "family": f"{about.get('cpu family', '?')}/{about.get('model', '?')}",
        "flags": [flag for flag in flags if flag.startswith(("avx", "amx"))],
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", "0")),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.system(),
        "python": platform.python_version(),
        "allocator": {key: os.environ.get(key) for key in ALLOCATOR},
    }


def versions() -> dict[str, str]:
    """Versions of the packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """The commit of this checkout, and whether files other than results differ from it."""
    ask = ["git", "status", "--porcelain", "--", ".", ":!tests/benchmarks/results"]
    try:
        run = [
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            for command in (["git", "rev-parse", "HEAD"], ask)
        ]
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "is_dirty": None}
    return {"commit": run[0].strip(), "is_dirty": bool(run[1].strip())}
