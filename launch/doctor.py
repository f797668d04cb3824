"""`python -m launch.doctor`: what this machine has, and what would be refused."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conf.choices import KernelImpl
from conf.errors import Refused
from conf.schema import RunConfig
from launch.cli import guarded
from launch.cluster import local_machine, num_accelerators
from launch.compose import compose_config
from launch.provenance import PACKAGES

GIB = 2**30
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
        ("kernels", *_kernels(config.kernels.impl)),
        ("model", *_model(config, root)),
        ("wandb", True, _wandb(config)),
    ]
    return found


def _package(name: str) -> tuple[str, bool, str]:
    try:
        return name, True, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, False, "not installed; type: make install"


def _kernels(impl: KernelImpl) -> tuple[bool, str]:
    from kernels.dispatch import KernelsNotBuilt, choose

    try:
        choice = choose(impl.name)
    except KernelsNotBuilt as error:
        return False, str(error)
    return True, f"{choice.impl}: {choice.reason}"


def _model(config: RunConfig, root: Path) -> tuple[bool, str]:
    from evaluation.model_facts import facts
    from evaluation.models import locate

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
    sys.exit(guarded(lambda: doctor(sys.argv[1:])))
