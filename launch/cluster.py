"""Connect to Ray, and know what it has."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from conf.choices import Device
from conf.clusters import ClusterConfig
from conf.devices import DEVICES
from conf.errors import ClusterError
from launch import watchdog
from launch.elsewhere.ray_cluster import (
    answering_machine,
    check_nodes,
    check_ray,
    connect,
    is_driver,
    joined_machine,
    remote_machine,
)
from launch.placement import Machine

# glibc hands large blocks back to the kernel after each step and faults them in again; keeping
# them took a 4,096-token LoRA step from 206 to 361 tokens/s on 2 cores.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}
ASKED_FOR = ("slurm", "kuberay")  # whose machine is what the configuration asks for
_watchdog: list[subprocess.Popen[bytes]] = []
# What every process of a run gets. Telemetry is off: a run says nothing to anyone.
ENVIRONMENT = {
    **ALLOCATOR,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "300",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a group ends at a check; by default every 2 s
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONUNBUFFERED": "1",
}


def check_cluster(config: ClusterConfig) -> None:
    """Refuse a cluster that cannot be reached yet, or that has too little. Starts nothing."""
    if config.name == "ray":
        return check_ray(config)
    if config.name in ASKED_FOR:
        return _check_asked_for(config)
    for key in ("address", "storage"):
        if getattr(config, key) is not None:
            raise ClusterError(
                f"cluster.{key}",
                found=str(getattr(config, key)),
                expected="null with cluster=local, which runs on this machine",
                remedy=f"leave cluster.{key} out",
            )
    machine = local_machine(config)
    asked = config.workers or 1
    if asked > machine.devices:
        raise ClusterError(
            "cluster.workers",
            found=f"{asked} workers, one device each",
            expected=f"at most {machine.devices}: this machine has {machine.devices} "
            f"{'cores' if machine.device == 'cpu' else 'accelerators'}",
            remedy=f"write cluster.workers={machine.devices}, or leave it out",
        )
    if config.nodes > 1:
        raise ClusterError(
            "cluster.nodes",
            found=f"{config.nodes} nodes",
            expected="1 with cluster=local",
            remedy="write cluster.nodes=1",
        )


def _check_asked_for(config: ClusterConfig) -> None:
    """Refuse a job whose devices are not said: the machine that asks is not the one that runs.

    A RayJob also needs an image, and a volume with the directory where it is mounted.

    Raises:
        ClusterError: with the key.
    """
    if config.device.name == "auto":
        raise ClusterError(
            "cluster.device",
            found="auto",
            expected="what the job's nodes compute on: cpu, cuda, or a kind of accelerator",
            remedy="write cluster.device=h100 (or cpu)",
        )
    if config.devices_per_node is None:
        raise ClusterError(
            "cluster.devices_per_node",
            found="nothing",
            expected="accelerators of a node (with cluster.device=cpu: its cores)",
            remedy="write cluster.devices_per_node=8",
        )
    if config.name != "kuberay":
        return
    needed = {"cluster.kuberay.image": config.kuberay.image}
    needed["cluster.kuberay.volume_claim"] = config.kuberay.volume_claim
    for key, value in needed.items():
        if value is None:
            raise ClusterError(
                key,
                found="nothing",
                expected="a name: pods start from an image, and runs lie on a volume",
                remedy=f"write {key}=NAME",
            )
    if not re.fullmatch(r"[A-Za-z0-9_./-]+", config.python):
        raise ClusterError(
            "cluster.python",
            found=config.python,
            expected="a program of the image, by letters, digits and _ . / -: shells read it",
            remedy="leave cluster.python out",
        )
    if not (config.storage and config.storage.startswith("/")):
        raise ClusterError(
            "cluster.storage",
            found=config.storage or "nothing",
            expected="the absolute directory where the volume is mounted in every pod",
            remedy="write cluster.storage=/storage",
        )


def machine_for(config: ClusterConfig) -> Machine:
    """What a run has to run on: this machine, the cluster at an address, or the nodes asked for."""
    if config.name in ASKED_FOR:
        return planned_machine(config)
    if config.name != "ray":
        return local_machine(config)
    if not is_driver(config):
        return remote_machine(config)
    os.environ.update(ENVIRONMENT)
    connect(ENVIRONMENT)
    return joined_machine(config)


def machine_left(planned: Machine, config: ClusterConfig) -> Machine:
    """What of a machine is there now: a cluster may have lost nodes since it was planned for."""
    if config.name != "ray":
        return planned
    return answering_machine(dataclasses.replace(config, nodes=1, workers=None))


def devices_left(config: ClusterConfig) -> int | None:
    """Devices of the joined cluster's living nodes; None of a machine, which loses none."""
    if config.name != "ray":
        return None
    try:
        return joined_machine(dataclasses.replace(config, nodes=1, workers=None)).devices
    except ClusterError:  # no node with a device is left: what runs fails, and says so
        return 0


