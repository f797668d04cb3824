"""A Ray cluster that others started: what it has, and whether its nodes fit the run.

`cluster.address=auto` means that this process is on a node of it: it connects and drives the run.
An address `http://host:8265` means that it is elsewhere: the run is submitted to it
(launch/elsewhere/submission.py).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from conf.clusters import ClusterConfig
from conf.errors import ClusterError
from launch.placement import Machine

HERE = "auto"
# What must be equal on all nodes: records and weights cross between them.
COMPARED = ("ray", "torch", "transformers", "peft", "deepspeed", "safetensors", "tokenizers")
NODE_TIMEOUT_SECONDS = 60.0  # a node that says nothing for so long is not one to train on
PING_SECONDS = 10.0  # the same between two attempts; a new process there takes 2


def is_driver(config: ClusterConfig) -> bool:
    """Whether this process drives the run on the cluster, rather than submits it."""
    return config.address == HERE


def check_ray(config: ClusterConfig) -> None:
    """Refuse an address or a storage that no run can use. Connects to nothing."""
    address = config.address or ""
    if "@" in address or "?" in address:
        raise ClusterError(
            "cluster.address",
            found="an address with a name, password or query, which would be written down",
            expected="the address alone",
            remedy="put the token into the environment as RAY_AUTH_TOKEN",
        )
    if address != HERE and not address.startswith(("http://", "https://")):
        raise ClusterError(
            "cluster.address",
            found=config.address or "nothing",
            expected="the address of the cluster's dashboard, or auto on a node of it",
            remedy="write cluster.address=http://HEAD:8265",
        )
    if address != HERE and not (config.storage and config.storage.startswith("/")):
        raise ClusterError(
            "cluster.storage",
            found=config.storage or "nothing",
            expected="an absolute directory that all nodes see, where runs and the cache lie",
            remedy="write cluster.storage=/shared/crossover",
        )


def machine_of(nodes: Sequence[Mapping[str, float]], config: ClusterConfig) -> Machine:
    """The nodes as a plan sees them (pure): accelerators where there are any, else cores.

    Args:
        nodes: the resources of each node that is alive, as Ray names them.
        config: what was asked for; a head without accelerators takes no part.

    Raises:
        ClusterError: fewer devices or nodes than asked for, or none.
    """
    has_cuda = any(node.get("GPU", 0) >= 1 for node in nodes)
    kind = "GPU" if has_cuda and config.device.name != "cpu" else "CPU"
    counts = sorted(int(node.get(kind, 0)) for node in nodes if node.get(kind, 0) >= 1)
    per_node = min(counts, default=0)
    if config.devices_per_node is not None:
        per_node = min(per_node, config.devices_per_node)
    devices = per_node * len(counts)
    if config.nodes > len(counts) or (config.workers or 1) > devices:
        raise ClusterError(
            "cluster.workers" if config.workers else "cluster.nodes",
            found=f"{config.workers or config.nodes} asked for",
            expected=f"at most {devices} devices on {len(counts)} nodes: that is what it has",
            remedy="ask for less, or add nodes to the cluster",
        )
    return Machine(
        devices=devices,
        devices_per_node=per_node,
        device="cuda" if kind == "GPU" else "cpu",
        name=f"{len(counts)} nodes of {per_node} {'accelerators' if kind == 'GPU' else 'cores'}",
    )


def remote_machine(config: ClusterConfig) -> Machine:
    """What the cluster behind an address has, asked over HTTP.

    Raises:
        ClusterError: no cluster there, or a token that it does not take.
    """
    from ray.util.state import list_nodes

    try:
        found = list_nodes(address=config.address, timeout=15, raise_on_missing_output=False)
    except Exception as error:  # noqa: BLE001 - requests', grpc's or Ray's own: all mean the same
        raise unreachable(config, error) from None
    nodes = [dict(node.resources_total or {}) for node in found if node.state == "ALIVE"]
    return machine_of(nodes, config)


def unreachable(config: ClusterConfig, error: Exception) -> ClusterError:
    """What a user can do about a cluster that does not answer."""
    first_line = str(error).strip().partition("\n")[0][:200]
    return ClusterError(
        "cluster.address",
        found=f"{config.address}, which does not answer as a Ray cluster: {first_line}",
        expected="the dashboard of a Ray cluster of this version, and its token",
        remedy="check the address, and put the token in RAY_AUTH_TOKEN or in ~/.ray/auth_token",
    )


def _ray() -> Any:
    import ray

    return ray


def connect(environment: Mapping[str, str]) -> None:
    """Join the cluster that this node belongs to; once.

    Raises:
        ClusterError: no Ray runs on this node.
    """
    ray = _ray()
    if ray.is_initialized():
        return
    try:
        ray.init(
            address=HERE,
            log_to_driver=False,
            logging_level="ERROR",
            configure_logging=False,
            runtime_env={"env_vars": dict(environment)},
        )
    except ConnectionError:
        raise ClusterError(
            "cluster.address",
            found="auto, but no Ray runs on this machine",
            expected="a node of a Ray cluster, or the address of one",
            remedy="write cluster.address=http://HEAD:8265",
        ) from None


def joined_machine(config: ClusterConfig) -> Machine:
    """What the cluster has that this process has joined."""
    return machine_of([dict(node["Resources"]) for node in _alive()], config)


def answering_machine(config: ClusterConfig) -> Machine:
    """What of the cluster answers now.

    Ray takes up to 15 s to call a silent node dead, and a group of workers that is placed on one
    waits for it in vain: 120 s, measured by killing a node of two.
    """
    asked = [(node, ask(node, is_there)) for node in _alive()]
    there = []
    for node, reference in asked:
        with suppress(Exception):  # whichever way it does not answer
            _wait(reference, PING_SECONDS)
            there.append(dict(node["Resources"]))
    return machine_of(there, config)


def is_there() -> bool:
    """What a node answers that is there."""
    return True


def draining() -> set[str]:
    """Nodes that are told to end: taken away by a cloud, or by a cluster that shrinks."""
    return set(_ray()._private.state.state.get_draining_nodes())


def _alive() -> list[dict[str, Any]]:
    return [node for node in _ray().nodes() if node["Alive"]]


def ask(node: Mapping[str, Any], function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function on one node; the reference to its answer."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    remote = _ray().remote(num_cpus=0, max_retries=0)(function)
    return remote.options(scheduling_strategy=there).remote(*arguments)


def _wait(reference: Any, seconds: float) -> Any:
    return _ray().get(reference, timeout=seconds)


def check_nodes(root: Path) -> None:
    """Refuse nodes with other versions, or that do not see the run's directory.

    Raises:
        ClusterError: with the nodes and both versions.
    """
    root.mkdir(parents=True, exist_ok=True)
    marker = root / f".seen-by-all-{os.getpid()}"
    marker.write_text("", encoding="utf-8")
    try:
        asked = {
            f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})": ask(
                node, describe_node, str(marker)
            )
            for node in _alive()
        }
        found = {name: _answer(name, asked[name]) for name in asked}
    finally:
        marker.unlink(missing_ok=True)
    check_described(found, root=root)


def _answer(name: str, reference: Any) -> dict[str, str]:
    try:
        return dict(_wait(reference, NODE_TIMEOUT_SECONDS))
    except Exception as error:  # noqa: BLE001 - whichever way a node fails to answer
        raise ClusterError(
            f"node {name}",
            found=f"no answer: {type(error).__name__}",
            expected=f"an answer within {NODE_TIMEOUT_SECONDS:.0f} s",
            remedy="look at the node, or take it out of the cluster",
        ) from None


def describe_node(marker: str) -> dict[str, str]:
    """The versions of this node, and whether it sees the run's directory."""
    found = {"python": platform.python_version(), "storage": str(Path(marker).exists())}
    for package in COMPARED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def check_described(nodes: Mapping[str, Mapping[str, str]], *, root: Path) -> None:
    """Compare what the nodes said of themselves (pure)."""
    blind = [name for name, node in nodes.items() if node["storage"] != "True"]
    if blind:
        raise ClusterError(
            "cluster.storage",
            found=f"{root}, which {', '.join(blind)} cannot see",
            expected="a directory that all nodes see, e.g. on NFS",
            remedy="write cluster.storage=DIRECTORY",
        )
    for key in ("python", *COMPARED):
        versions = {node[key] for node in nodes.values()}
        if len(versions) > 1 or "missing" in versions:
            told = ", ".join(f"{name}: {node[key]}" for name, node in nodes.items())
            raise ClusterError(
                f"{key} on the nodes",
                found=told,
                expected="the same version on all nodes",
                remedy="use one image or environment for all nodes",
            )
