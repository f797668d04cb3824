"""`python -m launch.doctor`: what this machine has, and what would be refused.

`--bundle RUN` packs what a helper needs to see of a run (launch/logs/bundle.py).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conf.errors import Refused
from conf.schema import RunConfig
from launch.cli import guarded
from launch.cluster import local_machine, num_accelerators
from launch.compose import compose_config
from launch.logs.bundle import write_bundle
from launch.placement import model_dtype
from launch.provenance import PACKAGES

GIB = 2**30
KERNELS_FLAG = "--kernels"
BUNDLE_FLAG = "--bundle"
KERNELS_SECONDS = 50  # of the minute that a doctor may take
MIN_FREE_BYTES = 5 * GIB  # two full checkpoints of the embedded model, three times over


def checks(overrides: list[str]) -> list[tuple[str, bool, str]]:
    """What was looked at, whether it is well, and what was found or what to do."""
    config = compose_config(overrides)
    root = Path(config.run.root).absolute()
    place = next(p for p in [root, *root.parents] if p.exists())
    free = shutil.disk_usage(place).free
    machine = local_machine(config.cluster)
    found = [
        ("python", sys.version_info[:2] in ((3, 11), (3, 12)), sys.version.split()[0]),
        *[_package(name) for name in PACKAGES if name != "crossover"],
        ("devices", True, f"{machine.name} ({machine.device})"),
        ("accelerators", True, f"{num_accelerators()} NVIDIA devices seen"),
        ("disk", free > MIN_FREE_BYTES, f"{free / GIB:.0f} GiB free at {place}"),
        ("run.root", os.access(place, os.W_OK), f"{place} can be written"),
        *_kernels(config, machine.device),
        ("model", *_model(config, root)),
        ("wandb", True, _wandb(config)),
    ]
    return found


def _package(name: str) -> tuple[str, bool, str]:
    try:
        return name, True, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, False, "not installed; type: make install"


def _kernels(config: RunConfig, device: str) -> list[tuple[str, bool, str]]:
    """Each kernel against its reference on this machine's device.

    In a process of its own, so that a kernel which hangs or ends its process is found as well.
    """
    from kernels.dispatch import KernelsNotBuilt, choose

    impl = config.kernels.impl.name
    try:
        choice = choose(impl, device)
    except KernelsNotBuilt as error:
        return [("kernels", False, str(error))]
    arguments = (device, model_dtype(config.model, device), impl)
    command = [sys.executable, "-m", "launch.doctor", KERNELS_FLAG, *arguments]
    root = Path(__file__).resolve().parent.parent
    problem = ""
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=KERNELS_SECONDS
        )
        if done.returncode == 0:
            lines = json.loads(done.stdout.splitlines()[-1])
            return [("kernels", True, f"{choice.impl}: {choice.reason}"), *map(tuple, lines)]
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        problem = f"the check ended with exit code {done.returncode}: {said[-1]}"
    except subprocess.TimeoutExpired:
        problem = f"the check did not end within {KERNELS_SECONDS} s"
    return [("kernels", False, f"{problem}; kernels.impl=reference does without them")]


def kernel_lines(device: str, dtype: str, impl: str) -> list[tuple[str, bool, str]]:
    """One line per kernel: whether it agrees with its reference, and what runs where it does not.

    Args:
        device: cpu or cuda.
        dtype: float32, bfloat16 or float16.
        impl: kernels.impl.
    """
    import torch

    from kernels.checks import check_kernels
    from kernels.linear import choose_linear

    lines = []
    for check in check_kernels(device, getattr(torch, dtype), impl):
        text = f"{check.impl}, off by at most {check.worst_error:.1e}"
        text += f" ({check.tolerance:.0e} allowed, {check.seconds:.1f} s)"
        text += f": {check.reason}" if check.reason else ""
        text += "" if check.is_ok else "; a run takes the reference instead"
        lines.append((f"  {check.kernel}", check.is_ok, text))
    if device == "cpu" and impl != "reference":
        is_faster, reason = choose_linear()
        which = "oneDNN's product" if is_faster else "torch's own product"
        lines.append(("  linear", True, f"{which}: {reason}"))
    return lines


def _model(config: RunConfig, root: Path) -> tuple[bool, str]:
    from evaluation.models import locate
    from evaluation.models.facts import facts

    try:
        place = locate(config.model, cache=root / ".cache")
        if place.kind != "ready":
            return True, f"{config.model.name}: to be made once ({place.kind})"
        seen = facts(place.path)
    except Refused as error:
        return False, f"{error.where}: {error.found}; {error.remedy}"
    return True, f"{config.model.name}: {seen.num_parameters / 1e6:.0f}M parameters, {place.path}"


def _wandb(config: RunConfig) -> str:
    from launch.tracking import mode_of

    mode = mode_of(config)
    return f"{mode}" + (" (no key found)" if mode == "offline" else "")


def doctor(overrides: list[str]) -> int:
    """Print the checks; 0 where all are well, 2 otherwise."""
    console = Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    found = checks(overrides)
    for name, is_well, text in found:
        table.add_row("[green]ok[/green]" if is_well else "[red]no[/red]", name, text)
    console.print(table)
    return 0 if all(is_well for _, is_well, _ in found) else 2


if __name__ == "__main__":
    if sys.argv[1:2] == [KERNELS_FLAG]:
        print(json.dumps(kernel_lines(*sys.argv[2:])))
        sys.exit(0)
    if sys.argv[1:2] == [BUNDLE_FLAG]:
        sys.exit(guarded(lambda: write_bundle(Path(sys.argv[2] if len(sys.argv) == 3 else "RUN"))))
    sys.exit(guarded(lambda: doctor(sys.argv[1:])))