def planned_machine(config: ClusterConfig) -> Machine:
    """The cluster that is asked for, as if it were here: for a plan only.

    Raises:
        ClusterError: more workers than devices.
    """
    per_node = config.devices_per_node or 1
    devices = config.nodes * per_node
    if config.workers is not None and config.workers > devices:
        raise ClusterError(
            "cluster.workers",
            found=f"{config.workers} workers, one device each",
            expected=f"at most {devices}: {config.nodes} nodes with {per_node}",
            remedy=f"write cluster.workers={devices}, or leave it out",
        )
    is_cpu = config.device.name == "cpu"
    what = "cores" if is_cpu else config.device.name
    name = f"{devices} x {what} on {config.nodes} nodes (planned, not here)"
    kind = "cpu" if is_cpu else "cuda"
    return Machine(devices=devices, devices_per_node=per_node, device=kind, name=name)


def accelerator_models() -> tuple[str, ...]:
    """What the NVIDIA driver calls the devices of this machine."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [t.partition(":")[2].strip() for t in lines if t.startswith("Model:")]
    return tuple(found)


def num_accelerators() -> int:
    """NVIDIA devices of this machine, without loading a driver library."""
    return len([p for p in Path("/proc/driver/nvidia/gpus").glob("*")])


def num_cores() -> int:
    """Cores that this process may use (cgroup or affinity limits counted)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The processor's own name, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def local_machine(config: ClusterConfig) -> Machine:
    """This machine as a plan sees it: accelerators where there are any, else cores."""
    accelerators = num_accelerators()
    if config.device.is_named:
        _check_named(config.device)
    use_cuda = config.device not in (Device.auto, Device.cpu)
    use_cuda = use_cuda or (config.device is Device.auto and accelerators > 0)
    if use_cuda and accelerators == 0:
        raise ClusterError(
            "cluster.device",
            found="cuda, but no NVIDIA device on this machine",
            expected="cpu, or a machine with an accelerator",
            remedy="write cluster.device=cpu, or leave it out",
        )
    count = accelerators if use_cuda else num_cores()
    count = min(count, config.devices_per_node or count)
    kind = "cuda" if use_cuda else "cpu"
    name = f"{count} x {'NVIDIA device' if use_cuda else processor_name()}"
    return Machine(devices=count, devices_per_node=count, device=kind, name=name)


def _check_named(device: Device) -> None:
    """Refuse a kind of accelerator that this machine does not have."""
    models = accelerator_models()
    if not models or any(DEVICES[device.name].model not in model for model in models):
        raise ClusterError(
            "cluster.device",
            found=f"{device.name}, and on this machine {', '.join(models) or 'no NVIDIA device'}",
            expected="a device of this machine, or a plan only",
            remedy="add dry_run=true to plan for it, or write cluster.device=auto",
        )


def start(machine: Machine, config: ClusterConfig | None = None, *, root: Path = Path()) -> None:
    """Start a private Ray on this machine, or make sure that all nodes of the joined one fit.

    The private one is on loopback, with a token, without a dashboard.

    Args:
        machine: what there is to run on.
        config: where; None: here.
        root: the directory that all nodes must see.
    """
    if config is not None and config.name == "ray":
        return check_nodes(root.resolve())
    os.environ.update(ENVIRONMENT)
    import ray

    if not _watchdog or _watchdog[-1].poll() is not None:
        _watchdog.append(watchdog.start())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        _init(ray, machine)
    _protect_token()


def _init(ray: Any, machine: Machine) -> None:
    """Start Ray; what it prints about its own settings is nothing a user can act on."""
    ray.init(
        address="local",
        num_cpus=max(machine.devices, 1) if machine.device == "cpu" else num_cores(),
        num_gpus=machine.devices if machine.device == "cuda" else 0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        configure_logging=False,
        runtime_env={"env_vars": dict(ENVIRONMENT)},
    )


def _protect_token() -> None:
    """Ray 2.60 writes its token readable by everyone; only the owner may read it."""
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.chmod(0o600)


def stop() -> None:
    """End the private Ray, and with it every process it started.

    The watchdog stays until this process ends: it would also end W&B's, which then still sends.
    """
    import ray

    if ray.is_initialized():
        ray.shutdown()
